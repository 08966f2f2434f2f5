# SPDX-License-Identifier: Apache-2.0
"""Study 132 at toy size: the forward algorithm against brute force, features, and the verdict rule."""

from __future__ import annotations

import itertools
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "132-hmm-head-tuning"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def hmm(study: Any) -> Any:
    return import_module(import_module(study.run.__module__).__package__ + ".hmm")


def test_a_smoke_run_gives_every_arm_and_draw(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [r["seed"] for r in raw["curves"][arm]] == [0, 1]
    assert set(raw["loss"]) == {"2", "16", "64"}


def test_beliefs_are_those_of_brute_force(hmm: Any) -> None:
    """Three states, five symbols long: all 243 paths."""
    world = hmm.made(3, 4, alpha=1.0, seed=7)
    x = world.sample(6, 5, hmm.seeded("x"))
    found = world.beliefs(x)
    torch.testing.assert_close(found.sum(1), torch.ones(6, dtype=torch.float64))
    for row, b in zip(x.tolist(), found, strict=True):
        want = torch.zeros(3, dtype=torch.float64)
        for path in itertools.product(range(3), repeat=5):
            p = world.start[path[0]] * world.O[path[0], row[0]]
            for t in range(1, 5):
                p = p * world.A[path[t - 1], path[t]] * world.O[path[t], row[t]]
            want[path[-1]] += p
        torch.testing.assert_close(b, want / want.sum())


def test_sequences_follow_the_model(hmm: Any) -> None:
    world = hmm.made(3, 4, seed=1)
    x = world.sample(20_000, 2, hmm.seeded("y"))
    for t, p in ((0, world.start), (1, world.start @ world.A)):
        share = torch.bincount(x[:, t], minlength=4).double() / 20_000
        torch.testing.assert_close(share, p @ world.O, atol=0.015, rtol=0)


def test_features_and_labels(hmm: Any) -> None:
    world = hmm.made(4, 6)
    b = world.beliefs(world.sample(2000, 6, hmm.seeded("f")))
    torch.testing.assert_close(hmm.expanded(b, 8), hmm.expanded(b, 32)[:, :8])
    M = torch.randn(4, 3, generator=hmm.seeded("M"), dtype=torch.float64)
    clean, noisy = hmm.labels(b, M, 2.0, hmm.seeded("n"))
    torch.testing.assert_close((noisy - clean).var(0) * 2, clean.var(0), rtol=0.15, atol=0)


def made_up(peak: float, ridge: float, rise: float = 1.0) -> dict[str, Any]:
    arms = {}
    for arm in ("random features of the belief", "recurrent model", "random features of the belief, ridge"):
        top = ridge if arm.endswith("ridge") else peak
        arms[arm] = [
            {"seed": s, "risk": {"8": 1.0, "16": 1 + 0.1 * rise, "32": 1 + 0.2 * rise, "64": 1 + 0.4 * rise,
                                 "128": top + 0.01 * s, "512": 1.0}}
            for s in range(5)
        ]  # fmt: skip
    return {"n": 128, "curves": arms, "arms": {}}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (made_up(20.0, 1.1), "reproduced"),
        (made_up(0.5, 0.5), "not reproduced"),
        (made_up(20.0, 15.0), "inconclusive"),  # ridge leaves the peak
        (made_up(20.0, 1.1, rise=-1.0), "inconclusive"),  # the risk falls before n
    ],
)
def test_verdict(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label
