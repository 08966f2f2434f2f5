# SPDX-License-Identifier: Apache-2.0
"""Selecting the largest entries gives what a stable sort gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import UsageError
from tunesmith.core.largest import LONG, SAMPLE, kth_largest, largest


@given(
    st.integers(1, 4), st.integers(1, 40), st.integers(0, 40), st.integers(0, 9), st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_it_is_the_head_of_a_stable_sort(
    rows: int, n: int, k: int, seed: int, coarse: bool, dtype: torch.dtype
) -> None:
    k = min(k, n)
    values = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    values = ((values * 2).round() / 2 if coarse else values).to(dtype)  # many ties, zeros of both signs
    order = torch.sort(values, dim=1, descending=True, stable=True).indices[:, :k]
    want = torch.zeros(rows, n, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(largest(values, k), want)
    if k:
        assert torch.equal(kth_largest(values, k)[:, 0], values.sort(1, descending=True).values[:, k - 1])


def test_infinity_ranks_and_nan_does_not() -> None:
    values = torch.tensor([[1.0, float("inf"), -float("inf"), 2.0]])
    assert largest(values, 2).tolist() == [[False, True, False, True]]
    with pytest.raises(UsageError, match="not a number"):
        largest(torch.tensor([[1.0, float("nan")]]), 1)
    for k in (-1, 3):
        with pytest.raises(UsageError, match=f"no {k} largest of 2"):
            largest(torch.zeros(1, 2), k)


@pytest.mark.parametrize("what", ["smooth", "coarse", "mostly zero", "misleading"])
def test_long_rows_are_ranked_as_short_ones(what: str) -> None:
    n = LONG + 4321
    values = torch.randn(1, n, generator=torch.Generator().manual_seed(1))
    if what == "coarse":
        values = (3 * values).round() / 3
    elif what == "mostly zero":
        values = values.clamp_min(0.5) - 0.5
    elif what == "misleading":
        values[0, :: n // SAMPLE] = 9.0  # just what the sample sees
    falling = torch.sort(values, dim=1, descending=True, stable=True)
    for k in (1, 5, n // 100, n // 5, n // 2, n - 5, n):
        assert torch.equal(kth_largest(values, k)[:, 0], falling.values[:, k - 1])
        want = torch.zeros(1, n, dtype=torch.bool).scatter_(1, falling.indices[:, :k], True)
        assert torch.equal(largest(values, k), want)
