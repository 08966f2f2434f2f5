# SPDX-License-Identifier: Apache-2.0
"""Study 052 at toy size: every arm with its scale from one grid, ablations, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.combine import COMBINERS
from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "052-pcb-merging"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


def test_a_smoke_run_gives_every_arm_seed_and_ablation(study: Any, module: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    grid = module.SCALES[::4]
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [0, 1]
        for row in raw["arms"][arm]:
            assert len(row["trials"]) == len(grid) and row["dev"] == max(row["trials"])
            assert row["scale"] == grid[row["trials"].index(row["dev"])]
            assert row["metric"] == pytest.approx(sum(row["tasks"]) / 4)
    assert [row["name"] for row in raw["ablations"]] == list(module.ABLATIONS)
    assert all(len(v) == 4 for v in raw["tuning"].values()) and raw["lr"] in module.LRS


def test_every_merge_is_known(module: Any) -> None:
    assert len(module.SCALES) == 10
    for text in (*module.METHODS.values(), *module.ABLATIONS.values()):
        COMBINERS.parse(text)


def _raw(module: Any, pcb: list[float], ta: float, ties: float) -> dict[str, Any]:
    values = {module.PCB: pcb, module.TA: [ta] * 5, module.TIES: [ties] * 5}
    return {
        "arms": {a: [{"seed": i, "metric": m} for i, m in enumerate(v)] for a, v in values.items()},
        "ablations": [],
    }


@pytest.mark.parametrize(
    ("pcb", "ta", "ties", "label"),
    [
        ([90.0, 90.1, 90.2, 89.9, 90.0], 88.0, 87.0, "reproduced"),
        ([90.0, 90.1, 90.2, 89.9, 90.0], 88.0, 91.0, "not reproduced"),
        ([90.0, 80.0, 95.0, 85.0, 92.0], 88.0, 87.0, "inconclusive"),
        ([88.0] * 5, 88.0, 80.0, "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(
    study: Any, module: Any, pcb: list[float], ta: float, ties: float, label: str
) -> None:
    assert study.verdict(_raw(module, pcb, ta, ties)).label == label
