# SPDX-License-Identifier: Apache-2.0
"""Gromov-Wasserstein distance between two square matrices of one size, with uniform node weights and square loss.

    GW^2(A, B) = min_T sum_ijkl (A_ik - B_jl)^2 T_ij T_kl        T a coupling of two uniform weightings of n nodes

By conditional gradient: with uniform weights the linear problem inside is an assignment, solved exactly, and the step has a
closed form. No entropic term is needed, so nothing underflows. The problem is not convex: several starts are tried and the
best is kept. O(n^3) a step; n of at most 60 is meant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from tunesmith.core.errors import UsageError

Matrix = NDArray[np.float64]


def cost(A: Matrix, B: Matrix, T: Matrix) -> float:
    """The objective at a coupling T [n, n] whose rows and columns sum to 1 / n."""
    n = len(A)
    return float((A**2).sum() / n**2 + (B**2).sum() / n**2 - 2 * ((A @ T @ B.T) * T).sum())


def gromov_wasserstein(
    A: Matrix, B: Matrix, *, starts: Sequence[Matrix] = (), restarts: int = 3, iterations: int = 60, seed: int = 0
) -> tuple[float, Matrix]:
    """GW (the root of the minimum found) and its coupling [n, n], for symmetric A and B [n, n].

    Starts: the nodes in the order of their row sums, the independent coupling, `restarts` random permutations, and those
    given. Raises UsageError for matrices that are not symmetric, finite and of one size.
    """
    A, B = (np.asarray(M, dtype=np.float64) for M in (A, B))
    fine = A.ndim == 2 and A.shape == B.shape and A.shape[0] == A.shape[1] > 0
    if not fine or not all(np.isfinite(M).all() and np.allclose(M, M.T) for M in (A, B)):
        raise UsageError(
            f"{A.shape} and {B.shape} are not two symmetric matrices of one size", where="gromov_wasserstein"
        )
    n, rng = len(A), np.random.default_rng(seed)
    ordered = np.zeros((n, n))
    ordered[np.argsort(A.sum(1), kind="stable"), np.argsort(B.sum(1), kind="stable")] = 1 / n
    every = [*starts, ordered, np.full((n, n), 1 / n**2)]
    every += [np.eye(n)[rng.permutation(n)] / n for _ in range(restarts)]
    found = [_descend(A, B, T, iterations) for T in every]
    value, T = min(found, key=lambda f: f[0])
    return float(np.sqrt(max(value, 0.0))), T


def _descend(A: Matrix, B: Matrix, T: Matrix, iterations: int) -> tuple[float, Matrix]:
    n, value = len(A), cost(A, B, T)
    for _ in range(iterations):
        G = A @ T @ B.T  # the gradient is -4 G up to a constant
        rows, columns = linear_sum_assignment(-G)
        S = np.zeros((n, n))
        S[rows, columns] = 1 / n
        D = S - T
        slope = -4 * float((G * D).sum())
        curve = -2 * float(((A @ D @ B.T) * D).sum())
        if slope > -1e-12:
            break
        step = 1.0 if curve <= 0 else min(1.0, -slope / (2 * curve))
        new = cost(A, B, T + step * D)
        if new >= value - 1e-13:
            break
        T, value = T + step * D, new
    return value, T
