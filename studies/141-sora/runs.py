# SPDX-License-Identifier: Apache-2.0
"""The runs of study 141: SoRA, LoRA of a given size, LoRA pruned at random, and SoRA under a rising threshold."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tunesmith.core.delta import Delta, Part, bake
from tunesmith.core.errors import TrainingError
from tunesmith.deltas import LoRA, SoRA
from tunesmith.deltas.weight.gated import as_lora, ranks
from tunesmith.study.worlds.arms import Outcome, train
from tunesmith.study.worlds.encoder import UpperWorld

SCALE = 2.0  # alpha / r of every arm: SoRA's 16 / 8


def sizes(world: UpperWorld, rank: int) -> dict[str, int]:
    """in + out of every layer that is adapted: the numbers one component takes there."""
    delta = Delta.create(world.base, LoRA(rank=rank))
    return {
        path: sum(t.numel() for t in delta.parts[0].tensors(path).values()) // rank for path in delta.parts[0].kind_of
    }


def outcome(out: Outcome, part: str, extra: Mapping[str, Any] = {}) -> dict[str, Any]:
    """What is kept of a run: percent correct, the numbers in the part, and how long a pass over dev takes."""
    dev, test = out.dev(), out.test()
    begun = time.perf_counter()
    with out.world.base.using(out.delta):
        out.world.logits(out.world.held["dev"])  # type: ignore[attr-defined]
    seconds = time.perf_counter() - begun
    mine = [p for p in out.delta.parts if p.name == part]
    return {
        "dev": 100 * dev.metric, "test": 100 * test.metric, "parameters": sum(t.numel() for p in mine for _, _, t in p.items()),
        "forward_ms": 1000 * seconds, "seconds": out.seconds, **extra,
    }  # fmt: skip


def sora(world: UpperWorld, rank: int, xi: float, lr: float, steps: int, seed: int) -> dict[str, Any] | None:
    """SoRA, measured as the plain LoRA that is left of it. None where it diverges."""
    try:
        out = train(world, [SoRA(rank=rank, alpha=SCALE * rank, xi=xi)], lr=lr, steps=steps, seed=seed)
    except TrainingError:
        return None
    kept = ranks(out.delta.part("sora"), "g")
    share = sum(kept.values()) / (rank * len(kept))
    bake(world.base, out.delta)
    return outcome(out, "sora", {"kept": kept, "share": share})


def lora(world: UpperWorld, rank: Mapping[str, int], lr: float, steps: int, seed: int) -> dict[str, Any] | None:
    """LoRA with these ranks and the common scale. None where it diverges."""
    try:
        out = train(world, [_lora(rank)], lr=lr, steps=steps, seed=seed)
    except TrainingError:
        return None
    return outcome(out, "lora")


def random_pruned(
    world: UpperWorld, rank: int, parameters: int, lr: float, steps: int, seed: int
) -> dict[str, Any] | None:
    """LoRA trained for half the steps, cut to `parameters` numbers at random components, trained for the other half."""
    half = steps // 2
    try:
        first = train(world, [LoRA(rank=rank, alpha=SCALE * rank)], lr=lr, steps=half, seed=seed)
        whole = first.delta.part("lora")
        kept = _drawn(sizes(world, rank), rank, parameters, seed)
        with torch.no_grad():
            found = {p: {"A": whole.parameter(p, "A")[at], "B": whole.parameter(p, "B")[:, at].contiguous()} if at else {}
                     for p, at in kept.items()}  # fmt: skip
        part = Part(as_lora("all-linear", found, lambda path, r: SCALE), [(p, "linear") for p, t in found.items() if t])
        for path, tensors in found.items():
            for name, value in tensors.items():
                part.put(path, name, value, trainable=True)
        others = [p for p in first.delta.parts if p is not whole]
        start = Delta("pruned", [part, *others], provenance=first.delta.provenance)
        out = train(world, [], lr=lr, steps=steps - half, seed=seed + 1000, start=start)
    except TrainingError:
        return None
    return outcome(out, "lora")


def rising(
    world: UpperWorld, rank: int, levels: Sequence[float], lr: float, steps: int, more: int, seed: int
) -> list[dict[str, Any]]:
    """One SoRA model trained at the first threshold, then for `more` steps at each of the rising others."""
    delta: Delta | None = None
    rows = []
    for i, xi in enumerate(levels):
        method = SoRA(rank=rank, alpha=SCALE * rank, xi=xi)
        if delta is not None:
            delta.part("sora").method = replace(method)
        out = train(world, [method], lr=lr, steps=more if i else steps, seed=seed + i, start=delta, schedule="constant")
        delta = out.delta
        kept = ranks(delta.part("sora"), "g")
        with world.base.using(delta):
            fitted = world.logits(world.task.rows).argmax(-1) == torch.tensor(world.task.rows.labels)
        rows.append({"xi": xi, "kept": sum(kept.values()), "share": sum(kept.values()) / (rank * len(kept)),
                     "train": 100 * float(fitted.float().mean()), "dev": 100 * out.dev().metric})  # fmt: skip
    return rows


def spread(sizes: Mapping[str, int], parameters: int) -> dict[str, int]:
    """Ranks as equal as can be whose numbers come nearest to `parameters`: one more in the first layers where it helps."""
    r = max(1, parameters // sum(sizes.values()))
    rank = dict.fromkeys(sizes, r)
    left = parameters - r * sum(sizes.values())
    for path, n in sizes.items():
        if left >= n / 2:
            rank[path] += 1
            left -= n
    return rank


def _lora(rank: Mapping[str, int]) -> LoRA:
    return as_lora("all-linear", {path: {"A": torch.empty(r, 1)} for path, r in rank.items()}, lambda path, r: SCALE)


def _drawn(sizes: Mapping[str, int], rank: int, parameters: int, seed: int) -> dict[str, list[int]]:
    """Components of each layer, drawn at random over all layers until they hold about `parameters` numbers."""
    every = [(path, i) for path in sizes for i in range(rank)]
    random.Random(f"pruned:{seed}").shuffle(every)
    kept: dict[str, list[int]] = {path: [] for path in sizes}
    left = parameters
    for path, i in every:
        if left >= sizes[path] / 2:
            kept[path].append(i)
            left -= sizes[path]
    return {path: sorted(at) for path, at in kept.items()}
