# SPDX-License-Identifier: Apache-2.0
"""Half fine-tuning trains a random half of the weight matrices in each round and leaves the others as they are.

    W' = W + D_W,  b' = b + D_b     at the chosen matrices, each with its bias; nothing is stored for the rest

D trains and starts at zero, so a fresh delta is the identity bit for bit. Frozen matrices take no gradient product and have
no optimiser state. A round is one training stage: the next one is a delta with `round` one higher, trained with this one in
use, and the sum of the rounds is the result. Merges exactly.

Rules, over the repeated blocks (`ratio` 1/2): "category" takes in each block 2 of 4 attention matrices, of 3 MLP matrices 2
in a random half of the blocks and 1 in the others, 1 of 2 norms; "model" any half of all matrices and norms, "layer" whole
blocks. Other counts and ratios are spread the same way: each block gets the whole part of ratio * n, random blocks one
more. What lies outside the blocks (embeddings, output head, last norm) trains with `outside`. The choice is a function of
`round` and the paths, the same on every machine. Where query, key and value are one matrix "category" is refused, because
halves of it would be rows, not matrices. `reset` undoes half of any delta afterwards (the paper's Half-Reset).

Defaults: as the paper: category, half, embeddings and head always trained.
Use when: a model is tuned on one task after another and must keep what it knew. Avoid when: the delta must be small.
Cost: half of full fine-tuning's numbers and optimiser state; a third of its work in the frozen matrices is saved.

Hui et al. 2024, arXiv 2404.18466.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunesmith.core.base import Base
from tunesmith.core.delta import SHARED, Delta, Part
from tunesmith.core.errors import UsageError, nearest
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.full import KINDS, Full

RULES = ("category", "model", "layer")
CATEGORY = {**dict.fromkeys("qkvo", "attention"), **dict.fromkeys(("gate", "up", "down"), "mlp")}


@register("hft", carrier="weight", paper="2404.18466", kinds=KINDS)
class HFT(Full):
    """Train a random half of the matrices in each round, held as the difference from the base."""

    rule: str = option(
        "category", "what is halved: the matrices of each kind in each block, or any, or blocks", choices=RULES
    )
    ratio: float = option(0.5, "share of the matrices that train", low=0.0, high=1.0)
    round: int = option(0, "number of the training stage; another one draws another half", low=0, high=2**31)
    outside: bool = option(True, "train embeddings, output head and whatever else lies outside the blocks")

    def among(self, sites: list[Site]) -> list[Site]:
        """The sites that train in this round. Raises UsageError where the rule cannot be followed."""
        beyond = set(_beyond(sites))
        drawn = {s.path for s in chosen([s for s in sites if s.path not in beyond], self.rule, self.ratio, self.round)}
        return [s for s in sites if s.path in drawn or (self.outside and s.path in beyond)]

    @classmethod
    def toy(cls) -> HFT:
        return cls()


def chosen(sites: Sequence[Site], rule: str, ratio: float, round: int) -> list[Site]:
    """The sites that `rule` draws at `ratio` in a round, in the order given; all lie within blocks.

    Raises UsageError for an unknown rule, or one that needs roles or blocks that the base does not have.
    """
    if rule not in RULES:
        raise UsageError(f"unknown rule {rule!r}", hint=nearest(rule, RULES))
    groups: dict[str, dict[str, list[Site]]] = {}  # category -> block -> its sites
    for s in sites:
        category = _category(s) if rule == "category" else rule
        groups.setdefault(category, {}).setdefault(_block(s) if rule != "model" else "", []).append(s)
    if rule == "layer" and "" in groups.get(rule, {}):
        raise UsageError("the model has no repeated blocks to choose from", where="rule", hint="rule='model'")
    kept: set[str] = set()
    for category, blocks in groups.items():
        if rule == "layer":
            whole = _ranked(blocks, round, rule)[: math.floor(ratio * len(blocks) + 0.5)]
            kept.update(s.path for block in whole for s in blocks[block])
            continue
        for block, count in _counts({b: len(some) for b, some in blocks.items()}, ratio, round, category).items():
            kept.update(_ranked([s.path for s in blocks[block]], round)[:count])
    return [s for s in sites if s.path in kept]


def reset(
    delta: Delta, base: Base, fraction: float = 0.5, rule: str = "category", round: int = 0, *, complement: bool = False
) -> Delta:
    """A copy of `delta` with the change taken off a `fraction` of the base's matrices and norms (Half-Reset).

    The sites are drawn as `hft` draws those it trains, what lies outside the blocks as a category of its own.
    `complement` takes the change off all the other sites instead, so that both in turn leave nothing. Parts that act on
    whole blocks, attention modules or the model (prompts, heads) stay. Raises UsageError as `chosen`, or for a fraction
    outside 0..1.
    """
    if not 0 <= fraction <= 1:
        raise UsageError(f"must lie in 0..1, got {fraction}", where="fraction")
    sites: list[Site] = []
    for s in base.sites.all():
        if s.kind in KINDS and "weight" in s.params() and not any(o.path in s.tied for o in sites):
            sites.append(s)
    beyond = _beyond(sites)
    drawn = {s.path for s in chosen([s for s in sites if s.path not in beyond], rule, fraction, round)}
    drawn.update(_ranked(beyond, round)[: math.floor(fraction * len(beyond) + 0.5)])
    gone = {p for s in sites if (s.path in drawn) != complement for p in (s.path, *s.tied)}
    parts = [_without(part, gone) for part in delta.parts]
    facts = {
        **delta.provenance,
        "edits": [*(delta.provenance.get("edits") or []), _record(fraction, rule, round, complement)],
    }
    out = Delta(delta.name, [p for p in parts if p.kind_of], provenance=facts)
    out.layout = dict(delta.layout)
    return out


def _record(fraction: float, rule: str, round: int, complement: bool) -> dict[str, Any]:
    return {"edit": "reset", "fraction": fraction, "rule": rule, "round": round, "complement": complement}


def _without(part: Part, gone: set[str]) -> Part:
    """A copy of the part with tensors of its own, without the sites in `gone`."""
    kept = {p: kind for p, kind in part.kind_of.items() if kind not in KINDS or p not in gone}
    alias = {other: p for other, p in part.alias.items() if p in kept}
    out = Part(part.method, kept.items(), name=part.name, scope=part.scope, auto=part.auto, alias=alias, tied=part.tied)
    for path, name, t in part.items():
        if path == SHARED or path in kept:
            out.put(path, name, t.clone(), trainable=t.requires_grad)
    return out


def _beyond(sites: Iterable[Site]) -> list[str]:
    """Paths outside the repeated blocks; of a model without blocks, its embeddings and head."""
    sites = list(sites)
    if any(_block(s) for s in sites):
        return [s.path for s in sites if not _block(s)]
    return [s.path for s in sites if s.kind == "embedding" or s.role == "head"]


def _block(site: Site) -> str:
    """The innermost repeated block that holds the site, or nothing."""
    paths = [] if site.map is None else [b.path for b in site.map.all() if b.kind == "block"]
    return max((b for b in paths if f"{site.path}.".startswith(f"{b}.")), key=len, default="")


def _category(site: Site) -> str:
    """Attention, MLP, norms, or other layers by their kind. Raises UsageError where roles are unknown or fused."""
    if site.role == "qkv":
        what = "query, key and value are one matrix, so 2 of 4 attention matrices cannot be chosen"
        raise UsageError(
            what, where=site.path, hint="rule='layer' or 'model', or take it out: targets='everything,!qkv'"
        )
    if site.map is not None and site.map.trace is None:
        hint = "give the base an example input, or use rule='layer' or 'model'"
        raise UsageError("what each matrix is for is not known", where=site.path, hint=hint)
    return CATEGORY.get(site.role, site.kind)


def _counts(sizes: Mapping[str, int], ratio: float, round: int, category: str) -> dict[str, int]:
    """How many of each block's n sites are taken: the whole part of ratio * n, and one more in random blocks.

    Over all blocks that is ratio times the number of sites, rounded to the nearest, halves up.
    """
    exact = {block: ratio * n + 1e-9 for block, n in sizes.items()}
    counts = {block: math.floor(x) for block, x in exact.items()}
    left = math.floor(sum(exact.values()) + 0.5) - sum(counts.values())
    open_ = [block for block, x in exact.items() if x - math.floor(x) > 1e-6]
    for block in _ranked(open_, round, category)[:left]:
        counts[block] += 1
    return counts


def _ranked(names: Iterable[str], round: int, what: str = "") -> list[str]:
    """The names in an order that depends on nothing but them, the round and what is drawn."""
    return sorted(names, key=lambda name: hashlib.sha256(f"hft:{round}:{what}:{name}".encode()).digest())
