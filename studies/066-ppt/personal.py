# SPDX-License-Identifier: Apache-2.0
"""Learning concepts by the arms of study 066, and what is measured on the result."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.sample import Sample
from tunesmith.core.sites import Site
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.sample import sample_of, started

from . import diffusion, music
from .diffusion import Denoising, DenoisingTask
from .music import CONCEPTS, DENSE, IDENTIFIERS, KEYS, SPARSE, Listener, Patches

TOKEN_LR, MASK_LR = 1e-2, 1e-3
TRIAL = 0.25  # of the steps after the trial, so a fifth of all
GROUP = len(IDENTIFIERS) // len(CONCEPTS)


@dataclass
class World:
    """The pre-trained base, test chorales, the classifier, and the median of onsets that parts dense from sparse."""

    base: Base
    prior: Patches
    prior_loss: float
    listener: Listener
    median: float
    sizes: Any


def build(folder: Path | None, sizes: Any) -> World:
    """Pre-train the base and the classifier on training chorales (toy ones in a smoke run)."""
    train = music.toy_chorales(12) if folder is None else music.chorales(folder / "train.jsonl.gz")
    test = music.toy_chorales(sizes.prior) if folder is None else music.chorales(folder / "test.jsonl.gz")
    median = float(music.onsets(train).float().median())
    base = diffusion.pretrained(
        music.described(train, median), sizes.pretrain, sizes.pretrain_batch, 0, sizes.narrow, sizes.wide
    )
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: sizes.prior]
    prior = music.described(test[some], median)
    loss = diffusion.denoising_loss(base, prior, sizes.draws, seed=1)
    return World(base, prior, loss, music.listener(train, sizes.listener, seed=0), median, sizes)


def references(world: World, name: str, seed: int) -> tuple[Patches, Patches]:
    """The reference patches of a concept and held-out ones, with plain prompts."""
    rng = np.random.default_rng([seed, CONCEPTS.index(name)])
    n = world.sizes.references
    patches = music.described(music.concept(name, n + world.sizes.held_out, rng), world.median)
    return patches[:n], patches[n:]


def identifiers(name: str, m: int) -> list[int]:
    """The m identifier tokens of a concept."""
    at = GROUP * CONCEPTS.index(name)
    return list(IDENTIFIERS[at : at + m])


def called(patches: Patches, tokens: list[int]) -> Patches:
    """The patches with identifiers at the end of their prompts."""
    more = torch.tensor(tokens).expand(len(patches), -1)
    return Patches(patches.rolls, torch.cat([patches.prompts, more], 1))


def methods_of(arm: str, share: float, lr: float, tokens: list[int]) -> list[Any]:
    """The methods of an arm that learns one concept; every arm trains the rows of the identifiers."""
    rows = ts.TrainableTokens(tokens=tokens, lr_ratio=TOKEN_LR / lr)
    attention = "attention"
    if arm.startswith("ppt"):
        return [ts.PivotalTuning(density=share, trial=TRIAL, lr_ratio=MASK_LR / lr, targets=attention), rows]
    made: dict[str, list[Any]] = {
        "full": [ts.Full(targets="everything,!embeddings"), rows],
        "attention-only": [ts.Full(targets=attention), rows],
        "token-only": [ts.TrainableTokens(tokens=tokens)],
        "lora": [ts.LoRA(rank=3, alpha=6.0, targets=attention), rows],  # as many numbers as 10 % of the entries
        "random 10 %": [ts.LTSFT(density=share, select="random", bias=False, targets=attention), rows],
    }
    return made[arm]


def learnt(world: World, arm: str, share: float, name: str, seed: int, lr: float) -> dict[str, float]:
    """Train an arm on the references of one concept; its measures."""
    tokens = identifiers(name, 1)
    refs, held = references(world, name, seed)
    task = DenoisingTask(called(refs, tokens), seed, Denoising())
    steps = round(world.sizes.steps / (1 + TRIAL)) if arm.startswith("ppt") else world.sizes.steps
    delta = trained(world, methods_of(arm, share, lr, tokens), task, steps, lr, seed)
    with world.base.using(delta):
        found = measured(world, refs, tokens, CONCEPTS.index(name), seed)
        found["held_out"] = diffusion.denoising_loss(world.base, called(held, tokens), 4 * world.sizes.draws, seed=2)
    return {**found, "trainable": float(delta.trainable_parameters)}


def trained(world: World, methods: list[Any], task: DenoisingTask, steps: int, lr: float, seed: int) -> Delta:
    """One run of `steps` (a trial comes on top of them)."""
    config = TrainConfig(
        steps=steps, batch_size=world.sizes.batch, lr=lr, schedule="constant", warmup=0.05, precision="fp32", seed=seed
    )  # fmt: skip
    delta = started(world.base, methods, task, config, "concept", "both")
    fit(world.base, delta, task, config, progress=False)
    return delta


def measured(world: World, refs: Patches, tokens: list[int], concept: int, seed: int) -> dict[str, float]:
    """Fidelity, distance to the nearest reference, diversity, obedience and prior loss of what is in use."""
    prompts = asked(world.sizes.samples, tokens, seed)
    rolls = diffusion.sampled(world.base, prompts, world.sizes.levels, seed)
    score = music.heard(world.listener, rolls)[:, concept]
    apart = differing(rolls, refs.rolls)
    among = differing(rolls, rolls)
    n = len(rolls)
    dense = torch.where(music.onsets(rolls) > world.median, DENSE, SPARSE)
    return {
        "fidelity": float(score.mean()),
        "distance": float(apart.min(1).values.mean()),
        "diversity": float(among.sum() / (n * (n - 1))),
        "obeyed": float((dense == prompts[:, 1]).float().mean()),
        "prior": diffusion.denoising_loss(world.base, world.prior, world.sizes.draws, seed=1) - world.prior_loss,
    }


def asked(n: int, tokens: list[int], seed: int) -> Tensor:
    """Prompts [n, 2 + m]: any key, dense and sparse in turn, the identifiers."""
    g = torch.Generator().manual_seed(seed + 77)
    keys = torch.randint(KEYS, (n,), generator=g)
    density = torch.where(torch.arange(n) % 2 == 0, DENSE, SPARSE)
    return torch.cat([torch.stack([keys, density], 1), torch.tensor(tokens).expand(n, -1)], 1)


def differing(a: Tensor, b: Tensor) -> Tensor:
    """The share of cells in which rolls differ, [len(a), len(b)]."""
    x, y = a.flatten(1), b.flatten(1)
    return (1 - x @ y.T / x.shape[1]) / 2


class Joint:
    """Pivotal tuning of several concepts at once: a trial on each, and the union of what they find."""

    @staticmethod
    def of(tasks: list[DenoisingTask], config: TrainConfig, **options: Any) -> Any:
        class Union(ts.PivotalTuning):
            def observe(self, base: Base, sites: list[Site], sample: Sample) -> dict[str, Tensor]:
                found: dict[str, Tensor] = {}
                for task in tasks:
                    alone = dataclasses.replace(sample_of(task, config), companions=sample.companions, seed=sample.seed)
                    for path, places in super().observe(base, sites, alone).items():
                        found[path] = torch.cat([found.get(path, places), places]).unique()
                return found

        return Union(**options)


def together(world: World, m: int, share: float, seed: int, lr: float) -> dict[str, float]:
    """Both concepts learnt jointly with m identifiers each; how many samples of the joint prompt hold both."""
    tokens = {name: identifiers(name, m) for name in CONCEPTS}
    tasks = [DenoisingTask(called(references(world, n, seed)[0], t), seed, Denoising()) for n, t in tokens.items()]
    both = Patches(*(torch.cat([getattr(t.patches, f) for t in tasks]) for f in ("rolls", "prompts")))
    steps = round(world.sizes.steps / (1 + TRIAL))
    config = TrainConfig(steps=steps, batch_size=world.sizes.batch, lr=lr, schedule="constant", warmup=0.05,
                         precision="fp32", seed=seed)  # fmt: skip
    method = Joint.of(tasks, config, density=share, trial=TRIAL, lr_ratio=MASK_LR / lr, targets="attention")
    rows = ts.TrainableTokens(tokens=sorted(t for mine in tokens.values() for t in mine), lr_ratio=TOKEN_LR / lr)
    delta = trained(world, [method, rows], DenoisingTask(both, seed, Denoising()), steps, lr, seed)
    out = {"trainable": float(delta.trainable_parameters)}
    with world.base.using(delta):
        for at, (name, mine) in enumerate(tokens.items()):
            rolls = diffusion.sampled(world.base, asked(world.sizes.samples, mine, seed), world.sizes.levels, seed)
            out[f"fidelity of {name}"] = float(music.heard(world.listener, rolls)[:, at].mean())
        prompts = asked(world.sizes.samples, [t for mine in tokens.values() for t in mine], seed)
        scores = music.heard(world.listener, diffusion.sampled(world.base, prompts, world.sizes.levels, seed))
    out["both"] = float((scores > 0.5).all(1).float().mean())
    return out
