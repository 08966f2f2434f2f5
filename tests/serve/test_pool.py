# SPDX-License-Identifier: Apache-2.0
"""The pool of cells: nothing is owned twice, nothing is lost, and it gives exactly what was asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import ResourceError, UsageError
from tunesmith.serve.pool import RUN, Pool, cells_for, lora_cells


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 25), st.booleans(), st.booleans()), max_size=40),
)
def test_books_add_up_after_any_sequence(cells: int, moves: list[tuple[int, int, bool, bool]]) -> None:
    pool = Pool(cells)
    held: dict[int, int] = {}
    for owner, n, take, together in moves:
        if take and n > pool.free:
            with pytest.raises(ResourceError, match=f"{n} cells were asked for and {pool.free} of {cells}"):
                pool.take(owner, n, together=together)
        elif take:
            got = pool.take(owner, n, together=together)
            assert len(got) == n and got.dtype == torch.int64 and bool((got.diff() > 0).all())
            held[owner] = held.get(owner, 0) + n
        else:
            assert pool.give_back(owner) == held.pop(owner, 0)
        pool.check()
        assert pool.free + sum(held.values()) == cells
        for o, count in held.items():
            assert len(pool.of(o)) == count


def test_neighbours_are_found_where_there_are_some() -> None:
    pool = Pool(10)
    for owner in range(5):
        pool.take(owner, 2)
    pool.give_back(1)  # 2, 3
    pool.give_back(3)  # 6, 7
    pool.give_back(4)  # 8, 9
    assert pool.take("run", 3, together=True).tolist() == [6, 7, 8]
    assert pool.take("scattered", 3, together=True).tolist() == [2, 3, 9]
    pool.check()


def test_cells_are_held_in_the_order_they_were_taken() -> None:
    pool = Pool(6)
    pool.take("a", 2)
    pool.take("b", 1)
    pool.take("a", 2)
    assert pool.of("a").tolist() == [0, 1, 3, 4] and pool.of("nobody").tolist() == []
    assert pool.give_back("nobody") == 0


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one cell"):
        Pool(0)
    with pytest.raises(UsageError, match="cannot take -1"):
        Pool(3).take("a", -1)


def test_a_lora_on_equal_projections_takes_four_times_its_rank() -> None:
    assert lora_cells([(8, 64, 64)] * 4, width=64) == 4 * 8


def test_rows_wider_than_a_cell_take_several() -> None:
    # SmolLM2-135M: 9 query and 3 key-value heads of 64, so a cell holds 192 numbers and a row of A (576) three cells.
    shapes = [(8, 576, 576), (8, 576, 192), (8, 576, 192), (8, 576, 576)]
    assert lora_cells(shapes, width=192) == 4 * 8 * 3
    assert cells_for([(2, 193), (1, 192)], width=192) == 5


def test_what_is_read_together_lies_together() -> None:
    pool = Pool(5 * RUN)
    prompts = {"a": pool.take("a", 3).tolist(), "b": pool.take("b", RUN + 2).tolist()}
    assert prompts == {"a": [0, 1, 2], "b": list(range(RUN, 2 * RUN + 2))}
    last = [prompts["a"][-1], prompts["b"][-1], -1]
    for _ in range(3):
        last = pool.take_each(["a", "b", "c"], last).tolist()
    assert pool.of("a").tolist() == list(range(6))
    assert pool.of("b").tolist() == list(range(RUN, 2 * RUN + 5))
    assert pool.of("c").tolist() == [3 * RUN, 3 * RUN + 1, 3 * RUN + 2]
    pool.check()


def test_scattered_cells_are_given_when_no_run_is_left() -> None:
    pool = Pool(2 * RUN + 3)  # the last three belong to no run
    pool.take("a", RUN - 2)
    pool.take("b", RUN - 1)
    taken = pool.take_each(["a", "b", "c", "d", "e", "f"], [RUN - 3, RUN - 3, -1, 2 * RUN + 2, -1, 0])
    assert taken[0] == RUN - 2  # the first of two that want it
    assert sorted(taken.tolist()) == [RUN - 2, RUN - 1, 2 * RUN - 1, 2 * RUN, 2 * RUN + 1, 2 * RUN + 2]
    assert pool.free == 0
    pool.check()


def test_one_cell_for_each_owner() -> None:
    pool = Pool(5)
    pool.take("a", 2)
    assert pool.take_each(["b", "a", "c"]).tolist() == [2, 3, 4]
    assert pool.of("a").tolist() == [0, 1, 3] and pool.take_each([]).tolist() == []
    with pytest.raises(ResourceError, match="1 cells were asked for and 0 of 5"):
        pool.take_each(["d"])
    pool.check()
