# SPDX-License-Identifier: Apache-2.0
"""Pareto fronts, paired comparisons over rows and seeds, and what is recommended."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tunesmith.arena.judge import against_best, between, recommend
from tunesmith.arena.pareto import front
from tunesmith.core.errors import DataError


def test_the_front_holds_what_nothing_beats_in_everything() -> None:
    points = [(1.0, 0.2), (0.5, 0.9), (0.4, 0.8), (1.0, 0.1), (0.2, 1.0)]
    assert front(points) == [True, True, False, False, True]
    assert front([(1.0, 1.0), (1.0, 1.0)]) == [True, True], "twins do not beat each other"
    assert front([]) == []


def flips(share: float, seeds: int, rows: int = 300, seed: int = 0) -> list[list[float]]:
    rng = random.Random(seed)
    return [[float(rng.random() < share) for _ in range(rows)] for _ in range(seeds)]


def test_a_clear_difference_is_found_and_none_is_made_up() -> None:
    low, high = flips(0.5, 3, seed=1), flips(0.8, 3, seed=2)
    found = between(low, high, higher_is_better=True)
    assert found.verdict == "win" and found.low > 0 and found.difference == pytest.approx(np.mean(high) - np.mean(low))
    assert between(low, high, higher_is_better=False).verdict == "loss"
    same = between(low, flips(0.5, 3, seed=3), higher_is_better=True)
    assert same.verdict == "tie" and same.low < 0 < same.high
    with pytest.raises(DataError, match="same rows"):
        between([[1.0, 0.0]], [[1.0]], higher_is_better=True)


def test_seeds_that_disagree_widen_the_interval() -> None:
    """The same mean over the same rows, but from two seeds far apart: the luck of the seed is part of the doubt."""
    steady = [[1.0] * 120 + [0.0] * 80] * 2
    shaky = [[1.0] * 180 + [0.0] * 20, [1.0] * 80 + [0.0] * 120]
    base = [[1.0] * 100 + [0.0] * 100]
    calm, wild = (between(base, arm, higher_is_better=True) for arm in (steady, shaky))
    assert wild.high - wild.low > 2 * (calm.high - calm.low)
    assert calm.verdict == "win" and wild.verdict == "tie"


def test_many_comparisons_are_adjusted_for() -> None:
    best = flips(0.62, 2, rows=150, seed=5)
    one = against_best({"best": best, "other": flips(0.5, 2, rows=150, seed=6)}, "best", higher_is_better=True)
    twins = {f"t{i}": flips(0.62, 2, rows=150, seed=20 + i) for i in range(8)}
    many = against_best(
        {"best": best, "other": flips(0.5, 2, rows=150, seed=6), **twins}, "best", higher_is_better=True
    )
    assert many["other"].p > one["other"].p
    assert {many[t].verdict for t in twins} == {"tie"}


def row(
    label: str, target: float, kept: float, stored: int, verdict: str | None, pareto: bool = True
) -> dict[str, Any]:
    return {"label": label, "target": {"mean": target}, "retention": {"mean": kept}, "stored": stored, "lr": 1e-3,
            "options": {}, "pareto": pareto, "versus": None if verdict is None else {"verdict": verdict}}  # fmt: skip


def told(*rows: dict[str, Any], controls: Any = (), higher: bool = True) -> dict[str, Any]:
    return recommend(rows, controls, "accuracy", higher_is_better=higher)


def test_a_clear_winner_is_taken_and_what_keeps_more_is_named() -> None:
    found = told(row("a", 0.9, 0.8, 10, None), row("b", 0.5, 0.99, 1, "worse"))
    assert found["method"] == "a" and found["not_shown_worse"] == ["a"] and found["convincing"]
    assert "better than each of the other 1" in found["reason"] and "More is kept" in found["reason"]


def test_of_a_tie_the_one_that_keeps_most_is_taken_then_the_smallest() -> None:
    kept = told(row("a", 0.9, 0.80, 10, None), row("b", 0.88, 0.95, 99, "tie"), row("c", 0.3, 1.0, 1, "worse"))
    assert (
        kept["method"] == "b"
        and kept["best_on_target"] == "a"
        and "a tie" in kept["reason"]
        and "keeps most" in kept["reason"]
    )
    small = told(row("a", 0.9, 0.950, 10, None), row("b", 0.88, 0.955, 99, "tie"))
    assert small["method"] == "a" and "stores least" in small["reason"]
    losses = told(row("a", 2.0, 0.9, 5, "worse"), row("b", 1.0, 0.9, 5, None), higher=False)
    assert losses["method"] == "b"


def test_a_method_that_beats_no_control_is_no_finding() -> None:
    controls = [{"name": "constant answer", "verdict": "not beaten"}, {"name": "untrained base", "verdict": None}]
    found = told(row("a", 0.4, 1.0, 1, None), controls=controls)
    assert not found["convincing"] and "constant answer" in found["reason"] and "untrained base" not in found["reason"]
