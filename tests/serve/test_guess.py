# SPDX-License-Identifier: Apache-2.0
"""Guesses: what a request writes is what it would write a token at a time, in fewer steps where texts repeat."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from serve_cases import GREEDY, engine, moved

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.deltas import IA3, LoRA
from tunesmith.serve.guess import MOST, START, Guesses
from tunesmith.serve.requests import Request
from tunesmith.serve.sampling import Sampling

DELTAS = {"a": LoRA(rank=2), "b": LoRA(rank=5), "c": IA3()}


def circles(id: str, seed: int, **more: Any) -> Request:
    """A prompt that repeats itself, so that much is guessed and much of it wrong."""
    rng = random.Random(seed)
    words = [rng.randrange(67) for _ in range(5)]
    return Request(id, tuple(words * 3), 24, **{"sampling": GREEDY, **more})


def test_what_followed_the_longest_run_is_guessed() -> None:
    g = Guesses([1, 2, 3, 9, 2, 3, 8, 1, 2, 3])
    assert g.next([], 8) == [9, 2, 3]  # after 1 2 3, not after the later 2 3
    assert g.next([9], 2) == [2, 3]
    assert g.next([9, 7], 8) == []
    assert Guesses([5]).next([], 4) == [] and Guesses([1, 2]).next([], 4) == []


def test_a_text_that_goes_in_circles_goes_on() -> None:
    g = Guesses([4, 4, 4])
    g.told(START, START)
    assert g.next([], 5) == [4] * 5
    assert Guesses([1, 2, 1, 2]).next([], 3) == [1, 2, 1]


def test_who_guesses_wrong_guesses_less() -> None:
    g = Guesses([1, 2, 1, 2])
    assert len(g.next([], 50)) == START
    for _ in range(6):
        g.told(len(g.next([], 50)), len(g.next([], 50)))
    assert len(g.next([], 50)) == MOST
    g.told(MOST, 2)
    assert len(g.next([], 50)) == 2
    g.told(2, 0)
    assert len(g.next([], 50)) == 1
    assert (g.made, g.right) == (g.made, g.made - MOST) and g.made > MOST


FEW = {1: 50.0, 2: 50.0, 3: 50.0}  # a random model writes of all its words; of three, runs of two stood before
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"sampling": Sampling(temperature=0, bias=FEW)},
    "drawn": {"sampling": Sampling(temperature=5.0, seed=5, top_p=0.95, bias=FEW)},
    "penalised": {"sampling": Sampling(temperature=0, repetition=1.3, presence=0.5, frequency=0.2, bias=FEW)},
    "stopped": {"sampling": Sampling(temperature=2.0, seed=1), "stop": frozenset(range(0, 67, 9))},
}


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("guess", [2, 6, 40])
def test_the_answer_is_that_of_a_token_at_a_time(llama: Base, how: str, guess: int) -> None:
    deltas = {n: moved(llama, m, seed=i) for i, (n, m) in enumerate(DELTAS.items())}
    requests = [circles(str(i), i, delta=d, **SETTINGS[how]) for i, d in enumerate([None, *deltas, None, "a"])]
    plain = engine(llama, deltas, guess=0)
    want = plain.generate(requests)
    assert plain.guessed == 0
    guessed = right = 0
    for some in (requests, requests[:1], requests[1:3]):
        e = engine(llama, deltas, guess=guess)
        got = e.generate(some)
        assert got == {r.id: want[r.id] for r in some}
        e.pool.check()
        e.pages.check()
        assert e.free == 4000
        guessed, right = guessed + e.guessed, right + e.right
    assert how == "stopped" or (guessed > 5 if guess == 2 else 0 < right < guessed)


def test_repetition_takes_fewer_steps(llama: Base) -> None:
    def steps(guess: int) -> int:
        e = engine(llama, guess=guess)
        e.submit(Request("r", (7, 8) * 6, 40, sampling=Sampling(temperature=0, bias={7: 100.0})))
        n = 0
        while not e.idle:
            e.step()
            n += 1
        return n

    assert steps(0) == 40 and steps(8) < 12


def test_logits_of_guesses_are_those_without(llama: Base) -> None:
    """The control of the tests above: tokens alone would not show a wrong cache where one token always wins."""
    request = circles("r", 3, sampling=Sampling(temperature=0, logprobs=5, bias=FEW))
    rows = []
    for guess in (0, 8):
        e = engine(llama, guess=guess)
        e.submit(request)
        rows.append([event.chosen for _ in range(30) if not e.idle for event in e.step()])
    assert len(rows[0]) == len(rows[1]) == 24
    for a, b in zip(*rows, strict=True):
        assert a.token == b.token and a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert [t for t, _ in a.others] == [t for t, _ in b.others]


def test_guesses_never_take_cells_that_others_need(llama: Base) -> None:
    deltas = {n: moved(llama, m, seed=i) for i, (n, m) in enumerate(DELTAS.items())}
    rng = random.Random(1)
    guessed = 0
    for cells in (45, 60, 90):
        e = engine(llama, deltas, cells=cells + 60, requests=5, guess=64)
        few = Sampling(temperature=2.0, bias=FEW)
        todo = [circles(str(i), i, delta=rng.choice([None, "a"]), sampling=few) for i in range(12)]
        done = 0
        while todo or not e.idle:
            if todo and rng.random() < 0.5:
                e.submit(todo.pop())
            for event in e.step():
                assert event.error is None
                done += event.reason == "length"
            e.pool.check()
            assert all(r.held == r.cached and not r.guessed for r in e.live.values())
        assert done == 12 and e.free == cells + 60
        guessed += e.guessed
    assert guessed > 100


def test_a_cancelled_request_leaves_nothing_of_its_guesses(llama: Base) -> None:
    e = engine(llama, guess=16)
    e.submit(circles("r", 0))
    for _ in range(4):
        e.step()
    assert e.cancel("r") and e.free == 4000
    e.pool.check()


def test_settings_are_checked(llama: Base) -> None:
    with pytest.raises(UsageError, match="guess"):
        engine(llama, guess=-1)


def test_half_precision_may_round_but_writes_on() -> None:
    from serve_cases import tiny_llama

    base = tiny_llama()
    base = Base(base.model.to(torch.bfloat16), family="causal-lm")
    e = engine(base, guess=8)
    assert len(e.generate([circles("r", 0)])["r"]) == 24
