# SPDX-License-Identifier: Apache-2.0
"""A rehearsed step counts what a real one does, in the code that really runs, and touches nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.toys import toys
from tunesmith.deltas import SSF, Full, Head, LoRA
from tunesmith.objectives import SFT, Classification
from tunesmith.train import rehearsal
from tunesmith.train.cached import find_cut
from tunesmith.train.config import TrainConfig
from tunesmith.train.plan import plan
from tunesmith.train.rehearsal import rehearse
from tunesmith.train.speeds import Speeds, measure
from tunesmith.train.tasks import LoaderTask, RowTask

CONFIG = TrainConfig(precision="fp32")


def llama(layers: int = 6) -> Base:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = Base(LlamaForCausalLM(config), family="causal-lm")
    for p in base.model.parameters():
        p.requires_grad_(False)
    return base


def real_flops(base: Base, delta: Delta, task: Any, rows: list[int]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FlopCounterMode(display=False) as counter, base.frozen(), base.using(delta):
            task.objective.loss(base, task.batch(rows, 0)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", [LoRA(rank=2), Full(), LoRA(rank=2, targets="model.layers.4.*")])
def test_the_arithmetic_of_a_decoder_is_that_of_a_real_step(token_rows: Any, method: Any) -> None:
    base, task = llama(), RowTask(token_rows(8), SFT())
    delta = Delta.create(base, method)
    found = rehearse(base, delta, task, [0, 1, 2], CONFIG)
    assert found.flops == real_flops(base, delta, task, [0, 1, 2])
    assert found.tokens == task.batch([0, 1, 2], 0)["input_ids"].numel()


def test_the_arithmetic_of_a_picture_net_is_that_of_a_real_step() -> None:
    base = toys()[2]
    rows = [{"array": torch.zeros(6, 6, 3, dtype=torch.uint8).numpy(), "label": i % 3} for i in range(4)]
    task = RowTask(rows, Classification())
    delta = Delta.create(base, SSF(), Head(classes=3))
    found = rehearse(base, delta, task, [0, 1, 2, 3], CONFIG)
    assert found.flops == real_flops(base, delta, task, [0, 1, 2, 3])
    assert {kind for kind, *_ in found.products} == {"conv", "depthwise", "matrix"}


@pytest.mark.parametrize("method", [LoRA(rank=2), LoRA(rank=2, targets="model.layers.5.*")])
def test_two_of_many_equal_blocks_stand_for_all(token_rows: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, task = llama(), RowTask(token_rows(8), SFT())
    delta = Delta.create(base, method)
    short = rehearse(base, delta, task, [0, 1], CONFIG)
    monkeypatch.setattr(rehearsal, "_alike", lambda *_: [])
    whole = rehearse(base, delta, task, [0, 1], CONFIG)
    assert short.flops == whole.flops and short.calls == whole.calls
    assert sum(short.moved.values()) == pytest.approx(sum(whole.moved.values()))
    assert short.held == pytest.approx(whole.held, rel=0.15)  # the largest moment may be another


def test_held_memory_follows_what_backward_needs(token_rows: Any) -> None:
    base, task = llama(), RowTask([r for r in token_rows(8) for _ in range(4)], SFT())
    delta = Delta.create(base, LoRA(rank=2))
    few, many = (rehearse(base, delta, task, list(range(n)), CONFIG).held for n in (8, 32))
    late = rehearse(base, Delta.create(base, LoRA(rank=2, targets="model.layers.5.*")), task, list(range(32)), CONFIG)
    again = rehearse(base, delta, task, list(range(32)), TrainConfig(precision="fp32", gradient_checkpointing=True))
    assert few < many and late.held < 0.5 * many and again.held < many


def test_kept_features_leave_out_the_prefix(token_rows: Any) -> None:
    base, task = llama(), RowTask(token_rows(8), SFT())
    delta = Delta.create(base, LoRA(rank=2, targets="model.layers.5.*"))
    whole = rehearse(base, delta, task, [0, 1], CONFIG)
    served = rehearse(base, delta, task, [0, 1], CONFIG, find_cut(base, delta))
    assert served.flops < 0.5 * whole.flops


def test_nothing_is_touched(token_rows: Any) -> None:
    base, task = llama(), RowTask(token_rows(8), SFT())
    delta = Delta.create(base, LoRA(rank=2))
    before, digest = base.digest(), delta.digest
    rehearse(base, delta, task, [0, 1], CONFIG)
    assert base.digest() == before and delta.digest == digest and not base.active
    assert all(type(p) is nn.Parameter and p.device.type == "cpu" for p in base.model.parameters())
    assert all(p.grad is None for _, p in delta.items())


def test_time_is_operations_over_speeds(token_rows: Any) -> None:
    base, task = llama(), RowTask(token_rows(8), SFT())
    delta = Delta.create(base, LoRA(rank=2))
    step = rehearse(base, delta, task, [0, 1], CONFIG)
    none = float("inf")
    kinds = {(k, d): none for k in ("matrix", "attention") for d in (torch.float32, torch.bfloat16)}
    assert Speeds(kinds, none, none, 2.0).seconds(step) == 2.0 * step.calls
    only = {**kinds, ("matrix", torch.float32): 1.0}
    matrix = sum(f * n for (kind, _, f, _), n in step.products.items() if kind == "matrix")
    assert Speeds(only, none, none, 0.0).seconds(step) == pytest.approx(matrix)
    assert all(v > 0 for v in measure(torch.get_num_threads()).product.values())


@pytest.mark.real
def test_code_that_decides_by_values_has_a_rough_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: Any, **__: Any) -> None:
        raise RuntimeError("it looked at a number")

    rows = [{"text": f"sentence {i}", "label": "ab"[i % 2]} for i in range(8)]
    good = plan("minilm-l6", rows)
    monkeypatch.setattr("tunesmith.train.plan.rehearse", no)
    rough = plan("minilm-l6", rows)
    assert any("it looked at a number" in n for n in rough.notes) and not good.notes
    assert rough.peak > 0 and rough.minutes and rough.minutes > 0


def test_a_decision_by_numbers_is_no_silent_guess() -> None:
    def loss(out: Tensor, batch: Any) -> Tensor:
        return out.sum() if float(out.detach().sum()) > 0 else -out.sum()

    base = toys()[2]
    task = LoaderTask([(torch.randn(2, 3, 6, 6), torch.zeros(2))], loss)
    with pytest.raises(Exception, match="scalar|data"):
        rehearse(base, Delta.create(base, LoRA(rank=2, targets="fc")), task, [0], CONFIG)
