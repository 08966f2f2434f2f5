# SPDX-License-Identifier: Apache-2.0
"""Deltas for languages and for tagging, learnt apart by the arms of study 020, and what they give together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lt_sft import headless
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.sample import sample_of

from . import world as made
from .world import IGNORED, LANGUAGES, Grammar, Sentences, Size

SOURCE, TARGETS = LANGUAGES[0], LANGUAGES[1:]
MASKABLE = "all-weights"
DENSE, ADAPTERS, TASK_ONLY = "dense composition", "adapters", "task only"


@ts.register("study-adapter", carrier="hidden", kinds=("block",), merge="it is a network behind the block")
class Adapter:
    """A bottleneck with a residual behind every block: h + B relu(A h + a) + b."""

    width: int = ts.option(64, "d, the width of the model", low=1, high=10**6)
    bottleneck: int = ts.option(8, "m, the width within", low=1, high=10**6)
    targets: str = ts.option("blocks", "which blocks")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A [m, d] random, B [d, m] and both biases zero."""
        A = torch.randn(self.bottleneck, self.width, generator=generator) * self.width**-0.5
        return {"A": A, "a": torch.zeros(self.bottleneck), "B": torch.zeros(self.width, self.bottleneck),
                "b": torch.zeros(self.width)}  # fmt: skip

    def forward(self, site: Site, t: dict[str, Tensor], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """The block's output with the bottleneck's added."""
        h = call(x)
        return h + torch.relu(h @ t["A"].T + t["a"]) @ t["B"].T + t["b"]


@dataclass(frozen=True)
class Lengths:
    """Steps of a language and of a task run."""

    language: int
    task: int


@dataclass
class World:
    """The base and data of one seed. `trials` keeps dense runs, which are also what sparse ones choose their places by."""

    base: Base
    size: Size
    raw: dict[str, Sentences]
    heard: dict[str, Sentences]
    tagged: Sentences
    dev: Sentences
    test: dict[str, Sentences]
    lengths: Lengths
    seed: int
    trials: dict[Any, Delta] = field(default_factory=dict)

    @classmethod
    def of(cls, size: Size, lengths: Lengths, seed: int) -> World:
        """A grammar, a pre-trained base and all sentences, drawn by the seed, those of each split apart."""
        grammar = Grammar.drawn(size, seed)
        base = made.pretrained(grammar, seed)
        rng = np.random.default_rng([seed, 3])

        def some(language: str, n: int, tagged: bool = False) -> Sentences:
            return Sentences(grammar.sentences(language, n, rng), size.vocabulary, tagged, seed)

        return cls(
            base, size, {x: some(x, size.raw) for x in LANGUAGES}, {x: some(x, size.dev) for x in LANGUAGES},
            some(SOURCE, size.tagged, True), some(SOURCE, size.dev, True), {x: some(x, size.test, True) for x in TARGETS},
            lengths, seed,
        )  # fmt: skip

    def maskable(self) -> int:
        """N: the entries that may be chosen."""
        sites = self.base.sites.select(MASKABLE, ("linear", "embedding"))
        return sum(p.numel() for s in sites for p in s.params().values())

    def bottleneck(self, share: float) -> int:
        """The adapter width m that trains nearest to `share` of N."""
        d, layers = self.size.width, self.size.layers
        return max(1, round((share * self.maskable() / layers - d) / (2 * d + 1)))


def methods_of(world: World, arm: str, share: float, l1: float) -> Any:
    """The method of an arm, for languages (l1 0.1) and tasks (l1 0)."""
    if arm == ADAPTERS:
        return Adapter(width=world.size.width, bottleneck=world.bottleneck(share))
    select = "random" if arm == "random mask" else "lottery"
    return ts.LTSFT(density=share, trial=1.0, l1=l1, select=select, targets=MASKABLE)


def learnt(
    world: World,
    arm: str,
    share: float,
    task: Sentences,
    what: str,
    steps: int,
    lr: float,
    *,
    head: bool,
    under: str = "",
) -> Delta:
    """One run on whatever is in use (`under` says what that is). For the dense arm it is the dense trial itself."""
    config = TrainConfig(steps=steps, batch_size=world.size.batch, lr=lr, schedule="linear", warmup=0.0,
                         precision="fp32", seed=world.seed)  # fmt: skip
    sample = sample_of(task, config, tied="untie")
    plain = sample.train
    assert plain is not None

    def once(base: Base, methods: list[Any], length: float) -> Delta:
        """Dense trials are the same for every share of entries, so each is run once."""
        key = (what, lr, under)
        if key not in world.trials:
            world.trials[key] = plain(base, methods, length)
        return world.trials[key]

    heads = [ts.Head(classes=world.size.states, task="tagging")] if head else []
    method = methods_of(world, arm, share, 0.0 if head else 0.1)
    given = dataclasses.replace(sample, train=once)
    delta = Delta.create(world.base, method, *heads, name=what, seed=world.seed, tied="untie", sample=given)
    if arm == DENSE:
        return world.trials[what, lr, under]
    fit(world.base, delta, task, config, progress=False)
    return delta


def language(world: World, arm: str, share: float, name: str, lr: float) -> Delta:
    """What an arm learns of a language from raw sentences."""
    return headless(
        learnt(world, arm, share, world.raw[name], f"language {name}", world.lengths.language, lr, head=False)
    )


def tagging(world: World, arm: str, share: float, source: Delta | None, lr: float, under: str) -> Delta:
    """What an arm learns of tagging from the source language, with its delta for that language in use."""
    with world.base.using(source):
        return learnt(world, arm, share, world.tagged, "tagging", world.lengths.task, lr, head=True, under=under)


@torch.no_grad()
def accuracy(world: World, rows: Sentences, *deltas: Delta | None) -> float:
    """Percent of tokens tagged right with the deltas in use."""
    right = total = 0
    with world.base.using(*deltas, check=False), world.base.evaluating():
        for start in range(0, len(rows), 100):
            batch = rows.batch(range(start, min(start + 100, len(rows))), 0)
            labels = batch.pop("labels")
            found = world.base.model(**batch)["logits"].argmax(-1)
            right += int((found == labels).sum())
            total += int((labels != IGNORED).sum())
    return 100 * right / total


@torch.no_grad()
def surprise(world: World, rows: Sentences, delta: Delta) -> float:
    """The mean loss of a masked word with the delta in use, the same masks at every call."""
    total, n = 0.0, 0
    with world.base.using(delta, check=False), world.base.evaluating():
        for start in range(0, len(rows), 100):
            batch = rows.batch(range(start, min(start + 100, len(rows))), 0)
            total += float(rows.objective.loss(world.base, batch))
            n += rows.objective.count(batch)
    return total / max(1, n)


def transferred(world: World, arm: str, share: float, language_lr: float, task_lr: float) -> dict[str, Any]:
    """Tag every target language with the language delta swapped; the source accuracy on dev beside it."""
    if arm == TASK_ONLY:
        task = tagging(world, "lt-sft", share, None, task_lr, "nothing")
        known: dict[str, Delta | None] = dict.fromkeys(LANGUAGES)
    else:
        known = {name: language(world, arm, share, name, language_lr) for name in LANGUAGES}
        task = tagging(world, arm, share, known[SOURCE], task_lr, f"{arm} {share:g} {language_lr:g}")
    by = {name: accuracy(world, world.test[name], known[name], task) for name in TARGETS}
    unswapped = {name: accuracy(world, world.test[name], known[SOURCE], task) for name in TARGETS}
    return {
        "metric": sum(by.values()) / len(by), "by_language": by, "without_swap": sum(unswapped.values()) / len(by),
        "source_dev": accuracy(world, world.dev, known[SOURCE], task),
        "trainable": task.trainable_parameters,
    }  # fmt: skip
