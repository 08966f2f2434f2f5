# SPDX-License-Identifier: Apache-2.0
"""Study 029 at toy size: its arms, the scaled deltas, and the verdict rule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "029-intruder-dimensions"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def raw(study: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_study(study, smoke=True, out=tmp_path_factory.mktemp("029"))["raw"]


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, raw: Any) -> None:
    assert {arm: [r["seed"] for r in rows] for arm, rows in raw["arms"].items()} == {a: [0, 1] for a in study.arms}
    for arm, rows in raw["arms"].items():
        for r in rows:
            assert r["matrices"] == 14 and r["metric"] == r["intruders"] >= 0
            assert ("scaled" in r) == (arm == "lora r=8")
    sizes = {arm: rows[0]["trainable"] for arm, rows in raw["arms"].items()}
    assert sizes["lora r=64"] == sizes["rslora r=64"] == 64 * sizes["lora r=1"]


def made(study: Any, **counts: Any) -> Any:
    row = {"seed": 0, "accuracy": 80.0, "forgetting": 1.0, "intruders": 0, "metric": 0}
    arms = {arm: [{**copy.deepcopy(row), "seed": s} for s in range(3)] for arm in study.arms}
    for r in arms["lora r=8"]:
        r.update(
            intruders=20, scaled={"accuracy": 79.5, "forgetting": 0.7}, control={"accuracy": 80.0, "forgetting": 0.9}
        )
    for r in arms["rslora r=64"]:
        r["intruders"] = 5
    return {"arms": arms}


def test_the_verdict_follows_the_rule(study: Any) -> None:
    good = made(study)
    assert study.verdict(good).label == "reproduced"
    for arm, change in (
        ("full", {"intruders": 3}),
        ("rslora r=64", {"intruders": 20}),
        ("lora r=8", {"scaled": {"accuracy": 78.0, "forgetting": 0.7}}),
        ("lora r=8", {"scaled": {"accuracy": 80.0, "forgetting": 0.9}}),
        ("lora r=8", {"control": {"accuracy": 80.0, "forgetting": 0.6}}),
        ("full", {"accuracy": 85.0}),
    ):
        bad = made(study)
        for r in bad["arms"][arm]:
            r.update(change)
        assert study.verdict(bad).label == "inconclusive", (arm, change)
    same = made(study)
    for r in same["arms"]["lora r=8"]:
        r["intruders"] = 0
    assert study.verdict(same).label == "not reproduced"
