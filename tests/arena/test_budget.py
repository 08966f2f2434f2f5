# SPDX-License-Identifier: Apache-2.0
"""Times as text, the split of a budget, and the learning rates that are tried."""

from __future__ import annotations

import pytest

from tunesmith.arena.budget import MIN_STEPS, SPARE, Timing, next_rate, parse_seconds, plan
from tunesmith.core.errors import UsageError

FAST, SLOW = Timing(0.5, 0.1, 0.2, 1.0), Timing(2.0, 0.4, 0.2, 1.0)
BOTH = {"fast": FAST, "slow": SLOW}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("1h30m", 5400), ("1h 30m", 5400), (45, 45)],
)
def test_lengths_of_time(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "ten", "10x", "-5m", "0", "5m10", "m", "nan"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_seconds(text)


def total(made: dict[str, int], rates: int, seeds: int) -> float:
    return sum(
        (rates + seeds - 1) * (t.start + made[m] * t.step) + rates * t.dev + seeds * t.test for m, t in BOTH.items()
    )


def test_equal_time_gives_each_training_the_same_seconds_and_stays_within_the_budget() -> None:
    made = plan(BOTH, 600, equal="time", rates=3, seeds=3, most=10_000)
    each = {m: t.start + made.steps[m] * t.step for m, t in BOTH.items()}
    assert abs(each["fast"] - each["slow"]) <= SLOW.step
    longest = max(each.values())
    assert 0.95 * SPARE * 600 < total(made.steps, 3, 3) + longest <= SPARE * 600 + 1e-6
    assert made.seconds == pytest.approx(total(made.steps, 3, 3)) and (made.rates, made.seeds) == (3, 3)


def test_trials_that_run_at_once_share_the_budget() -> None:
    one = plan(BOTH, 600, equal="time", rates=3, seeds=3, most=10_000)
    two = plan(BOTH, 600, equal="time", rates=3, seeds=3, most=10_000, lanes=2.0)
    longest = max(t.start + two.steps[m] * t.step for m, t in BOTH.items())
    assert total(one.steps, 3, 3) < 0.6 * total(two.steps, 3, 3)
    assert total(two.steps, 3, 3) + longest <= SPARE * 1200 + 1e-6
    assert two.seconds == pytest.approx(total(two.steps, 3, 3) / 2), "seconds are what a clock on the wall shows"


def test_equal_parameters_gives_the_same_steps() -> None:
    made = plan(BOTH, 600, equal="parameters", rates=3, seeds=3, most=10_000)
    assert made.steps["fast"] == made.steps["slow"] > MIN_STEPS
    assert total(made.steps, 3, 3) <= SPARE * 600


def test_steps_are_capped_and_controls_are_paid_for() -> None:
    assert plan(BOTH, 1e6, equal="time", rates=1, seeds=1, most=37).steps == {"fast": 37, "slow": 37}
    free = plan(BOTH, 300, equal="time", rates=2, seeds=2, most=10_000)
    paid = plan(BOTH, 300, equal="time", rates=2, seeds=2, most=10_000, control=100)
    assert paid.steps["fast"] < free.steps["fast"]


def test_a_small_budget_cuts_seeds_then_rates_for_all_and_says_so() -> None:
    made = plan(BOTH, 62, equal="time", rates=3, seeds=3, most=10_000)
    assert (made.rates, made.seeds) == (2, 2) and "2 of 3 seeds" in made.notes[0]
    assert min(made.steps.values()) >= MIN_STEPS
    assert plan(BOTH, 75, equal="time", rates=3, seeds=3, most=10_000).rates == 3
    with pytest.raises(UsageError, match="too small") as caught:
        plan(BOTH, 30, equal="time", rates=3, seeds=3, most=10_000, spent=10)
    assert "a budget of" in str(caught.value.hint)
    enough = parse_seconds(str(caught.value.hint).split()[3].rstrip(","))
    assert 40 < enough < 80
    plan(BOTH, enough - 10, equal="time", rates=3, seeds=3, most=10_000, spent=10)
    with pytest.raises(UsageError, match="unknown rule"):
        plan(BOTH, 300, equal="steps", rates=3, seeds=3, most=10)


def search(best: float, trials: int) -> list[float]:
    """The rates tried where the dev score falls off with the distance to `best` on a log scale."""
    import math

    tried: dict[float, float | None] = {}
    for _ in range(trials):
        rate = next_rate(tried, 1e-3, higher_is_better=True)
        assert rate not in tried
        tried[rate] = -abs(math.log(rate / best))
    return list(tried)


def test_rates_go_where_the_last_ones_pointed() -> None:
    assert search(1e-1, 4) == [1e-3, 3e-3, 9e-3, 2.7e-2]
    assert search(1e-5, 4) == [1e-3, 3e-3, 3.33e-4, 1.11e-4]
    assert search(3e-3, 4) == [1e-3, 3e-3, 9e-3, 5.2e-3] or search(3e-3, 4)[3] == 1.73e-3
    assert next_rate({1e-3: 2.0, 3e-3: 1.0}, 1e-3, higher_is_better=False) == 9e-3
    assert len(set(search(3.2e-3, 12))) == 12, "no rate is tried twice"
    assert next_rate({1e-3: None}, 1e-3, higher_is_better=True) < 1e-3
    assert next_rate({1e-3: None, 3.33e-4: None}, 1e-3, higher_is_better=True) < 3e-4
