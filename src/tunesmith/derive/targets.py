# SPDX-License-Identifier: Apache-2.0
"""Which layers a recipe changes, and a LoRA that sits at exactly those layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.sites import Site


def chosen(base: Base, targets: str) -> list[Site]:
    """The linear layers that `targets` name. Raises UsageError for one whose weight is tied to another's."""
    sites = base.sites.select(targets, ("linear",))
    tied = next((s for s in sites if s.tied), None)
    if tied is not None:
        hint = f"leave it out: targets='{targets},!{tied.path}'"
        raise UsageError(f"its weight is tied to {', '.join(tied.tied)}", where=tied.path, hint=hint)
    return sites


def lora_at(ranks: Mapping[str, int], alpha: float | None = None) -> Any:
    """A LoRA at exactly these paths, each of its own rank, scaled by alpha / rank (by 1 without an alpha)."""
    common = max(ranks.values())
    other = sorted((p for p, r in ranks.items() if r != common), key=len, reverse=True)
    # A pattern also names longer paths that end in it: with the long ones first, each finds its own.
    table = {p: ranks[p] for p in (sorted(ranks, key=len, reverse=True) if other else [])}
    options: dict[str, Any] = {
        "targets": "re:^(" + "|".join(re.escape(p) for p in ranks) + ")$", "rank": common, "rank_pattern": table,
        "alpha": float(common) if alpha is None else float(alpha),
        "alpha_pattern": {p: float(r) for p, r in table.items()} if alpha is None else {},
    }  # fmt: skip
    return methods.build("lora", options)
