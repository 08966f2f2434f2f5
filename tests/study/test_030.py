# SPDX-License-Identifier: Apache-2.0
"""Study 030 at toy size: sweeps, the shifted rows, every arm, and the verdict rule."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "030-model-soups"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def sweeps(module: Any) -> Any:
    return import_module(module.__name__.rpartition(".")[0] + ".sweeps")


def test_a_smoke_run_gives_every_arm_and_a_soup_that_is_not_worse_on_dev(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [0, 1]
        assert all(r["metric"] == pytest.approx((r["test"] + r["shift"]) / 2) for r in raw["arms"][arm])
    for sweep in raw["sweeps"]:
        assert len(sweep["configs"]) == len(sweep["dev"]) == 3
        assert sweep["ingredients"][0] == sweep["dev"].index(max(sweep["dev"]))
        assert sweep["dev of the soup"] >= max(sweep["dev"])
        assert len(sweep["learned"]["losses"]) == 5
    assert len(raw["pairs"]) == 2 and {tuple(p["pair"]) for p in raw["pairs"]} == {(0, 1), (0, 2)}


def test_no_two_runs_share_a_seed_and_settings_stay_in_range(sweeps: Any) -> None:
    every = [c for s in range(5) for c in sweeps.configs(s, 8, (1, 2, 3))]
    assert len({c["seed"] for c in every}) == 40 and every[:8] == sweeps.configs(0, 8, (1, 2, 3))
    assert all(1e-5 <= c["lr"] <= 3e-4 for c in every) and {c["epochs"] for c in every} == {1, 2, 3}
    assert {c["weight_decay"] for c in every} == {0.0, 0.01, 0.1} and {c["smoothing"] for c in every} == {0.0, 0.1}


def test_a_share_of_the_characters_is_exchanged(sweeps: Any) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(4000))  # all different
    found = sweeps.swapped(text, 0.15, random.Random(0))
    assert sorted(found) == sorted(text)
    assert sum(a != b for a, b in zip(found, text, strict=True)) / 4000 == pytest.approx(0.15, abs=0.02)
    assert sweeps.swapped("", 0.15, random.Random(0)) == ""


def _raw(module: Any, gains: list[float], clean: list[float]) -> dict[str, Any]:
    def rows(add: list[float], first: list[float]) -> list[dict[str, float]]:
        return [
            {"seed": i, "metric": 70 + a, "test": 75 + c, "shift": 65.0}
            for i, (a, c) in enumerate(zip(add, first, strict=True))
        ]

    zero = [0.0] * 5
    return {
        "arms": {arm: rows(gains, clean) if arm == module.GREEDY else rows(zero, zero) for arm in module.ARMS},
        "pairs": [],
    }


@pytest.mark.parametrize(
    ("gains", "clean", "label"),
    [
        ([1.0, 0.8, 1.2, 0.9, 1.1], [0.0, 1, 1, 1, 1], "reproduced"),
        ([1.0, 0.8, 1.2, 0.9, 1.1], [-1.0, 0, 1, 1, 1], "reproduced"),
        ([1.0, 0.8, 1.2, 0.9, 1.1], [-1.0, -1, 1, 1, 1], "inconclusive"),
        ([2.0, -1.5, 1.2, -0.9, 1.1], [1.0] * 5, "inconclusive"),
        ([0.0] * 5, [1.0] * 5, "not reproduced"),
        ([-1.0, -0.8, -1.2, 0.5, -1.1], [1.0] * 5, "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(
    study: Any, module: Any, gains: list[float], clean: list[float], label: str
) -> None:
    assert study.verdict(_raw(module, gains, clean)).label == label
