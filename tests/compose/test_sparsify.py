# SPDX-License-Identifier: Apache-2.0
"""Sparsifiers and their presets: the checks of cards 045 (DAREx) and 063 (breadcrumbs), and TIES by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from compose_cases import dense, gap, moved
from hypothesis import given
from hypothesis import strategies as st

import tunesmith as ts
from tunesmith.compose import consensus, merge, sparsify
from tunesmith.compose.ranking import order_statistics
from tunesmith.core.algebra import Dense
from tunesmith.core.combine import COMBINERS, Now, Place
from tunesmith.core.toys import toys

BASE = toys()[0]


def run(text: str, *changes: torch.Tensor, weights: list[float] | None = None, seed: int = 0) -> torch.Tensor:
    at = Place("layer", "weight", tuple(changes[0].shape), "linear")
    how = COMBINERS.parse(text)
    names = tuple(str(i) for i in range(len(changes)))
    found = how.combine(at, [Dense(c) for c in changes], weights or [1.0] * len(changes), Now(seed, names=names))
    assert found is not None
    return found.dense()


# DARE


def test_dare_is_unbiased_and_is_the_formula_for_its_mask() -> None:
    g = torch.Generator().manual_seed(0)
    D = torch.randn(6, 5, generator=g)
    p = 0.7
    masks = torch.stack(
        [sparsify.random(torch.ones_like(D), 1 - p, torch.Generator().manual_seed(i), "none") for i in range(2000)]
    )
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    mean = (masks * D / (1 - p)).mean(0)
    sigma = D.abs() * math.sqrt(p / (1 - p) / 2000)
    assert bool(((mean - D).abs() < 4.5 * sigma).all()) and bool(((mean - D).abs() > 0.01 * sigma).any())
    mask = sparsify.random(torch.ones_like(D), 1 - p, torch.Generator().manual_seed(3), "none")
    made = sparsify.random(D, 1 - p, torch.Generator().manual_seed(3))
    assert torch.allclose(made, mask * D / (1 - p))


def test_q_takes_the_place_of_one_minus_p() -> None:
    """q = 1 - p is DARE; any q divides what the same draw keeps; only lam / q matters for one source."""
    D = torch.randn(8, 9)
    assert torch.allclose(run("dare:density=0.3,q=0.3", D), run("dare:density=0.3", D))
    assert torch.allclose(run("dare:density=0.3,q=0.6", D) * 0.6, run("dare:density=0.3,rescale=none", D))
    assert torch.allclose(run("dare:density=0.3,q=0.8,lam=2", D), run("dare:density=0.3,q=0.4", D))


def test_l1_rescale_keeps_the_norm_and_equals_inverse_in_expectation_alone() -> None:
    D = torch.randn(40, 50)
    made = run("dare:density=0.2,rescale=l1", D)
    assert float(made.abs().sum()) == pytest.approx(float(D.abs().sum()), rel=1e-5)
    other = run("dare:density=0.2", D)
    assert torch.equal(made != 0, other != 0) and not torch.allclose(made, other)
    assert float(made.abs().sum() / other.abs().sum()) == pytest.approx(1, abs=0.15)


def test_sources_have_masks_of_their_own_and_the_seed_decides() -> None:
    D = torch.ones(30, 30)
    both = run("dare:density=0.5,rescale=none", D, D)
    assert set(both.unique().tolist()) == {0.0, 1.0, 2.0}
    assert not torch.equal(run("dare", D, seed=1), run("dare", D, seed=2))
    assert torch.equal(run("dare", D, seed=1), run("dare", D, seed=1))


def test_what_is_stored_is_an_index_and_a_value_for_each_kept_entry(tmp_path: Path) -> None:
    delta = moved(BASE, "full", {"targets": "layers.0.gate", "bias": False})
    made = merge(BASE, [delta], "dare:density=0.1", seed=2)
    (part,) = made.parts
    n, k = 32 * 16, part.parameter("layers.0.gate", "values").numel()
    assert part.info.name == "sparse" and abs(k - 0.1 * n) < 5 * math.sqrt(0.09 * n)
    assert made.nbytes == k * (8 + 4)
    assert made.provenance["composed"]["seed"] == 2 and made.save(tmp_path / "x").tensors == 4


# Breadcrumbs


@pytest.mark.parametrize("shape", [(6, 40), (5, 4, 3, 3), (37,)], ids=str)
@pytest.mark.parametrize(("beta", "gamma"), [(0.15, 0.1), (0.2, 0.006), (0.4, 0.0)])
def test_breadcrumbs_keeps_a_band_of_every_row(shape: tuple[int, ...], beta: float, gamma: float) -> None:
    D = torch.randn(shape)
    flat = D.reshape(1, -1) if D.dim() == 1 else D.reshape(shape[0], -1)
    n = flat.shape[1]
    made = sparsify.breadcrumbs(D, beta, gamma).reshape(flat.shape)
    for before, after in zip(flat, made, strict=True):
        order = before.abs().argsort(descending=True)
        top, keep = int(n * gamma), int(n * beta)
        want = torch.zeros_like(before)
        want[order[top : top + keep]] = before[order[top : top + keep]]
        assert torch.equal(after, want) and int((after != 0).sum()) == keep
        if top and keep:
            assert float(after.abs().max()) <= float(before.abs()[order[:top]].min())


def test_gamma_zero_is_magnitude_pruning_and_all_the_rest_is_outlier_removal() -> None:
    D = torch.randn(5, 40)
    assert torch.equal(sparsify.breadcrumbs(D, 0.25, 0.0), sparsify.magnitude(D, 0.25, "row"))
    made = sparsify.breadcrumbs(D, 0.9, 0.1)
    gone = D[made == 0].reshape(5, 4)
    assert torch.equal(gone.abs().sort().values, D.abs().sort(dim=1).values[:, -4:])


def test_a_small_tensor_is_not_zeroed_where_no_outlier_is_dropped() -> None:
    D = torch.randn(20)
    assert int((sparsify.breadcrumbs(D, 0.5, 0.006, "tensor") != 0).sum()) == 10
    assert sparsify.breadcrumbs(torch.tensor(3.0), 0.1, 0.1) == 3.0


def test_breadcrumbs_of_one_task_with_all_kept_is_the_fine_tuned_model() -> None:
    delta = moved(BASE, "full")
    made = merge(BASE, [delta], "breadcrumbs:density=1,drop_top=0,lam=1")
    assert gap(dense(BASE, made), dense(BASE, delta)) == 0
    with BASE.using(delta):
        want = BASE.probe_outputs()
    with BASE.using(made):
        assert torch.equal(BASE.probe_outputs(), want)


# TIES


def test_ties_by_hand() -> None:
    """The figure of the paper: trim, elect, average what agrees."""
    a = torch.tensor([[3.0, -2.0, 0.1, 1.0]])
    b = torch.tensor([[1.0, 3.0, 0.2, -1.5]])
    c = torch.tensor([[2.0, -0.1, 4.0, -1.0]])
    # kept by density 3/4: a all but 0.1, b all but 0.2, c all but -0.1
    want = torch.tensor([[2.0, 3.0, 4.0, -1.25]])
    assert torch.allclose(run("ties:density=0.75", a, b, c), want)
    assert torch.allclose(
        run("ties:density=0.75,normalize=false,lam=2", a, b, c), 2 * torch.tensor([[6.0, 3.0, 4.0, -2.5]])
    )
    weighted = run("ties:density=0.75", a, b, c, weights=[3.0, 1.0, 1.0])
    assert torch.allclose(weighted, torch.tensor([[12 / 5, -2.0, 4.0, 1.0]]))  # the sign of entries 2 and 4 turns


def test_ties_over_the_whole_model_ranks_all_tensors_together() -> None:
    delta = moved(BASE, "full", {"bias": False})
    made = merge(BASE, [delta], "ties:density=0.1,per=model")
    was, now = dense(BASE, delta), dense(BASE, made)
    everything = torch.cat([t[0].flatten() for t in was.values()]).abs().float()
    least = everything.sort(descending=True).values[int(0.1 * len(everything)) - 1]
    for key, (t,) in was.items():
        want = torch.where(t.abs().float() >= least, t, 0.0)
        assert torch.equal(now[key][0] if key in now else torch.zeros_like(t), want)


def test_ties_in_magnitude_go_to_the_lower_index() -> None:
    assert torch.equal(sparsify.magnitude(torch.ones(2, 3), 0.5), torch.tensor([[1.0, 1, 1], [0, 0, 0]]))


# DELLA


def test_della_keeps_the_larger_rather() -> None:
    D = torch.arange(1.0, 201.0).repeat(50, 1)
    kept = sparsify.della(D, 0.5, 0.4, torch.Generator().manual_seed(0), "none") != 0
    low, high = kept[:, :20].float().mean(), kept[:, -20:].float().mean()
    assert float(low) == pytest.approx(0.14, abs=0.05) and float(high) == pytest.approx(0.86, abs=0.05)
    mean = torch.stack([sparsify.della(D[:1], 0.5, 0.3, torch.Generator().manual_seed(i)) for i in range(800)]).mean(0)
    assert float((mean / D[:1]).mean()) == pytest.approx(1, abs=0.02)
    with pytest.raises(ts.TunesmithError, match="within 0"):
        sparsify.della(D, 0.9, 0.2, torch.Generator())


# Order statistics


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=40), st.data())
def test_order_statistics_are_those_of_a_sort(values: list[float], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(values) - 1))
    cut = data.draw(st.integers(0, len(values)))
    pieces = [torch.tensor(values[:cut]), torch.tensor(values[cut:])]
    found = order_statistics(lambda: ([p, -p] for p in pieces), [rank, len(values) - 1])
    want = torch.tensor(values).sort().values
    assert found[0] == [float(want[rank]), float(want[-1])]
    assert found[1] == [float((-want).sort().values[rank]), float(-want[0])]


def test_order_statistics_refuse_what_has_no_order() -> None:
    with pytest.raises(ts.TunesmithError, match="not a number"):
        order_statistics(lambda: iter([[torch.tensor([float("nan")])]]), [0])
    with pytest.raises(ts.TunesmithError, match="no entry of rank"):
        order_statistics(lambda: iter([[torch.tensor([1.0])]]), [1])


def test_sparse_results_take_the_lighter_form() -> None:
    at = Place("layer", "weight", (10, 10), "linear")
    thin = torch.zeros(10, 10)
    thin[2, 3] = 1.0
    assert type(consensus.lightest(thin, at)).__name__ == "Sparse"
    assert type(consensus.lightest(torch.ones(10, 10), at)).__name__ == "Dense"
    assert torch.equal(consensus.lightest(thin, at).dense(), thin)
