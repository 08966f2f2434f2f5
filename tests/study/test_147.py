# SPDX-License-Identifier: Apache-2.0
"""Study 147 at toy size: equal sizes, what is looked at in mid-run, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "147-bone"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def arms(study: Any) -> Any:
    return import_module(study.run.__module__)


def test_a_smoke_run_gives_every_arm_seed_and_look(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [1, 2]
        for row in raw["arms"][arm]:
            assert [step for step, _ in row["curve"]] == raw["looks"] == [1, 2, 4]
            assert row["curve"][-1][1] == pytest.approx(row["metric"] / 1000)
            assert len({loss for _, loss in row["curve"]}) == 3
        assert len(raw["tuning"][arm]["trials"]) == 2


def test_arms_are_of_one_size_within_two_percent(arms: Any) -> None:
    """Linear layers [out, in] of a SmolLM2 block: out * r for blocks and slices of r, r (out + in) for LoRA and PiSSA."""
    layers = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
    square = sum(out * arms.BLOCK for out, _ in layers)
    thin = sum(arms.RANK * (out + n) for out, n in layers)
    assert (4 * square, 4 * thin) == (663_552, 651_264)
    assert all(out % arms.BLOCK == 0 and n % arms.BLOCK == 0 for out, n in layers)
    (bat,), (tile,), (lora,), (pissa,) = (arms.methods_of(arm) for arm in arms.ARMS)
    assert (bat.block, tile.rank, lora.rank, pissa.rank) == (32, 32, 16, 16)
    assert lora.alpha / lora.rank == pissa.alpha / pissa.rank == 1


def test_a_run_that_broke_off_leaves_no_looks_behind(arms: Any) -> None:
    world = SimpleNamespace(score=lambda split: SimpleNamespace(metric={"test": 1.5}[split]))
    watch = arms.Watch(world, (2, 3))
    for step in (1, 2):
        watch.on_step(step, 0.0)
    for step in (1, 2, 3, 4):
        watch.on_step(step, 0.0)
    assert watch.curve(None) == [[2, 1.5], [3, 1.5]]


def made_up(early: tuple[float, float], late: tuple[float, float], spread: float = 0.001) -> dict[str, Any]:
    """BAT minus (LoRA, PiSSA) after 30 and after 60 steps."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for arm, below in (
        ("bat", (0.0, 0.0)),
        ("tile", (0.0, 0.0)),
        ("lora", (early[0], late[0])),
        ("pissa", (early[1], late[1])),
    ):
        arms[arm] = []
        for seed in (1, 2, 3):
            noise = spread * (seed - 2) if arm == "bat" else 0.0
            curve = [[15, 1.3 + noise], [30, 1.2 + noise - below[0]], [60, 1.1 + noise - below[1]]]
            arms[arm].append({"seed": seed, "metric": 1000 * curve[-1][1], "curve": curve, "trainable": 10, "seconds": 1.0,
                              "retention": {"kl": 0.1}})  # fmt: skip
    return {"arms": arms, "looks": [15, 30, 60]}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (made_up((-0.05, -0.04), (-0.03, -0.02)), "reproduced"),
        (made_up((0.05, 0.04), (0.03, 0.02)), "not reproduced"),
        (made_up((-0.05, -0.04), (-0.03, 0.02)), "inconclusive"),  # PiSSA is better in the end
        (made_up((-0.05, -0.04), (-0.03, -0.02), spread=0.1), "inconclusive"),  # too noisy
    ],
)
def test_verdict(study: Any, raw: dict[str, Any], label: str) -> None:
    found = study.verdict(raw)
    assert found.label == label
    assert len(found.reasons) == 4
