# SPDX-License-Identifier: Apache-2.0
"""Search of merge coefficients and method options against a score, with a held-out check.

`search` tries values in a box by a grid or by CMA-ES (Hansen and Ostermeier 2001; the library `cmaes`, Nomura and Shibata
2024, arXiv 2402.01373), and knows nothing of merging: it works around any combiner, around scaling by depth, around
anything that is made of numbers. It sees the score of one split only; the score of another split is taken once, of the
winner and of the values it started from, and reported beside it. `settle` puts values into a combiner and its weights, by
name.

PCB-Merging (Du et al. 2024, arXiv 2410.02396) tunes one coefficient for each task this way: CMA-ES from 1.0 in the box
0.8 .. 1.3, 100 evaluations.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.core.errors import UsageError, nearest

SEARCHES = ("grid", "cmaes")
Values = dict[str, float]
Score = Callable[[Values], float]


@dataclass(frozen=True)
class Axis:
    """One number to search, within `low` .. `high`.

    Args:
        start: where the search begins and what its winner is compared with; the middle by default.
        points: the values a grid tries (by default `levels` evenly spaced ones from `low` to `high`).
        levels: how many, where `points` are not given.
        whole: round to whole numbers.
    """

    low: float
    high: float
    start: float | None = None
    points: tuple[float, ...] = ()
    levels: int = 10
    whole: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UsageError(f"a box needs finite low < high, got {self.low} .. {self.high}", where="Axis")
        outside = [v for v in (*self.points, self.first) if not self.low <= v <= self.high]
        if outside:
            raise UsageError(f"{outside[0]} lies outside {self.low} .. {self.high}", where="Axis")
        if self.levels < 2:
            raise UsageError(f"a grid needs 2 levels or more, got {self.levels}", where="Axis")

    @property
    def first(self) -> float:
        """Where the search begins."""
        return self.settled(0.5 * (self.low + self.high) if self.start is None else self.start)

    def settled(self, value: float) -> float:
        """`value` within the box, rounded where only whole numbers make sense."""
        value = min(max(float(value), self.low), self.high)
        return float(min(max(round(value), math.ceil(self.low)), math.floor(self.high))) if self.whole else value

    def grid(self) -> tuple[float, ...]:
        """The values a grid tries, without repeats."""
        even = (self.low + (self.high - self.low) * i / (self.levels - 1) for i in range(self.levels))
        return tuple(dict.fromkeys(self.settled(v) for v in (self.points or even)))


@dataclass(frozen=True)
class Trial:
    """Values that were tried and their score; None where it was not finite."""

    values: Values
    score: float | None


@dataclass(frozen=True)
class Found:
    """What a search found.

    `values` won with `score`; `start_score` is that of the values the search began with. `held_out` and
    `start_held_out` are the same on the other split (None where none was given): the winner of many trials is too good on
    the split that chose it. `trials` holds every trial in order, `how`, `seed`, `budget` how they were chosen.
    """

    values: Values
    score: float
    start: Values
    start_score: float | None
    held_out: float | None
    start_held_out: float | None
    trials: list[Trial] = field(repr=False)
    how: str
    seed: int
    budget: int

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def search(
    score: Score,
    axes: Mapping[str, Axis],
    *,
    how: str = "grid",
    held_out: Score | None = None,
    budget: int = 100,
    seed: int = 0,
    maximise: bool = True,
    spread: float = 0.25,
    population: int | None = None,
) -> Found:
    """The values with the best score. Of equal ones the first tried wins; a score that is not finite cannot win.

    Args:
        score: the score of values on the split that chooses. Equal values are scored once.
        held_out: the score on another split, taken of the winner and of the start only.
        how: "grid" (every combination of the axes' points) or "cmaes" (needs the extra `search`).
        budget: the most evaluations of `score`, the start included.
        spread: the first standard deviation of CMA-ES, as a share of each box.
        population: candidates of one generation of CMA-ES (its own rule by default: 4 + 3 ln n).
    Raises UsageError for no axes, a grid larger than the budget, an unknown `how`, or when no score is finite.
    """
    if how not in SEARCHES:
        raise UsageError(f"unknown search {how!r}", hint=nearest(how, SEARCHES))
    if not axes:
        raise UsageError("there is nothing to search", hint='axes={"weight": Axis(0.1, 1.5)}')
    if budget < 1:
        raise UsageError(f"must be 1 or more, got {budget}", where="budget")
    record = _Record(score, maximise, budget)
    start = {name: axis.first for name, axis in axes.items()}
    if how == "grid":
        points = [axis.grid() for axis in axes.values()]
        size = math.prod(len(p) for p in points)
        if size > budget:
            hint = f"fewer points on an axis, a budget of {size}, or how='cmaes'"
            raise UsageError(f"the grid has {size} points and the budget is {budget}", hint=hint)
        for chosen in itertools.product(*points):
            record.of(dict(zip(axes, chosen, strict=True)))
    else:
        record.of(start)
        _evolve(record, axes, start, seed, spread, population)
    best = record.best()
    began = record.known.get(_key(start))
    start_held = None
    if held_out is not None:
        start_held = _finite(held_out(dict(start)))
    same = best.values == start
    won = None if held_out is None else start_held if same else _finite(held_out(dict(best.values)))
    assert best.score is not None
    return Found(best.values, best.score, start, began, won, start_held, record.trials, how, seed, budget)


def settle(how: Any, weights: Sequence[float], values: Mapping[str, float], names: Sequence[str] = ()) -> Any:
    """A combiner and its weights with values put in by name.

    `weight` is the weight of every source (times the one given in `weights`), `weight:NAME` or `weight:2` that of one
    source; any other name is an option of the combiner, whole numbers where it holds them. Raises UsageError for a name
    that is neither.
    """
    out = [float(w) for w in weights]
    options: dict[str, Any] = {}
    known = {f.name: f for f in dataclasses.fields(how)} if dataclasses.is_dataclass(how) else {}
    for name, value in values.items():
        if name == "weight":
            out = [w * value for w in out]
        elif name.startswith("weight:"):
            out[_source(name, names, len(out))] = float(value)
        elif name in known:
            whole = isinstance(getattr(how, name), int) and not isinstance(getattr(how, name), bool)
            options[name] = round(value) if whole and float(value).is_integer() else value
        else:
            choices = [*known, "weight", *(f"weight:{n}" for n in names or range(len(out)))]
            raise UsageError(f"there is nothing called {name!r} to search", hint=nearest(name, choices))
    return (dataclasses.replace(how, **options) if options else how), out


def _source(name: str, names: Sequence[str], count: int) -> int:
    which = name.partition(":")[2]
    if which in names:
        return list(names).index(which)
    if which.isdecimal() and int(which) < count:
        return int(which)
    raise UsageError(f"there is no source {which!r}", where=name, hint=nearest(which, names or map(str, range(count))))


def _key(values: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(values.items()))


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


@dataclass
class _Record:
    """Every trial, each set of values scored once."""

    score: Score
    maximise: bool
    budget: int
    trials: list[Trial] = field(default_factory=list)
    known: dict[Any, float | None] = field(default_factory=dict)

    def of(self, values: Values) -> float | None:
        """The score of values, None where it is not finite."""
        key = _key(values)
        if key not in self.known:
            self.known[key] = _finite(self.score(dict(values)))
            self.trials.append(Trial(dict(values), self.known[key]))
        return self.known[key]

    @property
    def left(self) -> int:
        return self.budget - len(self.trials)

    def best(self) -> Trial:
        scored = [t for t in self.trials if t.score is not None]
        if not scored:
            hint = "look at the score function at the start values first"
            raise UsageError(f"none of {len(self.trials)} trials gave a finite score", hint=hint)
        sign = 1.0 if self.maximise else -1.0
        return max(scored, key=lambda t: sign * (t.score or 0.0))  # the first of equal ones


def _evolve(
    record: _Record,
    axes: Mapping[str, Axis],
    start: Values,
    seed: int,
    spread: float,
    population: int | None,
) -> None:
    """CMA-ES in the unit box until the budget is used or the distribution has shrunk to a point."""
    try:
        import cmaes
    except ImportError:
        raise UsageError(
            "CMA-ES needs the package cmaes", hint="pip install 'tunesmith[search]', or how='grid'"
        ) from None
    import numpy as np

    names = list(axes)

    def scaled(values: Values) -> list[float]:
        return [(values[n] - axes[n].low) / (axes[n].high - axes[n].low) for n in names]

    def values_of(x: Any) -> Values:
        return {
            n: axes[n].settled(axes[n].low + float(v) * (axes[n].high - axes[n].low))
            for n, v in zip(names, x, strict=True)
        }

    # the library has no one-dimensional case: a second coordinate that nothing reads stands in
    dims = max(2, len(names))
    mean = np.array([*scaled(start), *[0.5] * (dims - len(names))])
    kept = np.tile([0.0, 1.0], (dims, 1))
    engine = cmaes.CMA(mean=mean, sigma=spread, bounds=kept, seed=seed, population_size=population)
    sign = -1.0 if record.maximise else 1.0
    asked = 0
    while record.left > 0 and asked < 20 * record.budget and not engine.should_stop():
        told = []
        for _ in range(engine.population_size):
            x = engine.ask()
            asked += 1
            values = values_of(x[: len(names)])
            if record.left <= 0 and _key(values) not in record.known:
                return
            found = record.of(values)
            told.append((x, math.inf if found is None else sign * found))
        worst = max((v for _, v in told if math.isfinite(v)), default=0.0)
        engine.tell([(x, v if math.isfinite(v) else worst + 1.0) for x, v in told])
