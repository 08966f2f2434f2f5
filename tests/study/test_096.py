# SPDX-License-Identifier: Apache-2.0
"""Study 096 at toy size: both scalings matched on dev, four merges, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "096-lines"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


def test_a_smoke_run_matches_the_scalings_on_dev_and_gives_every_merge(study: Any, module: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [0, 1]
        assert all(len(r["tasks"]) == 4 for r in raw["arms"][arm])
    for row in raw["arms"][module.LINES]:
        assert row["metric"] == pytest.approx(sum(t["control"] for t in row["tasks"]) / 4)
        assert all(t["knob"] in module.ALPHAS for t in row["tasks"])
    assert all(set(c["merges"]) == set(module.MERGES) for c in raw["choices"])


def test_the_uniform_strength_is_the_nearest_on_dev(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Delta:
        def at(self, s: float) -> float:
            return s

    def scale(base: Any, delta: Any, **how: float) -> float:
        return 2 + how["start"]  # 2 .. 3 stand for the scalings by depth

    def under(worlds: Any, delta: float, i: int, split: str) -> float:
        seen.append(split)
        return 0.5 * delta if delta <= 1 else 0.3 + 0.01 * delta  # uniform: linear in the strength

    monkeypatch.setattr(import_module("tunesmith.compose.merge"), "scale", scale)
    monkeypatch.setattr(module, "under", under)
    world = type("World", (), {"base": None})()
    found = module.forgetting([world, world], Delta(), 0, 1)
    assert found[module.LINES]["knob"] == 1.0  # accuracy rises with alpha here
    assert found[module.WISE]["knob"] == pytest.approx(0.65)  # 0.325 is nearest to 0.33
    assert seen.count("test") == 4 and seen.index("test") == len(seen) - 4  # after every choice


def _raw(module: Any, control: float, target: float, merged: float, wobble: float = 0.1) -> dict[str, Any]:
    arms = {arm: [{"seed": s, "metric": 80.0, "target": 90.0} for s in range(5)] for arm in module.ARMS}
    for s in range(5):
        arms[module.LINES][s] = {"seed": s, "metric": 80 + control + wobble * (s - 2), "target": 90 + target}
        arms["sum, lines"][s] = {"seed": s, "metric": 80 + merged + wobble * (s - 2), "target": 90.0}
    return {"arms": arms}


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ((2.0, -0.4, 1.0), "reproduced"),
        ((2.0, -0.6, 1.0), "inconclusive"),
        ((2.0, 0.0, 0.0), "inconclusive"),
        ((2.0, 0.0, 1.0, 5.0), "inconclusive"),
        ((-1.0, 0.0, 1.0), "inconclusive"),
        ((-1.0, 0.0, -1.0), "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, module: Any, values: tuple[float, ...], label: str) -> None:
    assert study.verdict(_raw(module, *values)).label == label
