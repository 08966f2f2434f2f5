# SPDX-License-Identifier: Apache-2.0
"""Bone and MiSS against PEFT's MiSS (bat, default, mini), closed forms, gradients and counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.deltas import Bone, LoRA, MiSS

peft = pytest.importorskip("peft")


def peft_twin(model: nn.Module, delta: Delta, targets: list[str], **config: object) -> tuple[nn.Module, int]:
    """A PEFT MiSS model with the delta's tensors, and how many layers got them."""
    twin = peft.get_peft_model(copy.deepcopy(model), peft.MissConfig(target_modules=targets, **config)).eval()
    n = 0
    with torch.no_grad():
        for path, module in twin.named_modules():
            site = path.removeprefix("base_model.model.")
            if hasattr(module, "miss_block") and site in delta.parts[0].kind_of:
                p = module.miss_block["default"]
                p.copy_(next(iter(delta.parts[0].tensors(site).values())))  # a wrong shape is an error
                n += 1
    return twin, n


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (Bone(block=4, targets="q_proj,v_proj,up_proj,down_proj"), {"r": 4, "init_weights": "bat"}),
        (MiSS(rank=4, targets="q_proj,v_proj,up_proj,down_proj"), {"r": 4}),
        (MiSS(rank=5, targets="q_proj,v_proj,up_proj,down_proj"), {"r": 5}),
        (
            MiSS(rank=4, mode="mini", mini_rank=8, targets="q_proj,v_proj,up_proj,down_proj"),
            {"r": 4, "init_weights": "mini", "mini_r": 8},
        ),
        (
            MiSS(rank=7, mode="mini", mini_rank=2, targets="q_proj,v_proj,up_proj,down_proj"),
            {"r": 7, "init_weights": "mini", "mini_r": 2},
        ),
    ],
    ids=["bat", "tile", "tile-uneven", "mini", "mini-uneven"],
)
def test_equals_peft(method, config, llama, ids, moved, undone) -> None:
    base = Base(llama)
    delta = moved(base, method)
    want, layers = peft_twin(llama, delta, method.targets.split(","), **config)
    assert layers == len(delta.parts[0].kind_of) == 8
    assert delta.trainable_parameters == sum(p.numel() for p in want.parameters() if p.requires_grad)
    out = undone(base, delta, input_ids=ids)
    with torch.no_grad():
        torch.testing.assert_close(out, want(input_ids=ids)[0], atol=1e-5, rtol=0)
        assert (out - llama(input_ids=ids)[0]).abs().max() > 1e-3
        merged = base.merged(delta).model
        torch.testing.assert_close(merged(input_ids=ids)[0], out, atol=1e-5, rtol=0)
        theirs = dict(want.merge_and_unload(safe_merge=True).named_parameters())
    for key, p in merged.named_parameters():
        torch.testing.assert_close(p, theirs[key], atol=1e-5, rtol=0)


def test_bat_merge_equals_peft_and_can_be_inverted(moved) -> None:
    """W'_ij = W_ij (I + M_i) + M_i, so W_ij = (W'_ij - M_i) (I + M_i)^-1, up to the digits an inverse loses."""
    layer, x, r = nn.Linear(12, 8), torch.randn(3, 12), 4
    model = nn.Sequential(layer)
    base = Base(model, example=(x,))
    delta = moved(base, Bone(block=r, targets="0"), size=0.2)
    twin, _ = peft_twin(model, delta, ["0"], r=r, init_weights="bat")
    M = delta.parts[0].tensors("0")["M"]
    with torch.no_grad():
        W = base.merged(delta).model[0].weight
        torch.testing.assert_close(W, twin.merge_and_unload(safe_merge=True)[0].weight, atol=1e-5, rtol=0)
        back = torch.empty_like(W)
        for i in range(8 // r):
            for j in range(12 // r):
                block = (slice(i * r, i * r + r), slice(j * r, j * r + r))
                want = layer.weight[block] @ (torch.eye(r) + M[i]) + M[i]
                torch.testing.assert_close(W[block], want, atol=1e-6, rtol=0)
                back[block] = (W[block] - M[i]) @ torch.linalg.inv(torch.eye(r) + M[i])
        torch.testing.assert_close(back, layer.weight, atol=1e-4, rtol=0)
        assert torch.linalg.matrix_rank(W - layer.weight) > r  # full rank, unlike any tile of this size


def test_gradient_of_bat_at_the_start() -> None:
    """dM_i = sum_j (W_ij^T G_ij + G_ij), G the gradient of the formed weight."""
    layer, x, c, r = nn.Linear(6, 4), torch.randn(7, 6), torch.randn(7, 4), 2
    base = Base(nn.Sequential(layer), example=(x,))
    delta = Delta.create(base, Bone(block=r, targets="0"))
    with base.frozen(), base.using(delta):
        (base.model(x) * c).sum().backward()
    G, W = c.T @ x, layer.weight.detach()
    want = torch.zeros(2, r, r)
    for i in range(2):
        for j in range(3):
            block = (slice(i * r, i * r + r), slice(j * r, j * r + r))
            want[i] += W[block].T @ G[block] + G[block]
    torch.testing.assert_close(delta.parts[0].tensors("0")["M"].grad, want)


def test_parts_on_one_weight_act_in_order(moved) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    base = Base(nn.Sequential(layer), example=(x,))
    one, two = (moved(base, Bone(block=2, targets="0"), size=0.5) for _ in range(2))
    first, second = base.merged(one, two), base.merged(two, one)
    assert (first.model[0].weight - second.model[0].weight).abs().max() > 1e-2
    with torch.no_grad(), base.using(one, two):
        torch.testing.assert_close(base.model(x), first.model(x))


@pytest.mark.parametrize("method", [Bone(block=4), MiSS(rank=4), MiSS(rank=4, mode="mini", mini_rank=8)])
def test_fresh_is_the_identity_and_counts(method, llama, ids, undone) -> None:
    base = Base(llama)
    delta = Delta.create(base, method)
    assert torch.equal(undone(base, delta, input_ids=ids), llama(input_ids=ids)[0])
    outs = 2 * (16 + 8 + 8 + 16 + 24 + 24 + 16)
    mini = getattr(method, "mode", "") == "mini"
    assert delta.trainable_parameters == (14 * 4 * 8 if mini else 4 * outs)


@pytest.mark.parametrize("n", [12, 14])
def test_tile_is_lora_with_a_fixed_a(n, moved) -> None:
    r, out = 4, 6
    layer, x = nn.Linear(n, out), torch.randn(5, n)
    base = Base(nn.Sequential(layer), example=(x,))
    delta = moved(base, MiSS(rank=r, targets="0"))
    lora = Delta.create(base, LoRA(rank=r, alpha=float(r), targets="0"))
    t = lora.parts[0].tensors("0")
    with torch.no_grad():
        t["A"].copy_(torch.cat([torch.eye(r)] * 4, 1)[:, :n])
        t["B"].copy_(delta.parts[0].tensors("0")["B"].T)
        change = base.merged(delta).model[0].weight - layer.weight
        torch.testing.assert_close(change[:, :-r], change[:, r:], atol=1e-6, rtol=0)
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == r
        with base.using(delta):
            got = base.model(x)
        with base.using(lora):
            torch.testing.assert_close(got, base.model(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", [Bone(block=2, targets="convs"), MiSS(rank=4, targets="convs")])
def test_convolutions_use_the_flattened_kernel(method, moved) -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 1)).eval(), torch.randn(2, 2, 5, 5)
    base = Base(model, example=(x,))
    delta = moved(base, method, size=0.3)
    with torch.no_grad(), base.using(delta):
        live = model(x)
        torch.testing.assert_close(base.merged(delta).model(x), live, atol=1e-5, rtol=0)
        assert (live - base.merged().model(x)).abs().max() > 0.05


def test_shapes_that_do_not_fit_are_refused(llama) -> None:
    base = Base(llama)
    with pytest.raises(UsageError, match="fitting: 1, 2, 4, 8"):
        Delta.create(base, Bone(block=16))
    with pytest.raises(UsageError, match="longer than"):
        Delta.create(base, MiSS(rank=17))
    with pytest.raises(UsageError, match="does not divide"):
        Delta.create(base, MiSS(rank=4, mode="mini", mini_rank=3))
