# SPDX-License-Identifier: Apache-2.0
"""Train methods in a world, choose learning rates with equal trials, and run arms over seeds as remembered cells."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.core.delta import Delta
from tunesmith.core.errors import TrainingError, UsageError
from tunesmith.study.fair import LrChoice
from tunesmith.study.fair import choose_lr as choose
from tunesmith.study.spec import Context
from tunesmith.study.worlds.world import Score, World
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import Trained, fit
from tunesmith.train.sample import started
from tunesmith.train.tasks import Task

Methods = Sequence[Any] | Callable[[int], Sequence[Any]]


@dataclass
class Outcome:
    """A trained delta in its world.

    `curve` holds (step, score on dev) for the steps asked for, `seconds` is training without those looks, `trainable`
    the numbers that train, the companions' included.
    """

    world: World
    delta: Delta
    curve: list[tuple[int, Score]]
    seconds: float
    trainable: int
    trained: Trained = field(repr=False)

    def dev(self) -> Score:
        with self.world.base.using(self.delta):
            return self.world.score("dev")

    def test(self) -> Score:
        """For reporting; never for choosing."""
        with self.world.base.using(self.delta):
            return self.world.score("test")

    def retention(self) -> dict[str, float]:
        with self.world.base.using(self.delta):
            return self.world.retention()


def train(
    world: World,
    methods: Sequence[Any],
    *,
    lr: float | None = None,
    steps: int,
    seed: int,
    evaluate_at: Iterable[int] = (),
    head_lr: float | None = None,
    start: Delta | None = None,
    task: Task | None = None,
    on_step: Callable[[int, float], None] | None = None,
    name: str = "delta",
    **settings: Any,
) -> Outcome:
    """`steps` updates of `methods` and the world's companions, AdamW with the world's batch size and precision.

    Args:
        lr: peak rate; None is each method's own.
        evaluate_at: steps (from 1) after which dev is scored; 0 is before training.
        head_lr: a peak rate of its own for the head, so that arms with other rates differ in nothing else.
        start: a delta to train on, instead of fresh methods; it is changed in place.
        task: other training rows than the world's, such as shuffled labels.
        on_step: called after every step with its number and loss, with the delta in use.
        settings: any other field of `TrainConfig`.
    Raises TrainingError where the loss stays non-finite, and what the methods raise where they do not fit.
    """
    wanted = {int(s) for s in evaluate_at}
    odd = sorted(s for s in wanted if not 0 <= s <= steps)
    if odd:
        raise UsageError(f"steps {odd} lie outside 0..{steps}", where="evaluate_at")
    base, data = world.base, world.task if task is None else task
    config = TrainConfig(**{"batch_size": world.batch, "precision": world.precision, "warmup": 0.1, "steps": steps,
                            "lr": lr, "seed": seed, **settings})  # fmt: skip
    beside = world.companions
    if head_lr is not None:
        if lr is None:
            raise UsageError("a rate for the head needs a rate for the arm", where="head_lr", hint="give lr")
        beside = [replace(c, lr_ratio=head_lr / lr) if hasattr(c, "lr_ratio") else c for c in beside]
    begun = time.perf_counter()
    delta = start or started(base, [*methods, *beside], data, config, name, "both")
    made = time.perf_counter() - begun
    curve: list[tuple[int, Score]] = []
    looking = 0.0
    if 0 in wanted:
        with base.using(delta):
            curve.append((0, world.score("dev")))

    def after(step: int, loss: float) -> None:
        nonlocal looking
        if on_step is not None:
            on_step(step, loss)
        if step in wanted:
            now = time.perf_counter()
            curve.append((step, world.score("dev")))
            looking += time.perf_counter() - now

    trained = fit(base, delta, data, config, progress=False, on_step=after)
    return Outcome(world, delta, curve, made + trained.seconds - looking, delta.trainable_parameters, trained)


def choose_lr(
    world: World, methods: Sequence[Any], lrs: Sequence[float], steps: int, seed: int, **settings: Any
) -> LrChoice:
    """The rate with the best dev metric after a run of `steps` at each of `lrs`; the smaller one wins a tie.

    A run that turns non-finite counts as a trial and cannot win. Raises TrainingError when all do.
    """

    def dev(lr: float) -> float:
        try:
            return train(world, methods, lr=lr, steps=steps, seed=seed, **settings).dev().metric
        except TrainingError:
            return float("nan")

    return choose(dev, lrs, lambda metric: metric, higher_is_better=world.higher_is_better)


def sweep(
    ctx: Context,
    world: World | Callable[[int], World],
    arms: Mapping[str, Methods],
    *,
    lrs: Sequence[float] | Mapping[str, Sequence[float]],
    steps: int,
    tune_on: Sequence[int] | None = None,
    extra: Callable[[Outcome], Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Every arm on every seed, each at the rate that is best for it on dev; one cell per (arm, seed, rate).

    Args:
        world: one world for all seeds, or a function of the seed.
        arms: name to methods, or to a function of the seed that gives them.
        lrs: rates to try, for all arms or by arm; every arm must have the same number.
        tune_on: seeds whose mean dev metric decides the rate of an arm (default: the first seed of the study). The
            other seeds run at that rate only. `ctx.seeds` itself tunes on every seed.
        extra: anything else to measure on a trained arm; plain JSON, kept as `extra`.
    Returns {"arms": {arm: rows}, "tuning": {arm: LrChoice as JSON}}, a row being the seed, `metric` and `rows` on test,
    `values`, `dev`, `retention`, `lr`, `seconds` and `trainable`. Test scores are looked at for no choice.
    Raises UsageError for unequal numbers of trials, TrainingError where every rate of an arm diverges.
    """
    rates = {arm: list(lrs[arm] if isinstance(lrs, Mapping) else lrs) for arm in arms}
    if len({len(r) for r in rates.values()}) != 1:
        raise UsageError(f"the arms have different numbers of rates: { {a: len(r) for a, r in rates.items()} }")
    tuning_seeds = list(ctx.seeds[:1] if tune_on is None else tune_on)
    made: dict[int, World] = {}

    def world_of(seed: int) -> World:
        if not callable(world):
            return world
        if seed not in made:
            made.clear()  # one at a time: a world holds a model and its data
            made[seed] = world(seed)
        return made[seed]

    def one(arm: str, seed: int, lr: float) -> dict[str, Any] | None:
        chosen: Any = arms[arm]
        methods = chosen(seed) if callable(chosen) else chosen
        try:
            out = train(world_of(seed), methods, lr=lr, steps=steps, seed=seed, **settings)
        except TrainingError:
            return None
        dev, test = out.dev(), out.test()
        if not math.isfinite(dev.metric) or not math.isfinite(test.metric):
            return None
        row = {"dev": dev.metric, "metric": test.metric, "values": test.values,
               "rows": [round(r, 5) for r in test.rows],
               "retention": out.retention(), "seconds": out.seconds, "trainable": out.trainable}  # fmt: skip
        return row if extra is None else {**row, "extra": extra(out)}

    cells: dict[tuple[str, int, float], dict[str, Any] | None] = {}
    total = len(arms) * (len(tuning_seeds) * len(next(iter(rates.values()))) + len(set(ctx.seeds) - set(tuning_seeds)))

    def cell(arm: str, seed: int, lr: float) -> dict[str, Any] | None:
        key = (arm, seed, lr)
        if key not in cells:
            cells[key] = ctx.cell({"arm": arm, "seed": seed, "lr": lr}, lambda: one(*key))
            ctx.progress(min(len(cells), total), total)
            found = cells[key]
            shown = "diverged" if found is None else f"dev {found['dev']:.4f}, {found['seconds']:.0f} s"
            ctx.log(f"{arm}, seed {seed}, lr {lr:g}: {shown}")
        return cells[key]

    tuning: dict[str, LrChoice] = {}
    first = world_of(tuning_seeds[0])
    for seed in tuning_seeds:  # world by world, so that each is made once
        for arm in arms:
            for lr in rates[arm]:
                cell(arm, seed, lr)
    for arm in arms:

        def metric(lr: float, arm: str = arm) -> float:
            found = [cell(arm, seed, lr) for seed in tuning_seeds]
            return sum(f["dev"] if f else float("nan") for f in found) / len(found)

        tuning[arm] = choose(metric, rates[arm], lambda m: m, higher_is_better=first.higher_is_better)
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in ctx.seeds:
        for arm in arms:
            found = cell(arm, seed, tuning[arm].lr)
            if found is None:
                raise TrainingError(f"{arm} diverges on seed {seed} at the rate {tuning[arm].lr:g}",
                                    hint="offer smaller learning rates, or tune on every seed")  # fmt: skip
            rows[arm].append({"seed": seed, "lr": tuning[arm].lr, **found})
    return {"arms": rows, "tuning": {arm: choice.as_json() for arm, choice in tuning.items()}}
