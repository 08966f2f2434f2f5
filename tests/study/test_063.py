# SPDX-License-Identifier: Apache-2.0
"""Study 063 at toy size: equal trials, settings from two tasks, all counts, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.combine import COMBINERS
from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "063-model-breadcrumbs"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


def test_a_smoke_run_gives_every_arm_seed_and_count(study: Any, module: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for arm in study.arms:
        tried = module.settings()[arm][::6]
        assert [r["seed"] for r in raw["arms"][arm]] == [0, 1]
        for row in raw["arms"][arm]:
            assert list(row["counts"]) == ["2", "4", "6", "8"] and row["metric"] == row["counts"]["8"]
            assert (row["method"], row["scale"]) == tried[row["trials"].index(max(row["trials"]))]
    assert all(len(row["test"]) == 8 for row in raw["singles"])


def test_every_method_has_as_many_settings_and_every_merge_is_known(module: Any) -> None:
    every = module.settings()
    assert set(every) == set(module.ARMS) and {len(set(tried)) for tried in every.values()} == {12}
    for tried in every.values():
        for method, _ in tried:
            COMBINERS.parse(method)


def _raw(module: Any, crumbs: list[tuple[float, float]], ta: tuple[float, float]) -> dict[str, Any]:
    def row(i: int, two: float, eight: float) -> dict[str, Any]:
        return {"seed": i, "counts": {"2": two, "4": two, "6": eight, "8": eight}}

    plain = [row(i, *ta) for i in range(5)]
    mine = [row(i, *c) for i, c in enumerate(crumbs)]
    return {"arms": {arm: mine if arm == module.CRUMBS else plain for arm in module.ARMS}}


@pytest.mark.parametrize(
    ("crumbs", "ta", "label"),
    [
        ([(90.0, 80.0), (90.0, 80.5), (90.0, 79.5)] + [(90.0, 80.0)] * 2, (92.0, 75.0), "reproduced"),
        ([(95.0, 76.0), (95.0, 76.5), (95.0, 75.8)] + [(95.0, 76.0)] * 2, (90.0, 75.0), "inconclusive"),  # drops more
        ([(90.0, 70.0), (90.0, 90.0), (90.0, 66.0)] + [(90.0, 80.0)] * 2, (92.0, 75.0), "inconclusive"),  # noisy
        ([(90.0, 75.0)] * 5, (92.0, 75.0), "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, module: Any, crumbs: Any, ta: Any, label: str) -> None:
    assert study.verdict(_raw(module, crumbs, ta)).label == label
