# SPDX-License-Identifier: Apache-2.0
"""Forms of the update, pruned bases, and tuning on them, for study 100."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, clone_part
from tunesmith.deltas.weight.bits import count
from tunesmith.deltas.weight.prune import prune, prune_heads, prune_neurons
from tunesmith.study.spec import Context
from tunesmith.study.worlds.arms import Outcome, train
from tunesmith.study.worlds.text import TextWorld, few_shot

PART = {"abs": "update", "wabs": "tuned", "w": "weight", "random": "random"}  # the paper's names for scores


@dataclass(frozen=True)
class Sizes:
    """Rows of each class by task, rows for choosing and reporting, batch, steps of the stages, entries, heads to take."""

    per_class: dict[str, int]
    dev: int
    test: int
    batch: int
    steps: int
    again: int
    rank: int
    entries: int
    heads: int


FULL = Sizes({"sst2": 2000, "clinc150-domains": 400}, 200, 500, 16, 100, 30, 8, 16, 3)
SMOKE = Sizes({"sst2": 4, "clinc150-domains": 4}, 8, 16, 8, 2, 2, 2, 3, 1)
HEAD_LR = 5e-3


def form(arm: str, sizes: Sizes) -> list[Any]:
    """The update of stage A: LoRA, or LoRA with sparse entries whose places are chosen by `arm`."""
    entries = 0 if arm == "lora" else sizes.entries
    support = "robust" if arm == "lora" else arm
    return [ts.DSEE(rank=sizes.rank, alpha=2.0 * sizes.rank, entries=entries, support=support, targets="q,v")]


def world_of(ctx: Context, task: str, seed: int, sizes: Sizes, base: Base | None) -> TextWorld:
    """MiniLM-L6 on a task, rows drawn by the seed."""
    return few_shot(
        ctx, task, sizes.per_class[task], seed, dev=sizes.dev, test=sizes.test, general=8, batch=sizes.batch, base=base
    )


def first(world: TextWorld, arm: str, lr: float, seed: int, sizes: Sizes) -> Outcome:
    """Stage A: train a form of the update and the head."""
    return train(world, form(arm, sizes), lr=lr, steps=sizes.steps, seed=seed, head_lr=HEAD_LR)


def masks(base: Base, delta: Delta, arm: str, sizes: Sizes, seed: int) -> list[Delta]:
    """The masks of an arm such as "abs 40 %", "heads by abs", "heads and neurons" or "unpruned"."""
    if arm == "unpruned":
        return []
    if arm.startswith("heads"):
        score = "abs" if arm == "heads and neurons" else arm.removeprefix("heads by ")
        taken = prune_heads(base, _own(delta), sizes.heads, PART[score], seed=seed)
        return [taken, prune_neurons(base, _own(delta), 0.4)] if arm == "heads and neurons" else [taken]
    score, share = arm.split()[0], int(arm.split()[1]) / 100
    return [
        prune(base, _own(delta), PART[score], share, targets="q,v", seed=seed),
        prune(base, None, "weight", share, targets="k,o,up,down"),
    ]


def _own(delta: Delta) -> Delta:
    """The update without the head, which scores nothing."""
    return Delta(delta.name, [p for p in delta.parts if p.info.name == "dsee"])


def again(world: TextWorld, trained: Delta, arm: str, lr: float, seed: int, sizes: Sizes) -> dict[str, float]:
    """Stages B and C: mask the base, look, tune a copy of the delta on, look again. The masks are folded into a base of
    their own, M * W, so that tuning costs what it costs without them."""
    made = masks(world.base, trained, arm, sizes, seed)
    pruned = world.base.merged(*made) if made else world.base
    place = replace(world, base=pruned)
    copy = Delta("on", [clone_part(p) for p in trained.parts])  # it says no base, so it fits the pruned one
    with pruned.using(copy, check=False):
        before = place.score("dev").metric
    out = train(place, [], lr=lr, steps=sizes.again, seed=seed, head_lr=HEAD_LR, start=copy)
    return {"dev_before": 100 * before, "metric": 100 * out.test().metric,
            "masked": sum(_off(d, world.base) for d in made)}  # fmt: skip


def _off(mask: Delta, base: Base) -> int:
    part = mask.parts[0]
    return sum(base.sites[p].module.weight.numel() - count(part.tensors(p)["bits"]) for p in part.kind_of)  # type: ignore[union-attr, operator]


def flops(base: Base, tokens: int, *, heads: float = 0.0, neurons: float = 0.0) -> float:
    """Multiplications of one row of `tokens` tokens through the blocks, with shares of heads and neurons cut away.

    Every block has query, key, value and output layers, two products of attention, and an MLP.
    """
    total = 0.0
    for attention in (s for s in base.sites.all() if s.kind == "attention"):
        assert attention.heads is not None
        H, _, d, d_v = attention.heads
        block = [s for s in base.sites.all() if s.depth == attention.depth and s.kind == "linear"]
        dense = {role: sum(s.shape[0] * s.shape[1] for s in block if s.role == role) for role in ROLES}
        total += tokens * (1 - heads) * sum(dense[r] for r in ("q", "k", "v", "o"))
        total += tokens**2 * (1 - heads) * H * (d + d_v)
        total += tokens * (1 - neurons) * sum(dense[r] for r in ("gate", "up", "down"))
    return total


ROLES = ("q", "k", "v", "o", "gate", "up", "down")
