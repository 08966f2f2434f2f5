# SPDX-License-Identifier: Apache-2.0
"""What methods share that train a trial delta first and choose what to train by what it did."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.core.method import MethodInfo
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.sparse import top_of_all

Key = TypeVar("Key", bound=Hashable)


def exactly(sites: Iterable[Site]) -> str:
    """The targets that select these sites and no others."""
    return "re:^(?:" + "|".join(re.escape(s.path) for s in sites) + ")$"


def unlisted(name: str, kinds: tuple[str, ...]) -> MethodInfo:
    """The record of a weight method that serves a trial only: it has no name in the registry and cannot be saved."""
    return MethodInfo(name, object, "weight", "", kinds, "exact", True, "blend", {})


def budget(entries: int, density: float, total: int, owner: str) -> int:
    """How many of `total` entries train: `entries`, or the share `density` where that is 0; at least 1.

    Raises UsageError for more entries than there are.
    """
    if entries > total:
        raise UsageError(f"there are only {total} entries to choose from, not {entries}", where=f"{owner}.entries")
    return entries or max(1, math.floor(density * total + 0.5))


def best_free(scores: Mapping[Key, Tensor], k: int, taken: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """The k largest non-negative scores over all keys among the entries not `taken`, and those: flat indices, rising."""
    free = {key: s.detach().reshape(-1).float() for key, s in scores.items()}
    for key, indices in taken.items():
        free[key] = free[key].index_fill(0, indices, -1.0)
    names = {str(i): key for i, key in enumerate(free)}
    new = top_of_all({name: free[key] for name, key in names.items()}, k)
    none = torch.empty(0, dtype=torch.int64)
    both = {key: torch.cat([taken.get(key, none), new.get(n, none)]).sort().values for n, key in names.items()}
    return {key: indices for key, indices in both.items() if len(indices)}
