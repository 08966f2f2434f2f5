# SPDX-License-Identifier: Apache-2.0
"""Who runs trials: this process one after the other, or Ray over cores and machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tunesmith.arena.trials import Arena, Trial
from tunesmith.core.errors import ResourceError
from tunesmith.core.method import load_methods


class Executor(Protocol):
    """Runs independent trials and gives each with its result as it is done, in any order."""

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]: ...

    def close(self) -> None: ...


class InProcess:
    """One trial after the other, here."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]:
        for trial in trials:
            yield trial, self.arena.run(trial)

    def close(self) -> None:
        pass


class Ray:
    """`workers` Ray actors, each with an arena of its own, made by `make` in the worker.

    Trials that run side by side share cores, so their times are longer than alone and less exact. Raises ResourceError
    where Ray is not installed.
    """

    def __init__(self, make: Callable[[], Arena], workers: int) -> None:
        try:
            import ray
            from ray.util import ActorPool
        except ImportError:
            hint = "pip install 'tunesmith[ray]', or leave --workers out"
            raise ResourceError("several workers need Ray, which is not installed", hint=hint) from None
        self.ray, self.started = ray, not ray.is_initialized()
        if self.started:
            ray.init(include_dashboard=False, log_to_driver=False)
        self.actors = [ray.remote(_Worker).remote(make) for _ in range(workers)]
        self.pool = ActorPool(self.actors)

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]:
        yield from self.pool.map_unordered(lambda actor, trial: actor.run.remote(trial), trials)

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)
        if self.started:
            self.ray.shutdown()


class _Worker:
    def __init__(self, make: Callable[[], Arena]) -> None:
        load_methods()
        self.arena = make()

    def run(self, trial: Trial) -> tuple[Trial, dict[str, Any]]:
        return trial, self.arena.run(trial)
