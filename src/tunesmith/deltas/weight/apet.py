# SPDX-License-Identifier: Apache-2.0
"""An arbitrary set of trained parameters of a given size: the random baseline for any designed method (APET).

    methods = arbitrary(base, budget=4096, seed=0)
    run = ts.tune(base, data, method=methods)

The pool holds groups: a LoRA pair, the four tensors of a linear bottleneck after a layer, one prompt vector, one whole
tensor of the base, one entry of a weight. Half the budget goes to added groups and half to tensors of the base, each walked in
random order, taking a group where all of it fits what is left; single entries drawn over all weights spend the rest to the
last number. So a budget is never overspent, nothing is trained by half, and what is not chosen does not exist.

The released code compares only the first tensor of a group with what is left, and can overspend. Its adapters have a
nonlinearity; the bottleneck here is `hydra`'s, which merges.

Su et al. 2023, arXiv 2306.02320.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError, nearest
from tunesmith.core.sites import Site
from tunesmith.deltas.prompt.prompt_tuning import PromptTuning
from tunesmith.deltas.prompt.tokens import embedding_site
from tunesmith.deltas.weight.bitfit import BitFit
from tunesmith.deltas.weight.full import Full
from tunesmith.deltas.weight.hydra import Hydra
from tunesmith.deltas.weight.lora import LoRA
from tunesmith.deltas.weight.lowrank import KINDS, columns
from tunesmith.deltas.weight.sparse import draw
from tunesmith.deltas.weight.sparse_delta import SparseDelta
from tunesmith.deltas.weight.trial import exactly

ADDED = ("lowrank", "adapter", "prompt")
OWN = ("tensor", "raw")
PROMPTS = 100


@dataclass(frozen=True)
class Group:
    """What is taken or left as one: `size` numbers of one kind at one site (`name` of a tensor of the base)."""

    kind: str
    site: Site
    size: int
    name: str = ""


def arbitrary(
    base: Base,
    budget: int,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    *,
    rank: int = 8,
    targets: str = "everything",
) -> list[Any]:
    """Methods that together train an arbitrary set of at most `budget` numbers: exactly so many with "raw", if there are enough.

    Args:
        seed: with the budget it decides the set; which entries and first values come from the delta's own seed.
        kinds: of "lowrank", "adapter", "prompt", "tensor" and "raw"; None takes all that the base allows.
        rank: of LoRA pairs and bottlenecks.
        targets: the layers whose tensors and entries are in the pool; pairs and bottlenecks go to its linear ones.
    Raises UsageError for an unknown kind, one that the base does not allow, or a budget that no group fits.
    """
    if budget < 1:
        raise UsageError(f"must be 1 or more, got {budget}", where="budget")
    pool = _pool(base, kinds, rank, targets)
    rng = random.Random(f"{budget}:{seed}")
    half = budget // 2 if set(pool) & set(ADDED) and set(pool) & set(OWN) else budget
    taken = _walk([g for k in ADDED for g in pool.get(k, [])], half, rng)
    taken += _walk(pool.get("tensor", []), budget - half if set(pool) & set(ADDED) else budget, rng)
    methods = _methods(taken, rank)
    left = budget - sum(g.size for g in taken)
    if "raw" in pool and left:
        whole = {g.site.path for g in taken if g.name == "weight"}
        methods += _raw([g.site for g in pool["raw"] if g.site.path not in whole], left, rng)
    if not methods:
        least = min(g.size for groups in pool.values() for g in groups)
        raise UsageError(f"nothing fits: the smallest group has {least} numbers", where=f"budget {budget}", hint="raw")
    return methods


def _pool(base: Base, kinds: Sequence[str] | None, rank: int, targets: str) -> dict[str, list[Group]]:
    """Every group by kind. Raises UsageError for a kind that is unknown or has none."""
    for kind in kinds or ():
        if kind not in (*ADDED, *OWN):
            raise UsageError(f"there is no kind {kind!r}", where="kinds", hint=nearest(kind, (*ADDED, *OWN)))
    found: dict[str, list[Group]] = {}
    makers: dict[str, Callable[[], list[Group]]] = {
        "lowrank": lambda: [Group("lowrank", s, rank * (s.shape[0] + columns(s))) for s in _linear(base, targets)],
        "adapter": lambda: [Group("adapter", s, (2 * rank + 1) * s.shape[0] + rank) for s in _linear(base, targets)],
        "prompt": lambda: _prompts(base),
        "tensor": lambda: _tensors(base, targets),
        "raw": lambda: [Group("raw", s, 1) for s in _untied(base.sites.select(targets, KINDS))],
    }
    for kind in kinds if kinds is not None else makers:
        groups = makers[kind]()
        if groups:
            found[kind] = groups
        elif kinds is not None:
            raise UsageError(f"the base has no place for kind {kind!r}", where=base.name)
    if not found:
        raise UsageError("no kind of group was given", where="kinds", hint=f"of {', '.join((*ADDED, *OWN))}")
    return found


def _linear(base: Base, targets: str) -> list[Site]:
    return [s for s in _untied(base.sites.select(targets, KINDS)) if s.kind == "linear" and s.role != "head"]


def _prompts(base: Base) -> list[Group]:
    model = base.sites.of("", "model")
    if PromptTuning().fits(model) is not None:
        return []
    return [Group("prompt", model, embedding_site(model).shape[1])] * PROMPTS


def _tensors(base: Base, targets: str) -> list[Group]:
    sites = _untied(base.sites.select(targets, (*KINDS, "norm")))
    return [Group("tensor", s, p.numel(), n) for s in sites for n, p in s.params().items() if n in ("weight", "bias")]


def _untied(sites: Iterable[Site]) -> list[Site]:
    """The sites without those whose weight an earlier one shares."""
    kept: list[Site] = []
    for s in sites:
        if not any(s.path in k.tied for k in kept):
            kept.append(s)
    return kept


def _walk(groups: list[Group], budget: int, rng: random.Random) -> list[Group]:
    """Groups in random order, each taken where all of it fits what is left."""
    taken = []
    for g in rng.sample(groups, len(groups)):
        if g.size <= budget:
            taken.append(g)
            budget -= g.size
    return taken


def _methods(taken: list[Group], rank: int) -> list[Any]:
    """One method for each kind of group taken."""

    def at(kind: str, name: str = "") -> str:
        sites = [g.site for g in taken if g.kind == kind and g.name == name]
        return exactly(sites) if sites else ""

    found: list[Any] = []
    if targets := at("lowrank"):
        found.append(LoRA(rank=rank, alpha=2.0 * rank, targets=targets))
    if targets := at("adapter"):
        found.append(Hydra(rank=0, output_rank=rank, bias=True, targets=targets))
    if tokens := sum(g.kind == "prompt" for g in taken):
        found.append(PromptTuning(tokens=tokens))
    if targets := at("tensor", "weight"):
        found.append(Full(targets=targets, bias=False))
    if targets := at("tensor", "bias"):
        found.append(BitFit(targets=targets))
    return found


def _raw(sites: list[Site], k: int, rng: random.Random) -> list[SparseDelta]:
    """k entries drawn over all the sites' weights together, at most all."""
    sizes = torch.tensor([s.shape[0] * columns(s) for s in sites], dtype=torch.int64)
    ends = sizes.cumsum(0)
    n = int(sizes.sum())
    if not n:
        return []
    at = torch.bucketize(draw(n, min(k, n), torch.Generator().manual_seed(rng.getrandbits(62))), ends, right=True)
    counts = torch.bincount(at, minlength=len(sites)).tolist()
    # a pattern also names longer paths that end in it, and the first match counts: longest first
    chosen = sorted(((s, c) for s, c in zip(sites, counts, strict=True) if c), key=lambda sc: -len(sc[0].path))
    table = {s.path: c for s, c in chosen}
    return [SparseDelta(select="random", targets=exactly(s for s, _ in chosen), count_pattern=table)]
