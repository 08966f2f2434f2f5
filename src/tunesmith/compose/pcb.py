# SPDX-License-Identifier: Apache-2.0
"""PCB-Merging: every entry of every source is scored by its size within the source and its agreement with the others.

With D_i the change by source i as one row over all tensors, d entries, n sources:

    M_i = clip(|D_i|, its trim and 1 - trim quantiles)       C_i = sign(D_i) M_i
    P_i = exp(n minmax(M_i)^2) tanh(D_i sum_j D_j)           may be negative: the entry fights the majority
    S_i = minmax(max(P_i, its 1 - ratio quantile))           the lowest 1 - ratio become 0
    D   = sum_i S_i lam w_i C_i / sum_i S_i                  0 where every S is

All quantiles are over the whole model, not per tensor; they are exact, found in four passes that hold one tensor at a
time. `agree=normed` replaces D_j in the sum by sign(D_j) minmax(M_j), as in the authors' script for vision, so that a
source of large norm does not decide alone. `use=size` scores by the exponential alone and `use=agreement` by tanh alone,
the paper's ablations. fp32, as the ranks are.

Defaults: the authors' generic function; ratio 0.05 and lam 1.2 in their script for vision. The gradient-free search of one
lambda for each source is `search` over its weights, as docs/merging.md shows.
Use when: sources were tuned for different tasks and no data is at hand. Avoid when: there is one source (entries are
clipped and dropped for nothing).
Cost: five passes over the changes.

Du et al. 2024, arXiv 2410.02396; after the released code, whose ranks int(d q) are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.compose.consensus import lightest
from tunesmith.compose.ranking import order_statistics
from tunesmith.core.algebra import Dense, Update
from tunesmith.core.combine import Changes, Now, Place, combiner, dense
from tunesmith.core.method import option

TINY = 1e-12


@dataclass(frozen=True)
class Bounds:
    """For each source: the ends of M, and the least and largest score that count."""

    low: list[float]
    high: list[float]
    least: list[float]
    most: list[float]


@combiner(
    "pcb",
    paper="2410.02396",
    whole={},
    most=64,
    expected={
        "one is itself": "entries are clipped and the lowest scores dropped",
        "linear": "scores depend on the values",
    },
)
class PCB:
    """Score each entry by its size in its source and its agreement with the others; drop the lowest, mix the rest."""

    ratio: float = option(0.1, "r: share of the entries of each source that is kept", low=1e-6, high=1.0)
    lam: float = option(1.0, "lambda: every source is scaled by it", low=-1e6, high=1e6)
    trim: float = option(1e-4, "share of the smallest and largest magnitudes that is clipped", low=0.0, high=0.49)
    use: str = option("both", "what a score is made of: size in the source and agreement, or one of the two (ablations)", choices=("both", "size", "agreement"))  # fmt: skip
    agree: str = option("raw", "what the others are summed as: changes, or changes scaled to one size", choices=("raw", "normed"))  # fmt: skip

    def survey(self, changes: Changes, weights: Sequence[float], now: Now) -> Bounds | None:
        """The bounds of every source, over all tensors."""
        d = sum(torch.Size(p.shape).numel() for p in changes.places())
        if not d:
            return None

        def stream(score: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[], Iterator[list[Tensor]]]:
            return lambda: (score(_dense(p, changes.at(p))) for p in changes.places())

        ends = [min(int(d * self.trim), d - 1), max(int(d * (1 - self.trim) - 1), 0)]
        found = order_statistics(stream(lambda D: [x.abs() for x in D]), ends)
        low, high = [a for a, _ in found], [max(a, b) for a, b in found]
        ranks = [min(int(d * (1 - self.ratio)), d - 1), d - 1]
        found = order_statistics(stream(lambda D: self.scores(D, low, high)), ranks)
        return Bounds(low, high, [a for a, _ in found], [b for _, b in found])

    def scores(self, D: Sequence[Tensor], low: Sequence[float], high: Sequence[float]) -> list[Tensor]:
        """P_i of every source, for one tensor."""
        size = [minmax(x.abs().clamp(a, b), a, b) for x, a, b in zip(D, low, high, strict=True)]
        others = D if self.agree == "raw" else [x.sign() * s for x, s in zip(D, size, strict=True)]
        whole = torch.stack(list(others)).sum(0)
        intra = [torch.exp(len(D) * s**2) for s in size]
        inter = [torch.tanh(x * whole) for x in D]
        if self.use != "both":
            return intra if self.use == "size" else inter
        return [a * b for a, b in zip(intra, inter, strict=True)]

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """The mix of one tensor."""
        b: Bounds = now.surveyed
        D = _dense(at, changes)
        P = self.scores(D, b.low, b.high)
        S = [minmax(p.clamp_min(a), a, z) for p, a, z in zip(P, b.least, b.most, strict=True)]
        top, bottom = torch.zeros_like(D[0]), torch.zeros_like(D[0])
        for x, s, w, a, z in zip(D, S, weights, b.low, b.high, strict=True):
            top += s * (self.lam * w) * x.sign() * x.abs().clamp(a, z)
            bottom += s
        found = top / bottom.clamp_min(TINY)
        return Dense(found) if now.dense else lightest(found, at)


def minmax(x: Tensor, low: float, high: float) -> Tensor:
    """(x - low) / (high - low), 0 where the ends are the same."""
    return (x - low) / (high - low) if high > low else torch.zeros_like(x)


def _dense(at: Place, changes: Sequence[Update | None]) -> list[Tensor]:
    return [d.float() for d in dense(at, changes)]
