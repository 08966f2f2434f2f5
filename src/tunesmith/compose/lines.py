# SPDX-License-Identifier: Apache-2.0
"""LiNeS: a merged (or single) change is scaled by depth, so that shallow layers go back towards the base.

    D' = s_l D      s_l = alpha + beta l / (L - 1) in block l of L, alpha outside the blocks, alpha + beta where L is 1

Left open, alpha is (||sum_i D_i||_1 / ||D||_1) / n over all tensors, with D what the inner combiner makes of n sources:
1 / n for their plain sum. beta takes the place of the merge's own coefficient; left open it is 1 - alpha, which leaves
the last block as it is. Stacks of an encoder and a decoder are counted apart (a choice made here, as is the case L = 1).
Norms inside blocks are scaled with their block. Low-rank changes stay low-rank.

Linear in the changes where what it scales is, as the default is.
Use when: one fine-tuned model forgets too much, or merged ones interfere. `scale(base, delta, depth="linear", start=.1)`
is the same for one delta. Blocks are found by structure, not by numbers in names.

Wang et al. 2024, arXiv 2410.17146.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.compose.linear import weighted
from tunesmith.core.algebra import Update
from tunesmith.core.combine import COMBINERS, Changes, Now, Place, combiner
from tunesmith.core.method import option


@dataclass(frozen=True)
class _Seen:
    inner: Any
    alpha: float
    beta: float


@combiner("lines", paper="2410.17146", linear=True, whole={"alpha": 1.0, "beta": 0.0})
class Lines:
    """Scale the result of another combiner by depth."""

    of: str = option("task-arithmetic", "the combiner whose result is scaled, with options")
    alpha: float | None = option(None, "scale of the first block and of all outside; open: from the norms", low=-1e6, high=1e6)  # fmt: skip
    beta: float | None = option(None, "what is added by the last block; open: 1 - alpha", low=-1e6, high=1e6)

    def survey(self, changes: Changes, weights: Sequence[float], now: Now) -> _Seen:
        """What the inner combiner surveys, and the scales."""
        how = COMBINERS.parse(self.of)
        seen = how.survey(changes, weights, now) if hasattr(how, "survey") else None
        alpha = self.alpha
        if alpha is None:
            inside = replace(now, surveyed=seen)
            plain = merged = 0.0
            for place in changes.places():
                found = changes.at(place)
                both = (weighted(found, [1.0] * len(found)), how.combine(place, found, weights, inside))
                one, other = (0.0 if u is None else float(u.dense().abs().double().sum()) for u in both)
                plain, merged = plain + one, merged + other
            alpha = plain / merged / len(weights) if merged else 1.0 / len(weights)
        return _Seen(seen, alpha, 1 - alpha if self.beta is None else self.beta)

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """The inner result times the scale of its depth."""
        seen: _Seen = now.surveyed
        found = COMBINERS.parse(self.of).combine(at, changes, weights, replace(now, surveyed=seen.inner))
        s = scale_at(at, seen.alpha, seen.beta)
        return None if found is None or s == 0 else found if s == 1 else found.scaled(s)


def scale_at(at: Place, alpha: float, beta: float) -> float:
    """s_l of the tensor."""
    if at.depth is None:
        return alpha
    return alpha + beta * (at.depth / (at.of - 1) if at.of > 1 else 1.0)
