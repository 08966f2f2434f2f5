# SPDX-License-Identifier: Apache-2.0
"""Search by grid and CMA-ES: the optimum is found, the held-out split chooses nothing, and every trial is kept."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tunesmith.compose.search import Axis, Values, search, settle
from tunesmith.core.combine import COMBINERS, combiner
from tunesmith.core.errors import UsageError
from tunesmith.core.registry import option


@pytest.fixture(scope="module")
def how() -> Any:
    @combiner("test-search")
    class Some:
        """For these tests."""

        share: float = option(0.5, "a share", low=0.0, high=1.0)
        count: int = option(3, "a number", low=0, high=10)

        def combine(self, at: Any, changes: Any, weights: Any, now: Any) -> None:
            return None

    yield Some
    COMBINERS._known.pop("test-search", None)


def test_a_grid_tries_every_combination_once_and_the_first_of_equal_scores_wins() -> None:
    axes = {"a": Axis(0.0, 1.0, points=(0.0, 0.5, 1.0)), "b": Axis(0, 4, levels=5, whole=True)}
    seen: list[Values] = []

    def score(v: Values) -> float:
        seen.append(v)
        return -((v["a"] - 0.5) ** 2)

    found = search(score, axes)
    assert len(seen) == len(found.trials) == 15 and len({tuple(v.items()) for v in seen}) == 15
    assert found.values == {"a": 0.5, "b": 0.0} and found.score == 0.0
    assert found.start == {"a": 0.5, "b": 2.0} and found.start_score == 0.0
    json.dumps(found.as_json(), allow_nan=False)


def test_the_held_out_split_is_looked_at_for_the_winner_and_the_start_only() -> None:
    looked: list[Values] = []

    def held(v: Values) -> float:
        looked.append(v)
        return 10 * v["a"]

    axes = {"a": Axis(0.0, 1.0, start=0.25, points=(0.0, 0.5, 1.0))}
    found = search(lambda v: -v["a"], axes, held_out=held)  # the held-out split would have chosen 1.0
    assert found.values == {"a": 0.0} and found.held_out == 0.0 and found.start_held_out == 2.5
    assert looked == [{"a": 0.25}, {"a": 0.0}]
    found = search(lambda v: -abs(v["a"] - 0.5), {"a": Axis(0, 1, points=(0.0, 0.5))}, held_out=held)
    assert found.held_out == found.start_held_out == 5.0 and len(looked) == 3


def test_scores_that_are_not_finite_cannot_win() -> None:
    axes = {"a": Axis(0.0, 1.0, points=(0.0, 0.5, 1.0))}
    table = {0.0: math.nan, 0.5: 1.0, 1.0: math.inf}
    found = search(lambda v: table[v["a"]], axes)
    assert found.values == {"a": 0.5} and [t.score for t in found.trials] == [None, 1.0, None]
    with pytest.raises(UsageError, match="none of 3 trials gave a finite score"):
        search(lambda v: math.nan, axes)
    assert search(lambda v: v["a"], axes, maximise=False).values == {"a": 0.0}


def test_cmaes_finds_the_optimum_of_a_quadratic_and_keeps_its_budget_and_box() -> None:
    pytest.importorskip("cmaes", reason="the extra `search` is not installed")
    best = {"x": 0.9, "y": 1.1, "z": 1.25}

    def score(v: Values) -> float:
        assert all(0.8 <= x <= 1.3 for x in v.values())
        return -sum((i + 1) * (v[k] - best[k]) ** 2 for i, k in enumerate(best))

    axes = {k: Axis(0.8, 1.3, start=1.0) for k in best}
    found = search(score, axes, how="cmaes", budget=300, seed=3)
    assert len(found.trials) <= 300
    assert found.trials[0].values == dict.fromkeys(best, 1.0) and found.start_score == found.trials[0].score
    assert found.values == pytest.approx(best, abs=5e-3)
    again = search(score, axes, how="cmaes", budget=40, seed=3)
    assert again.trials == search(score, axes, how="cmaes", budget=40, seed=3).trials and len(again.trials) == 40
    assert again.trials != search(score, axes, how="cmaes", budget=40, seed=4).trials
    one = search(lambda v: -((v["x"] - 1.2) ** 2), {"x": Axis(0.8, 1.3)}, how="cmaes", budget=60)
    assert one.values["x"] == pytest.approx(1.2, abs=5e-3)


def test_cmaes_over_whole_numbers_ends() -> None:
    pytest.importorskip("cmaes", reason="the extra `search` is not installed")
    found = search(lambda v: -abs(v["n"] - 2), {"n": Axis(0, 3, whole=True)}, how="cmaes", budget=50)
    assert found.values == {"n": 2.0} and len(found.trials) <= 4


def test_what_cannot_be_searched_is_refused() -> None:
    axes = {"a": Axis(0.0, 1.0)}
    with pytest.raises(UsageError, match="the grid has 10 points and the budget is 9"):
        search(lambda v: 0.0, axes, budget=9)
    with pytest.raises(UsageError, match="unknown search 'cma'.*\n.*cmaes"):
        search(lambda v: 0.0, axes, how="cma")
    with pytest.raises(UsageError, match="nothing to search"):
        search(lambda v: 0.0, {})
    for bad in ((1.0, 1.0), (0.0, math.inf)):
        with pytest.raises(UsageError, match="finite low < high"):
            Axis(*bad)
    with pytest.raises(UsageError, match="2.0 lies outside"):
        Axis(0.0, 1.0, points=(0.5, 2.0))


def test_values_go_into_a_combiner_and_its_weights_by_name(how: Any) -> None:
    made, weights = settle(how(), [1.0, 2.0], {"share": 0.25, "count": 4.0, "weight": 0.5})
    assert (made.share, made.count, weights) == (0.25, 4, [0.5, 1.0])
    assert settle(how(), [1.0, 2.0], {"weight:b": 0.1, "weight:0": 3}, ("a", "b"))[1] == [3.0, 0.1]
    with pytest.raises(UsageError, match="nothing called 'shar'.*\n.*share"):
        settle(how(), [1.0], {"shar": 1.0})
    with pytest.raises(UsageError, match="no source '2'"):
        settle(how(), [1.0], {"weight:2": 1.0})
    with pytest.raises(UsageError, match="outside"):
        settle(how(), [1.0], {"share": 1.5})
