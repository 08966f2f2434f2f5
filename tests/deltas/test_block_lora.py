# SPDX-License-Identifier: Apache-2.0
"""Block-LoRA is LoRA of rank r/n with n times the rate on B: the equality, the collapsed form, counts and errors."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, bake
from tunesmith.core.errors import UsageError
from tunesmith.deltas import BlockLoRA, LoRA

peft = pytest.importorskip("peft")

R, N, ALPHA = 8, 4, 3.0
TARGETS = "q_proj,v_proj"


def twin(targets: str = TARGETS) -> LoRA:
    """Rank r/n, the nominal rank's scale alpha / sqrt(r), and n times the rate on B."""
    k = R // N
    return LoRA(rank=k, alpha=ALPHA / math.sqrt(R) * k, targets=targets, lr_ratio=float(N))


def block(targets: str = TARGETS) -> BlockLoRA:
    return BlockLoRA(rank=R, blocks=N, alpha=ALPHA, targets=targets)


def stepped(base: Base, delta: Delta, optimiser: type, ids: Tensor, steps: int = 50, **kw: Any) -> list[float]:
    """Train on next tokens, each tensor at its method's factor on rate and (divided by it) decay; losses by step."""
    rates, decay = delta.parts[0].method, kw.pop("weight_decay", 0.0)
    factor = rates.learning_rates() if hasattr(rates, "learning_rates") else {}
    lr = kw.pop("lr")
    groups = [
        {"params": [t], "lr": lr * factor.get(name, 1.0), "weight_decay": decay / factor.get(name, 1.0)}
        for _, name, t in delta.parts[0].items()
    ]
    step, losses = optimiser(groups, lr=lr, **kw), []
    for _ in range(steps):
        with base.frozen(), base.using(delta):
            logits = base.model(input_ids=ids)[0][:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
        step.step()
        step.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def same(block_delta: Delta, plain: Delta, atol: float) -> None:
    for path in plain.parts[0].kind_of:
        t, u = block_delta.parts[0].tensors(path), plain.parts[0].tensors(path)
        torch.testing.assert_close(t["A"], u["A"], atol=atol, rtol=1e-4)
        torch.testing.assert_close(t["B"].sum(0), u["B"], atol=atol, rtol=1e-4)


@pytest.mark.parametrize(
    ("optimiser", "kw"),
    [
        (torch.optim.Adam, {"lr": 1e-3}),
        (torch.optim.SGD, {"lr": 0.05}),
        (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    ],
    ids=["adam", "sgd", "adamw"],
)
def test_it_trains_as_lora_of_rank_r_over_n_with_n_times_the_rate_on_b(
    llama: Any, ids: Tensor, optimiser: type, kw: dict[str, Any]
) -> None:
    base = Base(llama)
    blocks, plain = Delta.create(base, block(), seed=3), Delta.create(base, twin(), seed=3)
    same(blocks, plain, 0.0)
    start = {p: blocks.parts[0].tensors(p)["A"].clone() for p in blocks.parts[0].kind_of}
    one, two = (stepped(base, d, optimiser, ids, **dict(kw)) for d in (blocks, plain))
    assert one[-1] < one[0] - 1e-3, "it learns"
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), atol=1e-4, rtol=0)
    same(blocks, plain, 1e-4)
    for path in start:
        B = blocks.parts[0].tensors(path)["B"].detach()
        assert B.abs().max() > 1e-3 and (blocks.parts[0].tensors(path)["A"] - start[path]).abs().max() > 1e-5
        torch.testing.assert_close(B, B[:1].expand_as(B), atol=1e-7, rtol=0, msg="blocks stay equal")


def test_with_the_plain_rate_lora_is_another_run(llama: Any, ids: Tensor) -> None:
    base = Base(llama)
    blocks = Delta.create(base, block(), seed=3)
    slow = Delta.create(base, LoRA(rank=R // N, alpha=twin().alpha, targets=TARGETS), seed=3)
    one, two = (stepped(base, d, torch.optim.Adam, ids, lr=1e-3) for d in (blocks, slow))
    assert one[-1] < two[-1] - 1e-3


def stirred(delta: Delta) -> Delta:
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(torch.randn_like(t) * 0.1)
    return delta


def test_it_collapses_to_pefts_lora_of_rank_r_over_n_with_the_nominal_scale(llama: Any, ids: Tensor) -> None:
    base = Base(llama)
    delta = stirred(Delta.create(base, block()))
    k = R // N
    want = peft.get_peft_model(
        copy.deepcopy(llama),
        peft.LoraConfig(r=k, lora_alpha=ALPHA / math.sqrt(R) * k, target_modules=TARGETS.split(","), lora_dropout=0.0),
    ).eval()
    with torch.no_grad():
        for path in delta.parts[0].kind_of:
            layer, t = want.base_model.model.get_submodule(path), delta.parts[0].tensors(path)
            assert layer.scaling["default"] == pytest.approx(ALPHA / math.sqrt(R))
            layer.lora_A["default"].weight.copy_(t["A"])
            layer.lora_B["default"].weight.copy_(t["B"].sum(0))
        with base.using(delta):
            out = llama(input_ids=ids)[0]
        torch.testing.assert_close(out, want(input_ids=ids)[0], atol=1e-5, rtol=0)
        assert (out - llama(input_ids=ids)[0]).abs().max() > 1e-3
        torch.testing.assert_close(base.merged(delta).model(input_ids=ids)[0], out, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rslora", [True, False])
def test_it_is_stored_in_that_form(llama: Any, ids: Tensor, tmp_path: Path, rslora: bool) -> None:
    base = Base(llama)
    method = BlockLoRA(
        rank=8,
        blocks=4,
        alpha=3.0,
        rslora=rslora,
        targets=TARGETS,
        rank_pattern={"*.1.*": 12},
        alpha_pattern={"v_proj": 5.0},
    )
    delta = stirred(Delta.create(base, method))
    with torch.no_grad(), base.using(delta):
        live = llama(input_ids=ids)[0]
    bake(base, delta)
    plain = delta.parts[0].method
    assert isinstance(plain, LoRA)
    for path in delta.parts[0].kind_of:
        t, r = delta.parts[0].tensors(path), 12 if ".1." in path else 8
        assert set(t) == {"A", "B"} and len(t["A"]) == r // 4
        alpha = 5.0 if path.endswith("v_proj") else 3.0
        scale = plain.update(base.sites[path], t).scale
        assert scale == pytest.approx(alpha / (math.sqrt(r) if rslora else r))
    with torch.no_grad(), base.using(delta):
        torch.testing.assert_close(llama(input_ids=ids)[0], live, atol=1e-6, rtol=1e-6)
    delta.save(tmp_path / "d")
    assert Delta.load(tmp_path / "d", base).digest == delta.digest


def test_a_fresh_delta_is_the_identity_and_counts(llama: Any, ids: Tensor, undone: Any) -> None:
    base = Base(llama)
    delta = Delta.create(base, block("q_proj,down_proj"))
    assert torch.equal(undone(base, delta, input_ids=ids), llama(input_ids=ids)[0])
    # d r/n + r k with d the inputs and k the outputs: q 16 -> 16, down 24 -> 16, in two blocks of the model
    assert delta.trainable_parameters == 2 * ((16 + 24) * R // N + R * (16 + 16))
    bake(base, delta)
    assert sum(t.numel() for _, t in delta.items()) == 2 * ((16 + 24) + (16 + 16)) * R // N
    A = Delta.create(base, block("q_proj")).parts[0].tensors("model.layers.0.self_attn.q_proj")["A"]
    assert 0.5 / 4 < float(A.detach().abs().max()) <= 1 / 4, "Kaiming uniform with a = sqrt 5: within 1 / sqrt(16)"


def test_convolutions_and_embeddings_merge() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (2, 9))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv, self.out = nn.Embedding(20, 6), nn.Conv1d(6, 8, 3, stride=2), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.conv(self.embed(x).transpose(1, 2))).transpose(1, 2))

    base = Base(Net(), example=(ids,))
    delta = stirred(Delta.create(base, BlockLoRA(rank=4, blocks=2, targets="embed,conv,out")))
    with torch.no_grad():
        plain = base.model(ids)
        with base.using(delta):
            out = base.model(ids)
        assert (out - plain).abs().max() > 1e-3
        torch.testing.assert_close(base.merged(delta).model(ids), out, atol=1e-5, rtol=1e-5)
        bake(base, delta)
        with base.using(delta):
            torch.testing.assert_close(base.model(ids), out, atol=1e-6, rtol=1e-6)


def test_a_rank_that_the_blocks_do_not_divide_is_refused(llama: Any) -> None:
    base = Base(llama)
    with pytest.raises(UsageError, match=r"3 blocks do not divide rank 8.*\n.*rank 9"):
        Delta.create(base, BlockLoRA(rank=8, blocks=3))
    with pytest.raises(UsageError, match=r"do not divide rank 6"):
        Delta.create(base, BlockLoRA(rank=8, blocks=4, targets="q,v", rank_pattern={"v_proj": 6}))
    assert (
        Delta.create(base, BlockLoRA(rank=8, blocks=1)).trainable_parameters
        == Delta.create(base, LoRA(rank=8)).trainable_parameters
    )
