# SPDX-License-Identifier: Apache-2.0
"""Study 075 at toy size: its items, that held-out answers were never trained on, and the verdict rule."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "075-prior-influence"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def world(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".world")


def test_a_smoke_run_gives_every_arm(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    seeds = {arm: [r["seed"] for r in rows] for arm, rows in raw["arms"].items()}
    assert seeds == {
        "prior layers": [0, 1], "random layers": [0] * 3 + [1] * 3, "lowest c": [0, 1], "all layers": [0, 1],
    }  # fmt: skip
    assert [r["layers"] for r in raw["sweep"]] == [[0], [2]]
    assert [len(r["c"]) for r in raw["base"]] == [4, 4]
    for rows in raw["arms"].values():
        assert all(len(r["right"]) == len(r["prior"]) == 16 for r in rows)
    assert len({r["trainable"] for rows in raw["arms"].values() for r in rows}) == 1


def test_held_out_answers_share_no_string_with_training(world: Any) -> None:
    s, taken = world.strings(200, 0), set()
    test, tune = world.items(s, 60, "test:0", taken), world.items(s, 60, "tune:0", taken)
    assert len(test) == len(tune) == 60 and not set(test) & set(tune)
    for a, b in zip(test[::2], test[1::2], strict=True):  # matched pairs: the same letters, only one of them common
        assert sorted(a) == sorted(b) and a in s.common and b not in s.common


def test_tasks_are_what_they_say(world: Any) -> None:
    ids, at = world.acronym((1, 2, 3, 4), random.Random(0))
    assert ids[at:] == [1, 2, 3, 4] and ids[at - 1] == world.EQUALS and ids[2:at:3][:4] == [1, 2, 3, 4]
    ids, at = world.third((7, 8, 0, 0), random.Random(0))
    assert ids[at:] == [7, 8] and ids[8:10] == [7, 8]


def raw_of(base_follows: bool, after_follows: bool, low: dict[str, float], gain: float = 20.0) -> Any:
    rng = random.Random(0)

    def row(seed: int, follows: bool, value: float, total: float) -> dict[str, Any]:
        prior = [rng.gauss(0, 1) for _ in range(200)]
        right = [int(p + rng.gauss(0, 1) > 0) if follows else int(rng.random() < 0.5) for p in prior]
        return {"seed": seed, "low": value, "acronym": total, "control": 90.0, "prior": prior, "right": right}

    noise = {0: 0.0, 1: 0.5, 2: -0.5}
    arms = {a: [row(s, after_follows, v + noise[s], 60 + gain) for s in range(3)] for a, v in low.items()}
    return {"arms": arms, "base": [row(s, base_follows, 20.0, 60.0) for s in range(3)]}


def test_the_verdict_follows_the_rule(study: Any) -> None:
    better = {"prior layers": 80.0, "random layers": 60.0, "lowest c": 61.0, "all layers": 85.0}
    raw = raw_of(True, False, better)
    for s in range(3):
        raw["arms"]["prior layers"][s]["low"] += s  # the difference varies by seed
    assert study.verdict(raw).label == "reproduced"
    assert study.verdict(raw_of(False, False, better)).label == "inconclusive"
    assert study.verdict(raw_of(True, True, better)).label == "inconclusive"
    assert study.verdict(raw_of(True, False, better, gain=-5.0)).label == "inconclusive"
    assert study.verdict(raw_of(True, False, {**better, "prior layers": 55.0})).label == "not reproduced"
    weak = raw_of(True, False, better)
    for r in weak["base"]:
        r["acronym"] = 3.0
    assert study.verdict(weak).label == "inconclusive"
