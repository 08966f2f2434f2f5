# SPDX-License-Identifier: Apache-2.0
"""Study 035 at toy size: the mixture, the rules that tell kinds apart, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "035-cge"
CODE = ["def add(a, b):\n    return a + b", "import math\nfor x in xs:\n    y += x"]


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def world(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".world")


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    assert {arm: [r["seed"] for r in rows] for arm, rows in raw["arms"].items()} == {a: [0, 1] for a in study.arms}
    assert all(len(r["texts"]) == 3 for rows in raw["arms"].values() for r in rows)


def test_the_rules_know_their_own_texts_and_leave_news_alone(world: Any) -> None:
    for kind in world.KINDS:
        texts = world.made(kind, 20, 0, CODE)
        assert [world.kind_of(t) for t in texts] == [kind] * 20
        assert texts == world.made(kind, 20, 0, CODE)
        assert kind == "code" or texts != world.made(kind, 20, 1, CODE)
    for text in (
        "Santander accelerates Abbey bid Santander says it aims to complete its takeover one month sooner.",
        "Oil prices fell by 2.5 percent, to $43.12 a barrel, in New York on Tuesday.",
        "The company will return to growth for the first time in years, analysts said.",
        "",
    ):
        assert world.kind_of(text) is None


def test_the_mixture_holds_everything_once(world: Any) -> None:
    news = [f"news {i}" for i in range(30)]
    rows = world.mixture(news, 4, 0, CODE)
    assert len(rows) == 50 and set(news) <= set(rows) and rows != sorted(rows)


def raw_of(shares: tuple[float, float, float], domains: tuple[list[int], list[int]]) -> Any:
    static, iterative = domains
    return {
        "arms": {
            "sampling": [{"seed": s, "metric": shares[0], "domains": 1} for s in range(3)],
            "static": [{"seed": s, "metric": shares[1], "domains": static[s]} for s in range(3)],
            "iterative": [{"seed": s, "metric": shares[2], "domains": iterative[s]} for s in range(3)],
        }
    }


def test_the_verdict_follows_the_rule(study: Any) -> None:
    few, many = [2, 2, 1], [4, 5, 4]
    assert study.verdict(raw_of((10, 40, 50), (few, many))).label == "reproduced"
    assert study.verdict(raw_of((30, 40, 50), (few, many))).label == "inconclusive"
    assert study.verdict(raw_of((10, 40, 50), (few, [2, 5, 1]))).label == "inconclusive"
    assert study.verdict(raw_of((10, 40, 50), ([1, 1, 0], [3, 3, 3]))).label == "inconclusive"
    assert study.verdict(raw_of((40, 40, 50), (few, many))).label == "not reproduced"
