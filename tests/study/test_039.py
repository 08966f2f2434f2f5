# SPDX-License-Identifier: Apache-2.0
"""Study 039 at toy size: tasks, rounds, the entry-wise control, undoing half, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.delta import Delta
from tunesmith.study import load_study
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context

FOLDER = Path(__file__).parents[2] / "studies" / "039-hft"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


def part(study: Any, name: str) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + "." + name)


@pytest.fixture(scope="module")
def world(study: Any, tmp_path_factory: Any) -> Any:
    place = tmp_path_factory.mktemp("039")
    context = Context(True, [0], place, Cells(place / "cells.jsonl", {}))
    return part(study, "sequence").build(context, study_sizes(study))


def study_sizes(study: Any) -> Any:
    return part(study, "study").sizes_of(True)


def test_a_smoke_run_gives_every_arm(study: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Two arms stand for all: they differ in their method alone."""
    module = part(study, "study")
    monkeypatch.setattr(module, "ARMS", ("full", "hft, category"))
    context = Context(True, [0, 1], tmp_path, Cells(tmp_path / "cells.jsonl", {}))
    raw = module.run(context)
    assert list(raw["arms"]) == ["full", "hft, category"]
    assert all([r["seed"] for r in rows] == [0, 1] for rows in raw["arms"].values())
    assert all(len(raw["tuning"][arm]["trials"]) == 2 for arm in module.ARMS)
    for row in raw["arms"]["full"]:
        assert len(row["reset"]["category"]["general"]) == 2 and sorted(row["order"]) == sorted(row["final"])
    assert module.verdict(raw).label in ("reproduced", "not reproduced", "inconclusive")


@pytest.mark.parametrize("arm", ["full", "hft, category", "hft, model", "hft, layer", "fixed half", "half of the entries",
                                 "full, averaged", "lora"])  # fmt: skip
def test_rounds_of_an_arm_add_up(study: Any, world: Any, arm: str) -> None:
    """The base after all rounds is the first base plus the deltas; another half trains in each round, but for the fixed."""
    rounds = part(study, "rounds")
    before = world.base.digest()
    done = rounds.chain(world, study_sizes(study), arm, ("sst2", "gsm8k"), 3, 1e-3)
    assert world.base.digest() == before and list(done.learnt) == ["sst2", "gsm8k"]
    assert len(done.deltas) == (1 if arm == "lora" else 2)
    x = world.tasks["sst2"].splits["dev"].states[0][None]
    with torch.no_grad(), world.base.using(*done.deltas, check=False):
        together = world.base.model(x)["logits"]
    torch.testing.assert_close(together, done.base.model(x)["logits"], atol=1e-4, rtol=1e-4)
    assert (together - world.base.model(x)["logits"]).abs().max() > 1e-3
    sites = [set(d.parts[0].kind_of) for d in done.deltas]
    if arm in ("hft, category", "hft, model"):  # of two layers the same one may be drawn twice
        assert sites[0] != sites[1]
    elif arm == "fixed half":
        assert sites[0] == sites[1]


def test_the_entry_control_moves_half_of_the_entries(study: Any, world: Any) -> None:
    rounds = part(study, "rounds")
    delta = Delta.create(world.base, rounds.method_of("half of the entries", 5))
    rounds.learn(world.base, delta, world.tasks["gsm8k"].splits["train"], study_sizes(study), 0, 1e-3, "fp32", [])
    moved = total = 0
    for path in delta.parts[0].kind_of:
        t = delta.parts[0].tensors(path)
        assert not t["weight"][~t["trains"]].any()
        moved, total = moved + int((t["weight"] != 0).sum()), total + t["weight"].numel()
    assert 0.4 < moved / total < 0.55


def test_averaging_halves_each_round(study: Any, world: Any) -> None:
    rounds, sizes = part(study, "rounds"), study_sizes(study)
    one, half = (rounds.chain(world, sizes, arm, ("sst2",), 0, 1e-3).deltas[0] for arm in ("full", "full, averaged"))
    for (key, a), (_, b) in zip(one.items(), half.items(), strict=True):
        torch.testing.assert_close(b, 0.5 * a, msg=key)


def test_class_scores_look_at_class_words_only(study: Any, world: Any) -> None:
    """The likeliest of the class tokens at the first answer position, against a count by hand."""
    task = world.tasks["ag_news"]
    rows = task.splits["dev"]
    right = 0
    for states, labels in zip(rows.states, rows.labels, strict=True):
        first = next(i for i, y in enumerate(labels) if y >= 0)
        with torch.no_grad():
            logits = world.base.model(states[None])["logits"][0, first - 1]
        right += task.classes[int(logits[task.classes].argmax())] == labels[first]
    assert world.score(world.base, "ag_news", "dev") == pytest.approx(100 * right / len(rows))


def test_orders_are_permutations_and_splits_differ(study: Any, world: Any) -> None:
    rounds = part(study, "rounds")
    assert len({rounds.order(s) for s in range(6)}) > 1 and rounds.order(1) == rounds.order(1)
    for texts in world.tasks.values():
        train, test = (set(map(str, (s.shape for s in texts.splits[k].states))) for k in ("train", "test"))
        assert train and test


def _raw(bwt: float, general: float, op: float = 0.0, *, step: float = 0.8, undone: float = 0.6, kept: float = 0.9,
         wobble: float = 0.0) -> dict[str, Any]:  # fmt: skip
    def row(seed: int, **more: Any) -> dict[str, Any]:
        return {"seed": seed, "lr": 1e-4, "final": {}, "learnt": {}, "order": [], "trainable": 1, "dev": 50.0, **more}

    full = [
        row(s, metric=60.0, OP=60.0, BWT=-5.0, general=3.2, step_seconds=1.0, reset={
            "base_general": 3.0, "general": 3.2, "base_task": 20.0, "task": 60.0,
            "category": {"general": [3.2 - 0.2 * undone], "task": [20 + 40 * kept]},
            "any": {"general": [3.15], "task": [50.0]},
        })
        for s in range(3)
    ]  # fmt: skip
    half = [row(s, metric=60 + op, OP=60 + op, BWT=-5 + bwt + wobble * (s - 1), general=3.2 + general, step_seconds=step)
            for s in range(3)]  # fmt: skip
    return {"arms": {"full": full, "hft, category": half}, "tuning": {}, "base": {"general": 3.0, "test": {}}}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (_raw(2, -0.05), "reproduced"),
        (_raw(2, -0.05, op=-0.9), "reproduced"),
        (_raw(2, -0.05, op=-1.2), "not reproduced"),
        (_raw(0, -0.05), "not reproduced"),
        (_raw(2, 0.01), "not reproduced"),
        (_raw(0.5, -0.05, wobble=1.0), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label


@pytest.mark.parametrize(
    ("options", "time", "reset"),
    [
        ({}, "holds", "holds"),
        ({"step": 0.9, "undone": 0.4}, "open", "open"),
        ({"step": 1.0, "undone": 0.2}, "fails", "fails"),
        ({"kept": 0.4}, "holds", "fails"),
        ({"kept": 0.7}, "holds", "open"),
    ],
)
def test_time_and_half_reset_are_judged_apart(study: Any, options: dict[str, Any], time: str, reset: str) -> None:
    found = study.verdict(_raw(2, -0.05, **options)).statistics
    assert (found["time claim"], found["half-reset"]) == (time, reset)
