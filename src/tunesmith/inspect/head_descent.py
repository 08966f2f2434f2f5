# SPDX-License-Identifier: Apache-2.0
"""Linear heads on frozen features in closed form, and what their size does to the risk (double descent).

    W = argmin ||W||_F among the least squares solutions        ridge 0: the min-norm head
    W = argmin ||X W^T - y||_F^2 + lambda ||W||_F^2             otherwise

on centred features X [n, p] and targets y [n, k]. Near p = n the min-norm head fits the noise with huge weights: the risk is
far above that of a smaller or a much larger head, and ridge takes the peak away. For isotropic features that hold all of the
signal r^2 beside noise s^2 the excess risk is (g = p / n)

    s^2 g / (1 - g)  for g < 1        r^2 (1 - 1 / g) + s^2 / (g - 1)  for g > 1

The true rank of the features counts, not p, so the effective rank is reported.

The setting: arXiv 2410.00699, of which only abstract and summaries were at hand; the formulas are the standard ones of
ridgeless regression (Hastie, Montanari, Rosset and Tibshirani 2022, arXiv 1903.08560).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding

LAMBDAS = tuple(10.0**k for k in range(-6, 5))
NEAR = (0.5, 2.0)


@dataclass(frozen=True)
class LinearHead:
    """W [k, p] and b [k] in fp64; `ridge` as used; p / n, rank / n, effective rank; a warning where the risk may peak."""

    W: Tensor
    b: Tensor
    ridge: float
    ratio: float
    rank: int
    effective_rank: float
    warning: str | None

    def __call__(self, X: Tensor) -> Tensor:
        """Predictions [n, k] for features [n, p]."""
        return X.double() @ self.W.T + self.b


def head_tune(X: Tensor, y: Tensor, ridge: float | str = "cv") -> LinearHead:
    """The head on features X [n, p] for y [n, k] (or [n]): ridge "cv" picks lambda / n by leaving one out, 0 is min-norm.

    A number is lambda itself. Raises UsageError for unfit shapes, fewer than two rows or a negative ridge.
    """
    if X.dim() != 2 or len(X) != len(y) or len(X) < 2 or not (torch.isfinite(X).all() and torch.isfinite(y).all()):
        raise UsageError(f"{list(X.shape)} features and {list(y.shape)} targets cannot be fitted", where="head_tune")
    if ridge != "cv" and not (isinstance(ridge, int | float) and 0 <= ridge < math.inf):
        raise UsageError(f"must be 'cv' or a number of 0 or more, got {ridge!r}", where="ridge")
    A, Y = X.double(), y.double().reshape(len(y), -1)
    mx, my = A.mean(0), Y.mean(0)
    A, Y = A - mx, Y - my
    n, p = A.shape
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    keep = S.max() * max(n, p) * torch.finfo(S.dtype).eps < S
    U, S, Vh = U[:, keep], S[keep], Vh[keep]
    lam = float(ridge) if ridge != "cv" else min(LAMBDAS, key=lambda v: _left_out(U, S, Y, v * n)) * n
    W = ((Vh.T * (S / (S**2 + lam))) @ (U.T @ Y)).T  # [k, p]
    share = S**2 / (S**2).sum() if len(S) else S
    effective = float((-(share * share.log()).sum()).exp()) if len(S) else 0.0
    near = NEAR[0] <= p / n <= NEAR[1]
    warning = f"{p} features for {n} rows: a head without ridge is worst near equality" if near and lam == 0 else None
    return LinearHead(W, my - W @ mx, lam, p / n, len(S), effective, warning)


def _left_out(U: Tensor, S: Tensor, Y: Tensor, lam: float) -> float:
    """Mean squared error of leaving each row out, by the hat matrix (the mean counts as one of its directions)."""
    shrink = S**2 / (S**2 + lam)
    hat = (U**2 * shrink).sum(1) + 1 / len(Y)
    residual = Y - (U * shrink) @ (U.T @ Y)
    return float((residual / (1 - hat).clamp_min(1e-9)[:, None]).square().mean())


def ridgeless_risk(g: float, signal: float, noise: float) -> float:
    """Excess risk of the min-norm head at g = p / n for isotropic features with signal r^2 and noise s^2; inf at g = 1."""
    if g < 0:
        raise UsageError(f"p / n cannot be {g}", where="g")
    if g == 1:
        return math.inf if noise > 0 else 0.0
    return noise * g / (1 - g) if g < 1 else signal * (1 - 1 / g) + noise / (g - 1)


def double_descent(
    sizes: Mapping[int, tuple[Tensor, Tensor]], y: Tensor, y_test: Tensor, *, ridge: float | str = 0.0
) -> Finding:
    """Risk over sizes: `sizes[p]` holds training and test features [n, p] and [m, p]; `y_test` [m, k] is free of noise.

    One row a size, with the mean squared error summed over targets. Raises UsageError as `head_tune`.
    """
    rows = []
    for p in sorted(sizes):
        X, X_test = sizes[p]
        head = head_tune(X, y, ridge)
        error = head(X_test) - y_test.double().reshape(len(y_test), -1)
        rows.append({
            "p": p, "ratio": head.ratio, "risk": float(error.square().sum(1).mean()), "ridge": head.ridge, "rank": head.rank,
            "effective_rank": head.effective_rank, "norm": float(head.W.norm()), "warning": head.warning,
        })  # fmt: skip
    if not rows:
        raise UsageError("there are no sizes", where="double_descent")
    worst, best = (pick(rows, key=lambda r: r["risk"]) for pick in (max, min))
    told = f"The risk is highest at {worst['p']} features for {len(y)} rows ({worst['risk']:.4g}) and lowest at {best['p']} ({best['risk']:.4g})"
    return Finding("head-descent", told, {"worst": worst["p"], "best": best["p"], "rows": len(y)}, rows)
