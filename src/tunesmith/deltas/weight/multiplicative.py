# SPDX-License-Identifier: Apache-2.0
"""What the methods that multiply a weight share: element by element, from the left, block by block, by rotations.

A weight is W [out, in, *kernel]; where columns count it is seen as a matrix [out, n], n = in * kernel.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lowrank import columns


def hadamard(W: Tensor, B: Tensor, A: Tensor, scale: float = 1.0, *, residual: bool = True) -> Tensor:
    """W * (1 + s B A), or W * (s B A) without `residual`; B [out, r], A [r, n]. A zero of W stays zero."""
    change = W * (scale * (B @ A)).reshape(W.shape)
    return W + change if residual else change


def from_left(W: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """B A W in the shape and dtype of W [out, ...]; B [out, r], A [r, out]."""
    flat = W.reshape(W.shape[0], -1)
    return (B.to(W.dtype) @ (A.to(W.dtype) @ flat)).reshape(W.shape)


def block_affine(W: Tensor, M: Tensor) -> Tensor:
    """W'_ij = W_ij (I + M_i) + M_i over the r x r blocks of W [out, n]; M [out / r, r, r], shared by a block row."""
    M = M.to(W.dtype)
    rows, r = M.shape[0], M.shape[1]
    blocks = W.reshape(rows, -1, r)  # row block i: its rows a and block columns j, [out / r, r * n / r, r]
    change = (blocks @ M).reshape(rows, r, -1, r) + M[:, :, None, :]
    return W + change.reshape(W.shape)


def rotate(x: Tensor, R: Tensor) -> Tensor:
    """x [..., n] times the block-diagonal matrix of R [blocks, k, k], in the dtype of x; one block serves all."""
    wide = torch.promote_types(x.dtype, R.dtype)
    parts = x.to(wide).unflatten(-1, (-1, R.shape[-1]))  # [..., blocks, k]
    return torch.einsum("...bk,bkc->...bc", parts, R.to(wide).expand(parts.shape[-2], -1, -1)).flatten(-2).to(x.dtype)


def butterfly(x: Tensor, R: Tensor, level: int) -> Tensor:
    """x [..., n] times factor `level` of a butterfly with blocks R [n / k, k, k].

    Level 0 is `rotate`. At level i the columns are taken in groups of 2^i blocks; the half blocks of the two halves of a
    group are interleaved before the rotation and put back after it, so that columns far apart are mixed.
    """
    if not level:
        return rotate(x, R)
    half, pairs = R.shape[-1] // 2, 2**level
    mixed = x.unflatten(-1, (-1, 2, pairs, half)).transpose(-3, -2).flatten(-4)
    return rotate(mixed, R).unflatten(-1, (-1, pairs, 2, half)).transpose(-3, -2).flatten(-4)


def skew(q: Tensor, k: int) -> Tensor:
    """Skew-symmetric matrices [m, k, k] whose upper triangles are the rows of q [m, k (k - 1) / 2]."""
    i, j = torch.triu_indices(k, k, 1, device=q.device)
    upper = q.new_zeros(q.shape[0], k, k)
    upper[:, i, j] = q
    return upper - upper.mT


def cayley(Q: Tensor, terms: int = 0) -> Tensor:
    """Rotations from skew-symmetric Q [m, k, k]: (I - Q) (I + Q)^-1, orthogonal up to rounding.

    With `terms` n >= 4 the inverse is avoided: (I + Q) (I + Q + ... + Q^(n - 2)), which approaches (I + Q) (I - Q)^-1,
    the rotation the other way, and is orthogonal only as far as Q is small. Both signs are PEFT's.
    """
    with torch.autocast(Q.device.type, enabled=False):  # rotations lose their length in half precision
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        if not terms:
            return torch.linalg.solve(eye + Q, eye - Q, left=False)
        series = power = eye + Q
        for _ in range(terms - 2):
            power = Q @ power  # Q^i (I + Q)
            series = series + power
        return series


@lru_cache(maxsize=256)
def near_divisor(n: int, k: int) -> int:
    """The divisor of n nearest to k, the smaller of two at one distance; n itself for k >= n."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - k), d)) if k < n else n


def block_refusal(site: Site, block: int) -> str | None:
    """Why `block` x `block` blocks do not tile the site's matrix, if so, with the sizes that do."""
    out, n = site.shape[0], columns(site)
    if out % block == 0 and n % block == 0:
        return None
    common = math.gcd(out, n)
    fitting = [d for d in range(1, common + 1) if common % d == 0]
    return f"blocks of {block} do not tile its {out} x {n} weight (fitting: {', '.join(map(str, fitting))})"
