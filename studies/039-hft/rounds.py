# SPDX-License-Identifier: Apache-2.0
"""Tasks learnt in a row by the arms of study 039, and undoing half of what was learnt."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, site_seed
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.difference import added
from tunesmith.deltas.weight.hft import reset
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.tasks import Task

from .sequence import TASKS, Sequence4, Sizes

EVERYTHING = "everything,!head"


@ts.register("study-half-entries", carrier="weight", kinds=("linear", "norm"))
class HalfEntries:
    """Full fine-tuning in which a random half of the entries gets no gradient: the control for whole matrices."""

    targets: str = ts.option(EVERYTHING, "which layers to train")
    round: int = ts.option(0, "which half", low=0, high=10**6)

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Zeros of the shape of the weight, and which of its entries train."""
        g = torch.Generator().manual_seed(site_seed(self.round, site.path))
        return {"weight": torch.zeros(site.shape), "trains": torch.rand(site.shape, generator=g) < 0.5}

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weight plus its difference."""
        return added(params, {"weight": t["weight"]})

    def before_step(self, part: Any, now: Any) -> None:
        """No gradient for the other half; with no decay, AdamW then leaves it at zero."""
        for path in part.kind_of:
            grad = part.parameter(path, "weight").grad
            if grad is not None:
                grad.mul_(part.parameter(path, "trains"))


@dataclass
class Chain:
    """A base after all rounds, the delta of each, the score of each task just after it, and the time of every step."""

    base: Base
    deltas: list[Delta]
    learnt: dict[str, float]
    seconds: list[float]
    trainable: int


def order(seed: int) -> tuple[str, ...]:
    """The tasks in the order of a seed."""
    return tuple(random.Random(f"order:{seed}").sample(TASKS, len(TASKS)))


def method_of(arm: str, stage: int) -> Any:
    """The method that learns round `stage` of an arm."""
    made = {
        "hft, category": lambda: ts.HFT(rule="category", round=stage, outside=False, targets=EVERYTHING),
        "hft, model": lambda: ts.HFT(rule="model", round=stage, outside=False, targets=EVERYTHING),
        "hft, layer": lambda: ts.HFT(rule="layer", round=stage, outside=False, targets=EVERYTHING),
        "fixed half": lambda: ts.HFT(round=stage // 100 * 100, outside=False, targets=EVERYTHING),
        "half of the entries": lambda: HalfEntries(round=stage),
        "lora": lambda: ts.LoRA(rank=16, alpha=32.0),
    }
    return made.get(arm, lambda: ts.Full(targets=EVERYTHING))()


def chain(world: Sequence4, sizes: Sizes, arm: str, tasks: Sequence[str], seed: int, lr: float) -> Chain:
    """Learn the tasks in turn. Each round is folded into the base of the next; LoRA trains on with one adapter."""
    out = Chain(world.base, [], {}, [], 0)
    base = world.base
    for stage, task in enumerate(tasks):
        if arm == "lora" and out.deltas:
            delta = out.deltas[0]
        else:
            delta = Delta.create(base, method_of(arm, 100 * seed + stage), name=f"round {stage}", seed=seed)
            out.deltas.append(delta)
        learn(
            base, delta, world.tasks[task].splits["train"], sizes, seed * 10 + stage, lr, world.precision, out.seconds
        )
        if arm == "full, averaged":
            with torch.no_grad():
                for _, t in delta.items():
                    t.mul_(0.5)
        out.trainable = delta.trainable_parameters
        out.base = base.merged(delta)
        if arm != "lora":
            base = out.base
        out.learnt[task] = world.score(out.base, task, "test")
    return out


def learn(
    base: Base, delta: Delta, task: Task, sizes: Sizes, seed: int, lr: float, precision: str, seconds: list[float]
) -> None:
    """One round with fresh moments; the time of every step but the first two is added to `seconds`."""
    began = [time.perf_counter()]
    config = TrainConfig(steps=sizes.steps, batch_size=sizes.batch, lr=lr, warmup=0.1, precision=precision, seed=seed)
    fit(base, delta, task, config, progress=False, on_step=lambda step, loss: began.append(time.perf_counter()))
    taken = [b - a for a, b in pairwise(began)]
    seconds.extend(taken[2:] or taken)


def half_reset(world: Sequence4, sizes: Sizes, done: Chain, last: str, seed: int) -> dict[str, Any]:
    """General loss and the last task's score with and without half of the matrices, drawn by category or at random."""
    out: dict[str, Any] = {
        "base_general": world.forgotten(world.base, sizes.reset_general),
        "base_task": world.score(world.base, last, "test"),
        "general": world.forgotten(done.base, sizes.reset_general),
        "task": world.score(done.base, last, "test"),
    }
    for name, rule in (("category", "category"), ("any", "model")):
        rows: dict[str, list[float]] = {"general": [], "task": []}
        for draw in range(sizes.draws):
            halves = [reset(d, world.base, 0.5, rule, 1000 * seed + draw) for d in done.deltas]
            with ExitStack() as stack:  # a round's delta was made for the base that the rounds before it gave
                stack.enter_context(world.base.using(*halves, check=False))
                rows["general"].append(world.forgotten(world.base, sizes.reset_general))
                rows["task"].append(world.score(world.base, last, "test"))
        out[name] = rows
    return out
