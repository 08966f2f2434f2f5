# SPDX-License-Identifier: Apache-2.0
"""From changes of tensors to the parts of a delta, each in the lightest form that holds it exactly.

A change of a weight that is low-rank (or a sum of such) becomes factors of a `lora` part, a sparse one entries of a
`sparse` part, a sum of both one entry in each; anything else, and a sum whose factors would be larger than the matrix,
the plain difference in a `full` part (`bitfit` where a layer changes its bias alone). All are registered methods, so
what is made saves, loads, merges, exports and undoes like any other delta.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.algebra import LowRank, MaskedRows, Rows, Sparse, Sum, Update, wide
from tunesmith.core.base import Base
from tunesmith.core.combine import Place
from tunesmith.core.delta import Part
from tunesmith.core.errors import UsageError
from tunesmith.core.patterns import common, targets_of
from tunesmith.core.sites import Site

STATISTICS = ("running_mean", "running_var")
ENTRY = 3  # a sparse entry, an int64 place and a value, takes as much room as three fp32 numbers


@dataclass
class _Pile:
    """Tensors by path for one part to be."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)

    def put(self, place: Place, tensors: Mapping[str, Tensor]) -> None:
        self.tensors.setdefault(place.path, {}).update(tensors)
        self.alias.update(dict.fromkeys(place.tied, place.path))


@torch.no_grad()
def parts_of(base: Base, changes: Iterable[tuple[Place, Update]]) -> list[Part]:
    """The parts that make these changes, at most five. A change that is zero throughout is left out.

    Raises UsageError for a tensor that no method can change, or a change that is not finite.
    """
    low, sparse, plain = _Pile(), _Pile(), _Pile()
    for place, update in changes:
        factors, entries, dense = _forms(base, place, update)
        for t in (*(factors or ()), *(entries or ()), *(() if dense is None else (dense,))):
            if not bool(torch.isfinite(t).all()):
                raise UsageError("the combined change is not finite", where=place.key, hint="look for NaN in a source")
        if factors is not None:
            low.put(place, {"A": factors[1], "B": factors[0]})
        if entries is not None:
            sparse.put(place, {"indices": entries[0], "values": entries[1]})
        if dense is not None and bool(dense.any()):
            plain.put(place, {place.name: dense})
    made = [_lora(base, low), _sparse(base, sparse), *_full(base, plain)]
    return [p for p in made if p is not None]


def _forms(
    base: Base, place: Place, update: Update
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None, Tensor | None]:
    """The change as factors (B, A), entries (indices, values) and a dense rest: dense alone, or any of the others."""
    total = math.prod(place.shape)
    terms = flat_terms(update)
    lows = [f for t in terms if (f := low_rank(t)) is not None]
    thin = [t for t in terms if isinstance(t, Sparse | Rows)]
    size = sum(f.rank * (place.shape[0] + total // max(place.shape[0], 1)) for f in lows)
    size += ENTRY * sum(t.values.numel() for t in thin)
    able = place.name == "weight" and place.kind in methods.get("lora").kinds
    if not able or len(lows) + len(thin) < len(terms) or size >= total:
        return None, None, update.dense()
    return (joined(lows) if lows else None), (coalesced(thin) if thin else None), None


def flat_terms(update: Update) -> list[Update]:
    """The terms of a sum, of sums within it too; anything else is its own only term."""
    return [t for u in update.terms for t in flat_terms(u)] if isinstance(update, Sum) else [update]


def low_rank(update: Update) -> LowRank | None:
    """The update as two factors, where it has them."""
    if isinstance(update, MaskedRows):
        return LowRank(update.mask[:, None].to(update.vector.dtype), update.vector[None])
    return update if isinstance(update, LowRank) else None


def joined(terms: Sequence[LowRank]) -> tuple[Tensor, Tensor] | None:
    """B [out, r] and A [r, in * kernel] of a sum, r the sum of the ranks; scales go into B.

    Terms of one A add their B, so that a delta less itself is nothing; None where B is zero.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for t in terms:
        B, A = wide(t.B) * t.scale, wide(t.A)
        same = next((i for i, (_, other) in enumerate(found) if other is A or torch.equal(other, A)), None)
        if same is None:
            found.append((B, A))
        else:
            found[same] = (found[same][0] + B, A)
    found = [(B, A) for B, A in found if bool(B.any())]
    return (torch.cat([B for B, _ in found], 1), torch.cat([A for _, A in found])) if found else None


def coalesced(terms: Sequence[Sparse | Rows]) -> tuple[Tensor, Tensor] | None:
    """Flat places [k] int64, rising and unique, and values [k] of a sum; None where nothing is left."""
    flat = [_entries(t) for t in terms]
    places, at = torch.unique(torch.cat([i for i, _ in flat]), return_inverse=True)
    values = torch.cat([wide(v) for _, v in flat])
    found = torch.zeros(len(places), dtype=values.dtype, device=values.device).index_add_(0, at, values)
    kept = found != 0
    return (places[kept], found[kept]) if bool(kept.any()) else None


def _entries(t: Sparse | Rows) -> tuple[Tensor, Tensor]:
    if isinstance(t, Sparse):
        return t.indices, t.values
    width = math.prod(t.full[1:])
    return (t.indices[:, None] * width + torch.arange(width, device=t.indices.device)).reshape(-1), t.values.reshape(-1)


def _lora(base: Base, pile: _Pile) -> Part | None:
    if not pile.tensors:
        return None
    rank, pattern = common({p: len(t["A"]) for p, t in pile.tensors.items()}, 8)
    options = {"rank": rank, "alpha": float(rank), "rank_pattern": pattern}
    options["alpha_pattern"] = {p: float(r) for p, r in pattern.items()}  # alpha / r is 1 everywhere
    return _part(base, "lora", options, pile)


def _sparse(base: Base, pile: _Pile) -> Part | None:
    if not pile.tensors:
        return None
    settled = {"settled_indices": torch.empty(0, dtype=torch.int64), "settled_values": torch.empty(0)}
    for t in pile.tensors.values():
        t.update(settled)
    count, pattern = common({p: len(t["values"]) for p, t in pile.tensors.items()}, 1)
    return _part(base, "sparse", {"select": "random", "count": count, "count_pattern": pattern}, pile)


def _full(base: Base, pile: _Pile) -> list[Part | None]:
    """`full` parts for what each layer changes, and `bitfit` where it is the bias alone."""
    groups: dict[tuple[bool, bool] | None, _Pile] = {}
    for path, tensors in pile.tensors.items():
        site = _plain_site(base, path, tensors)
        names = set(tensors)
        statistics = bool(names & set(STATISTICS))
        key = None if names == {"bias"} else ("bias" in names, statistics)
        group = groups.setdefault(key, _Pile())
        wanted = ("bias",) if key is None else ("weight", *("bias",) * key[0], *STATISTICS * statistics)
        have = site.params()
        group.tensors[path] = {n: tensors.get(n, torch.zeros(have[n].shape)) for n in wanted if n in have}
        if "weight" in names:
            group.alias.update({o: p for o, p in pile.alias.items() if p == path})
    made: list[Part | None] = []
    for key, group in groups.items():
        options = {} if key is None else {"bias": key[0], "statistics": key[1]}
        name = "bitfit" if key is None else "full"
        made.append(_part(base, name, options, group, name if not made else f"{name}-{len(made) + 1}"))
    return made


def _plain_site(base: Base, path: str, tensors: Mapping[str, Tensor]) -> Site:
    kinds = methods.get("full").kinds
    site = next((s for s in base.sites.all() if s.path == path and s.kind in kinds), None)
    for name in tensors:
        known = ("weight", "bias", *STATISTICS)
        if site is None or name not in known or name not in site.params():
            hint = "changes of weights, biases and running statistics of linear, convolution, embedding and norm layers"
            raise UsageError("no method holds a change of this tensor", where=f"{path}.{name}", hint=f"held are {hint}")
    assert site is not None
    return site


def _part(base: Base, name: str, options: Mapping[str, Any], pile: _Pile, label: str = "") -> Part:
    info = methods.get(name)
    chosen = {s.path: s for s in base.sites.all() if s.path in pile.tensors and s.kind in info.kinds}
    method = methods.build(name, {**options, "targets": targets_of(base, chosen, info.kinds)})
    held = {n for hook in ("frozen", "books") if hasattr(method, hook) for n in getattr(method, hook)()}
    part = Part(
        method, [(p, s.kind) for p, s in chosen.items()], name=label, alias=pile.alias,
        tied="both" if pile.alias else "untie",
    )  # fmt: skip
    for path, tensors in pile.tensors.items():
        for key, value in tensors.items():
            part.put(path, key, value.detach().clone().to(base.device), trainable=key not in held)
    return part
