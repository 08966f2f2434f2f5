# SPDX-License-Identifier: Apache-2.0
"""The sparse store: a few trained entries of each weight, and how they are chosen from scores.

A site holds `indices` [k] int64 (flat, rising, frozen) and `values` [k] fp32 (trained); optimiser state exists for the
values alone. A selector is a score for every entry; the largest win, ties going to the lower index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tunesmith.core.algebra import Sparse
from tunesmith.core.errors import UsageError
from tunesmith.core.sites import Site


def lora_equivalent(site: Site, rank: int) -> int:
    """The entries that a LoRA of `rank` would train at this site, at most all: min(rank (out + in), out in)."""
    rows, columns = site.shape[0], math.prod(site.shape[1:])
    return min(rank * (rows + columns), rows * columns)


def top(scores: Tensor, k: int) -> Tensor:
    """Flat indices [k] int64, rising, of the k largest scores; ties go to the lower index.

    Raises UsageError unless 1 <= k <= the number of scores, or for a score that is NaN.
    """
    flat = scores.detach().reshape(-1).float()
    if not 1 <= k <= flat.numel():
        raise UsageError(f"cannot choose {k} of {flat.numel()} entries")
    if bool(torch.isnan(flat).any()):
        raise UsageError("a score is not a number, so the entries cannot be ranked")
    least = torch.kthvalue(flat, flat.numel() - k + 1).values
    above = torch.nonzero(flat > least).squeeze(1)
    level = torch.nonzero(flat == least).squeeze(1)[: k - len(above)]
    return torch.cat([above, level]).sort().values


def top_of_all(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k largest scores over all sites together, as flat indices by path; a site without one is left out."""
    sizes = {path: s.numel() for path, s in scores.items()}
    chosen = top(torch.cat([s.detach().reshape(-1).float() for s in scores.values()]), k)
    out, start = {}, 0
    for path, n in sizes.items():
        mine = chosen[(chosen >= start) & (chosen < start + n)] - start
        if len(mine):
            out[path] = mine
        start += n
    return out


def drawn(site: Site, k: int, generator: torch.Generator) -> Tensor:
    """k entries of the site's weight drawn at random, as flat indices, rising."""
    return top(torch.rand(math.prod(site.shape), generator=generator, dtype=torch.float64).float(), k)


def entries(indices: Tensor) -> dict[str, Tensor]:
    """`indices` [k] and `values` [k], fp32 zeros, so that a fresh change is none."""
    return {"indices": indices.to(torch.int64), "values": torch.zeros(len(indices))}


def change(site: Site, t: Mapping[str, Tensor]) -> Sparse:
    """The values at their places in a zero weight."""
    return Sparse(t["indices"], t["values"], site.shape)


def survivors(old: Tensor, new: Tensor) -> Tensor:
    """Where each of the `new` indices [k] was in the rising `old` ones, -1 for a newcomer (see `Now.replace`)."""
    if not len(old):
        return torch.full_like(new, -1)
    at = torch.searchsorted(old, new).clamp_max(len(old) - 1)
    return torch.where(old[at] == new, at, torch.full_like(at, -1))
