"""KL(base || base + delta) from what the head reads against full logits: value, gradients, and where it takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.core import fused
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.toys import toys
from tunesmith.deltas import SSF, BitFit, Full, LoRA
from tunesmith.train import divergence as module
from tunesmith.train.divergence import divergence

IDS = torch.arange(18).reshape(3, 6) * 5 % 37


def moved(base: Base, *methods: Any) -> Delta:
    delta = Delta.create(base, *methods, seed=0)
    delta.to(torch.float64)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(0.1 * torch.randn(t.shape, generator=g, dtype=torch.float64))
    return delta


def found(base: Base, delta: Delta, keep: torch.Tensor | None, plain: bool) -> tuple[float, int, list[Any]]:
    params = [t for _, t in delta.items() if t.requires_grad]
    with base.frozen(), base.using(delta):
        if plain:
            with fused.plain():
                loss, n = divergence(base, delta, lambda: base.model(input_ids=IDS), keep)
        else:
            loss, n = divergence(base, delta, lambda: base.model(input_ids=IDS), keep)
        return loss.item(), n, list(torch.autograd.grad(loss, params, allow_unused=True))


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "method, quick",
    [(LoRA(rank=2), True), (Full(), True), (BitFit(), True), (LoRA(rank=2, targets="head"), False)],
    ids=["lora", "full", "bitfit", "lora on the head"],
)
def test_it_equals_the_full_logits(
    tied: bool, masked: bool, method: Any, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = toys()[int(tied)]
    base.model.double()
    delta = moved(base, method)
    keep = torch.ones_like(IDS).tril(2) if masked else None
    used: list[int] = []
    real = module.weight_divergence
    monkeypatch.setattr(module, "weight_divergence", lambda *a: used.append(1) or real(*a))
    loss, n, grads = found(base, delta, keep, plain=False)
    assert bool(used) == quick
    used.clear()
    want, count, expected = found(base, delta, keep, plain=True)
    assert not used and n == count == (int(keep.sum()) if keep is not None else 18)
    assert want > 1e-4 and loss == pytest.approx(want, rel=1e-9)
    for a, b in zip(grads, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_delta_underneath_that_acts_on_the_head_goes_by_full_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "weight_divergence", lambda *a: pytest.fail("the head is not the base's"))
    base = toys()[0]
    base.model.double()
    under, delta = moved(base, LoRA(rank=2, targets="head")), moved(base, SSF(targets="attention.q"))
    with base.frozen(), base.using(under, delta):
        loss, _ = divergence(base, delta, lambda: base.model(input_ids=IDS))
    assert loss.item() > 0
