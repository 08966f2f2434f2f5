# SPDX-License-Identifier: Apache-2.0
"""Study 002 at toy size: the strings, splits, the measurements on a tiny model, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "002-mechanistic-finetuning"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def counting(study: Any) -> Any:
    return import_module(import_module(study.run.__module__).__package__ + ".counting")


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for rows in (raw["base"], *raw["arms"].values(), *raw["large"].values()):
        assert [r["seed"] for r in rows] == [0, 1]
    row = raw["arms"]["fine-tuned"][0]
    assert [p["k"] for p in row["pruned"]] == [0, 1] and row["pruned"][0]["old"] == pytest.approx(
        row["pruned"][0]["old"]
    )
    assert len(row["probes"]) == 2 and row["back"]["steps"][0] == 0


def test_strings_hold_the_counts_they_were_drawn_with(counting: Any) -> None:
    world = counting.World(16, 5, 8, 1, 4)
    x = world.strings(4000, counting.seeded("t"))
    a, b = counting.counted(x, counting.A), counting.counted(x, counting.B)
    for count in (a, b):
        share = torch.bincount(count, minlength=6).double() / 4000
        assert len(share) == 6 and float((share - 1 / 6).abs().max()) < 0.03  # balanced
    assert abs(float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])) < 0.06
    y = world.strings(2000, counting.seeded("u"), unequal=True)
    assert (counting.counted(y, counting.A) != counting.counted(y, counting.B)).all()
    prompt = world.prompts(x, torch.full((4000,), counting.A))
    assert (
        prompt.shape == (4000, 19) and (prompt[:, 0] == counting.COUNT).all() and (prompt[:, -1] == counting.EQ).all()
    )


def test_spurious_strings(counting: Any) -> None:
    """With a share of 1 every string has count(b) - count(a) = 1; with 0 as many as independent counts give."""
    world = counting.World(16, 5, 8, 1, 4)

    def share(spurious: float) -> float:
        x = world.strings(4000, counting.seeded("s", spurious), spurious=spurious)
        return float((counting.counted(x, counting.B) - counting.counted(x, counting.A) == 1).double().mean())

    assert share(1.0) == 1
    assert share(0.0) == pytest.approx(5 / 36, abs=0.02)
    assert share(0.5) == pytest.approx(0.5 + 0.5 * 5 / 36, abs=0.03)


def test_read_outs_train_and_test_on_other_strings(counting: Any) -> None:
    world = counting.World(16, 5, 8, 1, 4)
    one, two = (counting.task(world, 1024, counting.A, name, 0).x for name in ("probe", "probe test"))
    both = {tuple(r) for r in one.tolist()} & {tuple(r) for r in two.tolist()}
    assert not both


def test_the_untouched_base_needs_no_steps_and_no_pruned_rows_change_nothing(counting: Any) -> None:
    world = counting.World(7, 2, 16, 1, 8)
    base = counting.pretrained(world, 0, 5, knows_a=True)
    delta = counting.tuned(world, base, 1e-9, 2, 0)
    reachable = counting.accuracy(base, counting.task(world, 512, counting.A, "back test", 0))
    assert counting.back(world, base, delta, 1e-4, 0, 4, reachable - 0.01)["reached"] == 0
    found = counting.pruned(world, base, delta, 0, (2,))
    assert found[0]["old"] == pytest.approx(
        counting.accuracy(base, counting.task(world, 512, counting.A, "pruning test", 0)), abs=0.005
    )


def made_up(steps: tuple[int, int], old: float = 0.02, probe: float = 0.9, base: float = 0.99) -> dict[str, Any]:
    def rows(count: int) -> list[dict[str, Any]]:
        pruned = [{"k": 0, "old": old, "new": 0.9}, {"k": 1, "old": 0.5, "new": 0.4}]
        return [
            {"seed": s, "metric": count + s, "old": old, "probes": [0.3, probe], "pruned": pruned} for s in range(3)
        ]

    arms = {"fine-tuned": rows(steps[0]), "never could": rows(steps[1])}
    return {
        "arms": arms,
        "large": arms,
        "base": [{"seed": s, "accuracy": base, "probes": [0.4, 1.0]} for s in range(3)],
    }


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (made_up((20, 300)), "reproduced"),
        (made_up((280, 300)), "not reproduced"),
        (made_up((100, 300)), "inconclusive"),
        (made_up((20, 300), old=0.3), "inconclusive"),  # the behaviour is not lost
        (made_up((20, 300), probe=0.5), "inconclusive"),  # the ability is not there
        (made_up((20, 300), base=0.9), "inconclusive"),  # nobody could count
    ],
)
def test_verdict(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label
