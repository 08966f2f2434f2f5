# SPDX-License-Identifier: Apache-2.0
"""What a trained SaRA is kept as: values and a digest of the mask, whose places are found on the base again, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import BaseMismatch
from tunesmith.deltas import ImplicitSparse, SaRA


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 4))


@pytest.fixture
def base() -> Base:
    return Base(net(), example=(torch.randn(5, 24),))


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 24, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(6)]


def trained(base: Base, **options: Any) -> Delta:
    method = SaRA(**{"threshold": 0.05, **options})
    return ts.tune(
        base, batches(), method=method, steps=6, lr=0.05, precision="fp32", progress=False,
        loss=lambda out, batch: F.cross_entropy(out, batch[1]),
    ).delta  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"progressive": 1.0}, {"share": 0.2}, {"bias": False}], ids=str)
def test_a_trained_one_holds_no_places_and_is_the_same_change(base: Base, options: dict[str, Any]) -> None:
    kept, full = trained(base, **options), trained(base, **options, implicit=False)
    assert {p.info.name for p in kept.parts} == {"implicit-sparse"} and {p.info.name for p in full.parts} == {"sara"}
    assert {name.removeprefix("bias_") for _, name, _ in kept.parts[0].items()} == {"values", "mask"}
    assert kept.nbytes < 0.5 * full.nbytes
    merged = [dict(base.merged(d).model.named_parameters()) for d in (kept, full)]
    moved = 0
    for name, p in base.model.named_parameters():
        torch.testing.assert_close(merged[0][name], merged[1][name], atol=1e-7, rtol=0)
        moved += int((merged[0][name] != p).sum())
    assert moved > 50


def test_reloaded_on_the_same_base_it_gives_the_same_bits(base: Base, tmp_path: Path) -> None:
    delta = trained(base)
    delta.save(tmp_path / "d")
    twin = Base(copy.deepcopy(base.model), example=base.probe())
    again = Delta.load(tmp_path / "d", twin)
    x = torch.randn(7, 24)
    with torch.no_grad(), base.using(delta), twin.using(again):
        assert torch.equal(base.model(x), twin.model(x))
    for a, b in zip(base.merged(delta).model.parameters(), twin.merged(again).model.parameters(), strict=True):
        assert torch.equal(a, b)
    p = dict(twin.merged(again).model.named_parameters())["0.weight"].reshape(-1)
    start = base.model[0].weight.reshape(-1)
    t = again.parts[0].tensors("0")
    torch.testing.assert_close(p[start.abs() < 0.05], t["values"].detach(), atol=1e-8, rtol=0)
    assert torch.equal(p[start.abs() >= 0.05], start[start.abs() >= 0.05])


def test_a_base_that_is_rounded_otherwise_is_found_or_refused(base: Base) -> None:
    with torch.no_grad():
        base.model[0].weight[0, 0] = 0.04999  # in bf16 it is 0.05005
    coarse = Base(copy.deepcopy(base.model).bfloat16(), example=(torch.randn(5, 24).bfloat16(),))
    small = [Delta.create(b, ImplicitSparse(threshold=0.05)) for b in (base, coarse)]
    assert len(small[0].parts[0].tensors("0")["values"]) != len(small[1].parts[0].tensors("0")["values"])
    places = {}
    for b in (coarse, base):
        site, t = b.sites.of("0", "linear"), small[1].parts[0].tensors("0")
        places[b] = small[1].parts[0].method.placed(site, t)["indices"]
    assert torch.equal(places[coarse], places[base]), "made on the rounded base, it works on the exact one"
    with pytest.raises(BaseMismatch, match="small entries") as told, coarse.using(small[0]):
        coarse.model(torch.randn(2, 24).bfloat16())
    assert told.value.where is not None and "implicit=false" in str(told.value)


def test_a_weight_that_changed_is_looked_at_anew(base: Base) -> None:
    delta = Delta.create(base, ImplicitSparse(share=0.2))
    with base.using(delta):
        base.model(torch.randn(2, 24))
    with torch.no_grad():
        base.model[0].weight.mul_(torch.linspace(0.1, 2, 24))
    with pytest.raises(BaseMismatch), base.using(delta):
        base.model(torch.randn(2, 24))
