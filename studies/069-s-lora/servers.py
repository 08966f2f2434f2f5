# SPDX-License-Identifier: Apache-2.0
"""Four ways to serve a trace, timed in processor seconds of this process: study 069."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.serve.admission import Limits, Running, Waiting, admit
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.requests import Request
from tunesmith.serve.sampling import Sampling

from .trace import Ask

GREEDY = Sampling(temperature=0)
BUDGET = 1 << 40  # every delta stays in memory: the paper's are in host memory too


@dataclass
class Served:
    """What a server did: tokens written, processor seconds, first-token waits, rows per step, most cells in use."""

    tokens: int = 0
    seconds: float = 0.0
    waits: dict[str, float] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    cells: int = 0

    def summary(self) -> dict[str, Any]:
        waits = sorted(self.waits.values())
        return {
            "metric": self.tokens / self.seconds, "tokens": self.tokens, "seconds": self.seconds,
            "first token": sum(waits) / len(waits), "first token p95": waits[int(0.95 * (len(waits) - 1))],
            "batch": sum(self.rows) / len(self.rows), "cells": self.cells,
        }  # fmt: skip


class Clock:
    """Processor seconds since the start; `skip` passes over time in which there is nothing to do."""

    def __init__(self) -> None:
        self.begin, self.extra = time.process_time(), 0.0

    def now(self) -> float:
        return time.process_time() - self.begin + self.extra

    def spent(self) -> float:
        """Processor seconds without what was skipped."""
        return self.now() - self.extra

    def skip(self, until: float) -> None:
        self.extra += max(0.0, until - self.now())


def library_of(base: Base, deltas: Sequence[Delta]) -> Library:
    """The deltas, ready in memory."""
    made = Library(base, BUDGET)
    for d in deltas:
        made.add(d)
    return made


def request(a: Ask, name: str | None) -> Request:
    return Request(a.id, a.prompt, a.new, name, GREEDY, arrived=a.arrived)


def step(engine: Engine, clock: Clock, asked: dict[str, Ask], out: Served) -> None:
    """One round, with what it wrote and held."""
    ended = 0
    for event in engine.step():
        ended += event.reason is not None
        if event.error is not None:
            raise event.error
        if event.chosen is not None:
            out.tokens += 1
            out.waits.setdefault(event.id, clock.now() - asked[event.id].arrived)
    out.rows.append(len(engine.live) + ended)
    out.cells = max(out.cells, engine.pool.cells - engine.free)


def all_at_once(engine: Engine, asks: Sequence[Ask], name: Callable[[Ask], str | None]) -> Served:
    """Every request joins as soon as it is there and fits, whatever its adapter."""
    clock, out, todo, asked = Clock(), Served(), list(asks), {a.id: a for a in asks}
    while todo or not engine.idle:
        if engine.idle:
            clock.skip(todo[0].arrived)
        while todo and todo[0].arrived <= clock.now():
            a = todo.pop(0)
            engine.submit(request(a, name(a)))
        step(engine, clock, asked, out)
    out.seconds = clock.spent()
    return out


def one_adapter_at_a_time(
    engine: Engine,
    asks: Sequence[Ask],
    name: Callable[[Ask], str | None],
    switch: Callable[[int], None] = lambda a: None,
) -> Served:
    """The adapter that has waited longest has the server to itself until its requests are done; others wait."""
    clock, out, todo, asked = Clock(), Served(), list(asks), {a.id: a for a in asks}
    while todo:
        clock.skip(todo[0].arrived)
        turn = todo[0].adapter
        switch(turn)
        while True:
            for a in [a for a in todo if a.adapter == turn and a.arrived <= clock.now()]:
                todo.remove(a)
                engine.submit(request(a, name(a)))
            if engine.idle:
                break
            step(engine, clock, asked, out)
    out.seconds = clock.spent()
    return out


class Merged:
    """A copy of the base whose weights are rewritten for each adapter in turn."""

    def __init__(self, base: Base, deltas: Sequence[Delta]) -> None:
        self.base, self.deltas = base, deltas
        self.own = Base(copy.deepcopy(base.model), name=f"{base.name}-merged", family=base.family)
        self.changed: list[str] = []

    @torch.no_grad()
    def switch(self, adapter: int) -> None:
        """W of every touched layer as W + s B A, the others as in the base."""
        part = self.deltas[adapter].parts[0]
        for path in {*self.changed, *part.paths}:
            W = self.base.modules[path].weight
            if path in part.kind_of:
                t = part.tensors(path)
                scale = part.method.alpha / part.method.rank
                W = W + (scale * (t["B"].to(W.dtype) @ t["A"].to(W.dtype)))
            self.own.modules[path].weight.copy_(W)
        self.changed = list(part.paths)


def padded(library: Library, rank: int) -> None:
    """Fill the factors of every delta with zeros up to one rank, and take their cells out of the pool's account."""
    for name, entry in list(library.entries.items()):
        held = library.acquire(name)
        for path, (A, B) in held.low.items():
            extra = rank - len(A)
            held.low[path] = (
                torch.cat([A, A.new_zeros(extra, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), extra)], 1)
            )  # fmt: skip
        library.release(held)
        library.entries[name] = replace(entry, nbytes=2)  # one cell: they lie in a buffer of their own


def best_buffer(asks: Sequence[Ask], cells: int, slot: int, requests: int, choices: Sequence[int]) -> int:
    """How many slots of a padded buffer give the largest mean batch at this memory, by bookkeeping alone."""

    def mean(slots: int) -> float:
        limits = Limits(cells - slots * slot, requests, resident=slots)
        if limits.cells < 2 * max(len(a.prompt) + a.new for a in asks):
            return 0.0
        sizes = {str(a.adapter): 1 for a in asks}
        queue = [Waiting(a.id, len(a.prompt), a.new, str(a.adapter)) for a in asks]
        live: list[Running] = []
        rows = []
        while queue or live:
            joined = admit(queue, live, limits, sizes)
            queue = [w for w in queue if w not in joined]
            live += [Running(w.id, w.prompt, w.new, w.delta) for w in joined]
            rows.append(len(live))
            live = [replace(r, used=r.used + 1, left=r.left - 1) for r in live if r.left > 1]
        return sum(rows) / len(rows)

    return max(choices, key=lambda s: (mean(s), -s))
