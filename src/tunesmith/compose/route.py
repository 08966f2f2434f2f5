# SPDX-License-Identifier: Apache-2.0
"""Several low-rank deltas as one that chooses among them token by token (MeteoRA): deltas in, delta out.

    both = route(base, [sums, spelling])          # gates untrained; `tunesmith.train.router.fit_router` trains them
    wide = reset(both, temperature=15.0)          # for prompts that hold several tasks
    seen = trace(base, both, input_ids)           # {path: weights [B, T, n]}

The deltas are copied and stay as they are: their tensors are frozen in the result.

Xu et al. 2024, arXiv 2405.13053.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tunesmith.compose.build import agreed, build, parents, sources
from tunesmith.compose.collect import DeltaChanges
from tunesmith.core import method as methods
from tunesmith.core.algebra import Update
from tunesmith.core.assemble import flat_terms, joined, low_rank
from tunesmith.core.base import Base
from tunesmith.core.combine import Place
from tunesmith.core.delta import Delta, Part, View, as_view, site_seed
from tunesmith.core.errors import UsageError
from tunesmith.core.gates import watched
from tunesmith.core.patterns import targets_of


@torch.no_grad()
def route(
    base: Base,
    deltas: Sequence[Delta | View],
    *,
    top_k: int = 2,
    temperature: float = 1.0,
    start: str = "scaled",
    name: str | None = None,
    seed: int = 0,
) -> Delta:
    """One delta that gates the given ones at every layer any of them changes. A layer that one leaves alone has it at rank 0.

    Args:
        deltas: two or more that change weights of linear layers by low-rank matrices, of any ranks.
        top_k, temperature, start: options of `meteora`.
        seed: of the first gates.
    `provenance["composed"]["sources"]` names the deltas in the order of the gates. Raises UsageError for a change that is
    not low-rank, not of a linear layer or of a tied weight; BaseMismatch for a delta of another base.
    """
    views = [as_view(d) for d in deltas]
    if len(views) < 2:
        raise UsageError("there is nothing to choose between", hint="route(base, [a, b])")
    names = [v.delta.name for v in views]
    if len(set(names)) < len(names):
        raise UsageError(f"two deltas share a name: {names}", hint="the names say which gate is whose")
    changes = DeltaChanges(base, views)
    found = {place.path: _stacked(place, changes.at(place), names) for place in changes.places()}
    options = {"experts": len(views), "top_k": top_k, "temperature": temperature, "start": start}
    info = methods.get("meteora")
    method = methods.build("meteora", {**options, "targets": targets_of(base, found, info.kinds)})
    sites = [base.sites.of(path, "linear") for path in found]
    method.check(sites)
    part = Part(method, [(s.path, s.kind) for s in sites])
    for s in sites:
        fresh = method.init(s, torch.Generator().manual_seed(site_seed(seed, s.path)))
        for key, value in {**fresh, **found[s.path]}.items():
            part.put(s.path, key, value.to(base.device), trainable=key not in method.frozen())
    layout, dropped = agreed(views)
    facts: dict[str, Any] = {"combiner": "meteora", "options": options, "seed": seed}
    facts["sources"] = sources(views, [1.0] * len(views))
    if dropped:
        facts["layout_dropped"] = dropped
    made = build(
        base, [], name=name or "+".join(names), facts=facts, others=[part], lineage=parents(views), layout=layout
    )
    made.provenance["untrained"] = True
    return made


def _stacked(place: Place, changes: Sequence[Update | None], names: Sequence[str]) -> dict[str, Tensor]:
    """A [R, in], B [out, R] and `of` [R] of the changes at one place. Raises UsageError for one that has no such form."""
    if place.name != "weight" or place.kind != "linear" or place.tied:
        hint = "train the deltas on linear layers whose weight is their own"
        raise UsageError("only weights of linear layers are gated", where=place.key, hint=hint)
    A, B, of = [torch.zeros(0, place.shape[1])], [torch.zeros(place.shape[0], 0)], [torch.zeros(0, dtype=torch.int64)]
    for i, change in enumerate(changes):
        if change is None:
            continue
        lows = [low_rank(t) for t in flat_terms(change)]
        if any(f is None for f in lows):
            hint = "ts.compress(base, delta, rank=8) gives its nearest low-rank form"
            raise UsageError(f"the change of {names[i]!r} is not low-rank", where=place.key, hint=hint)
        pair = joined([f for f in lows if f is not None])
        if pair is not None:
            B.append(pair[0])
            A.append(pair[1])
            of.append(torch.full((len(pair[1]),), i, dtype=torch.int64))
    return {"A": torch.cat([a.cpu() for a in A]), "B": torch.cat([b.cpu() for b in B], 1), "of": torch.cat(of)}


def reset(delta: Delta, **options: Any) -> Delta:
    """The same gates and deltas with another `top_k` or `temperature`, sharing every tensor.

    Raises UsageError for a delta without gates, or any other option.
    """
    other = set(options) - {"top_k", "temperature"}
    if other:
        raise UsageError(f"{sorted(other)} cannot be changed afterwards", hint="top_k and temperature can")
    parts, changed = [], False
    for p in delta.parts:
        if p.info.name == "meteora":
            changed, method = True, replace(p.method, **options)
            q = Part(method, p.kind_of.items(), name=p.name, scope=p.scope, auto=p.auto, alias=p.alias, tied=p.tied)
            q.method.check([])
            q._parameters.update(p._parameters)
            q._index = p._index
            p = q
        parts.append(p)
    if not changed:
        raise UsageError(f"delta {delta.name!r} has no gates", hint="route(base, deltas) makes one that has")
    out = Delta(delta.name, parts, provenance=delta.provenance)
    out.layout = dict(delta.layout)
    return out


@torch.no_grad()
def trace(base: Base, delta: Delta | View, input_ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """How much each delta counted for each token, by path: [B, T, n] fp32, 0 where it was not chosen."""
    view = as_view(delta)
    gated = [p for p in view.delta.parts if p.info.name == "meteora"]
    if len(gated) != 1:
        raise UsageError(f"delta {view.delta.name!r} has {len(gated)} parts with gates, not one")
    with base.evaluating(), base.using(view), watched() as seen:
        base.model(input_ids=input_ids.to(base.device), **inputs)
    return {path: gated[0].method.weights(g) for path, g in seen.items()}
