# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of changes: the mean (uniform soup) and task arithmetic.

    linear            D = sum_i w_i D_i / sum_i w_i
    task-arithmetic   D = lam sum_i w_i D_i

Low-rank changes give low-rank ones, their factors side by side and exact, sparse ones sparse ones. Averaging the factors
of LoRAs one by one is something else and not what is done here. With equal weights `linear` is the uniform soup:
averaging the changes is averaging the models. Adding an instruction residual to a model that was trained on is
`task-arithmetic` of the two changes.

Deviation from mergekit: `linear` without `normalize` keeps the base at weight 1 whatever the weights; mergekit sums the
weights times whole models, which agrees only where they add up to 1. What was averaged are parameters; integer buffers
never are, and batch-norm statistics of an average must be estimated anew.

Wortsman et al. 2022, arXiv 2203.05482 (soups); Ilharco et al. 2022, arXiv 2212.04089 (task arithmetic); Jindal et al.
2024, arXiv 2410.10739 (instruction residual).
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.algebra import Sum, Update
from tunesmith.core.combine import Now, Place, combiner
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option


def shares(weights: Sequence[float]) -> list[float]:
    """Weights over their sum. Raises UsageError where the sum is 0."""
    total = sum(weights)
    if abs(total) < 1e-12:
        hint = "normalize=false, or method='task-arithmetic'"
        raise UsageError(f"the weights {list(weights)} add up to 0 and cannot be normalised", hint=hint)
    return [w / total for w in weights]


def weighted(changes: Sequence[Update | None], coefficients: Sequence[float]) -> Update | None:
    """sum_i c_i D_i, each in its own form."""
    terms = [u if c == 1 else u.scaled(c) for u, c in zip(changes, coefficients, strict=True) if u is not None and c]
    return None if not terms else terms[0] if len(terms) == 1 else Sum(tuple(terms))


@combiner("linear", paper="2203.05482", linear=True, whole={})
class Linear:
    """The weighted mean of the changes; with equal weights the uniform soup."""

    normalize: bool = option(True, "divide the weights by their sum")

    def coefficients(self, weights: Sequence[float]) -> list[float]:
        """w_i / sum w, or w_i."""
        return shares(weights) if self.normalize else list(weights)

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """sum_i c_i D_i."""
        return weighted(changes, self.coefficients(weights))


@combiner("task-arithmetic", paper="2212.04089", linear=True, whole={})
class TaskArithmetic:
    """The weighted sum of the changes."""

    lam: float = option(1.0, "lambda: the sum is scaled by it", low=-1e6, high=1e6)
    normalize: bool = option(False, "divide the weights by their sum")

    def coefficients(self, weights: Sequence[float]) -> list[float]:
        """lam w_i, the weights divided by their sum with `normalize`."""
        return [self.lam * w for w in (shares(weights) if self.normalize else weights)]

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """lam sum_i w_i D_i."""
        return weighted(changes, self.coefficients(weights))
