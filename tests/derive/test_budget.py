# SPDX-License-Identifier: Apache-2.0
"""The integer programme against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.derive.budget import allocate


def by_trying(errors: list[list[float]], sizes: list[list[int]], budget: float) -> float:
    """The least error of any choice within the budget."""
    return min(
        sum(errors[i][c] for i, c in enumerate(pick))
        for pick in itertools.product(*(range(len(e)) for e in errors))
        if sum(sizes[i][c] for i, c in enumerate(pick)) <= budget
    )


@pytest.mark.parametrize("seed", range(12))
def test_four_matrices_with_three_choices_are_solved_as_by_enumeration(seed: int) -> None:
    rng = random.Random(seed)
    scale = 10.0 ** rng.randint(-9, 3)  # the solver's tolerances must not depend on the unit of the errors
    errors = [[rng.random() * scale for _ in range(3)] for _ in range(4)]
    sizes = [[rng.randint(1, 1000) for _ in range(3)] for _ in range(4)]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for budget in (least, least + 0.3 * (most - least), least + 0.7 * (most - least), most):
        choice = allocate(errors, sizes, budget)
        assert sum(sizes[i][c] for i, c in enumerate(choice)) <= budget
        got = sum(errors[i][c] for i, c in enumerate(choice))
        assert got == pytest.approx(by_trying(errors, sizes, budget), rel=1e-9)


def test_many_matrices_stay_within_the_budget_and_beat_any_single_format() -> None:
    rng = random.Random(1)
    bits = (2, 3, 4, 8)
    sizes = [[n * b for b in bits] for n in (rng.randint(100, 900) for _ in range(60))]
    errors = [[w * 4.0**-b for b in bits] for w in (rng.random() ** 4 for _ in range(60))]
    budget = sum(row[1] for row in sizes)
    choice = allocate(errors, sizes, budget)
    assert sum(sizes[i][c] for i, c in enumerate(choice)) <= budget
    assert sum(errors[i][c] for i, c in enumerate(choice)) < sum(row[1] for row in errors)


def test_a_budget_that_cannot_be_met_names_the_smallest() -> None:
    with pytest.raises(UsageError, match="30"):
        allocate([[1.0, 0.5]] * 3, [[10, 20]] * 3, 29)
    assert allocate([[1.0, 0.5]] * 3, [[10, 20]] * 3, 30) == [0, 0, 0]


def test_rows_must_fit_together() -> None:
    with pytest.raises(UsageError):
        allocate([[1.0]], [[1, 2]], 5)
