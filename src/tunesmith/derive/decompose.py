# SPDX-License-Identifier: Apache-2.0
"""W ~ Q + L1 L2: a quantised matrix and a low-rank one that repairs its error, found in turns.

LQ-LoRA, from Q = 0:                          L1 L2 = SVD_k(W - Q);  Q = quant(W - L1 L2);  e = ||W - L1 L2 - Q||
    until e no longer falls; the best pair is kept.
LoftQ, from L1 L2 = 0:                        Q = quant(W - L1 L2);  L1 L2 = SVD_k(W - Q)
    a fixed number of times; the last pair is kept.

With weights F [out, in] the error is ||sqrt(F) * (...)||, and the SVD is that of diag(d_r) (W - Q) diag(d_c) with d_r =
sqrt(mean of F over columns), d_c = sqrt(mean of F over rows): the optimum where F has rank one.

Guo et al. 2023, arXiv 2311.12023; LoftQ: Li et al. 2023, arXiv 2310.08659, as PEFT defines it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.spectrum import randomised
from tunesmith.derive.nf import Format, rounded

FLOOR = 1e-4  # least weight of a row or column, over the mean: one that saw no gradient must not divide by zero
POWER_ROUNDS = 2  # of the random range finder; the residual's spectrum is flat, and more change nothing


@dataclass(frozen=True)
class Decomposition:
    """Q = quant(`residual`), `L1` [out, k] and `L2` [k, in], their `error`, and the `errors` of all rounds that were run."""

    residual: Tensor
    L1: Tensor
    L2: Tensor
    error: float
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Weights:
    """F [out, in] as mean `level` and, of F / level, `root` = sqrt [out, in], d_r [out] and d_c [in]."""

    level: float
    root: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, F: Tensor) -> Weights:
        """From the weights of the entries, none of them negative."""
        level = float(F.double().mean())
        # A layer that no example reached: all its errors are 0, and no entry counts more than another.
        F = F.float() / level if level > 0 else torch.ones_like(F, dtype=torch.float32)
        rows, columns = F.mean(1).clamp_min(FLOOR).sqrt(), F.mean(0).clamp_min(FLOOR).sqrt()
        return cls(level, F.sqrt(), rows, columns)


def low_rank(W: Tensor, rank: int, weights: Weights | None = None, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """L1 [out, k] and L2 [k, in], the (weighted) truncated SVD of W with the singular values split evenly."""
    if weights is not None:
        W = weights.rows[:, None] * W * weights.columns
    if exact or rank >= min(W.shape):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        found = randomised(W, rank, rounds=POWER_ROUNDS)
        U, S, Vh = found.U, found.S, found.Vh
    root = S[:rank].sqrt()
    L1, L2 = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return (L1, L2) if weights is None else (L1 / weights.rows[:, None], L2 / weights.columns)


def size(E: Tensor, weights: Weights | None = None) -> float:
    """||E||, or ||sqrt(F) * E||, Frobenius, summed in double precision."""
    if weights is None:
        return math.sqrt(float(E.double().square().sum()))
    return math.sqrt(weights.level * float((weights.root * E).double().square().sum()))


@torch.no_grad()
def lq(
    W: Tensor, form: Format, rank: int, *, weights: Weights | None = None, rounds: int = 100, exact: bool = False
) -> Decomposition:
    """LQ-LoRA's alternation; rank 0 is plain quantisation. The released code keeps the last pair, this the best one."""
    W = W.detach().float()
    out, inside = W.shape
    if rank == 0:
        error = size(W - rounded(W, form), weights)
        return Decomposition(W, W.new_zeros(out, 0), W.new_zeros(0, inside), error, (error,))
    Q, kept, errors = torch.zeros_like(W), (W, W, W), [math.inf]
    for _ in range(max(1, rounds)):
        L1, L2 = low_rank(W - Q, rank, weights, exact=exact)
        residual = W - L1 @ L2
        Q = rounded(residual, form)
        errors.append(size(residual - Q, weights))
        if errors[-1] >= errors[-2]:
            break
        kept = (residual, L1, L2)
    return Decomposition(*kept, min(errors), tuple(errors[1:]))


@torch.no_grad()
def loftq(W: Tensor, form: Format, rank: int, *, rounds: int = 1, exact: bool = True) -> Decomposition:
    """LoftQ's alternation as in PEFT 0.21: the last low-rank part fits what the last quantisation left."""
    W = W.detach().float()
    residual, errors = W, []
    L1, L2 = W.new_zeros(W.shape[0], 0), W.new_zeros(0, W.shape[1])
    for i in range(max(1, rounds)):
        if i:
            residual = W - L1 @ L2
        Q = rounded(residual, form)
        L1, L2 = low_rank(W - Q, rank, exact=exact)
        errors.append(size(W - Q - L1 @ L2))
    return Decomposition(residual, L1, L2, errors[-1], tuple(errors))
