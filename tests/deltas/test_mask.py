# SPDX-License-Identifier: Apache-2.0
"""Masks: bits, straight-through gradients, identity, bake, merge, and undo of what was switched off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, bake
from tunesmith.core.errors import DeltaError, UsageError
from tunesmith.core.toys import toys
from tunesmith.deltas import FixedMask, Mask
from tunesmith.deltas.weight.bits import count, pack, unpack
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.tasks import LoaderTask


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (2, 3, 3, 3), (16, 4), (0,)])
def test_bits_come_back_for_sizes_that_do_not_fill_a_byte(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.4
    bits = pack(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == (mask.numel() + 7) // 8
    assert torch.equal(unpack(bits, shape), mask)
    assert count(bits) == int(mask.sum())
    if mask.numel() % 8:
        assert int(bits[-1]) < 2 ** (mask.numel() % 8), "the padding is not zero"


def test_bits_have_the_layout_that_is_written_down() -> None:
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.bool)
    assert pack(mask).tolist() == [0b10000001, 0b00000010]


def test_bits_of_another_length_are_refused() -> None:
    with pytest.raises(DeltaError, match="2 bytes"):
        unpack(torch.zeros(1, dtype=torch.uint8), (3, 3))


def linear(bias: bool = False) -> tuple[Base, torch.Tensor]:
    x = torch.randn(5, 7)
    return Base(nn.Sequential(nn.Linear(7, 3, bias=bias)), example=(x,)), x


def test_a_fresh_mask_is_the_identity_bit_for_bit() -> None:
    base, x = linear()
    with torch.no_grad(), base.using(Delta.create(base, Mask(targets="everything"))):
        masked = base.model(x)
    assert torch.equal(masked, base.model(x).detach())


def test_the_gradient_of_the_scores_is_that_of_the_weight_times_the_weight() -> None:
    base, x = linear()
    delta = Delta.create(base, Mask(targets="everything"))
    R = delta.parts[0].parameter("0", "R")
    with torch.no_grad():
        R[0, :4] = -1.0
    W = base.model[0].weight.detach()
    effective = (W * (R > 5e-3)).requires_grad_(True)
    want = torch.autograd.grad(F.linear(x, effective).square().sum(), effective)[0] * W
    with base.frozen(), base.using(delta):
        base.model(x).square().sum().backward()
    torch.testing.assert_close(R.grad, want)
    assert R.grad[0, :4].abs().min() > 0, "a weight that is off must be able to come back"


@pytest.mark.parametrize("pull", ["zero", "start"])
def test_the_penalty_is_the_sum_of_norms(pull: str) -> None:
    base = toys()[0]
    method = Mask(l2=0.5, pull=pull)
    delta = Delta.create(base, method)
    part = delta.parts[0]
    with torch.no_grad():
        for _, _, t in part.items():
            t.add_(torch.randn_like(t))
    total = sum(method.penalty(base.sites[p], part.tensors(p)) for p in part.kind_of)
    shift = 0.01 if pull == "start" else 0.0
    want = sum(0.5 * (part.tensors(p)["R"] - shift).square().sum().sqrt() for p in part.kind_of)
    torch.testing.assert_close(total, want)


def test_the_penalty_alone_prunes_with_no_signal_and_a_pull_to_the_start_does_not() -> None:
    base, x = linear()
    off = {}
    for pull in ("zero", "start"):
        delta = Delta.create(base, Mask(targets="everything", l2=1.0, pull=pull))
        task = LoaderTask([(x, torch.zeros(5))], lambda out, batch: 0.0 * out.sum())
        config = TrainConfig(steps=120, lr=1e-4, schedule="constant", precision="fp32", warmup=0.0)
        if pull == "start":
            with pytest.raises(Exception, match="moved"):  # nothing pulls: the guard says so
                fit(base, delta, task, config, progress=False)
        else:
            fit(base, delta, task, config, progress=False)
        off[pull] = int((delta.parts[0].parameter("0", "R") <= 5e-3).sum())
    assert off == {"zero": 21, "start": 0}


def test_baked_bits_count_what_is_kept_and_give_the_same_outputs(tmp_path: Path) -> None:
    for base in toys():
        delta = Delta.create(base, Mask(targets="all-weights"))
        with torch.no_grad():
            for _, t in delta.items():
                t.add_(0.01 * torch.randn_like(t))
        kept = {p: int((delta.parts[0].tensors(p)["R"] > 5e-3).sum()) for p in delta.parts[0].kind_of}
        with base.using(delta):
            floating = base.probe_outputs()
        trained = delta.nbytes
        bake(base, delta)
        with base.using(delta):
            assert torch.equal(base.probe_outputs(), floating), "training and evaluation disagree"
        part = delta.parts[0]
        assert {p: count(part.tensors(p)["bits"]) for p in part.kind_of} == kept
        sizes = [base.sites[p].shape for p in part.kind_of]
        assert delta.nbytes == sum((torch.Size(s).numel() + 7) // 8 for s in sizes) < trained / 25
        delta.save(tmp_path / base.name)
        again = Delta.load(tmp_path / base.name, base)
        assert again.digest == delta.digest and not any(t.requires_grad for _, t in again.items())
        with base.using(again):
            assert torch.equal(base.probe_outputs(), floating)


def test_switched_off_weights_come_back() -> None:
    base, x = linear(bias=True)
    before, digest = base.model(x).detach(), base.digest()
    delta = Delta.create(base, FixedMask(targets="everything", share=1.0))
    with torch.no_grad(), base.using(delta):
        assert torch.equal(base.model(x), base.model[0].bias.expand(5, 3))
    assert torch.equal(base.model(x), before) and base.digest() == digest
    assert torch.equal(base.merged(delta).model[0].weight, torch.zeros(3, 7))


def test_a_fixed_mask_takes_the_smallest_weights_and_exactly_its_share() -> None:
    base = toys()[0]
    delta = Delta.create(base, FixedMask(share=0.25))
    for path in delta.parts[0].kind_of:
        W = base.sites[path].params()["weight"]
        M = unpack(delta.parts[0].tensors(path)["bits"], W.shape)
        assert int((~M).sum()) == round(0.25 * W.numel())
        assert W[~M].abs().max() <= W[M].abs().min()
    random = [Delta.create(base, FixedMask(share=0.25, by="random"), seed=s) for s in (0, 0, 1)]
    assert random[0].digest == random[1].digest != random[2].digest


def test_training_switches_weights_off_and_the_loss_falls() -> None:
    """Inputs 0 to 2 carry the label, the others noise that the frozen weights pass on."""
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    y = (x[:, :3].sum(1) > 0).long()
    net = nn.Sequential(nn.Linear(12, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.cat([torch.ones(3), torch.randn(9)]) * torch.tensor([[-1.0], [1.0]]))
    base = Base(net, example=(x,))
    task = LoaderTask([(x, y)], lambda out, batch: F.cross_entropy(out, batch[1]))
    delta = Delta.create(base, Mask(targets="everything"))
    trained = fit(base, delta, task, TrainConfig(steps=150, lr=5e-4, precision="fp32"), progress=False)
    M = delta.parts[0].parameter("0", "R") > 5e-3
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    assert bool(M[:, :3].all()) and int((~M[:, 3:]).sum()) >= 6


def test_a_start_that_masks_all_is_refused() -> None:
    with pytest.raises(UsageError, match="switch every weight off"):
        Delta.create(toys()[0], Mask(start=1e-3))
