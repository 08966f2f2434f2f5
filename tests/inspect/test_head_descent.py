# SPDX-License-Identifier: Apache-2.0
"""Closed-form heads against pinv, scikit-learn and the theory of ridgeless regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tunesmith.core.errors import UsageError
from tunesmith.inspect.head_descent import _left_out, double_descent, head_tune, ridgeless_risk


def data(n: int, p: int, k: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, p, generator=g, dtype=torch.float64) + 3,
        torch.randn(n, k, generator=g, dtype=torch.float64) - 1,
    )


@pytest.mark.parametrize("p", [5, 20, 60])
def test_min_norm_is_pinv_and_the_limit_of_ridge(p: int) -> None:
    X, y = data(20, p)
    head = head_tune(X, y, 0)
    A, Y = X - X.mean(0), y - y.mean(0)
    torch.testing.assert_close(head.W, (torch.linalg.pinv(A, rtol=1e-12) @ Y).T, atol=1e-9, rtol=0)
    torch.testing.assert_close(head(X), A @ head.W.T + y.mean(0))
    torch.testing.assert_close(head_tune(X, y, 1e-10).W, head.W, atol=1e-7, rtol=1e-6)
    assert head.rank == min(p, 19) and head.ratio == p / 20


def test_ridge_is_scikit_learns() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    X, y = data(30, 12)
    theirs = linear.Ridge(alpha=2.5).fit(X.numpy(), y.numpy())
    head = head_tune(X, y, 2.5)
    np.testing.assert_allclose(head.W.numpy(), theirs.coef_, atol=1e-10)
    np.testing.assert_allclose(head.b.numpy(), theirs.intercept_, atol=1e-10)


def test_left_out_errors_are_those_of_refitting() -> None:
    """With a fixed mean the hat matrix gives leave-one-out exactly; the mean adds its own 1 / n."""
    X, y = data(12, 4)
    A, Y = X - X.mean(0), y - y.mean(0)
    U, S, _ = torch.linalg.svd(A, full_matrices=False)
    errors = []
    for i in range(12):
        rest = [j for j in range(12) if j != i]
        B = torch.cat([X[rest], torch.ones(11, 1, dtype=torch.float64)], 1)
        w = torch.linalg.lstsq(B, y[rest]).solution
        errors.append((y[i] - torch.cat([X[i], torch.ones(1, dtype=torch.float64)]) @ w).square())
    assert _left_out(U, S, Y, 0.0) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-9)


@pytest.mark.parametrize("g", [0.25, 0.5, 2.0, 4.0])
def test_simulation_meets_the_closed_form(g: float) -> None:
    """Isotropic Gaussian features, signal 1, noise 0.5, within 5 % away from g = 1."""
    n, signal, noise = 200, 1.0, 0.5
    p = int(g * n)
    risks = []
    for draw in range(150 if g < 1 else 30):
        r = torch.Generator().manual_seed(draw)
        beta = torch.randn(p, generator=r, dtype=torch.float64)
        beta *= math.sqrt(signal) / beta.norm()
        X = torch.randn(n, p, generator=r, dtype=torch.float64)
        y = X @ beta + math.sqrt(noise) * torch.randn(n, generator=r, dtype=torch.float64)
        W = torch.linalg.lstsq(X, y, driver="gelsd").solution if p < n else X.T @ torch.linalg.solve(X @ X.T, y)
        head = head_tune(X, y, 0)
        risks.append(float((head.W[0] - beta).square().sum()))
        assert float((head.W[0] - W).norm() / W.norm()) < 0.25  # the centred fit is near the plain one
    assert np.mean(risks) == pytest.approx(ridgeless_risk(g, signal, noise), rel=0.05)


def test_the_curve() -> None:
    assert ridgeless_risk(0, 1, 1) == 0 and ridgeless_risk(1, 1, 0.5) == math.inf
    assert ridgeless_risk(0.9, 1, 0.5) > ridgeless_risk(0.5, 1, 0.5) > ridgeless_risk(0.1, 1, 0.5)
    assert ridgeless_risk(1.1, 1, 0.5) > ridgeless_risk(2, 1, 0.5)
    with pytest.raises(UsageError):
        ridgeless_risk(-0.1, 1, 1)


def test_a_peak_at_equality_and_none_with_ridge() -> None:
    g = torch.Generator().manual_seed(0)
    n, sizes = 40, (5, 20, 40, 80, 320)
    X, T = (torch.randn(m, 320, generator=g, dtype=torch.float64) for m in (n, 500))
    beta = torch.randn(320, 1, generator=g, dtype=torch.float64) / math.sqrt(320)
    y = X @ beta + 0.5 * torch.randn(n, 1, generator=g, dtype=torch.float64)
    given = {p: (X[:, :p], T[:, :p]) for p in sizes}
    plain, ridge = (double_descent(given, y, T @ beta, ridge=r) for r in (0.0, "cv"))
    risk = {r["p"]: r["risk"] for r in plain.rows}
    assert plain.values["worst"] == 40 and risk[40] > 2 * max(risk[5], risk[320])
    assert [r["p"] for r in plain.rows if r["warning"]] == [20, 40, 80]
    calm = {r["p"]: r["risk"] for r in ridge.rows}
    assert calm[40] - calm[5] < 0.2 * (risk[40] - risk[5]) and not any(r["warning"] for r in ridge.rows)


def test_effective_rank_counts_directions_not_columns() -> None:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(50, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 30, generator=g, dtype=torch.float64)
    head = head_tune(X, X[:, :1], 0)
    assert head.rank == 3 and 1 < head.effective_rank <= 3


def test_what_is_refused() -> None:
    X, y = data(10, 3)
    for bad in ((X[:5], y, 0), (X, y, -1.0), (X, y, "loo"), (X[:1], y[:1], 0), (X / 0, y, 0)):
        with pytest.raises(UsageError):
            head_tune(*bad)
    with pytest.raises(UsageError, match="no sizes"):
        double_descent({}, y, y)
