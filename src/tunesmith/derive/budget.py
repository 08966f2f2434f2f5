# SPDX-License-Identifier: Apache-2.0
"""Which format each matrix gets under one budget: an integer programme, solved exactly.

    minimise sum_i sum_c e_ic x_ic   subject to   sum_c x_ic = 1,  sum_ic bytes_ic x_ic <= budget,  x_ic in {0, 1}

Guo et al. 2023, arXiv 2311.12023, with scipy's `milp` in place of their solver. Choices that another one of the same
matrix beats in both error and size are dropped first; no optimum needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from tunesmith.core.errors import ResourceError, UsageError


def allocate(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: float) -> list[int]:
    """For each matrix the number of its choice: least total error within `budget` (in the unit of `sizes`).

    `errors` and `sizes` hold one row for each matrix, one column for each choice. Raises UsageError naming the smallest
    budget where none fits, and ResourceError where the solver gives up.
    """
    if len(errors) != len(sizes) or any(len(e) != len(z) or not len(e) for e, z in zip(errors, sizes, strict=True)):
        raise UsageError("errors and sizes need one row for each matrix and one column for each choice")
    least = sum(min(row) for row in sizes)
    if least > budget:
        raise UsageError(f"the smallest choices need {least:,}, the budget is {budget:,.0f}", where="budget")
    kept = [_undominated(e, z) for e, z in zip(errors, sizes, strict=True)]
    owner = np.concatenate([np.full(len(k), i) for i, k in enumerate(kept)])
    error = np.array([errors[i][c] for i, k in enumerate(kept) for c in k], dtype=float)
    size = np.array([sizes[i][c] for i, k in enumerate(kept) for c in k], dtype=float)
    unit = max(float(error.max()), 1e-300)  # the solver's tolerances are absolute
    one = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    found = milp(
        error / unit, integrality=np.ones(len(owner)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(size[None] / budget, -np.inf, 1.0)],
        options={"mip_rel_gap": 0.0, "time_limit": 120.0},
    )  # fmt: skip
    if found.x is None:
        raise ResourceError(f"the budget could not be solved: {found.message}", hint="offer fewer choices")
    choice = [k[int(np.argmax(found.x[owner == i]))] for i, k in enumerate(kept)]
    if sum(sizes[i][c] for i, c in enumerate(choice)) > budget:  # the solver accepts a hair's breadth too much
        raise ResourceError("the solver went over the budget", hint="a slightly smaller budget")
    return choice


def _undominated(errors: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Choices that no other one beats or equals in both, by rising size."""
    order = sorted(range(len(errors)), key=lambda c: (sizes[c], errors[c]))
    kept: list[int] = []
    for c in order:
        if not kept or errors[c] < errors[kept[-1]]:
            kept.append(c)
    return kept
