# SPDX-License-Identifier: Apache-2.0
"""Study 021 at toy size: equal counts, masks that move, and the verdict rule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.delta import Delta
from tunesmith.study import load_study, run_study
from tunesmith.study.worlds.language import toy_base

FOLDER = Path(__file__).parents[2] / "studies" / "021-lift"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def result(study: Any, tmp_path_factory: Any) -> dict[str, Any]:
    return run_study(study, smoke=True, out=tmp_path_factory.mktemp("out"))


def test_a_smoke_run_has_every_arm_and_seed_with_equal_trials(study: Any, result: dict[str, Any]) -> None:
    raw = result["raw"]
    assert {arm: len(rows) for arm, rows in raw["arms"].items()} == dict.fromkeys(study.arms, 2)
    assert {len(choice["trials"]) for choice in raw["tuning"].values()} == {3}
    assert raw["base"]["kl"] == 0 and raw["base"]["agreement"] == 1


def test_lifts_masks_move_and_the_others_stay(result: dict[str, Any]) -> None:
    for arm, rows in result["raw"]["arms"].items():
        for row in rows:
            assert (row["extra"]["settled"] > 0) == (arm == "lift")


def test_the_light_arms_train_as_many_numbers_as_lora(study: Any) -> None:
    base = toy_base()
    methods = sys.modules[study.run.__module__].methods
    counts = {arm: Delta.create(base, *methods(arm, True)).trainable_parameters for arm in study.arms}
    assert counts["magnitude"] == counts["random"] == counts["lift"] == counts["lora"] < counts["full"]


def _raw(
    lift: float = 1.00, magnitude: float = 1.05, *, wobble: float = 0.001, best: float = 1.0, lora: float = 0.2,
    full: float = 0.3, forgets: float = 0.1,
) -> dict[str, Any]:  # fmt: skip
    means = {"lift": lift, "magnitude": magnitude, "random": 1.1, "lora": best, "full": 1.01}
    general = {"lift": forgets, "magnitude": 0.1, "random": 0.1, "lora": lora, "full": full}
    arms = {
        arm: [
            {
                "seed": s,
                "metric": m + (wobble * (s - 1) if arm == "lift" else 0.0),
                "retention": {"loss": 4 + general[arm]},
            }
            for s in range(3)
        ]
        for arm, m in means.items()
    }
    return {"arms": arms, "base": {"target": 1.4, "loss": 4.0}}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (_raw(), "reproduced"),
        (_raw(magnitude=1.0, wobble=0.0), "not reproduced"),
        (_raw(magnitude=0.99), "not reproduced"),
        (_raw(wobble=0.06), "inconclusive"),  # one seed the other way
        (_raw(wobble=0.045), "inconclusive"),  # within two standard errors
        (_raw(best=0.97), "inconclusive"),
        (_raw(forgets=0.25), "inconclusive"),
        (_raw(full=0.05), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label
