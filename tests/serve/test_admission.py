# SPDX-License-Identifier: Apache-2.0
"""Admission: what is let in always fits, in the order the policy says."""

from __future__ import annotations

import random

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.serve.admission import (
    Batch,
    Counters,
    EarlyAbort,
    Limits,
    Running,
    Waiting,
    admit,
    attainment,
    need,
    satisfaction,
)
from tunesmith.serve.pool import Pool


def test_need_on_the_example_of_the_card() -> None:
    assert need([(3, 5), (2, 4)]) == 13
    assert need([(2, 4), (3, 5)]) == 13
    assert need([]) == 0


def highest_use(requests: list[tuple[int, int]]) -> int:
    """By playing it through: every request takes a cell a step until it is done."""
    most, step = 0, 0
    while True:
        most = max(most, sum(used + min(step, left) for used, left in requests if step <= left))
        if step >= max((left for _, left in requests), default=0):
            return most
        step += 1


def test_need_is_the_highest_use_if_all_run_to_their_end() -> None:
    rng = random.Random(0)
    for _ in range(200):
        requests = [(rng.randrange(20), rng.randrange(20)) for _ in range(rng.randrange(1, 8))]
        assert need(requests) == highest_use(requests)


@pytest.mark.parametrize("policy", ["fcfs", "cluster", "fair"])
def test_the_pool_never_overflows(policy: str) -> None:
    """Requests stop when they like; whatever was admitted finds its cells."""
    rng = random.Random(1)
    for trial in range(20):
        limits = Limits(cells=rng.randrange(60, 200), requests=rng.randrange(2, 9), prompt_tokens=60, deltas=2)
        sizes = {f"d{i}": rng.choice([0, 4, 16]) for i in range(5)}
        pool, counters, running, done = Pool(limits.cells), Counters(), {}, 0
        queue = [
            Waiting(f"r{i}", rng.randrange(1, 25), rng.randrange(1, 25), rng.choice([None, *sizes]), float(i))
            for i in range(25)
        ]
        for _ in range(3000):
            now = [Running(w.id, used, w.new - wrote, w.delta) for w, used, wrote in running.values()]
            for w in admit(queue, now, limits, sizes, policy=policy, counters=counters):
                queue.remove(w)
                if w.delta is not None and w.delta not in pool.owners():
                    pool.take(w.delta, sizes[w.delta])
                pool.take(("kv", w.id), w.prompt)
                running[w.id] = (w, w.prompt, 0)
            for key, (w, _, wrote) in list(running.items()):
                if wrote == w.new or rng.random() < 0.03:
                    pool.give_back(("kv", key))
                    del running[key]
                    done += 1
            for key, (w, used, wrote) in list(running.items()):  # after the finished have left
                pool.take(("kv", key), 1)
                running[key] = (w, used + 1, wrote + 1)
            for owner in pool.owners():
                if isinstance(owner, str) and owner not in {w.delta for w, _, _ in running.values()}:
                    pool.give_back(owner)
            pool.check()
            if not queue and not running:
                break
        assert done == 25 and pool.free == limits.cells, trial


def test_first_come_first_served_stops_at_what_does_not_fit() -> None:
    queue = [Waiting("a", 5, 5), Waiting("big", 50, 50), Waiting("c", 1, 1)]
    assert [w.id for w in admit(queue, [], Limits(cells=30, prompt_tokens=30), {})] == ["a"]


def test_a_refusal_leaves_no_trace() -> None:
    batch = Batch(Limits(cells=30, prompt_tokens=30), {"d": 25})
    assert not batch.fits(Waiting("x", 5, 5, "d")) and batch.fits(Waiting("y", 10, 10)) and not batch.joined


def test_deltas_share_the_budget_with_caches_and_count_once() -> None:
    limits, sizes = Limits(cells=40, prompt_tokens=40), {"d": 16, "e": 16}
    same = [Waiting("a", 4, 4, "d"), Waiting("b", 4, 4, "d")]
    other = [Waiting("a", 4, 4, "d"), Waiting("b", 4, 4, "e")]
    assert len(admit(same, [], limits, sizes)) == 2
    assert len(admit(other, [], limits, sizes)) == 1
    assert len(admit([Waiting("a", 4, 4), Waiting("b", 4, 4, "d")], [], limits, sizes)) == 2


def test_a_prompt_longer_than_the_joint_limit_goes_alone_and_one_that_never_fits_is_known() -> None:
    limits = Limits(cells=120, prompt_tokens=20)
    queue = [Waiting("long", 50, 5), Waiting("short", 5, 5)]
    assert [w.id for w in admit(queue, [], limits, {})] == ["long"]
    assert not Batch(limits, {}).could_ever(Waiting("huge", 119, 2))


def test_clustering_prefers_the_deltas_that_are_there() -> None:
    limits, sizes = Limits(cells=1000, requests=4, prompt_tokens=500, deltas=2), {}
    sizes = dict.fromkeys("abcd", 1)
    running = [Running("1", 5, 5, "a"), Running("2", 5, 5, "b")]
    queue = [Waiting("x", 5, 5, "c"), Waiting("y", 5, 5, "a"), Waiting("z", 5, 5, "b")]
    assert [w.id for w in admit(queue, running, limits, sizes, policy="cluster")] == ["y", "z"]
    assert [w.id for w in admit(queue, running, limits, sizes)] == ["x", "y"]
    few = admit(queue, running[:1], limits, sizes, policy="cluster")
    assert [w.id for w in few] == ["x", "y", "z"]


def test_the_delta_with_the_least_service_goes_first() -> None:
    counters = Counters()
    counters.joined(Waiting("before", 100, 1, "greedy"))
    queue = [Waiting("g1", 5, 5, "greedy", 0), Waiting("g2", 5, 5, "greedy", 1), Waiting("m", 5, 5, "modest", 2)]
    limits = Limits(cells=1000, requests=2, prompt_tokens=500)
    got = admit(queue, [], limits, {"greedy": 0, "modest": 0}, policy="fair", counters=counters)
    assert [w.id for w in got] == ["m", "g1"]


def test_idle_time_earns_no_credit_and_weights_divide_the_charge() -> None:
    counters = Counters({"paid": 2.0})
    counters.joined(Waiting("a", 100, 1, "busy"))
    counters.arrived("late", ["busy", "late"])
    assert counters.of("late") == counters.of("busy") == 100
    counters.wrote("paid", 10)
    counters.wrote("late", 10)
    assert counters.of("paid") == 10 and counters.of("late") == 120


def test_what_would_be_late_is_turned_away_and_overload_serves_the_newest() -> None:
    queue = [Waiting("old", 1, 1, None, 0.0), Waiting("mid", 1, 1, None, 4.0), Waiting("new", 1, 1, None, 6.0)]
    calm, busy = EarlyAbort(), EarlyAbort()
    kept, late = calm.turn(queue, now=6.2, arrived=0, admitted=5)
    assert [w.id for w in kept] == ["mid", "new"] and [w.id for w in late] == ["old"]
    kept, _ = busy.turn(queue, now=6.2, arrived=10, admitted=2)
    assert (busy.rate, busy.size) == (7, 1)
    assert [w.id for w in kept] == ["new", "mid"]


def test_what_users_saw() -> None:
    assert attainment([1.0, 7.0, None, 5.9]) == 0.5
    assert satisfaction([0.0, 6.0, None, 3.0]) == pytest.approx((1 + 0 + 0.75) / 4)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(UsageError, match="unknown policy 'lifo'"):
        admit([], [], Limits(cells=5), {}, policy="lifo")
    with pytest.raises(UsageError, match="counters"):
        admit([], [], Limits(cells=5), {}, policy="fair")


def test_a_batch_may_be_bound_to_so_many_deltas() -> None:
    queue = [Waiting(str(i), 2, 2, f"d{i}") for i in range(4)]
    sizes = {f"d{i}": 1 for i in range(4)}
    assert len(admit(queue, [], Limits(1000, resident=2), sizes)) == 2
    assert len(admit(queue, [Running("r", 2, 2, "d0")], Limits(1000, resident=2), sizes)) == 2
    assert len(admit(queue, [], Limits(1000), sizes)) == 4
