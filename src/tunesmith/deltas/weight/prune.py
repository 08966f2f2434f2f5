# SPDX-License-Identifier: Apache-2.0
"""Prune a base by what a delta has learnt: masks (`fixed-mask` deltas) to be stacked before the delta they were made for.

    M * W + dW,   M keeps the weights with the largest scores      (DSEE, arXiv 2111.00160)

Scores are computed from the true change dW, in memory of their own: the base is never written to. The ratio is global:
over all weights that are scored together. A mask under a fresh delta changes the model, so measure the drop before
tuning on:

    mask = prune(base, delta, "update", 0.2)
    with base.using(mask):
        fit(base, delta, task, config)
    both = Delta("pruned", [*mask.parts, *delta.parts])
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank, Sum, Update, wide
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, Part, site_seed
from tunesmith.core.errors import UsageError, nearest
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.bits import pack
from tunesmith.deltas.weight.fixed_mask import KINDS, FixedMask
from tunesmith.deltas.weight.sparse import top, top_of_all

SCORES = ("update", "tuned", "low-rank", "weight", "random")


@torch.no_grad()
def prune(
    base: Base,
    delta: Delta | None,
    score: str = "update",
    ratio: float = 0.2,
    *,
    targets: str | None = None,
    seed: int = 0,
) -> Delta:
    """A mask that switches off the share `ratio` of the weights with the smallest scores.

    Args:
        delta: what the scores are made from; its additive parts are summed. Not needed for "weight" and "random".
        score: "update" |dW| (ABS in the paper's code), "tuned" |W + dW| (WABS), "low-rank" |W + the low-rank part of
            dW| (WAB), "weight" |W|, "random".
        targets: which layers; by default those the delta adds to.
    Raises UsageError for an unknown score, a ratio outside 0..1, or a layer that the delta says nothing of.
    """
    if score not in SCORES:
        raise UsageError(f"unknown score {score!r}", hint=nearest(score, SCORES))
    if not 0 <= ratio <= 1:
        raise UsageError(f"must lie in 0..1, got {ratio}", where="ratio")
    sites = _sites(base, delta, targets)
    scores = {s.path: _scores(s, delta, score, seed) for s in sites}
    total = sum(v.numel() for v in scores.values())
    keep = total - round(ratio * total)
    kept = top_of_all(scores, keep) if keep else {}
    masks = {}
    for s in sites:
        M = torch.zeros(math.prod(s.shape), dtype=torch.bool)
        if s.path in kept:
            M[kept[s.path].cpu()] = True
        masks[s.path] = M.reshape(s.shape)
    return mask_delta(base, masks)


@torch.no_grad()
def prune_heads(base: Base, delta: Delta | None, count: int, score: str = "update", *, seed: int = 0) -> Delta:
    """A mask that takes `count` heads out of every attention: the columns of its output layer that read them are zero.

    A head's score is the sum over its query and value rows. The delta must leave the output layers alone, or it would
    fill the columns again. Raises UsageError where query, value and output layers cannot be told, or too many heads go.
    """
    masks = {}
    for attention in (s for s in base.sites.all() if s.kind == "attention"):
        q, v, o = (_only(base, role, attention) for role in ("q", "v", "o"))
        _untouched(delta, o)
        assert attention.heads is not None
        H, H_kv, _, d_v = attention.heads
        if not 0 <= count < H:
            raise UsageError(f"cannot take {count} of {H} heads", where=attention.path)
        of_q = _scores(q, delta, score, seed).reshape(H, -1).sum(1)
        of_v = _scores(v, delta, score, seed).reshape(H_kv, -1).sum(1).repeat_interleave(H // H_kv)
        masks[o.path] = _columns(o, of_q + of_v, count, d_v)
    if not masks:
        raise UsageError("no attention module is known", where=base.name, hint="give the base an example input")
    return mask_delta(base, masks)


@torch.no_grad()
def prune_neurons(
    base: Base, delta: Delta | None, share: float, score: str = "weight", *, targets: str = "down", seed: int = 0
) -> Delta:
    """A mask that takes the share `share` of hidden neurons out of every MLP: columns of its last layer are zero.

    A neuron's score is the sum over its column there. Raises UsageError for a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"must lie in 0..1, got {share}", where="share")
    masks = {}
    for s in base.sites.select(targets, ("linear",)):
        _untouched(delta, s)
        masks[s.path] = _columns(s, _scores(s, None, score, seed).sum(0), round(share * s.shape[1]), 1)
    return mask_delta(base, masks)


def mask_delta(base: Base, masks: dict[str, Tensor]) -> Delta:
    """A delta of boolean masks by path, each of the shape of the canonical weight; False switches off.

    Raises UsageError for a path that has no weight or a mask of another shape.
    """
    sites = [base.sites[path] for path in masks]
    for s in sites:
        if s.kind not in KINDS or tuple(masks[s.path].shape) != s.shape:
            shape = list(masks[s.path].shape)
            raise UsageError(f"a mask of shape {shape} does not fit a {s.kind} of {list(s.shape)}", where=s.path)
    method = FixedMask(targets=",".join(masks), share=0.0)
    made = Delta.create(base, method, name="mask")
    for s in sites:
        made.parts[0].put(s.path, "bits", pack(masks[s.path]).to(base.device), trainable=False)
    return made


def _sites(base: Base, delta: Delta | None, targets: str | None) -> list[Site]:
    if targets is not None:
        return base.sites.select(targets, KINDS)
    if delta is None:
        raise UsageError("which layers are pruned is not known", hint="give targets, or the delta that says it")
    return [base.sites.of(path, kind) for p in _additive(delta) for path, kind in p.kind_of.items()]


def _additive(delta: Delta) -> Iterable[Part]:
    return [p for p in delta.parts if p.info.carrier == "weight" and hasattr(p.method, "update")]


def _scores(site: Site, delta: Delta | None, score: str, seed: int) -> Tensor:
    """Scores of the shape of W, fp32 or wider."""
    W = wide(site.params()["weight"].detach())
    if score == "weight":
        return W.abs()
    if score == "random":
        g = torch.Generator().manual_seed(site_seed(seed, site.path))
        return torch.rand(site.shape, generator=g)
    updates = [p.method.update(site, p.tensors(site.path)) for p in _additive(delta or _none()) if site.path in p.paths]
    if not updates:
        raise UsageError(f"score {score!r} needs a delta that adds to this layer", where=site.path, hint='"weight"')
    if score == "low-rank":
        updates = [Sum(tuple(found)) for u in updates if (found := _low_rank(u))]
        return (W + sum(u.dense() for u in updates)).abs()
    dW = torch.stack([u.dense() for u in updates]).sum(0)
    return dW.abs() if score == "update" else (W + dW).abs()


def _low_rank(u: Update) -> list[Update]:
    return [t for v in u.terms for t in _low_rank(v)] if isinstance(u, Sum) else [u] if isinstance(u, LowRank) else []


def _none() -> Delta:
    return Delta("none", [])


def _only(base: Base, role: str, attention: Site) -> Site:
    found = [s for s in base.sites.role(role) if s.depth == attention.depth]
    if len(found) != 1:
        what = f"{len(found)} layers have the role {role!r} here, one is needed"
        raise UsageError(what, where=attention.path, hint="prune_heads takes one attention a block with own q, v and o")
    return found[0]


def _columns(site: Site, scores: Tensor, count: int, width: int) -> Tensor:
    """A mask of the site's shape without the `count` groups of `width` columns that score least."""
    off = torch.zeros(len(scores), dtype=torch.bool)
    if count:
        off[top(-scores, count).cpu()] = True
    return ~off.repeat_interleave(width).expand(site.shape).clone()


def _untouched(delta: Delta | None, site: Site) -> None:
    if delta is not None and any(site.path in p.paths for p in delta.parts):
        what = "the delta changes this layer and would fill what is taken out"
        raise UsageError(what, where=site.path, hint="use a delta with other targets, such as 'q,v'")
