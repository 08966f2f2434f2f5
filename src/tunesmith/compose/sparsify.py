# SPDX-License-Identifier: Apache-2.0
"""Sparsifiers: which entries of one change are kept, and how the rest makes up for what is dropped.

Each takes a dense change D and gives one of its shape with zeros. Rows are those of the matrix [out, in * kernel]: a
convolution's kernel is flattened first, since a row of its last axis has three entries and every share of them rounds to
none; a vector is one row. Ties in magnitude go to the lower index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.core.largest import largest

RESCALES = ("inverse", "l1", "none")


def rows(D: Tensor, per: str) -> Tensor:
    """D as [rows, n] within which entries compete: one row for all of it, or its rows."""
    return D.reshape(D.shape[0], -1) if per == "row" and D.dim() > 1 else D.reshape(1, -1)


def band(D: Tensor, first: int, last: int) -> Tensor:
    """Mask of the entries whose rank by falling magnitude within their row of D [rows, n] lies in first .. last - 1."""
    size, n = D.abs(), D.shape[1]
    kept = largest(size, min(max(last, 0), n))
    return kept & ~largest(size, min(first, n)) if first > 0 else kept


def magnitude(D: Tensor, density: float, per: str = "tensor") -> Tensor:
    """The int(density n) largest entries of the tensor (at least one) or of each row; all of them from density 1 on."""
    if density >= 1:
        return D
    flat = rows(D, per)
    k = int(density * flat.shape[1])
    k = max(1, k) if per == "tensor" and density > 0 else k
    return torch.where(band(flat, 0, k), flat, 0.0).reshape(D.shape)


def breadcrumbs(D: Tensor, density: float, drop_top: float, per: str = "row") -> Tensor:
    """The int(density n) largest entries that are left once the int(drop_top n) largest are gone.

    Where both together are more than there are, fewer large ones are dropped. A scalar is kept.
    """
    if density >= 1 or D.dim() == 0:
        return D
    flat = rows(D, per)
    n = flat.shape[1]
    keep = int(density * n)
    first = min(int(drop_top * n), n - keep)
    return (flat * band(flat, first, first + keep)).reshape(D.shape)


def random(D: Tensor, density: float, generator: torch.Generator, rescale: str = "inverse", q: float = 0.0) -> Tensor:
    """Each entry kept with probability `density`, the kept ones divided by q, or by the density (see `rescaled`)."""
    if density >= 1 and not q:
        return D
    keep = torch.rand(D.shape, generator=generator).to(D.device) < density
    return D * keep / q if q else rescaled(D, keep, density, rescale)


def della(D: Tensor, density: float, epsilon: float, generator: torch.Generator, rescale: str = "inverse") -> Tensor:
    """Each entry kept with a probability from density - epsilon to density + epsilon, rising with its rank in its row.

    Raises UsageError unless both ends lie within 0 .. 1.
    """
    if density >= 1:
        return D
    if density - epsilon <= 0 or density + epsilon >= 1:
        hint = f"for density {density:g} an epsilon below {min(density, 1 - density):g}"
        raise UsageError(f"density {density:g} +- epsilon {epsilon:g} must stay within 0 .. 1", hint=hint)
    flat = rows(D, "row")
    n = flat.shape[1]
    order = torch.sort(flat.abs(), dim=1, stable=True).indices
    spread = torch.linspace(0, 1, n, dtype=flat.dtype, device=D.device) if n > 1 else flat.new_full((1,), 0.5)
    chance = torch.empty_like(flat).scatter_(1, order, (density - epsilon + 2 * epsilon * spread).expand_as(flat))
    keep = torch.rand(flat.shape, generator=generator).to(D.device) < chance
    return rescaled(flat, keep, chance, rescale).reshape(D.shape)


def rescaled(D: Tensor, keep: Tensor, chance: float | Tensor, how: str) -> Tensor:
    """The kept entries over their chance ("inverse"), scaled to the L1 norm of all of D ("l1"), or as they are."""
    kept = D * keep
    if how == "inverse":
        return kept / chance
    if how == "l1":
        before, after = D.abs().sum(), kept.abs().sum()
        return kept * (before / after) if float(before) > 0 and float(after) > 0 else kept
    return kept
