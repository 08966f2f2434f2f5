# SPDX-License-Identifier: Apache-2.0
"""The upper blocks of an encoder on cached states are the whole encoder, and a delta on them the same delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith as ts
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context
from tunesmith.study.worlds.arms import train
from tunesmith.study.worlds.encoder import UpperEncoder, UpperWorld, below, upper
from tunesmith.study.worlds.text import few_shot


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    torch.set_num_threads(1)
    return Context(True, [0, 1], tmp_path, Cells(tmp_path / "cells.jsonl", {"test": "encoder"}))


@pytest.fixture
def world(ctx: Context) -> UpperWorld:
    return upper(few_shot(ctx, "sst2", 4, 0), 1)


def noisy(base: Any, targets: str) -> Delta:
    delta = Delta.create(base, ts.LoRA(rank=2, targets=targets))
    generator = torch.Generator().manual_seed(3)
    for _, t in delta.items():
        t.data.normal_(std=0.3, generator=generator)
    return delta


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_top_on_cached_states_is_the_whole_encoder_with_and_without_a_delta(ctx: Context, blocks: int) -> None:
    whole = few_shot(ctx, "sst2", 4, 0)
    world = upper(whole, blocks)
    rows = whole.held["test"]
    names = [f"encoder.layer.{2 - blocks + i}" for i in range(blocks)]
    big = noisy(whole.base, "query,dense,!encoder.layer.0.*" if blocks == 1 else "query,dense")
    small = noisy(world.base, "query,dense")
    assert len(small.parts[0].kind_of) == 4 * blocks
    for path in small.parts[0].kind_of:
        block, rest = path.removeprefix("layer.").split(".", 1)
        for name, value in small.parts[0].tensors(path).items():
            big.parts[0].put(f"{names[int(block)]}.{rest}", name, value.detach(), trainable=True)
    for use in (False, True):
        for i in (0, 3, 7):
            ids = torch.tensor([rows[i]["input_ids"]])
            with torch.no_grad():
                with whole.base.using(*([big] if use else [])):
                    want = whole.base.model(input_ids=ids).last_hidden_state[0]
                with world.base.using(*([small] if use else [])):
                    got = world.base.model(**world.held["test"].some([i, 1]))["last_hidden_state"][0]
            torch.testing.assert_close(got[: len(want)], want, atol=1e-5, rtol=0)


def test_a_world_learns_scores_and_keeps_its_splits(ctx: Context, world: UpperWorld) -> None:
    whole = few_shot(ctx, "sst2", 4, 0)
    assert world.held["dev"].labels == [r["labels"] for r in whole.held["dev"]]
    assert len(world.task) == len(whole.task) and world.base.digest() == upper(whole, 1).base.digest()
    out = train(world, [ts.LoRA(rank=2)], lr=1e-2, steps=30, seed=0)
    assert out.trained.losses[-1] < out.trained.losses[0]
    score = out.test()
    assert score.metric == sum(score.rows) / len(score.rows) > 0.5
    assert 0 < out.retention()["cosine"] < 1
    assert world.retention()["cosine"] == pytest.approx(1.0, abs=1e-6)
    with world.base.using(out.delta):
        for i in (0, 5):
            alone = world.logits(type(world.held["test"])([world.held["test"].states[i]], [0]))
            torch.testing.assert_close(alone[0], world.logits(world.held["test"])[i], atol=1e-5, rtol=0)


def test_states_of_the_test_split_are_used_again(ctx: Context, world: UpperWorld) -> None:
    other = upper(few_shot(ctx, "sst2", 4, 1), 1, known=world)
    assert other.base is world.base and other.held["test"] is world.held["test"]
    assert other.task.rows.labels and not torch.equal(other.task.rows.states[0], world.task.rows.states[0])
    assert [len(s) for s in below(few_shot(ctx, "sst2", 4, 0).base, [{"input_ids": [1, 5, 6]}], 1)] == [3]


def test_more_blocks_than_there_are(ctx: Context) -> None:
    with pytest.raises(UsageError, match="1..2"):
        UpperEncoder(few_shot(ctx, "sst2", 2, 0).base.model, 3)
