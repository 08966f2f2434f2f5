# SPDX-License-Identifier: Apache-2.0
"""Study 049 at toy size: the counted cost, agreement with PEFT, one head rate for all arms, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context
from tunesmith.study.worlds.arms import train
from tunesmith.study.worlds.text import few_shot

FOLDER = Path(__file__).parents[2] / "studies" / "049-hut"
TOKENS = (32, 512, 2048, 8192)


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def cost(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".cost")


@pytest.fixture(scope="module")
def arms(study: Any) -> Any:
    return import_module(study.run.__module__)


def test_a_smoke_run_gives_every_arm_task_and_seed(study: Any, tmp_path: Path) -> None:
    result = run_study(study, smoke=True, out=tmp_path)
    raw = result["raw"]
    for arm in study.arms:
        assert {(r["task"], r["seed"]) for r in raw["arms"][arm]} == {
            (t, s) for t in ("clinc150-domains", "banking77") for s in (0, 1)
        }
        assert all(0 < r["correlation"] <= 1 for r in raw["arms"][arm])
        assert len(raw["language"][arm]) == 2
    sizes = {arm: {r["trainable"] for r in raw["arms"][arm]} for arm in study.arms}
    assert sizes["hut"] == sizes["lora"] and max(sizes["rank-1"]) < min(sizes["hut"])
    assert raw["peft"]["layers"] == 4 and raw["peft"]["gap"] < 1e-4 < raw["peft"]["moved"]
    assert {(r["arm"], r["tokens"]) for r in raw["cost"]} == {(a, t) for a in ("hut", "lora") for t in (8, 16)}
    assert all(s > 0 for r in raw["cost"] for s in r["seconds"].values())


def test_counts_cross_where_they_should(cost: Any) -> None:
    """Forward, HUT's share per token vanishes: the cross-over is (r + 1) / r times in * out / (in + out)."""
    assert cost.crossover(576, 576) == 288
    for r in (1, 8):
        at = (r + 1) / r * 288
        below, above = (
            [cost.counts(arm, round(at) + step, 576, 576, r)["forward"] for arm in ("hut", "lora")] for step in (-2, 2)
        )
        assert below[0] > below[1] and above[0] < above[1]
    hut, lora = (cost.counts(arm, 8192, 576, 576, 8)["forward and backward"] for arm in ("hut", "lora"))
    assert hut > lora  # the dense gradient of W' costs T in out


def test_every_arm_changes_queries_and_values_or_all(arms: Any) -> None:
    for arm in arms.ARMS:
        (method,) = arms.methods_of(arm)
        assert method.targets == ("all-linear" if arm == "full" else "q,v")
        assert len(arms.RATES[arm]) == 3


def test_the_head_keeps_its_own_rate(tmp_path: Path, arms: Any) -> None:
    ctx = Context(True, [0], tmp_path, Cells(tmp_path / "cells.jsonl", {}))
    world = few_shot(ctx, "banking77", 4, 0)
    heads = []
    for lr in (1e-6, 1e-5):
        out = train(world, arms.methods_of("lora"), lr=lr, steps=2, seed=0, head_lr=1e-2)
        heads.append(out.delta.part("head").parameter("", "W").detach())
    torch.testing.assert_close(heads[0], heads[1], atol=1e-4, rtol=0)
    slow = train(world, arms.methods_of("lora"), lr=1e-6, steps=2, seed=0).delta.part("head").parameter("", "W")
    assert (slow - heads[0]).abs().max() > 1e-3


def made_up(d: float = 0.0, spread: float = 0.1, forward: float = 0.8, both: float = 0.9) -> dict[str, Any]:
    """HUT - LoRA = d with a spread over runs; measured time of HUT over LoRA's at all numbers of tokens."""
    keys = [(t, s) for t in ("a", "b", "c") for s in range(5)]
    arms = {
        arm: [
            {"task": t, "seed": s, "metric": 80 + (d + spread * (-1) ** i if arm == "hut" else 0), "correlation": 0.9}
            for i, (t, s) in enumerate(keys)
        ]
        for arm in ("hut", "lora", "rank-1", "full")
    }
    cost = [
        {"arm": arm, "tokens": T, "counts": {"forward": 90 if arm == "hut" and T > 288 else 100, "forward and backward": 100},
         "seconds": {"forward": forward if arm == "hut" else 1.0, "forward and backward": both if arm == "hut" else 1.0}}
        for T in TOKENS for arm in ("hut", "lora")
    ]  # fmt: skip
    language = {arm: [{"seed": 0, "metric": 1.2}] for arm in arms}
    return {"arms": arms, "cost": cost, "crossover": 288.0, "language": language, "peft": {"gap": 1e-6}}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (made_up(), "reproduced"),
        (made_up(d=-2.0), "not reproduced"),  # worse than LoRA
        (made_up(spread=4.0), "inconclusive"),  # too noisy to say
        (made_up(both=1.2), "not reproduced"),  # slower in training at every number of tokens
        (made_up(forward=1.1), "inconclusive"),  # only the forward pass is slower
    ],
)
def test_verdict(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label


def test_one_slow_length_leaves_it_open(study: Any) -> None:
    raw = made_up()
    next(r for r in raw["cost"] if r["arm"] == "hut" and r["tokens"] == 2048)["seconds"]["forward and backward"] = 1.5
    assert study.verdict(raw).label == "inconclusive"
    raw = made_up()
    next(r for r in raw["cost"] if r["arm"] == "hut" and r["tokens"] == 512)["counts"]["forward"] = 101
    assert study.verdict(raw).label == "inconclusive"
