# SPDX-License-Identifier: Apache-2.0
"""From combined changes to a delta that says where it comes from, and parts that act on no weight, combined by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.algebra import Update, wide
from tunesmith.core.assemble import parts_of
from tunesmith.core.base import Base
from tunesmith.core.combine import Place
from tunesmith.core.delta import Delta, Part, View
from tunesmith.core.errors import UsageError


def build(
    base: Base,
    changes: Iterable[tuple[Place, Update]],
    *,
    name: str,
    facts: Mapping[str, Any],
    others: Sequence[Part] = (),
    lineage: Sequence[Mapping[str, Any]] = (),
    layout: Mapping[str, Any] | None = None,
) -> Delta:
    """A delta of these changes and parts, bound to `base`, with `facts` under `provenance["composed"]`.

    Raises UsageError where nothing changes.
    """
    parts = [*parts_of(base, changes), *others]
    if not parts:
        hint = "the sources cancel, are untrained, or every weight is 0"
        raise UsageError("nothing is left: the result would be the base itself", where=name, hint=hint)
    taken: set[str] = set()
    for p in parts:
        while p.name in taken:
            p.name += "-of-all"
        taken.add(p.name)
    provenance = {"base": base.fingerprint.to_dict(), "composed": dict(facts), "lineage": [dict(x) for x in lineage]}
    if base.source.get("derived"):
        provenance["derived"] = base.source["derived"]
    made = Delta(name, parts, provenance=provenance)
    made.layout = dict(layout or {})
    return made


def sources(views: Sequence[View], weights: Sequence[float]) -> list[dict[str, Any]]:
    """Name, digest, strength and weight of each source, as plain data."""
    return [
        {"name": v.delta.name, "digest": v.delta.digest, "strength": v.strength, "weight": float(w)}
        for v, w in zip(views, weights, strict=True)
    ]


def parents(views: Sequence[View]) -> list[dict[str, Any]]:
    """What the sources were trained on top of and that is none of them."""
    inside = {v.delta.digest for v in views}
    needs = {p["digest"]: p for v in views for p in v.delta.provenance.get("lineage") or []}
    return [dict(p) for digest, p in needs.items() if digest not in inside]


def agreed(views: Sequence[View]) -> tuple[dict[str, Any], list[str]]:
    """The entries of the layout on which all sources agree, and the names of the others."""
    layouts = [v.delta.layout for v in views]
    keys = dict.fromkeys(k for one in layouts for k in one)
    same = {k: layouts[0][k] for k in keys if all(k in one and one[k] == layouts[0].get(k) for one in layouts)}
    return same, [k for k in keys if k not in same]


def by_tensor(base: Base, views: Sequence[View]) -> list[list[Part]]:
    """Parts that act on no weight, one list for each source and alike in all of them; empty where they are not.

    Raises UsageError, naming what differs, where one of them cannot be merged into weights either.
    """
    found = [[p for p in v.delta.parts if p.info.carrier != "weight"] for v in views]
    if not any(found):
        return []
    kinds = [[_shape_of(p) for p in parts] for parts in found]
    plain = all(p.auto for parts in found for p in parts) and all(v.strength == 1 for v in views)
    if plain and all(k == kinds[0] for k in kinds):
        return found
    fixed = [p for parts in found for p in parts if not p.info.mergeable]
    if fixed:
        lines = [
            f"{v.delta.name}: {', '.join(map(_said, parts)) or 'none'}" for v, parts in zip(views, found, strict=True)
        ]
        what = f"{fixed[0].info.name} is no change of weights, and the deltas do not have the same one"
        hint = "give every delta the same such part (method, options, sites) at strength 1\n  " + "\n  ".join(lines)
        raise UsageError(what, hint=hint)
    return []


def _shape_of(p: Part) -> tuple[Any, ...]:
    shapes = [(path, n, tuple(t.shape), t.dtype) for path, n, t in p.items()]
    return p.info.name, methods.chosen(p.method), sorted(p.kind_of.items()), sorted(p.alias.items()), shapes


def _said(p: Part) -> str:
    options = ", ".join(f"{k}={v!r}" for k, v in methods.chosen(p.method))
    return f"{p.info.name}({options}) at {len(p.kind_of)} sites"


@torch.no_grad()
def weighted_parts(base: Base, found: Sequence[Sequence[Part]], coefficients: Sequence[float]) -> list[Part]:
    """One part for each that all sources have, its tensors the weighted sums of theirs.

    Where a fresh part is the identity whatever the seed (scales start at one), the sum is of the differences from it;
    others (prompts, heads) have no zero, so their weights must add up to 1. Raises UsageError where they do not, or for
    integer tensors that differ.
    """
    return [_weighted(base, parts, coefficients) for parts in zip(*found, strict=True)]


def _weighted(base: Base, parts: Sequence[Part], coefficients: Sequence[float]) -> Part:
    first = parts[0]
    zero = _identity(base, first)
    if zero is None and abs(sum(coefficients) - 1) > 1e-6:
        hint = "method='linear' divides weights by their sum"
        what = f"{first.info.name} has no zero, so its weights must add up to 1, not {sum(coefficients):g}"
        raise UsageError(what, where=first.name, hint=hint)
    out = Part(
        first.method, first.kind_of.items(), name=first.name, scope=first.scope, alias=first.alias, tied=first.tied
    )
    alone = len(parts) == 1 and coefficients[0] == 1
    for path, name, t in first.items():
        values = [p.parameter(path, name) for p in parts]
        made: Tensor = t.detach().clone()
        if t.is_floating_point() and not alone:
            start = torch.zeros_like(wide(t)) if zero is None else wide(zero[path, name].to(t))
            total = sum((c * (wide(v) - start) for c, v in zip(coefficients, values, strict=True)), start)
            made = total.to(t.dtype)
        elif not t.is_floating_point() and any(not torch.equal(v, t) for v in values):
            raise UsageError("integer tensors differ and cannot be combined", where=f"{first.name}/{path}/{name}")
        out.put(path, name, made, trainable=t.requires_grad)
    return out


def _identity(base: Base, part: Part) -> dict[tuple[str, str], Tensor] | None:
    """The tensors at which the part does nothing, None where a fresh one depends on the seed or does something."""
    method = part.method
    if not part.info.identity_at_init or hasattr(method, "calibrate") or hasattr(method, "shared"):
        return None
    out: dict[tuple[str, str], Tensor] = {}
    for path, kind in part.kind_of.items():
        site = base.sites.of(path, kind)
        one, two = (method.init(site, torch.Generator().manual_seed(s)) for s in (0, 1))
        if any(not torch.equal(one[n], two[n]) for n in one) or set(one) != {
            n for p, n, _ in part.items() if p == path
        }:
            return None
        out.update({(path, n): t for n, t in one.items()})
    return out
