# SPDX-License-Identifier: Apache-2.0
"""Card 029: intruder dimensions, and what scaling them does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tunesmith as ts
from tunesmith.core.algebra import Dense, LowRank
from tunesmith.core.base import Base
from tunesmith.core.changes import changes
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.spectrum import SVD
from tunesmith.inspect import Intruders, dampened, find_intruders, match, overlap, similarity

from .conftest import Plain


def svd(W: Tensor) -> SVD:
    return SVD(*torch.linalg.svd(W, full_matrices=False))


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))[0]


def by_definition(W0: Tensor, W1: Tensor, k: int, eps: float) -> int:
    """Count as in the paper, one cosine at a time, in fp64."""
    U0, U1 = (torch.linalg.svd(W.double(), full_matrices=False)[0] for W in (W0, W1))
    found = 0
    for j in range(min(k, U1.shape[1])):
        best = max(abs(float(U1[:, j] @ U0[:, i])) for i in range(U0.shape[1]))
        found += best < eps
    return found


def spectral(U: Tensor, s: Tensor, V: Tensor) -> Tensor:
    return U @ torch.diag(s) @ V.T


def test_no_change_has_no_intruders(plain: Base) -> None:
    fresh = Delta.create(plain, ts.LoRA(rank=2))
    found = Intruders().measure(plain, fresh)
    assert found.values["intruders"] == 0 and found.values["by_space"] == 0
    assert all(min(r["m"]) > 1 - 1e-4 for r in found.rows)


def test_a_planted_intruder_is_found_and_nothing_else(planted: Callable[..., Delta]) -> None:
    torch.manual_seed(0)
    n, U, V = 24, orthogonal(24, 1), orthogonal(24, 2)
    model = Plain()
    model.first.weight.data = spectral(U, torch.linspace(4, 1, n), V)
    base = Base(model, example=(torch.randn(2, n),))
    low = U[:, 12:] @ torch.ones(12) / math.sqrt(12)  # a mixture of the last vectors: cosine 1/sqrt(12) to each
    right = V[:, 12:] @ torch.ones(12) / math.sqrt(12)
    delta = planted(base, first=100 * torch.outer(low, right))
    found = Intruders().measure(base, delta)
    (row,) = found.rows
    assert found.values["intruders"] == 1 and row["at"] == [0]
    assert row["m"][0] == pytest.approx(1 / math.sqrt(12), abs=0.02) and min(row["m"][1:]) > 0.9
    assert find_intruders(base, delta) == {"first": [0]}


def test_a_rotation_gives_its_cosine() -> None:
    n, U, V, s = 16, orthogonal(16, 1), orthogonal(16, 2), torch.linspace(8, 1, 16)
    for angle in (0.0, 0.3, 0.7, 1.2):
        R = torch.eye(n)
        R[0, 0], R[0, 15], R[15, 0], R[15, 15] = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
        found = match(svd(spectral(U, s, V)), svd(spectral(U @ R, s, V)), k=1)
        assert float(found.m[0]) == pytest.approx(max(math.cos(angle), math.sin(angle)), abs=1e-4)


def test_near_equal_singular_values_turn_freely_and_the_second_score_knows() -> None:
    n, U, V = 16, orthogonal(16, 1), orthogonal(16, 2)
    s = torch.cat([torch.full((8,), 5.0) + torch.linspace(1e-3, 0, 8), torch.linspace(1, 0.1, 8)])
    turned = U.clone()
    turned[:, :8] = U[:, :8] @ orthogonal(8, 3)
    found = match(svd(spectral(U, s, V)), svd(spectral(turned, s, V)), k=8)
    assert int((found.m < 0.8).sum()) > 0 and float(found.by_space.min()) > 0.999
    assert n == len(found.m) * 2


def test_counts_equal_the_definition_on_random_pairs_and_rise_with_eps() -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((20, 20), (12, 30), (30, 12)):
        W0 = torch.randn(shape, generator=g)
        W1 = W0 + 3 * torch.randn(shape[0], 3, generator=g) @ torch.randn(3, shape[1], generator=g)
        counts = []
        for eps in (0.1, 0.3, 0.5, 0.7, 0.9):
            m = match(svd(W0), svd(W1), k=10, side="left").m
            counts.append(int((m < eps).sum()))
            assert counts[-1] == by_definition(W0, W1, 10, eps)
        assert counts == sorted(counts) and counts[-1] > 0


def test_signs_do_not_matter() -> None:
    g = torch.Generator().manual_seed(0)
    W0, W1 = torch.randn(9, 9, generator=g), torch.randn(9, 9, generator=g)
    a, b = svd(W0), svd(W1)
    flip = torch.tensor([1.0, -1.0]).repeat(5)[:9]
    flipped = SVD(b.U * flip, b.S, b.Vh * flip[:, None])
    assert torch.equal(match(a, b, 5).m, match(a, flipped, 5).m)
    assert torch.equal(similarity(a, b), similarity(a, flipped))


def test_the_side_that_spans_is_read() -> None:
    g = torch.Generator().manual_seed(0)
    tall, wide = torch.randn(30, 12, generator=g), torch.randn(12, 30, generator=g)
    for W, side, other in ((tall, "right", "left"), (wide, "left", "right")):
        a, b = svd(W), svd(W + 0.1 * torch.randn(W.shape, generator=g))
        auto = match(a, b, 3)
        assert (auto.side, auto.spans) == (side, True) and not match(a, b, 3, side=other).spans
    with pytest.raises(UsageError, match="unknown side"):
        match(a, b, 3, side="top")


def intruding(planted: Callable[..., Delta]) -> tuple[Base, Delta]:
    torch.manual_seed(0)
    U, V = orthogonal(24, 1), orthogonal(24, 2)
    model = Plain()
    model.first.weight.data = spectral(U, torch.linspace(4, 1, 24), V)
    base = Base(model, example=(torch.randn(2, 24),))
    mix = torch.ones(24) / math.sqrt(24)
    return base, planted(base, first=40 * torch.outer(U @ mix, V @ mix))


def test_scaling_by_one_is_the_delta_and_by_zero_takes_the_component_away(planted: Callable[..., Delta]) -> None:
    base, delta = intruding(planted)
    found = find_intruders(base, delta)
    assert found == {"first": [0]}
    digest = (base.digest(), delta.digest)
    x = base.probe()[0]
    with base.using(delta):
        wanted = base(x)
    with base.using(dampened(base, delta, found, 1.0)):
        assert torch.equal(base(x), wanted)
    W1 = base.merged(delta).model.first.weight
    for lam in (0.0, 0.3, 0.7):
        W = base.merged(dampened(base, delta, found, lam)).model.first.weight
        U, S, Vh = torch.linalg.svd(W1)
        torch.testing.assert_close(W, W1 + (lam - 1) * S[0] * torch.outer(U[:, 0], Vh[0]), atol=1e-4, rtol=1e-4)
    gone = base.merged(dampened(base, delta, found, 0.0)).model.first.weight
    assert int(torch.linalg.matrix_rank(W1)) == 24 and int(torch.linalg.matrix_rank(gone, tol=1e-3)) == 23
    assert (base.digest(), delta.digest) == digest


def test_a_dampened_delta_saves_and_loads(planted: Callable[..., Delta], tmp_path: object) -> None:
    base, delta = intruding(planted)
    less = dampened(base, delta, find_intruders(base, delta), 0.5)
    less.save(f"{tmp_path}/d")
    again = Delta.load(f"{tmp_path}/d", base)
    x = base.probe()[0]
    with base.using(less):
        wanted = base(x)
    with base.using(again):
        assert torch.equal(base(x), wanted)
    twice = dampened(base, less, {"first": [0]}, 0.5)
    assert [p.name for p in twice.parts] == ["full", "dampened", "dampened1"]


def test_what_cannot_be_dampened_is_refused(planted: Callable[..., Delta], lm: Base) -> None:
    base, delta = intruding(planted)
    for lam in (-0.1, 1.5):
        with pytest.raises(UsageError, match="0..1"):
            dampened(base, delta, {"first": [0]}, lam)
    with pytest.raises(UsageError, match="does not change"):
        dampened(base, delta, {"first": [0], "second": [1]}, 0.5)
    with pytest.raises(UsageError, match="no component 99"):
        dampened(base, delta, {"first": [99]}, 0.5)
    scaled = Delta.create(lm, ts.LoRA(targets="up"), ts.IA3(targets="up"))
    with pytest.raises(UsageError, match="acts there after the weights"):
        dampened(lm, scaled, {"layers.0.up": [0]}, 0.5)


def test_overlap_of_two_changes() -> None:
    U, V = orthogonal(12, 1), orthogonal(12, 2)
    a, b = LowRank(U[:, :3], V[:3]), LowRank(U[:, 1:4], V[:3])
    assert overlap(a, a, 3) == pytest.approx(1, abs=1e-5)
    assert overlap(a, b, 3) == pytest.approx(2 / 3, abs=1e-5)
    assert overlap(a, LowRank(U[:, 6:9], V[:3]), 3) == pytest.approx(0, abs=1e-5)
    assert overlap(Dense(a.dense()), b, 3) == pytest.approx(2 / 3, abs=1e-4)


def test_a_tied_weight_is_dampened_on_both_sides() -> None:
    from tunesmith.core.toys import toys

    base = toys()[1]
    delta = Delta.create(base, ts.LoRA(rank=2, targets="embed"))
    for _, t in delta.items():
        t.data += torch.randn(t.shape, generator=torch.Generator().manual_seed(0))
    less = dampened(base, delta, {"embed": [0, 1]}, 0.0)
    model = base.merged(less).model
    assert model.head.weight is model.embed.weight
    S1 = torch.linalg.svdvals(base.merged(delta).model.embed.weight)
    torch.testing.assert_close(torch.linalg.svdvals(model.embed.weight)[:14], S1[2:], atol=1e-4, rtol=1e-4)
    assert len(list(changes(base, less))) == 1
