# SPDX-License-Identifier: Apache-2.0
"""Study 045 at toy size: every arm, set and rate, the search under a mask of its own, AdamR, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context

FOLDER = Path(__file__).parents[2] / "studies" / "045-darex"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def runs(module: Any) -> Any:
    return import_module(module.__name__.rpartition(".")[0] + ".runs")


def test_a_smoke_run_gives_every_arm_set_rate_and_share(study: Any, module: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    wanted = {(n, r, p) for n in module.SETS for r in module.RATES for p in (0.9, 0.99)}
    for arm in study.arms:
        assert {(r["set"], r["rate"], r["p"]) for r in raw["arms"][arm]} == wanted
        assert all(0 <= r["metric"] <= 100 for r in raw["arms"][arm])
        assert arm == "by size" or all(len(r["masks"]) == 2 for r in raw["arms"][arm])
    for row in raw["changes"]:
        assert 1 - row["p"] - 1e-9 <= row["labelled"] <= 1 and 1 - row["p"] - 1e-9 <= row["mean q by layer"] < 1
    assert [[t["pull"] for t in row["trials"]] for row in raw["adamr"]] == [[0.0, 0.3]] * 2


def test_a_pull_keeps_the_change_small_and_masks_that_search_are_not_reported(
    runs: Any, module: Any, tmp_path: Path
) -> None:
    ctx = Context(True, [0], tmp_path, Cells(tmp_path / "cells.jsonl", {"test": "045"}))
    w = runs.world_of(ctx, "sst2", module.sizes_of(True), 0)
    free, held = (w.tuned(1e-3, 5, 0, {"pull": p}) for p in (0.0, 100.0))

    def size(delta: Any) -> float:
        return float(sum(t.detach().square().sum() for _, t in delta.items()))

    assert 0 < size(held) < size(free)
    made = runs.Pruned(w, free)
    seen = []
    plain = made.at
    made.at = lambda p, q, mask: (seen.append(mask), plain(p, q, mask))[1]
    made.reported(0.9, None, 3)
    assert seen == [0, 1, 2] and runs.SEARCHED not in seen
    one, again, other = (plain(0.9, None, m).digest for m in (0, 0, 1))
    assert one == again != other


def _raw(module: Any, gains: dict[str, list[float]]) -> dict[str, Any]:
    arms: dict[str, list[dict[str, Any]]] = {arm: [] for arm in module.ARMS}
    for arm in module.ARMS:
        for name in module.SETS:
            for seed in (0, 1):
                add = gains[name][3 * seed : 3 * seed + 3] if arm == module.LABELLED else [0.0] * 3
                for rate in module.RATES:
                    for p in (0.9, 0.99):
                        masks = [60 + a if (rate, p) == ("large", 0.99) else 90.0 for a in add]
                        arms[arm].append(
                            {"set": name, "seed": seed, "rate": rate, "p": p, "metric": sum(masks) / 3, "masks": masks}
                        )
    trials = [
        {"pull": 0.0, "unpruned dev": 90.0, "unpruned": 90.0, "dare dev": 55.0, "dare": 55.0},
        {"pull": 0.1, "unpruned dev": 89.5, "unpruned": 89.0, "dare dev": 80.0, "dare": 79.0},
        {"pull": 0.3, "unpruned dev": 85.0, "unpruned": 84.0, "dare dev": 85.0, "dare": 84.0},  # costs too much
    ]
    return {"arms": arms, "adamr": [{"set": n, "seed": s, "trials": trials} for n in module.SETS for s in (0, 1)]}


@pytest.mark.parametrize(
    ("sst2", "ag_news", "label"),
    [
        ([20.0, 22, 18, 21, 19, 20], [5.0, 6, 5, 4, 5, 5], "reproduced"),
        ([20.0, 22, 18, 21, 19, 20], [5.0, -9, 5, -4, 9, -3], "inconclusive"),
        ([20.0, 22, 18, 21, 19, 20], [-5.0] * 6, "inconclusive"),
        ([1.0, -1, 1, -1, 1, -1], [-2.0] * 6, "not reproduced"),
        ([0.0] * 6, [0.0] * 6, "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(
    study: Any, module: Any, sst2: list[float], ag_news: list[float], label: str
) -> None:
    found = study.verdict(_raw(module, {"sst2": sst2, "ag_news": ag_news}))
    assert found.label == label
    assert found.statistics["AdamR"] == {"raises DARE by": 24.0, "costs unpruned": 1.0, "n": 4}
