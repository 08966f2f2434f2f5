# SPDX-License-Identifier: Apache-2.0
"""The methods that multiply weights, together: double precision, strength, half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.deltas.weight.multiplicative import block_affine, block_refusal, from_left, hadamard, rotate

METHODS = [
    ts.HUT(rank=2, targets="0,2"), ts.HUT(rank=2, no_residual=True, targets="0,2"), ts.HiRA(rank=2, targets="0,2"),
    ts.Bone(block=2, targets="0,2"), ts.MiSS(rank=3, targets="0,2"),
    ts.MiSS(rank=3, mode="mini", mini_rank=2, targets="0,2"), ts.Hydra(bias=True, targets="0,2"),
    ts.OFT(block=4, targets="0,2"), ts.OFT(block=4, neumann_terms=5, targets="0,2"),
    ts.BOFT(block=2, factors=2, targets="0,2"),
]  # fmt: skip
NAMES = [f"{m.info.name}-{i}" for i, m in enumerate(METHODS)]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merging_equals_applying_in_other_precisions(method, dtype, moved) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)
    x = torch.randn(5, 8, dtype=dtype)
    base = Base(model, example=(x,))
    delta = moved(base, method, size=0.2)
    with torch.no_grad():
        plain = model(x)
        with base.using(delta):
            live = model(x)
        merged = base.merged(delta).model(x)
    assert live.dtype == merged.dtype == dtype
    torch.testing.assert_close(merged, live, atol=1e-12 if dtype == torch.float64 else 3e-2, rtol=0)
    assert (live - plain).abs().max() > 0.02


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_half_strength_is_half_way_between_the_weights(method, moved) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    base = Base(model, example=(torch.randn(5, 8),))
    delta = moved(base, method, size=0.2)
    whole, half = (dict(base.merged(d).model.named_parameters()) for d in (delta, delta.at(0.5)))
    for name, p in model.named_parameters():
        torch.testing.assert_close(half[name], p + 0.5 * (whole[name] - p), atol=1e-6, rtol=0)


def test_engine_against_dense_matrices() -> None:
    W, B, A = torch.randn(4, 6), torch.randn(4, 2), torch.randn(2, 6)
    torch.testing.assert_close(hadamard(W, B, A, 0.5), W + 0.5 * W * (B @ A))
    torch.testing.assert_close(hadamard(W, B, A, residual=False), W * (B @ A))
    C = torch.randn(2, 4)
    torch.testing.assert_close(from_left(W.reshape(4, 2, 3), B, C), (B @ C @ W).reshape(4, 2, 3))
    M = torch.randn(2, 2, 2)
    tiled = torch.cat([torch.cat([M[i]] * 3, 1) for i in range(2)])
    right = torch.cat([W[2 * i : 2 * i + 2] @ torch.block_diag(*[M[i]] * 3) for i in range(2)])
    torch.testing.assert_close(block_affine(W, M), W + right + tiled)
    R = torch.randn(3, 2, 2)
    torch.testing.assert_close(rotate(W, R), W @ torch.block_diag(*R))
    torch.testing.assert_close(rotate(W, R[:1]), W @ torch.block_diag(*[R[0]] * 3))


def test_a_refusal_names_the_sizes_that_fit() -> None:
    site = Base(nn.Sequential(nn.Linear(18, 12)), example=(torch.randn(1, 18),)).sites["0"]
    assert block_refusal(site, 3) is None
    assert "fitting: 1, 2, 3, 6" in str(block_refusal(site, 4))
