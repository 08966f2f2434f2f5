# SPDX-License-Identifier: Apache-2.0
"""Who runs trials: this process one after the other, or Ray over cores and machines."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tunesmith.arena.trials import Arena, Splits, Trial
from tunesmith.core.base import Base
from tunesmith.core.derive import records
from tunesmith.core.errors import BaseMismatch, Interrupted, ResourceError, TunesmithError, UsageError
from tunesmith.core.method import load_methods
from tunesmith.models.open import load, opened_as
from tunesmith.train.config import TrainConfig

STORE_BYTES = 100 * 2**20  # Ray's shared memory; results are small, and larger inputs go to disk
# Ray reads these when it is imported: a cluster of this machine alone listens on the loopback, and nothing is reported.
_PRIVATE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


class Executor(Protocol):
    """Runs independent trials and gives each with its result as it is done, in any order."""

    def warm(self, trials: Sequence[Trial]) -> float:
        """Run one trial that is not recorded wherever trials run; gives a final look's time in looks at dev."""
        ...

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]: ...

    def lanes(self, trials: int) -> float:
        """How many of so many trials run at once, on average, when all start together."""
        ...

    def close(self) -> None: ...


class InProcess:
    """One trial after the other, here."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def warm(self, trials: Sequence[Trial]) -> float:
        return _warmed(self.arena, trials)

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]:
        for trial in trials:
            yield trial, self.arena.run(trial)

    def lanes(self, trials: int) -> float:
        return 1.0

    def close(self) -> None:
        pass


class Ray:
    """`workers` Ray actors, each with an arena of its own, made by `make` in the worker.

    The cluster that RAY_ADDRESS names is used, or one that is running in this process; else one is started on this
    machine, listening on the loopback alone, and stopped by `close`. The threads of this process are divided among the
    workers. Trials that run side by side share cores, so their times are longer than alone and less exact. Raises
    ResourceError where Ray is not installed or a worker dies, and what `make` raises.
    """

    def __init__(self, make: Callable[[], Arena], workers: int) -> None:
        local = "RAY_ADDRESS" not in os.environ
        if local:
            for name, value in _PRIVATE.items():
                os.environ.setdefault(name, value)
        try:
            import ray
            from ray.util import ActorPool
        except ImportError:
            hint = "pip install 'tunesmith[ray]', or leave --workers out"
            raise ResourceError("several workers need Ray, which is not installed", hint=hint) from None
        self.ray, self.started, self.actors = ray, not ray.is_initialized(), []
        if self.started:
            own = {"address": "local", "num_cpus": workers, "object_store_memory": STORE_BYTES} if local else {}
            ray.init(include_dashboard=False if local else None, log_to_driver=False, **own)
        try:
            threads = max(1, torch.get_num_threads() // workers)
            kind = ray.remote(_Worker)
            self.actors = [kind.remote() for _ in range(workers)]
            with self._told():
                ray.get([a.open.remote(make, threads) for a in self.actors])
        except BaseException:
            self.close()
            raise
        self.pool = ActorPool(self.actors)

    def warm(self, trials: Sequence[Trial]) -> float:
        with self._told():
            return statistics.median(self.ray.get([a.warm.remote(list(trials)) for a in self.actors]))

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]:
        with self._told():
            yield from self.pool.map_unordered(lambda actor, trial: actor.run.remote(trial), trials)

    def lanes(self, trials: int) -> float:
        return trials / math.ceil(trials / len(self.actors))

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)
        if self.started:
            self.ray.shutdown()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What went wrong in a worker, as the error it was there."""
        errors = self.ray.exceptions
        kept = "finished trials are kept: the same command goes on from here"
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted("the comparison was stopped", hint=kept) from None
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, TunesmithError) else error) from None
        except errors.RayActorError as error:
            why = str(error).strip().splitlines()[0]
            raise ResourceError(f"a worker died: {why}", where="workers", hint=f"fewer workers; {kept}") from None


class _Worker:
    """What lives in a Ray actor. It is opened by a call of its own, since an error there comes back as it was."""

    arena: Arena

    def open(self, make: Callable[[], Arena], threads: int) -> None:
        torch.set_num_threads(threads)
        load_methods()
        self.arena = make()

    def warm(self, trials: Sequence[Trial]) -> float:
        return _warmed(self.arena, trials)

    def run(self, trial: Trial) -> tuple[Trial, dict[str, Any]]:
        return trial, self.arena.run(trial)


def _warmed(arena: Arena, trials: Sequence[Trial]) -> float:
    for trial in trials:
        with contextlib.suppress(Exception):  # what is wrong with it is told when it is timed
            return arena.warm(trial)
    return 1.0


@dataclass(frozen=True)
class Place:
    """How a worker opens the same base: the name it was opened by, dtype, task, and the fingerprint it must have."""

    name: str
    dtype: str
    task: str | None
    fingerprint: str

    @classmethod
    def of(cls, base: Base) -> Place:
        """Raises UsageError for a base that was given as an object, or derived and not saved."""
        derived, name = records(base), opened_as(base)
        if name is None:
            hint = "save it with save_derived and give the folder" if derived else "give a name or a folder"
            raise UsageError("workers open the base by its name, and this one has none", where="workers", hint=hint)
        dtype = str(base.dtype).removeprefix("torch.")
        return cls(name, dtype, None if derived else base.source.get("task"), base.fingerprint.digest)

    def open(self) -> Base:
        """Raises BaseMismatch where the name means another base here."""
        base = load(self.name, dtype=self.dtype, task=self.task)
        if base.fingerprint.digest != self.fingerprint:
            raise BaseMismatch("this worker found another base by that name", where=self.name)
        return base


def arena_at(place: Place, splits: Splits, config: TrainConfig, system: str | None, metric: str | None) -> Arena:
    """An arena of a worker's own."""
    return Arena(place.open(), splits, config, system=system, metric=metric)
