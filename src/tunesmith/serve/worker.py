# SPDX-License-Identifier: Apache-2.0
"""The engines in a thread of their own, spoken to from an event loop.

One thread steps the engines (one writes, one reads) and nothing else touches them; orders (submit, cancel, anything on the library) are queued and
run between steps. What happens to a request arrives in an `asyncio.Queue` of its caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tunesmith.core.errors import ResourceError, TunesmithError, UsageError
from tunesmith.serve.encoder import Encoder, Outcome, Reading
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.requests import Event, Request

log = logging.getLogger("tunesmith.serve")
T = TypeVar("T")
Happened = Event | Outcome


class Busy(ResourceError):
    """The queue is full; `seconds` says when to come again."""

    def __init__(self, seconds: int) -> None:
        super().__init__("the queue is full", hint=f"come again in {seconds} s")
        self.seconds = seconds


class Failed(ResourceError):
    """A step of the engine failed; what was in it is given up and the server goes on."""

    def __init__(self, why: str, memory: bool) -> None:
        super().__init__(why, hint="come again" if memory else "the server's log says where")
        self.memory = memory


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
    """Runs what writes (`engine`) and what reads (`encoder`), either or both, over one library.

    `queue` is how many requests may wait before others are turned away.
    """

    def __init__(self, engine: Engine | None, encoder: Encoder | None = None, *, queue: int = 256) -> None:
        self.engine, self.encoder, self.limit, self.counts = engine, encoder, queue, Counts()
        self._engines: list[Engine | Encoder] = [e for e in (engine, encoder) if e is not None]
        if not self._engines:
            raise UsageError("a worker needs an engine")
        self.library: Library = self._engines[0].library
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._listeners: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Happened], float]] = {}
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
            if not done.set_running_or_notify_cancel():
                return  # whoever gave the order went away
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

    @property
    def idle(self) -> bool:
        return all(e.idle for e in self._engines)

    async def serve(self, request: Request | Reading) -> AsyncIterator[Any]:
        """The events of a request as they come; leaving the loop early takes it out of the batch.

        Raises Busy, Draining, UsageError where no engine does this work, and what its `submit` raises.
        """
        if self._draining:
            raise Draining
        if self._waiting >= self.limit:
            self.counts.refused += 1
            raise Busy(max(1, min(60, round(self.limit / 16))))
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Happened]()
        self._waiting += 1
        first = True

        def submit() -> None:
            self._submit(request)
            self._listeners[request.id] = (loop, queue, time.monotonic())
            self.counts.requests += 1
            self.counts.prompt_tokens += request.tokens if isinstance(request, Reading) else len(request.prompt)

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
            with contextlib.suppress(ResourceError):  # an engine that has stopped holds nothing
                self.order(lambda: self._drop(request.id))

    def _submit(self, request: Request | Reading) -> None:
        if isinstance(request, Reading):
            if self.encoder is None:
                raise UsageError("this server reads no texts", hint="it serves /v1/chat/completions")
            self.encoder.submit(request)
        elif self.engine is None:
            raise UsageError("the base writes no text", hint="it serves /v1/embeddings and /v1/classify")
        else:
            self.engine.submit(request)

    def _drop(self, id: str) -> None:
        self._listeners.pop(id, None)
        if any([e.cancel(id) for e in self._engines]):
            self.counts.ends["cancelled"] = self.counts.ends.get("cancelled", 0) + 1

    def drain(self, seconds: float) -> bool:
        """Take no more requests and wait until those under way are done, at most `seconds`; whether they are."""
        self._draining = True
        until = time.monotonic() + seconds
        while (self._listeners or self._orders) and self.alive and time.monotonic() < until:
            time.sleep(0.02)
        return not self._listeners

    def stop(self) -> None:
        """End the thread; requests under way end with an error."""
        self._draining = True
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._orders and self.idle and not self._stopping:
                        self._wake.wait()
                    orders, self._orders = list(self._orders), deque()
                for run in orders:
                    run()
                if self._stopping:
                    raise Draining
                for engine in self._engines:
                    if engine.idle:
                        continue
                    began = time.monotonic()
                    events = self._step(engine)
                    self.counts.busy_seconds += time.monotonic() - began
                    self.counts.steps += 1
                    for event in events:
                        self._tell(event)
        except BaseException as error:
            self._failed = error
            cause = error if isinstance(error, TunesmithError) else ResourceError(f"the engine failed ({error!r})")
            for run in self._orders:  # before the last words: a submit among them has a listener too
                run()
            for id in list(self._listeners):
                self._tell(Event(id, reason="error", error=cause))
            if not isinstance(error, Draining):
                raise

    def _step(self, engine: Engine | Encoder) -> Sequence[Happened]:
        """A step. One that fails costs the requests it had, not the server."""
        try:
            return engine.step()
        except Exception as error:
            log.exception("a step failed")
            memory = isinstance(error, MemoryError) or "alloc" in str(error)
            cause = Failed("memory is short" if memory else f"a step failed ({type(error).__name__})", memory)
            # Those in the batch first; with none, what waits must be to blame.
            ids = engine.under_way() or engine.queued()
            if not ids:
                raise
            for id in ids:
                engine.cancel(id)
            return [Event(id, reason="error", error=cause) for id in ids]

    def _tell(self, event: Happened) -> None:
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
        times = sorted(self.counts.first_token_seconds)
        at = {p: times[min(len(times) - 1, int(p * len(times)))] if times else 0.0 for p in (0.5, 0.95)}
        writing: dict[str, Any] = {"running": 0, "waiting": 0, "cells": 0, "cells_free": 0, "cells_cached": 0,
                                   "prefix_tokens": 0, "guessed": 0, "guessed_right": 0}  # fmt: skip
        if self.engine is not None:
            e = self.engine
            writing = {
                "running": len(e.live),
                "waiting": len(e.waiting),
                "cells": e.pool.cells,
                "cells_free": e.free,
                "cells_cached": e.pages.unused,
                "prefix_tokens": e.pages.found,
                "guessed": e.guessed,
                "guessed_right": e.right,
            }
        return {
            **writing, "reading": 0 if self.encoder is None else self.encoder.waiting,
            "deltas": len(self.library.entries), "deltas_held": len(self.library.held),
            "held_bytes": self.library.held_bytes, "loads": self.library.loads, "evictions": self.library.evictions,
            "first_token_p50": at[0.5], "first_token_p95": at[0.95],
        }  # fmt: skip
