# SPDX-License-Identifier: Apache-2.0
"""Study 020 at toy size: the languages, masking, equal numbers, what is swapped, shared trials, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.core.delta import Delta
from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "020-lt-sft"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


def part(study: Any, name: str) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + "." + name)


@pytest.fixture(scope="module")
def world(study: Any) -> Any:
    transfer, made = part(study, "transfer"), part(study, "world")
    return transfer.World.of(made.SMOKE, transfer.Lengths(3, 3), 0)


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    result = run_study(study, smoke=True, out=tmp_path)
    assert {arm: len(rows) for arm, rows in result["raw"]["arms"].items()} == dict.fromkeys(study.arms, 2)
    assert sorted({row["share"] for row in result["raw"]["curve"]}) == [0.005, 0.02, 0.2]
    for arm, tuning in result["raw"]["tuning"].items():
        assert set(tuning) == ({"task"} if arm == "task only" else {"language", "task"})
        assert all(len(choice["trials"]) == 2 for choice in tuning.values())


def test_languages_share_states_and_few_words(study: Any) -> None:
    made = part(study, "world")
    size = made.Size()
    grammar = made.Grammar.drawn(size, 0)
    per = size.states * size.words
    rows = {x: grammar.sentences(x, 300, np.random.default_rng(1)) for x in made.LANGUAGES}
    for at, (name, some) in enumerate(rows.items()):
        for row in some:
            assert size.shortest <= len(row["input_ids"]) == len(row["states"]) <= size.longest
            for word, state in zip(row["input_ids"], row["states"], strict=True):
                tongue, left = divmod(word - made.FIRST, per)
                assert left // size.words == state and tongue == (0 if left % size.words % 4 == 3 else at), name
    assert max(i for some in rows.values() for r in some for i in r["input_ids"]) < size.vocabulary


def test_language_b_reverses_adjacent_pairs(study: Any) -> None:
    made = part(study, "world")
    grammar = made.Grammar.drawn(made.Size(), 0)
    a, b = (grammar.sentences(x, 50, np.random.default_rng(4)) for x in "AB")
    for one, two in zip(a, b, strict=True):
        s, n = one["states"], len(one["states"]) - len(one["states"]) % 2
        want = [s[i ^ 1] for i in range(n)] + s[n:]
        assert two["states"] == want


def test_masks_cover_words_only_and_repeat(study: Any, world: Any) -> None:
    made = part(study, "world")
    rows = world.raw["A"]
    one, two = rows.batch([0, 1, 2], 5), rows.batch([0, 1, 2], 5)
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = rows.batch([0, 1, 2], 6)
    assert not torch.equal(one["labels"], other["labels"])
    chosen = one["labels"] != made.IGNORED
    assert chosen.any(1).all() and not (chosen & (one["attention_mask"] == 0)).any()
    big = made.masked([{"input_ids": list(range(2, 22))}] * 400, 300, torch.Generator().manual_seed(0))
    chosen = big["labels"] != made.IGNORED
    assert 0.13 < chosen.float().mean() < 0.19
    assert 0.7 < (big["input_ids"][chosen] == made.MASK).float().mean() < 0.9


@pytest.mark.parametrize("full", [False, True])
def test_arms_train_equal_numbers(study: Any, world: Any, full: bool) -> None:
    """Adapters of the chosen width train within 4 % of K on the real sizes; sparse arms exactly K."""
    transfer, made = part(study, "transfer"), part(study, "world")
    if full:
        size = made.Size()
        from dataclasses import replace

        from tunesmith.core.base import Base

        example = {"input_ids": torch.arange(2, 34).reshape(2, 16)}
        world = replace(world, base=Base(made.TinyBert(size).eval(), example=example), size=size)
        K = round(0.05 * world.maskable())
        delta = Delta.create(world.base, transfer.methods_of(world, "adapters", 0.05, 0.0))
        assert abs(delta.trainable_parameters - K) < 0.04 * K
        return
    for arm in ("lt-sft", "random mask"):
        delta = transfer.language(world, arm, 0.05, "B", 1e-3)
        assert delta.trainable_parameters == int(0.05 * world.maskable() + 0.5)


def test_the_base_output_embedding_and_norms_stay(study: Any, world: Any) -> None:
    transfer = part(study, "transfer")
    for arm in ("lt-sft", "dense composition"):
        delta = transfer.language(world, arm, 0.5, "C", 1e-2)
        merged, base = world.base.merged(delta).model, world.base.model
        assert torch.equal(merged.decoder.weight, base.decoder.weight)
        assert not torch.equal(merged.embed.weight, base.embed.weight)
        assert torch.equal(merged.norm.weight, base.norm.weight)


def test_dense_trials_are_shared_and_are_the_dense_arm(study: Any, world: Any) -> None:
    transfer = part(study, "transfer")
    world.trials.clear()
    transfer.language(world, "lt-sft", 0.05, "B", 1e-3)
    assert len(world.trials) == 1
    (trial,) = world.trials.values()
    transfer.language(world, "lt-sft", 0.2, "B", 1e-3)
    assert len(world.trials) == 1
    dense = transfer.language(world, "dense composition", 0.05, "B", 1e-3)
    assert dense.parts[0] is trial.parts[0] and dense.trainable_parameters == world.maskable()


def test_the_target_delta_takes_the_place_of_the_source(study: Any, world: Any) -> None:
    """Swapping changes predictions and leaves the base as it was; the head is that of the task alone."""
    transfer = part(study, "transfer")
    before = world.base.digest()
    source, target = (transfer.language(world, "adapters", 0.05, x, 0.05) for x in "AB")
    task = transfer.tagging(world, "adapters", 0.05, source, 0.05, "x")
    assert [p.info.name for p in task.parts] == ["study-adapter", "head"]
    assert [p.info.name for p in target.parts] == ["study-adapter"]
    batch = world.test["B"].batch(range(4), 0)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    out = []
    for lang in (source, target):
        with torch.no_grad(), world.base.using(lang, task, check=False):
            out.append(world.base.model(**inputs)["logits"])
    assert out[0].shape[-1] == world.size.states and not torch.equal(*out)
    assert world.base.digest() == before


def _raw(sparse: float, adapters: float, dense: float, wobble: float = 0.2) -> dict[str, Any]:
    means = {"lt-sft": sparse, "random mask": 50.0, "adapters": adapters, "dense composition": dense, "task only": 40.0}
    arms = {
        arm: [{"seed": s, "metric": m + (wobble * (s - 2) if arm == "lt-sft" else 0.0)} for s in range(5)]
        for arm, m in means.items()
    }
    return {"arms": arms, "tuning": {}, "curve": [{"seed": 0, "share": 0.02, "metric": 48.0}]}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (_raw(60, 55, 57), "reproduced"),
        (_raw(60, 61, 50), "not reproduced"),
        (_raw(60, 50, 61), "not reproduced"),
        (_raw(60, 55, 59.9), "inconclusive"),
        (_raw(60, 58, 57, wobble=3.0), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label
