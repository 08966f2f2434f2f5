# SPDX-License-Identifier: Apache-2.0
"""Hydra against PEFT's LoRA, its closed form with biases, its merge and its counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.deltas import Hydra, LoRA

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(("name", "targets"), [("llama", "o_proj,down_proj"), ("gpt2", "c_proj")])
def test_without_the_sequential_branch_it_is_lora(name, targets, request, ids, moved, undone) -> None:
    model = request.getfixturevalue(name)
    base = Base(model)
    delta = moved(base, Hydra(rank=3, output_rank=0, scale=2.5, targets=targets))
    config = peft.LoraConfig(r=3, lora_alpha=7.5, target_modules=targets.split(","))
    want = peft.get_peft_model(copy.deepcopy(model), config).eval()
    n = 0
    with torch.no_grad():
        for path, module in want.named_modules():
            if hasattr(module, "lora_A"):
                t = delta.parts[0].tensors(path.removeprefix("base_model.model."))
                module.lora_A["default"].weight.copy_(t["A_p"])
                module.lora_B["default"].weight.copy_(t["B_p"])
                n += 1
        assert n == len(delta.parts[0].kind_of) > 0
        out = undone(base, delta, input_ids=ids)
        torch.testing.assert_close(out, want(input_ids=ids)[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(base.merged(delta).model(input_ids=ids)[0], out, atol=1e-5, rtol=0)


@pytest.mark.parametrize("has_bias", [True, False])
def test_without_the_parallel_branch_it_multiplies_from_the_left(has_bias, moved) -> None:
    layer, x = nn.Linear(6, 5, bias=has_bias), torch.randn(4, 6)
    base = Base(nn.Sequential(layer), example=(x,))
    delta = moved(base, Hydra(rank=0, output_rank=2, scale=0.7, targets="0"), size=0.5)
    t = delta.parts[0].tensors("0")
    assert set(t) == {"A_s", "B_s"}
    with torch.no_grad(), base.using(delta):
        want = nn.functional.linear(x, layer.weight, layer.bias) @ (torch.eye(5) + 0.7 * t["B_s"] @ t["A_s"]).T
        torch.testing.assert_close(base.model(x), want)
        merged = base.merged(delta).model[0]
        torch.testing.assert_close(merged(x), want, atol=1e-5, rtol=0)
        assert (merged.bias is not None) is has_bias


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("start", ["xavier", "normal", "kaiming"])
def test_both_branches_with_biases_are_the_formula_and_merge(has_bias, start, moved) -> None:
    layer, x, s = nn.Linear(6, 5, bias=has_bias), torch.randn(4, 6), 1.3
    base = Base(nn.Sequential(layer), example=(x,))
    delta = moved(base, Hydra(rank=3, output_rank=2, scale=s, bias=True, start=start, targets="0"), size=0.5)
    t = delta.parts[0].tensors("0")
    with torch.no_grad():
        y0 = layer(x)
        P = (x @ t["A_p"].T + t["c_p"]) @ t["B_p"].T + t["d_p"]
        S = (y0 @ t["A_s"].T + t["c_s"]) @ t["B_s"].T + t["d_s"]
        want = y0 + s * P + s * S
        with base.using(delta):
            torch.testing.assert_close(base.model(x), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(base.merged(delta).model(x), want, atol=1e-5, rtol=0)
    assert delta.trainable_parameters == 3 * (6 + 5) + 2 * 2 * 5 + 3 + 2 + 2 * 5


def test_convolutions_mix_the_output_channels(moved) -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 1)).eval(), torch.randn(2, 2, 5, 5)
    base = Base(model, example=(x,))
    delta = moved(base, Hydra(bias=True, targets="convs"), size=0.3)
    with torch.no_grad():
        plain = model(x)
        with base.using(delta):
            live = model(x)
        torch.testing.assert_close(base.merged(delta).model(x), live, atol=1e-5, rtol=0)
        assert (live - plain).abs().max() > 0.05


def test_at_the_start_only_the_up_matrices_and_biases_have_a_gradient(llama, ids) -> None:
    base = Base(llama)
    delta = Delta.create(base, Hydra(bias=True))
    with base.frozen(), base.using(delta):
        out = llama(input_ids=ids)[0]
        assert torch.equal(out.detach(), base.merged().model(input_ids=ids)[0].detach())
        out.square().mean().backward()
    for path in delta.parts[0].kind_of:
        t = delta.parts[0].tensors(path)
        for name in ("A_p", "A_s", "c_p", "c_s"):
            assert not t[name].grad.any(), name
        for name in ("B_p", "B_s", "d_p", "d_s"):
            assert t[name].grad.abs().max() > 0, name


def test_it_reads_the_output_as_earlier_parts_left_it(moved) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    base = Base(nn.Sequential(layer), example=(x,))
    lora, hydra = moved(base, LoRA(rank=2, targets="0")), moved(base, Hydra(targets="0", bias=True), size=0.5)
    outs = []
    for stack in ((lora, hydra), (hydra, lora)):
        with torch.no_grad(), base.using(*stack):
            outs.append(base.model(x))
            torch.testing.assert_close(base.merged(*stack).model(x), outs[-1], atol=1e-5, rtol=0)
    assert (outs[0] - outs[1]).abs().max() > 1e-3


def test_counts_and_what_is_refused(llama) -> None:
    base = Base(llama)
    delta = Delta.create(base, Hydra(rank=2, output_rank=3))
    per_block = 2 * (16 + 16) + 2 * 3 * 16 + 2 * (24 + 16) + 2 * 3 * 16
    assert delta.trainable_parameters == 2 * per_block
    with pytest.raises(UsageError, match="both 0"):
        Delta.create(base, Hydra(rank=0, output_rank=0))
    grouped = Base(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), example=(torch.randn(1, 4, 5, 5),))
    with pytest.raises(UsageError, match="groups"):
        Delta.create(grouped, Hydra(targets="0"))
    assert Delta.create(grouped, Hydra(output_rank=0, targets="0")).trainable_parameters == 2 * (4 + 18)
