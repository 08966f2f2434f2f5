# SPDX-License-Identifier: Apache-2.0
"""Study 146 at toy size: arms of one size, the measures of general features, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.delta import Delta
from tunesmith.study import load_study, run_study
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context
from tunesmith.study.worlds.text import few_shot

FOLDER = Path(__file__).parents[2] / "studies" / "146-hydra"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def arms(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def kept(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".kept")


def test_a_smoke_run_gives_every_arm_task_and_seed(study: Any, arms: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for arm in study.arms:
        assert {(r["task"], r["seed"]) for r in raw["arms"][arm]} == {(t, s) for t in arms.TASKS for s in (0, 1)}
        assert all(0 < r["cka"] <= 1 + 1e-9 and 0 <= r["knn"] <= 1 for r in raw["arms"][arm])
        assert any(r["cka"] < 1 - 1e-9 for r in raw["arms"][arm])  # the encoder moved, not the head alone
    assert raw["base"]["cka"] == pytest.approx(1)


def test_arms_train_exactly_as_many_numbers(arms: Any) -> None:
    """On MiniLM's block, 384 -> 384 and 1536 -> 384: r_p (in + out) + 2 r_s out."""
    layers = ((384, 384), (1536, 384))
    sizes = {arm: sum(p * (i + o) + 2 * s * o for i, o in layers) for arm, (p, s) in arms.RANKS.items()}
    assert set(sizes.values()) == {21_504}


def test_measures(kept: Any) -> None:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(40, 6, generator=g)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g)).Q
    assert kept.cka(X, 3 * X @ turn + 1) == pytest.approx(1)
    other = kept.cka(X, torch.randn(40, 6, generator=g))
    assert 0 <= other < 0.5
    y = torch.arange(40) % 2
    apart = X + 10 * (2 * y[:, None] - 1)
    assert kept.neighbours(apart[20:], apart[:20], y[20:], y[:20], k=3) == 1.0
    assert kept.neighbours(apart[20:], apart[:20], 1 - y[20:], y[:20], k=3) == 0.0


def test_news_is_measured_with_the_delta_and_without_the_head(kept: Any, arms: Any, tmp_path: Path) -> None:
    ctx = Context(True, [0], tmp_path, Cells(tmp_path / "cells.jsonl", {}))
    world = few_shot(ctx, "banking77", 4, 0)
    news = kept.news(ctx, world.base, "fp32", 1, 1, world.held["test"])
    delta = Delta.create(world.base, *arms.methods_of("hydra"), *world.companions)
    with world.base.using(delta):
        assert news.measure()["cka"] == pytest.approx(1)
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(0.3 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)))
    with world.base.using(delta):
        assert news.measure()["cka"] < 0.99


def made_up(hydra: float, sequential: float, spread: float = 0.1, cka: float = 0.1) -> dict[str, Any]:
    """Hydra and the sequential branch above the parallel one by so many points; `cka` is sequential - parallel."""
    shift = {"hydra": hydra, "sequential": sequential, "parallel": 0.0}
    arms = {
        arm: [
            {"task": t, "seed": s, "metric": 80 + by + (spread * (-1) ** s if arm == "hydra" else 0),
             "cka": 0.5 + (cka if arm == "sequential" else 0), "knn": 0.7}
            for t in ("a", "b") for s in range(5)
        ]
        for arm, by in shift.items()
    }  # fmt: skip
    return {"arms": arms, "base": {"cka": 1.0, "knn": 0.8}}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (made_up(1.0, -1.0), "reproduced"),
        (made_up(-0.5, -1.0), "not reproduced"),
        (made_up(1.0, 2.0), "inconclusive"),  # the sequential branch alone is better still
        (made_up(1.0, -1.0, spread=5.0), "inconclusive"),  # too noisy
    ],
)
def test_verdict(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label


def test_the_claim_about_general_features_is_reported_beside_it(study: Any) -> None:
    key = "the sequential branch keeps general features"
    assert study.verdict(made_up(1.0, -1.0)).statistics[key] == "yes"
    raw = made_up(1.0, -1.0)
    for row in raw["arms"]["sequential"]:
        row["cka"] -= 0.2 if row["task"] == "b" and row["seed"] < 2 else 0
    found = study.verdict(raw)
    assert found.statistics[key] == "no" and found.label == "reproduced"
