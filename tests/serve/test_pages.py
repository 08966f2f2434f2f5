# SPDX-License-Identifier: Apache-2.0
"""Cached prefixes: found by delta and tokens alone, shared without a copy, and never in the way of a request."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_cases import moved

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.deltas import LoRA
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.pages import Page, Pages
from tunesmith.serve.pool import Pool
from tunesmith.serve.requests import Request
from tunesmith.serve.sampling import Sampling

GREEDY = Sampling(temperature=0)


def engine(base: Base, **more: Any) -> Engine:
    library = Library(base, 1 << 30)
    for i in range(2):
        library.add(moved(base, LoRA(rank=2 + i), seed=i), f"d{i}")
    return Engine(base, library, **{"cells": 2000, **more})


def prompt(n: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(67) for _ in range(n))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 2)), max_size=40))
def test_books_add_up_after_any_sequence(moves: list[tuple[int, int, int]]) -> None:
    pool = Pool(24)
    pages = Pages(pool, size=2)
    chains: dict[int, list[Page]] = {}
    for reader, token, what in moves:
        chain = chains.setdefault(reader, [])
        if what == 0 and pool.free + pages.unused >= 2:
            pages.make_room(2)
            cells = pool.take(("cache", reader), 2)
            page = pages.add(("cache", reader), None, chain, (token, token), cells)
            chain.append(page)
            assert pages.find(None, [t for p in chain for t in p.key[2]] + [0]) == chain
        elif what == 1:
            pages.release(chains.pop(reader))
        elif what == 2:
            pages.make_room(token)
            assert pool.free >= token or not pages.unused
        pool.check()
        pages.check()
        assert pool.free + pages.unused + pages.in_use == 24
    for chain in chains.values():
        pages.release(chain)
    pages.make_room(24)
    assert pool.free == 24 and not pages.unused


def test_what_is_no_page_of_ones_own_is_not_handed_over() -> None:
    pool = Pool(8)
    mine, other = pool.take("a", 2), pool.take("b", 2)
    with pytest.raises(UsageError, match="does not have these cells"):
        pool.hand_over("a", other, None)
    pool.hand_over("a", mine[:1], "c")
    assert pool.of("a").tolist() == [1] and pool.of("c").tolist() == [0]
    pool.check()


def test_a_prefix_is_read_once_and_answers_stay_what_they_were(llama: Base) -> None:
    e, begin = engine(llama), prompt(40)
    asked = [
        Request(f"{d}{i}", begin + prompt(3 + i, 9 + i), 10, d, GREEDY) for i in range(3) for d in (None, "d0", "d1")
    ]
    want = {r.id: engine(llama, prefixes=False).generate([r])[r.id] for r in asked}
    for r in asked:
        before = e.pages.found
        assert e.generate([r])[r.id] == want[r.id]
        assert e.pages.found - before == (0 if r.id.endswith("0") else 32)  # two pages of 16, once a delta has been
        e.pool.check()
        e.pages.check()
    assert e.free == 2000 and e.pages.unused > 0 and not e.pages.in_use
    assert engine(llama).generate(asked) == want  # all at once: pages made twice are read once


def test_an_answer_is_a_prefix_too(llama: Base) -> None:
    e = engine(llama)
    first = e.generate([Request("a", prompt(20), 30, "d0", GREEDY)])["a"]
    again = Request("b", prompt(20) + tuple(first), 5, "d0", GREEDY)
    assert e.generate([again])["b"] == engine(llama, prefixes=False).generate([again])["b"]
    assert e.pages.found == 48


@pytest.mark.parametrize("policy", ["fcfs", "cluster", "fair"])
def test_nothing_overflows_when_prefixes_are_shared_in_a_small_pool(llama: Base, policy: str) -> None:
    rng = random.Random(5)
    e = engine(llama, cells=220, requests=6, chunk=11, policy=policy)
    begins = [prompt(n, n) for n in (17, 33, 50)]
    asked = [
        Request(str(i), rng.choice(begins)[: rng.randrange(10, 51)] + prompt(rng.randrange(1, 9), i), rng.randrange(1, 20),
                rng.choice([None, "d0", "d1"]), GREEDY)
        for i in range(40)
    ]  # fmt: skip
    answers: dict[str, list[int]] = {r.id: [] for r in asked}
    todo, ends = list(asked), {}
    while todo or not e.idle:
        for _ in range(rng.randrange(4)):
            if todo:
                e.submit(todo.pop())
        if rng.random() < 0.05 and e.live:
            gone = rng.choice(list(e.live))
            e.cancel(gone)
            ends[gone] = "cancelled"
        for event in e.step():
            assert event.error is None
            if event.chosen is not None:
                answers[event.id].append(event.chosen.token)
            if event.reason is not None:
                ends[event.id] = event.reason
        e.pool.check()
        e.pages.check()
    assert set(ends) == {r.id for r in asked} and e.free == 220 and e.pages.found > 0
    for r in asked[:12]:
        if ends[r.id] == "length":
            assert answers[r.id] == engine(llama, prefixes=False).generate([r])[r.id]
