# SPDX-License-Identifier: Apache-2.0
"""A wall-clock budget split over methods, learning rates and seeds, after every method was timed for a few steps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.core.errors import UsageError, nearest

EQUAL = ("parameters", "time", "memory")
MIN_STEPS = 10  # fewer updates say nothing about a method
SPARE = 0.9  # share of what is left that is planned for: timings are estimates
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Timing:
    """Seconds that one method needs to start, for one step, to score dev, and to score test and retention."""

    start: float
    step: float
    dev: float
    test: float


@dataclass(frozen=True)
class Plan:
    """Steps of every method, learning rates and seeds each, and the seconds this should take in all."""

    steps: dict[str, int]
    rates: int
    seeds: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes)}


def parse_seconds(text: str | float) -> float:
    """Seconds from `90`, `90s`, `10m`, `1.5h` or `1h30m`. Raises UsageError for anything else and for 0."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        value = float(text)
    else:
        pieces = re.findall(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip().lower())
        whole = "".join(a + b for a, b in pieces)
        if (
            not pieces
            or whole != re.sub(r"\s+", "", str(text).lower())
            or (len(pieces) > 1 and any(not u for _, u in pieces))
        ):
            raise UsageError(f"{text!r} is no length of time", where="budget", hint="write 90s, 10m or 1h30m")
        value = sum(float(n) * _UNITS[u] for n, u in pieces)
    if not 0 < value < float("inf"):
        raise UsageError("must be above 0", where="budget")
    return value


def check_equal(equal: str) -> None:
    """Raise UsageError for an unknown rule."""
    if equal not in EQUAL:
        raise UsageError(f"unknown rule {equal!r}", where="equal", hint=nearest(equal, EQUAL))


def plan(
    timings: Mapping[str, Timing],
    left: float,
    *,
    equal: str,
    rates: int,
    seeds: int,
    most: int,
    control: float = 0.0,
    spent: float = 0.0,
    lanes: float = 1.0,
) -> Plan:
    """How many steps each method takes so that all its trials end within `left` seconds.

    A method has one trial for each rate on the first seed, one for each other seed at the rate that was chosen, a look
    at dev after each of the former and at test after each seed. With `equal` "time" every trial of every method trains
    for the same seconds; with "parameters" or "memory" for the same steps. Where even `MIN_STEPS` do not fit, seeds and
    then rates are cut to two, for all alike. `most` caps the steps, `control` is what the controls need beside one more
    training, `spent` what was used before. `lanes` trials run at once, so that many times the seconds can be trained.

    Raises UsageError naming the budget that would do.
    """
    check_equal(equal)
    tried = [(rates, seeds), (rates, min(2, seeds)), (min(2, rates), min(2, seeds))]
    for n_rates, n_seeds in dict.fromkeys(tried):
        steps = _steps(timings, SPARE * left * lanes - control, equal, n_rates, n_seeds, most)
        if min(steps.values()) >= min(MIN_STEPS, most):
            notes = () if (n_rates, n_seeds) == (rates, seeds) else (
                f"the budget allows {n_seeds} of {seeds} seeds and {n_rates} of {rates} learning rates a method",
            )  # fmt: skip
            return Plan(
                steps, n_rates, n_seeds, (_seconds(timings, steps, n_rates, n_seeds) + control) / lanes, notes
            )  # fmt: skip
    need = (_least(timings, equal, *tried[-1], min(MIN_STEPS, most)) + control) / (SPARE * lanes)
    raise UsageError(
        f"the budget is too small for {len(timings)} methods: {left:.0f} s are left and {need:.0f} s are needed for "
        f"{MIN_STEPS} steps a trial",
        where="budget",
        hint=f"a budget of {_told(1.1 * need + spent)} would do, or fewer methods; --fresh times them anew",
    )


def _steps(timings: Mapping[str, Timing], left: float, equal: str, rates: int, seeds: int, most: int) -> dict[str, int]:
    trainings = rates + seeds - 1
    looks = sum(rates * t.dev + seeds * t.test for t in timings.values())
    runs = len(timings) * trainings + 1  # the shuffled control is one more
    if equal == "time":
        each = (left - looks) / runs  # seconds of one training, its start included
        return {m: max(0, min(most, int((each - t.start) / t.step))) for m, t in timings.items()}
    starts = trainings * sum(t.start for t in timings.values())
    pace = trainings * sum(t.step for t in timings.values()) + max(t.step for t in timings.values())
    same = max(0, min(most, int((left - looks - starts) / pace)))
    return dict.fromkeys(timings, same)


def _least(timings: Mapping[str, Timing], equal: str, rates: int, seeds: int, steps: int) -> float:
    """Seconds in which `_steps` gives every method so many steps."""
    trainings, every = rates + seeds - 1, timings.values()
    looks = sum(rates * t.dev + seeds * t.test for t in every)
    if equal == "time":
        return looks + (len(timings) * trainings + 1) * max(t.start + steps * t.step for t in every)
    pace = trainings * sum(t.step for t in every) + max(t.step for t in every)
    return looks + trainings * sum(t.start for t in every) + steps * pace


def _seconds(timings: Mapping[str, Timing], steps: Mapping[str, int], rates: int, seeds: int) -> float:
    return sum(
        (rates + seeds - 1) * (t.start + steps[m] * t.step) + rates * t.dev + seeds * t.test for m, t in timings.items()
    )


def _told(seconds: float) -> str:
    return f"{10 * math.ceil(seconds / 10)}s" if seconds < 100 else f"{math.ceil(seconds / 60)}m"


FACTOR = 3.0  # between learning rates


def next_rate(tried: Mapping[float, float | None], centre: float, *, higher_is_better: bool) -> float:
    """The learning rate to try next, given the dev score of each tried (None where it failed).

    First the method's own, then three times as much (recipes are made for long runs; short ones want larger steps).
    Then one step beyond the best while that is at an end, else halfway, on a log scale, towards its better neighbour.
    Every method gets the same number of such trials.
    """
    if not tried:
        return _rounded(centre)
    if len(tried) == 1:
        only, score = next(iter(tried.items()))
        return _rounded(only * FACTOR if score is not None else only / FACTOR)
    rates = sorted(tried)
    sign = 1.0 if higher_is_better else -1.0

    def worth(rate: float) -> float:
        score = tried[rate]
        return float("-inf") if score is None else sign * score

    best = max(rates, key=lambda r: (worth(r), -r))
    at = rates.index(best)
    if worth(best) == float("-inf") or at == 0:
        return _rounded(rates[0] / FACTOR)
    if at == len(rates) - 1:
        return _rounded(best * FACTOR)
    other = max((rates[at - 1], rates[at + 1]), key=lambda r: (worth(r), -r))
    between = _rounded((best * other) ** 0.5)
    return between if between not in tried else _rounded(rates[-1] * FACTOR)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
