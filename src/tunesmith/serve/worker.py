# SPDX-License-Identifier: Apache-2.0
"""The engine in a thread of its own, spoken to from an event loop.

One thread steps the engine and nothing else touches it; orders (submit, cancel, anything on the library) are queued and
run between steps. What happens to a request arrives in an `asyncio.Queue` of its caller.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tunesmith.core.errors import ResourceError, TunesmithError
from tunesmith.serve.engine import Engine, Event, Request

T = TypeVar("T")


class Busy(ResourceError):
    """The queue is full; `seconds` says when to come again."""

    def __init__(self, seconds: int) -> None:
        super().__init__("the queue is full", hint=f"come again in {seconds} s")
        self.seconds = seconds


class Draining(ResourceError):
    """The server is going down and takes no new requests."""

    def __init__(self) -> None:
        super().__init__("the server is going down", hint="ask another one")


@dataclass
class Counts:
    """What was served since the start."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    ends: dict[str, int] = field(default_factory=dict)
    first_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))


class Worker:
    """Runs an engine. `queue` is how many requests may wait before others are turned away."""

    def __init__(self, engine: Engine, *, queue: int = 256) -> None:
        self.engine, self.limit, self.counts = engine, queue, Counts()
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._listeners: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Event], float]] = {}
        self._waiting = 0  # requests that were taken and have no token yet
        self._stopping = self._draining = False
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tunesmith-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._failed is None

    @property
    def draining(self) -> bool:
        return self._draining

    def order(self, what: Callable[[], T]) -> Future[T]:
        """Have the engine's thread call `what` between two steps."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(what())
            except BaseException as error:
                done.set_exception(error)

        with self._wake:
            if not self.alive:
                raise ResourceError("the engine has stopped", hint="restart the server; its log says why")
            self._orders.append(run)
            self._wake.notify()
        return done

    async def serve(self, request: Request) -> AsyncIterator[Event]:
        """The events of a request as they come; leaving the loop early takes it out of the batch.

        Raises Busy, Draining, and what `Engine.submit` raises.
        """
        if self._draining:
            raise Draining
        if self._waiting >= self.limit:
            self.counts.refused += 1
            raise Busy(max(1, min(60, round(self.limit / 16))))
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._waiting += 1
        first = True

        def submit() -> None:
            self.engine.submit(request)
            self._listeners[request.id] = (loop, queue, time.monotonic())
            self.counts.requests += 1
            self.counts.prompt_tokens += len(request.prompt)

        try:
            await asyncio.wrap_future(self.order(submit))
            while True:
                event = await queue.get()
                if first:
                    self._waiting, first = self._waiting - 1, False
                yield event
                if event.reason is not None:
                    return
        finally:
            if first:
                self._waiting -= 1
            if self.alive:
                self.order(lambda: self._drop(request.id))

    def _drop(self, id: str) -> None:
        self._listeners.pop(id, None)
        if self.engine.cancel(id):
            self.counts.ends["cancelled"] = self.counts.ends.get("cancelled", 0) + 1

    async def drain(self, seconds: float) -> None:
        """Take no more requests and wait until those under way are done, at most `seconds`."""
        self._draining = True
        until = time.monotonic() + seconds
        while self._listeners and self.alive and time.monotonic() < until:
            await asyncio.sleep(0.05)

    def stop(self) -> None:
        """End the thread; requests under way end with an error."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._orders and self.engine.idle and not self._stopping:
                        self._wake.wait()
                    orders, self._orders = list(self._orders), deque()
                for run in orders:
                    run()
                if self._stopping:
                    raise Draining
                if not self.engine.idle:
                    began = time.monotonic()
                    events = self.engine.step()
                    self.counts.busy_seconds += time.monotonic() - began
                    self.counts.steps += 1
                    for event in events:
                        self._tell(event)
        except BaseException as error:
            self._failed = error
            cause = error if isinstance(error, TunesmithError) else ResourceError(f"the engine failed ({error!r})")
            for id in list(self._listeners):
                self._tell(Event(id, reason="error", error=cause))
            for run in self._orders:
                run()
            if not isinstance(error, Draining):
                raise

    def _tell(self, event: Event) -> None:
        known = self._listeners.get(event.id)
        if known is None:
            return
        loop, queue, began = known
        if event.chosen is not None:
            self.counts.tokens += 1
            if began:
                self.counts.first_token_seconds.append(time.monotonic() - began)
                self._listeners[event.id] = (loop, queue, 0.0)
        if event.reason is not None:
            self.counts.ends[event.reason] = self.counts.ends.get(event.reason, 0) + 1
            del self._listeners[event.id]
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, event)

    def statistics(self) -> dict[str, Any]:
        """Numbers of the moment, for metrics and the admin plane."""
        e, times = self.engine, sorted(self.counts.first_token_seconds)
        at = {p: times[min(len(times) - 1, int(p * len(times)))] if times else 0.0 for p in (0.5, 0.95)}
        return {
            "running": len(e.live), "waiting": len(e.waiting), "cells": e.pool.cells, "cells_free": e.pool.free,
            "deltas": len(e.library.entries), "deltas_held": len(e.library.held), "held_bytes": e.library.held_bytes,
            "loads": e.library.loads, "evictions": e.library.evictions, "first_token_p50": at[0.5],
            "first_token_p95": at[0.95],
        }  # fmt: skip
