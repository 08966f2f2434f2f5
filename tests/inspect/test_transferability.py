# SPDX-License-Identifier: Apache-2.0
"""Graphons, Gromov-Wasserstein distance and feasibility on graphs of known kinds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tunesmith.core.errors import UsageError
from tunesmith.inspect.gromov import cost, gromov_wasserstein
from tunesmith.inspect.transferability import (
    denoised,
    feature_distance,
    graphon,
    nearest_mixture,
    rank_sources,
    resized,
    statistics,
    transferability,
)

Graph = np.ndarray


def drawn(P: Graph, rng: np.random.Generator) -> Graph:
    A = np.triu(rng.random(P.shape) < P, 1).astype(float)
    return A + A.T


def blocks(sizes: list[int], P: list[list[float]], rng: np.random.Generator) -> Graph:
    z = np.repeat(np.arange(len(sizes)), sizes)
    return drawn(np.array(P)[np.ix_(z, z)], rng)


def er(p: float, count: int, seed: int, n: int = 30) -> list[Graph]:
    rng = np.random.default_rng(seed)
    return [drawn(np.full((n, n), p), rng) for _ in range(count)]


TWO = [[0.8, 0.1], [0.1, 0.4]]


def sbm(count: int, seed: int, n: int = 30) -> list[Graph]:
    rng = np.random.default_rng(seed)
    return [blocks([n // 2, n - n // 2], TWO, rng) for _ in range(count)]


def test_small_distances_are_those_of_all_permutations() -> None:
    rng = np.random.default_rng(0)
    for _ in range(4):
        A, B = ((M + M.T) / 2 for M in (rng.random((5, 5)), rng.random((5, 5))))
        best = min(cost(A, B, np.eye(5)[list(p)] / 5) for p in itertools.permutations(range(5)))
        found, T = gromov_wasserstein(A, B, restarts=20)
        assert found**2 <= best + 1e-9  # a coupling may also be no permutation
        np.testing.assert_allclose([T.sum(0), T.sum(1)], 0.2)
        assert found**2 == pytest.approx(
            sum((A[i, k] - B[j, m]) ** 2 * T[i, j] * T[k, m] for i, j, k, m in itertools.product(range(5), repeat=4))
        )


def test_the_distance_does_not_see_the_order_of_nodes_nor_the_resolution() -> None:
    rng = np.random.default_rng(0)
    W, V = graphon(sbm(20, 0)), graphon(er(0.2, 20, 1))
    order = rng.permutation(30)
    assert gromov_wasserstein(W, W[np.ix_(order, order)])[0] < 1e-6
    d = gromov_wasserstein(W, V)[0]
    assert d > 0.05 and gromov_wasserstein(W[np.ix_(order, order)], V)[0] == pytest.approx(d, rel=0.05)
    fine = gromov_wasserstein(*(resized(M, 60) for M in (W, V)))[0]
    assert fine == pytest.approx(d, rel=0.05)


def test_block_densities_are_recovered() -> None:
    """A stochastic block model of 200 nodes with blocks of other degrees."""
    rng = np.random.default_rng(0)
    P = [[0.7, 0.2], [0.2, 0.1]]
    A = blocks([80, 120], P, rng)
    order = rng.permutation(200)
    A = A[np.ix_(order, order)]
    for how, edge in (("gap", 0), ("smooth", 6)):
        W = graphon([A], how=how, blocks=2, resolution=200)
        parts = (slice(edge, 80 - edge), slice(80 + edge, 200 - edge))
        for i, j in itertools.product(range(2), repeat=2):
            assert abs(W[parts[i], parts[j]].mean() - P[i][j]) < 0.05, how


def test_denoising_lowers_the_variation_and_keeps_the_mean() -> None:
    rng = np.random.default_rng(0)
    M = np.kron([[0.8, 0.2], [0.2, 0.5]], np.ones((8, 8))) + 0.05 * rng.standard_normal((16, 16))
    M = np.clip((M + M.T) / 2, 0, 1)
    U = denoised(M, 0.1)

    def tv(X: Graph) -> float:
        return float(np.abs(np.diff(X, axis=0)).sum() + np.abs(np.diff(X, axis=1)).sum())

    assert tv(U) < 0.6 * tv(M) and U.mean() == pytest.approx(M.mean(), abs=0.01)
    assert np.array_equal(denoised(M, 0), M)


def test_the_same_set_on_both_sides_is_found() -> None:
    bases = {"sbm": graphon(sbm(20, 0)), "sparse": graphon(er(0.05, 20, 1)), "dense": graphon(er(0.6, 20, 2))}
    for name, B in bases.items():
        distance, a = nearest_mixture(bases, B, epochs=10)
        assert distance < 1e-6 and a[name] > 0.99
    target = 0.5 * bases["sparse"] + 0.5 * bases["dense"]
    distance, a = nearest_mixture({k: bases[k] for k in ("sparse", "dense")}, target, epochs=60)
    assert distance < 0.3 * min(gromov_wasserstein(bases[k], target)[0] for k in ("sparse", "dense"))
    assert all(0 <= v <= 1 for v in a.values()) and sum(a.values()) == pytest.approx(1)


def test_more_bases_never_lower_the_feasibility() -> None:
    bases = {"sparse": graphon(er(0.05, 20, 1)), "dense": graphon(er(0.6, 20, 2)), "sbm": graphon(sbm(20, 0))}
    target = graphon(er(0.35, 20, 5))
    distances = []
    for k in (1, 2, 3):
        distance, a = nearest_mixture(dict(list(bases.items())[:k]), target, epochs=40)
        distances.append(distance)
        assert sum(a.values()) == pytest.approx(1)
    assert distances[0] >= distances[1] and distances[1] + 0.005 >= distances[2]


def test_sources_of_the_targets_kind_come_first() -> None:
    sources = {"sbm": sbm(15, 0), "sparse": er(0.05, 15, 1)}
    found = transferability(sources, sbm(15, 9))
    assert {r["family"] for r in found.rows} == {"integrated", "domain", "topological"}
    assert found.values["zeta"] == -min(r["distance"] for r in found.rows) and -0.1 < found.values["zeta"] <= 0
    assert [name for name, _ in rank_sources(sources, sbm(15, 9))] == ["sbm", "sparse"]


def test_graph_statistics_of_known_graphs() -> None:
    whole = np.ones((5, 5)) - np.eye(5)
    np.testing.assert_allclose(statistics(whole), [4, 0, 1, 1, 0, 0, 1, 1], atol=1e-12)
    star = np.zeros((5, 5))
    star[0, 1:] = star[1:, 0] = 1
    found = statistics(star)
    assert found[0] == 1.6 and found[2] == 0.4 and found[5] == pytest.approx(-1) and found[6] == found[7] == 0
    assert found[3] == pytest.approx((1 + 4 * 4 / 7) / 5)


def test_features_by_exact_transport() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((12, 3)), rng.standard_normal((10, 3)) + 4
    distance, mix = feature_distance({"a": a, "b": b}, a)
    assert distance == pytest.approx(0, abs=1e-6) and mix["a"] == pytest.approx(1)
    distance, mix = feature_distance({"a": a, "b": b}, np.concatenate([a, a, a, *[b] * 3])[np.r_[0:36, 36:48]])
    assert distance < 1.5 and mix["a"] == pytest.approx(0.75, abs=0.1)
    assert feature_distance({"b": b}, a)[0] > 4
    assert rank_sources({"b": b, "a": a}, a, space="feature")[0][0] == "a"


def test_what_is_refused() -> None:
    for bad in (np.ones((2, 3)), np.array([[0, 1], [0, 0]]), np.array([[0, 0.5], [0.5, 0]]), np.zeros((1, 1))):
        with pytest.raises(UsageError, match="graph"):
            graphon([bad])
    with pytest.raises(UsageError, match="no graphs"):
        graphon([])
    with pytest.raises(UsageError, match="estimator"):
        graphon(er(0.5, 1, 0), how="usvt")
    with pytest.raises(UsageError, match="space"):
        transferability({"a": er(0.5, 1, 0)}, er(0.5, 1, 0), space="text")
    with pytest.raises(UsageError, match="empty"):
        transferability({"a": []}, er(0.5, 1, 0))
    with pytest.raises(UsageError, match="symmetric"):
        gromov_wasserstein(np.array([[0, 1], [0, 0]]), np.zeros((2, 2)))
    with pytest.raises(UsageError, match="one width"):
        feature_distance({"a": np.zeros((2, 3))}, np.zeros((2, 2)))
