# SPDX-License-Identifier: Apache-2.0
"""One trial: a method at a learning rate on a seed for a number of steps, trained and measured on fixed rows."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.arena.candidates import reason_of
from tunesmith.arena.measure import Scores, Yardstick
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, bake
from tunesmith.core.errors import DataError, Interrupted, UsageError
from tunesmith.data import Dataset
from tunesmith.evaluate.controls import random_delta, shuffled
from tunesmith.study.fair import support_query
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import Trained, fit
from tunesmith.train.prepare import Prepared, choose_methods, prepare
from tunesmith.train.sample import started

TEST_SHARE, DEV_SHARE = 0.2, 0.15
TIMED_STEPS = 4


@dataclass(frozen=True)
class Splits:
    """Rows for training, for choosing learning rates, and for reporting.

    `source` is the digest of the data they were cut from, `notes` says what is worth knowing of them.
    """

    train: Dataset
    dev: Dataset
    test: Dataset
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> list[str]:
        return [self.train.digest, self.dev.digest, self.test.digest]


def split(
    data: Dataset, test: Dataset | None, dev: Dataset | None, *, shots: int | None = None, dev_rows: int = 200,
    test_rows: int = 500,
) -> Splits:  # fmt: skip
    """Cut the data by a fixed seed: the same rows for every method, seed and resumed run.

    Without `test` a fifth of `data` is held out, without `dev` 15 % of what is left. `shots` keeps so many training
    rows of each class and takes dev rows, a quarter as many, from the others. Dev and test are thinned to `dev_rows`
    and `test_rows`. Raises DataError where a class has too few rows, UsageError for shots without classes.
    """
    source = data.digest
    if test is None:
        data, test = data.split(TEST_SHARE)
    train = data
    if shots is not None:
        if data.labels is None:
            raise UsageError("shots are rows per class, and this data has none", where=data.report.path)
        rows = support_query([r["label"] for r in data.rows], shots, 0 if dev is not None else max(1, shots // 4), 0)
        train, dev = data.select(rows.support), dev if dev is not None else data.select(rows.val)
    elif dev is None:
        train, dev = data.split(DEV_SHARE)
    dev = dev.take(dev_rows) if len(dev) > dev_rows else dev
    test = test.take(test_rows) if len(test) > test_rows else test
    return Splits(train, dev, test, source, _overlap(train, dev, test))


def _overlap(train: Dataset, dev: Dataset, test: Dataset) -> tuple[str, ...]:
    def inputs(data: Dataset) -> list[str]:
        if data.kind in ("image", "audio"):
            return [str(hash(r["array"].tobytes())) for r in data.rows]
        return [repr(sorted((k, repr(v)) for k, v in r.items() if k not in ("label", "answer"))) for r in data.rows]

    seen, notes = set(inputs(train)), []
    for name, data in (("dev", dev), ("test", test)):
        both = sum(row in seen for row in inputs(data))
        if both:
            notes.append(f"{both} of {len(data)} {name} rows are training rows too")
    return tuple(notes)


@dataclass(frozen=True)
class Trial:
    """What is trained: `method` None is the head alone. `purpose` is "tune" (measured on dev), "final" (on test and
    retention), "shuffled" (a final on shuffled answers), "random" (a delta of the trained one's size) or "time".
    """

    label: str
    method: Any
    lr: float
    seed: int
    steps: int
    purpose: str = "tune"

    @property
    def key(self) -> dict[str, Any]:
        from tunesmith.core.method import chosen

        options = {} if self.method is None else dict(chosen(self.method))
        return {"method": self.label, "options": options, "lr": self.lr, "seed": self.seed, "steps": self.steps,
                "purpose": self.purpose}  # fmt: skip


class Arena:
    """A base with split data, on which trials are run one after the other in this process.

    Raises what the data or the base cause when laid out: rows that cannot be used, a base that cannot read them.
    """

    def __init__(
        self, base: Base, splits: Splits, config: TrainConfig, *, system: str | None = None, metric: str | None = None
    ) -> None:
        self.base, self.splits, self.config, self.system = base, splits, config, system
        self.prepared = prepare(base, splits.train, config, system=system)
        self.yard = Yardstick(base, splits.dev, splits.test, config, system, metric)
        self._best: dict[str, tuple[float, dict[str, Any], Delta]] = {}

    @property
    def has_head(self) -> bool:
        return self.prepared.head is not None

    def steps_of(self, epochs: float) -> int:
        """Updates in so many passes over the training rows."""
        return max(1, math.ceil(epochs * len(self.prepared.task.plan(self.config.batch_size, 0, 0))))

    def run(self, trial: Trial) -> dict[str, Any]:
        """Train and measure; plain finite JSON. A trial that diverges or fails gives {"failed": reason}.

        Raises Interrupted on Ctrl-C.
        """
        gc.collect(1)  # what the last trial held must not count as this one's peak
        try:
            return getattr(self, f"_{trial.purpose}")(trial)
        except Interrupted:
            raise
        except Exception as error:  # one method must not take the comparison with it; its reason stands in the result
            return {"failed": reason_of(error)}

    # Purposes

    def _time(self, trial: Trial) -> dict[str, Any]:
        """Seconds to start, per step, and to score dev with this method."""
        marks: list[float] = []
        began = time.perf_counter()
        delta, trained = self._trained(trial, self.prepared, on_step=lambda *_: marks.append(time.perf_counter()))
        whole = time.perf_counter() - began
        gaps = sorted(b - a for a, b in itertools.pairwise(marks))
        step = gaps[len(gaps) // 2] if gaps else trained.seconds
        with self.base.using(delta):
            now = time.perf_counter()
            self.yard.score("dev")
            dev = time.perf_counter() - now
        return {"start": max(0.0, whole - step * trial.steps), "step": step, "dev": dev, **self._facts(delta, trained)}

    def warm(self, trial: Trial) -> float:
        """Run a trial that is not recorded, so that no method pays for the first use of anything.

        Gives how many times as long as a look at dev a final look takes.
        """
        delta, _ = self._trained(dataclasses.replace(trial, steps=2), self.prepared)
        with self.base.using(delta):
            began = time.perf_counter()
            self.yard.score("dev")
            middle = time.perf_counter()
            self._final_look()
            return (time.perf_counter() - middle) / max(1e-9, middle - began)

    def _tune(self, trial: Trial) -> dict[str, Any]:
        delta, trained = self._trained(trial, self.prepared)
        with self.base.using(delta):
            dev = self.yard.score("dev")
        if not math.isfinite(dev.value):
            return {"failed": "the dev score is not finite"}
        self._remember(trial, dev, delta)
        return {"dev": dev.value, **self._facts(delta, trained)}

    def _final(self, trial: Trial) -> dict[str, Any]:
        """The delta of a tuning trial with these settings is taken where it is in memory: training gives the same."""
        kept = self._best.get(trial.label)
        same = {**trial.key, "purpose": "tune"}
        if kept is not None and kept[1] == same:
            delta, facts = kept[2], {}
        else:
            delta, trained = self._trained(trial, self.prepared)
            facts = self._facts(delta, trained)
        with self.base.using(delta):
            return {**self._final_look(), **facts}

    def _shuffled(self, trial: Trial) -> dict[str, Any]:
        wrong = prepare(self.base, shuffled(self.splits.train, trial.seed), self.config, system=self.system)
        delta, _ = self._trained(trial, wrong)
        with self.base.using(delta):
            return self._final_look()

    def _random(self, trial: Trial) -> dict[str, Any]:
        kept = self._best.get(trial.label)
        if kept is not None and kept[1] == {**trial.key, "purpose": "tune"}:
            delta = kept[2]
        else:
            delta, _ = self._trained(trial, self.prepared)
        with self.base.using(random_delta(self.base, delta, trial.seed)):
            return self._final_look()

    def _final_look(self) -> dict[str, Any]:
        found, kept = self.yard.score("test"), self.yard.retention()
        if not (math.isfinite(found.value) and math.isfinite(kept)):
            return {"failed": "the test score or the retention is not finite"}
        return {"test": found.value, "rows": [round(r, 6) for r in found.rows], "retention": kept}

    # Parts

    def _trained(self, trial: Trial, prepared: Prepared, on_step: Any = None) -> tuple[Delta, Trained]:
        config = dataclasses.replace(self.config, lr=trial.lr, seed=trial.seed, steps=trial.steps)
        chosen = [_head(prepared)] if trial.method is None else choose_methods(self.base, trial.method, prepared)
        began = time.perf_counter()
        delta = started(self.base, chosen, prepared.task, config, "trial", "both")
        made = time.perf_counter() - began
        try:
            trained = fit(self.base, delta, prepared.task, config, progress=False, on_step=on_step)
        except Interrupted as error:
            hint = "finished trials are kept: the same command goes on from here"
            raise Interrupted(error.what, where=trial.label, hint=hint) from None
        trained.seconds += made  # a start that is learnt from data is part of the price
        bake(self.base, delta)
        return delta, trained

    def _facts(self, delta: Delta, trained: Trained) -> dict[str, Any]:
        own = [t for p in delta.parts if p.info.name != "head" for _, _, t in p.items()]
        return {
            "seconds": trained.seconds, "stored": delta.nbytes,
            "peak_memory": max(0, trained.peak_memory_bytes - sum(d.nbytes for _, _, d in self._best.values())),
            "trainable": trained_numbers(delta), "own_trainable": sum(t.numel() for t in own if t.requires_grad),
            "loss": trained.losses[-1] if trained.losses and math.isfinite(trained.losses[-1]) else None,
        }  # fmt: skip

    def _remember(self, trial: Trial, dev: Scores, delta: Delta) -> None:
        """Keep the best delta of each method in memory, so that its final needs no second training."""
        sign = 1.0 if self.yard.for_dev.higher_is_better else -1.0
        before = self._best.get(trial.label)
        better = before is None or sign * dev.value > before[0]
        tied_and_smaller = before is not None and sign * dev.value == before[0] and trial.lr < before[1]["lr"]
        if better or tied_and_smaller:
            self._best[trial.label] = (sign * dev.value, trial.key, delta)


def _head(prepared: Prepared) -> Any:
    from tunesmith.core.method import build

    if prepared.head is None:
        raise DataError("this data needs no head, so a head alone is no method for it")
    return build("head", prepared.head)


def trained_numbers(delta: Delta) -> int:
    """Numbers that train or trained; baking may have marked others."""
    return delta.trainable_parameters or sum(t.numel() for _, t in delta.items() if t.is_floating_point())


def failed(result: Mapping[str, Any]) -> bool:
    return "failed" in result
