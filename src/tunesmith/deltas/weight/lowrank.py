# SPDX-License-Identifier: Apache-2.0
"""What the low-rank methods share: options by pattern, the scale, the factors' shapes and their first values.

Some methods start from a piece B0 A0 of the weight and train on from there. Published code takes the piece out of the
base; here the base stays as it is and the change is what B A has moved since (`begun`, `relative`). It costs a rank of 2r
in what is stored and computed, and in return the delta is portable, adds to others and starts as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.errors import UsageError
from tunesmith.core.patterns import pick, require_used
from tunesmith.core.sites import Site

KINDS = ("linear", "embedding", "conv1d", "conv2d")


def check_patterns(owner: str, method: Any, sites: list[Site]) -> None:
    """Raise UsageError for a pattern that matches no site, or maps to a value that is no rank or alpha."""
    check_ranks(owner, method.rank_pattern, sites)
    _check_numbers(f"{owner}.alpha_pattern", method.alpha_pattern, whole=False)
    require_used(f"{owner}.alpha_pattern", method.alpha_pattern, sites)


def check_ranks(owner: str, table: Mapping[str, Any], sites: list[Site]) -> None:
    """Raise UsageError for a rank pattern that matches no site, or maps to a value that is no rank."""
    _check_numbers(f"{owner}.rank_pattern", table, whole=True)
    require_used(f"{owner}.rank_pattern", table, sites)


def _check_numbers(where: str, table: Mapping[str, Any], *, whole: bool) -> None:
    for pattern, value in table.items():
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            want = "a whole number of 1 or more" if whole else "a number above 0"
            raise UsageError(f"{pattern!r} must map to {want}, got {value!r}", where=where)


def rank_at(method: Any, site: Site) -> int:
    """The rank r of the site: `method.rank` unless `method.rank_pattern` says otherwise."""
    return int(pick(method.rank_pattern, site.path, method.rank))


def scale_at(method: Any, site: Site) -> float:
    """alpha / r, or alpha / sqrt(r) with `method.rslora`, at the site."""
    r, alpha = rank_at(method, site), float(pick(method.alpha_pattern, site.path, method.alpha))
    return alpha / math.sqrt(r) if getattr(method, "rslora", False) else alpha / r


def kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming uniform with a = sqrt 5: within 1/sqrt(fan-in), the product of all axes but the first."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def columns(site: Site) -> int:
    """in * kernel: the length of one row of the canonical weight (the width of an embedding)."""
    return math.prod(site.shape[1:])


def factors(site: Site, r: int, init: str, generator: torch.Generator) -> dict[str, Tensor]:
    """A [r, in * kernel] random and B [out, r] zero, fp32, so that B A = 0.

    "kaiming" draws A uniformly within 1/sqrt(in * kernel) (Kaiming uniform with a = sqrt 5), "gaussian" from
    N(0, 1/r^2). An embedding has no fan-in: its A is drawn from N(0, 1) as in the released code.
    """
    n = columns(site)
    A = torch.empty(r, n)
    if site.kind == "embedding":
        A.normal_(generator=generator)
    elif init == "gaussian":
        A.normal_(std=1 / r, generator=generator)
    else:
        A.uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=generator)
    return {"A": A, "B": torch.zeros(site.shape[0], r)}


START = ("A0", "B0")  # the frozen names of `begun`


def begun(B: Tensor, A: Tensor) -> dict[str, Tensor]:
    """The tensors of a part that starts from B [out, r] and A [r, in * kernel]: both, and frozen copies B0 and A0."""
    B, A = B.contiguous(), A.contiguous()
    return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}


def unbegun(site: Site, r: int) -> dict[str, Tensor]:
    """The same, all zero, for `init`; `calibrate` knows the values."""
    return begun(torch.zeros(site.shape[0], r), torch.zeros(r, columns(site)))


def relative(t: Mapping[str, Tensor], scale: float, shape: tuple[int, ...]) -> LowRank:
    """scale (B A - B0 A0) in the shape of the weight, of rank 2r.

    Written as [B - B0, B0] [A; A - A0]: at the start it is zero bit for bit, and in half precision the differences are
    rounded instead of two large products that nearly cancel.
    """
    B = torch.cat([t["B"] - t["B0"], t["B0"]], 1)  # [out, 2r]
    A = torch.cat([t["A"], t["A"] - t["A0"]])  # [2r, in * kernel]
    return LowRank(B, A, scale, shape)


def too_wide(method: Any, site: Site) -> str | None:
    """Why the rank of a site cannot be had from its weight, or None: a weight has min(out, in * kernel) components."""
    r, most = rank_at(method, site), min(site.shape[0], columns(site))
    return f"rank {r} is above the {most} components of its weight" if r > most else None
