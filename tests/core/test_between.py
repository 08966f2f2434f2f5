# SPDX-License-Identifier: Apache-2.0
"""The difference of two models as a delta (card 116)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.compose import merge
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.toys import ToyLM, toys


def pair(base: Base, noise: float = 0.1, dtype: torch.dtype = torch.float32) -> tuple[Base, Base]:
    """The base and a copy whose tensors were moved, in `dtype`."""
    model = copy.deepcopy(base.model)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point() and noise >= 1:  # another model altogether, of many scales
                t.copy_(torch.randn(t.shape, generator=g).abs() * torch.randn(t.shape, generator=g).exp())
            elif t.is_floating_point():
                t.add_(noise * torch.randn(t.shape, generator=g).abs())
            else:
                t.add_(3)
    kind = {"example": base.probe(), "family": base.family}
    plain = copy.deepcopy(base.model).to(dtype)
    return Base(plain, name="base", **kind), Base(model.to(dtype), name="other", **kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", range(4), ids=[b.name for b in toys()])
def test_base_plus_difference_is_the_other_within_an_ulp(at: int) -> None:
    base, other = pair(toys()[at], 1.0)
    delta = Delta.between(base, other)
    found, want, start = (b.model.state_dict() for b in (base.merged(delta), other, base))
    for k, v in want.items():
        if not v.is_floating_point():
            assert torch.equal(found[k], start[k])  # counters are left alone
            continue
        large = torch.maximum(start[k].abs(), v.abs())
        ulp = torch.nextafter(large, torch.tensor(torch.inf)) - large
        assert bool(((found[k] - v).abs() <= ulp).all()), k
    facts = delta.provenance["between"]
    assert facts["other"]["digest"] == other.fingerprint.digest and facts["share_zero"] < 0.01
    assert delta.provenance["base"]["digest"] == base.fingerprint.digest
    assert 0 < facts["share_inexact"] < 0.5


@pytest.mark.parametrize("at", range(4), ids=[b.name for b in toys()])
def test_exact_brings_every_bit_back(at: int) -> None:
    base, other = pair(toys()[at], 1.0)
    assert Delta.between(base, other).provenance["between"]["share_inexact"] > 0
    delta = Delta.between(base, other, exact=True)
    assert delta.provenance["between"]["share_inexact"] == 0
    found, want = base.merged(delta).model.state_dict(), other.model.state_dict()
    assert all(torch.equal(found[k], v) for k, v in want.items() if v.is_floating_point())
    assert torch.equal(base.merged(delta).probe_outputs(), other.probe_outputs())


def test_bf16_comes_back_bit_for_bit_and_small_updates_are_counted() -> None:
    """Subtracted and added in fp32 and cast once."""
    base, other = pair(toys()[0], 1e-3, torch.bfloat16)
    delta = Delta.between(base, other)
    facts = delta.provenance["between"]
    found, want = base.merged(delta).model.state_dict(), other.model.state_dict()
    assert facts["share_inexact"] == 0 and all(torch.equal(found[k], v) for k, v in want.items())
    start = base.model.state_dict()
    same = sum(int((start[k] == v).sum()) for k, v in want.items()) / sum(v.numel() for v in want.values())
    assert facts["share_zero"] == pytest.approx(same) and same > 0.05


def test_it_saves_undoes_and_equals_task_arithmetic(tmp_path: Path) -> None:
    base, other = pair(toys()[0])
    digest, before = base.digest(), base.probe_outputs()
    delta = Delta.between(base, other, name="residual")
    delta.save(tmp_path / "r")
    again = Delta.load(tmp_path / "r", base)
    assert again.digest == delta.digest and again.provenance["between"] == delta.provenance["between"]
    with base.using(again):
        assert torch.allclose(base.probe_outputs(), other.probe_outputs(), atol=1e-5)
    assert torch.equal(base.probe_outputs(), before) and base.digest() == digest
    made = base.merged(merge(base, [delta], "task-arithmetic")).model.state_dict()
    assert all(torch.equal(v, made[k]) for k, v in base.merged(delta).model.state_dict().items())


def test_a_residual_goes_onto_a_base_that_was_trained_on() -> None:
    """theta_b + tau_cpt + r, as one merge and as a stack."""
    base, instruct = pair(toys()[0])
    residual = Delta.between(base, instruct, name="r")
    trained = Delta.create(base, ts.Full(), name="cpt")
    with torch.no_grad():
        for _, t in trained.items():
            t.add_(0.05)
    one = base.merged(merge(base, [trained, residual], "task-arithmetic")).model.state_dict()
    two = base.merged(trained, residual).model.state_dict()
    assert all(torch.allclose(v, two[k], atol=1e-6) for k, v in one.items())


def test_a_tied_weight_counts_once_and_may_be_untied() -> None:
    base, other = pair(toys()[1])
    delta = Delta.between(base, other)
    size = sum(p.numel() for p in base.model.parameters())
    assert delta.provenance["between"]["entries"] == size
    model = base.merged(delta).model
    assert model.head.weight is model.embed.weight
    free = copy.deepcopy(other.model)
    free.head.weight = nn.Parameter(other.model.head.weight.detach() + 1)
    apart = Delta.between(base, Base(free, example=base.probe()), exact=True)
    model = base.merged(apart).model
    assert torch.equal(model.head.weight, free.head.weight) and torch.equal(model.embed.weight, free.embed.weight)


class WithToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.fc = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x + self.token)


def test_what_no_delta_can_hold_is_said() -> None:
    base, other = (Base(WithToken(), example=(torch.randn(2, 4),)) for _ in range(2))
    with torch.no_grad():
        other.model.token.add_(1)  # type: ignore[operator]
    with pytest.raises(ts.TunesmithError, match="no layer that a delta can change: token"):
        Delta.between(base, other)
    assert Delta.between(base, other, outside="leave").provenance["between"]["left"] == ["token"]
    with pytest.raises(ts.TunesmithError, match="outside"):
        Delta.between(base, other, outside="skip")


def test_other_shapes_and_equal_models_are_refused() -> None:
    base = toys()[0]
    with pytest.raises(ts.TunesmithError, match="not of one shape") as found:
        Delta.between(base, Base(ToyLM(vocab=40), example=base.probe()))
    assert "embed.weight: (37, 16) here, (40, 16) there" in str(found.value)
    with pytest.raises(ts.TunesmithError, match="are the same"):
        Delta.between(base, toys()[0])
