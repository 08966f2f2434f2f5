# SPDX-License-Identifier: Apache-2.0
"""Decompositions of frozen weights: what they are, when they are kept, and when they are made anew."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tunesmith.core import spectrum
from tunesmith.core.base import Base


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch.manual_seed(0)
    spectrum.forget()
    yield
    spectrum.forget()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the matrices that are decomposed from here on."""
    seen: list[tuple[int, ...]] = []
    plain = torch.linalg.svd

    def watched(W: torch.Tensor, **kw: Any) -> Any:
        seen.append(tuple(W.shape))
        return plain(W, **kw)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    return seen


def base() -> Base:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 7))
    return Base(model, example=(torch.randn(2, 3, 3, 3),))


def test_it_is_the_decomposition_of_the_flattened_weight() -> None:
    b = base()
    for path, shape in (("0", (6, 27)), ("2", (5, 6))):
        site = b.sites[path]
        W = spectrum.flat(site)
        assert tuple(W.shape) == shape and torch.equal(W, b.modules[path].weight.detach().flatten(1))
        found = spectrum.svd(site)
        torch.testing.assert_close(found.matrix(), W, atol=1e-5, rtol=0)
        eye = torch.eye(min(shape))
        torch.testing.assert_close(found.U.T @ found.U, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.Vh @ found.Vh.T, eye, atol=1e-5, rtol=0)
        assert (found.S.diff() <= 0).all() and found.S.dtype == torch.float32
        few = spectrum.svd(site, 2)
        assert (few.U.shape[1], len(few.S), len(few.Vh)) == (2, 2, 2)
        torch.testing.assert_close(few.matrix(), (found.U[:, :2] * found.S[:2]) @ found.Vh[:2])


def test_a_transposed_weight_is_seen_as_out_by_in() -> None:
    from transformers.pytorch_utils import Conv1D

    b = Base(nn.Sequential(Conv1D(4, 6), nn.Linear(4, 2)), example=(torch.randn(2, 6),))
    site = b.sites["0"]
    assert tuple(spectrum.flat(site).shape) == (4, 6)
    torch.testing.assert_close(spectrum.svd(site).matrix(), b.modules["0"].weight.detach().T, atol=1e-5, rtol=0)


def test_it_is_computed_once_and_holds_no_more_than_was_asked_for(counted: list[Any]) -> None:
    site = base().sites["0"]
    spectrum.svd(site, 2)
    spectrum.svd(site, 2)
    spectrum.svd(site, 1)
    assert len(counted) == 1
    kept = next(iter(spectrum._KEPT.values())).found
    assert kept.U.untyped_storage().nbytes() == kept.U.numel() * 4 == 6 * 2 * 4, "a view would hold all components"
    full = spectrum.svd(site)
    assert len(counted) == 2 and len(full.S) == 6, "more components than are kept need another decomposition"
    spectrum.svd(site, 5)
    spectrum.svd(site)
    assert len(counted) == 2
    spectrum.forget()
    spectrum.svd(site, 1)
    assert len(counted) == 3


def test_a_changed_or_replaced_weight_is_decomposed_anew(counted: list[Any]) -> None:
    b = base()
    site, layer = b.sites["2"], b.modules["2"]
    spectrum.svd(site)
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(spectrum.svd(site).matrix(), layer.weight.detach(), atol=1e-5, rtol=0)
    for _ in range(20):  # one of these soon gets the address that an earlier one had
        layer.weight = nn.Parameter(torch.randn(5, 6))
        gc.collect()
        torch.testing.assert_close(spectrum.svd(site).matrix(), layer.weight.detach(), atol=1e-5, rtol=0)
    assert len(counted) == 22


def test_it_goes_with_its_module(counted: list[Any]) -> None:
    b = base()
    spectrum.svd(b.sites["2"])
    assert len(spectrum._KEPT) == 1
    del b
    gc.collect()
    assert len(spectrum._KEPT) == 0


def low_rank(m: int, n: int, r: int) -> torch.Tensor:
    Q, P = torch.linalg.qr(torch.randn(m, r)).Q, torch.linalg.qr(torch.randn(n, r)).Q
    return (Q * 2.0 ** -torch.arange(r)) @ P.T + 1e-4 * torch.randn(m, n)


def test_the_randomised_one_finds_the_leading_components() -> None:
    W = low_rank(60, 40, 8)
    want = torch.linalg.svd(W, full_matrices=False)
    got = spectrum.randomised(W, 4)
    torch.testing.assert_close(got.S, want.S[:4], atol=1e-5, rtol=0)
    torch.testing.assert_close((got.Vh @ want.Vh[:4].T).abs(), torch.eye(4), atol=1e-3, rtol=0)
    assert torch.equal(got.matrix(), spectrum.randomised(W, 4).matrix())
    # as far from W as the best matrix of that rank, and no nearer
    best = float((W - (want.U[:, :4] * want.S[:4]) @ want.Vh[:4]).norm())
    assert best * (1 - 1e-5) <= float((W - got.matrix()).norm()) <= best * 1.001


def test_a_quick_one_is_asked_for_by_site_and_keeps_nothing(counted: list[Any]) -> None:
    linear = nn.Linear(40, 60)
    with torch.no_grad():
        linear.weight.copy_(low_rank(60, 40, 8))
    site = Base(nn.Sequential(linear, nn.Linear(60, 2)), example=(torch.randn(2, 40),)).sites["0"]
    quick = spectrum.svd(site, 4, exact=False)
    assert counted == [(14, 40)] and len(spectrum._KEPT) == 0, "4 components and 10 more are decomposed"
    torch.testing.assert_close(quick.S, spectrum.svd(site, 4).S, atol=1e-5, rtol=0)
    assert len(spectrum.svd(site, 40, exact=False).S) == 40, "all components are found exactly"


def test_a_change_is_decomposed_through_its_factors() -> None:
    from tunesmith.core.algebra import Dense, LowRank, MaskedRows, Rows, Sparse, Sum

    g = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(12, 3, generator=g), torch.randn(3, 20, generator=g), 0.5, (12, 5, 4))
    rows = Rows(torch.tensor([1, 7]), torch.randn(2, 20, generator=g), (12, 20))
    masked = MaskedRows(torch.randn(12, generator=g), torch.randn(20, generator=g))
    flat_low = LowRank(low.B, low.A, low.scale)
    sparse = Sparse(torch.tensor([3, 44, 200]), torch.randn(3, generator=g), (12, 20))
    cases = [(low, 3), (rows, 2), (masked, 1), (Sum((flat_low, masked)), 4), (sparse, 12), (Dense(low.dense()), 12)]
    for update, components in cases:
        D = update.dense().flatten(1)
        found = spectrum.svd_of(update)
        assert len(found.S) == components
        torch.testing.assert_close(found.matrix(), D, atol=1e-5, rtol=1e-5)
        true = torch.linalg.svdvals(D)
        torch.testing.assert_close(found.S, true[:components], atol=1e-5, rtol=1e-5)
        assert float(true[components:].sum()) < 1e-4
        torch.testing.assert_close(spectrum.svd_of(update, vectors=False).S, found.S, atol=1e-5, rtol=1e-5)


def test_ranks_of_known_spectra() -> None:
    assert spectrum.effective_rank(torch.ones(7)) == pytest.approx(7)
    assert spectrum.effective_rank(torch.tensor([3.0, 0.0])) == pytest.approx(1)
    assert spectrum.effective_rank(torch.zeros(4)) == 0 == spectrum.stable_rank(torch.zeros(4))
    assert spectrum.stable_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(1.5)
