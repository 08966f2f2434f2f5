# SPDX-License-Identifier: Apache-2.0
"""One sweep of study 030: fine-tunings from one probed start, their soups and their ensemble, on clean and shifted tests."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.compose import soups
from tunesmith.compose.build import build
from tunesmith.compose.collect import DeltaChanges
from tunesmith.core import method as methods
from tunesmith.core.delta import Delta
from tunesmith.core.objective import get_objective
from tunesmith.study.spec import Context
from tunesmith.study.worlds.arms import train
from tunesmith.study.worlds.encoder import States, StatesTask, UpperWorld, below, upper
from tunesmith.study.worlds.probed import probed
from tunesmith.study.worlds.text import few_shot

SWAPPED = 0.15
ALPHA, H = 0.5, 0.1  # where the formula is evaluated, and the step of its second difference


@dataclass(frozen=True)
class Sizes:
    """Blocks that change, rows of each intent, rows to choose on and to report on, runs of a sweep, epochs, pairs."""

    blocks: int
    per_class: int
    dev: int
    test: int
    runs: int
    epochs: tuple[int, ...]
    pairs: int
    length: int = 48


def configs(sweep: int, runs: int, epochs: tuple[int, ...]) -> list[dict[str, Any]]:
    """The settings of the runs of one sweep, drawn by its number; no two sweeps share a seed."""
    rng = random.Random(f"sweep:{sweep}")
    return [
        {
            "lr": math.exp(rng.uniform(math.log(1e-5), math.log(3e-4))), "epochs": rng.choice(epochs),
            "weight_decay": rng.choice((0.0, 0.01, 0.1)), "smoothing": rng.choice((0.0, 0.1)), "seed": 100 * sweep + i,
        }
        for i in range(runs)
    ]  # fmt: skip


def swapped(text: str, share: float, rng: random.Random) -> str:
    """`text` with neighbouring characters exchanged: about `share` of the characters take part in an exchange."""
    out, i = list(text), 0
    while i + 1 < len(out):
        if rng.random() < share / 2:
            out[i], out[i + 1] = out[i + 1], out[i]
            i += 1
        i += 1
    return "".join(out)


def start(ctx: Context, sweep: int, sizes: Sizes) -> UpperWorld:
    """The probed world of a sweep, its held-out splits with `shift` beside "dev" and "test"."""
    text = few_shot(
        ctx, "banking77", sizes.per_class, sweep, dev=sizes.dev, test=sizes.test, general=0, length=sizes.length,
        precision="fp32",
    )  # fmt: skip
    world = upper(text, sizes.blocks)
    rng = random.Random("shift")
    if ctx.smoke:
        rows = [{**r, "input_ids": [r["input_ids"][0], *reversed(r["input_ids"][1:])]} for r in text.held["test"]]
    else:
        texts = [swapped(t, SWAPPED, rng) for t in text.texts["test"]]
        ids = text.base.tokenizer(texts, truncation=True, max_length=sizes.length)["input_ids"]
        rows = [{"input_ids": list(i), "labels": r["labels"]} for i, r in zip(ids, text.held["test"], strict=True)]
    world.held["shift"] = States(below(text.base, rows, sizes.blocks), [int(r["labels"]) for r in rows])
    return probed(world, len(text.labels))


def tuned(world: UpperWorld, config: dict[str, Any]) -> Delta:
    """One full fine-tuning of blocks and head from the probed start."""
    task = StatesTask(world.task.rows, get_objective("classification")(smoothing=config["smoothing"]))
    steps = config["epochs"] * math.ceil(len(task) / world.batch)
    out = train(
        world, [methods.build("full")], lr=config["lr"], steps=steps, seed=config["seed"], task=task,
        weight_decay=config["weight_decay"], name=f"run-{config['seed']}",
    )  # fmt: skip
    return out.delta


def logits(world: UpperWorld, delta: Delta, split: str) -> Tensor:
    with world.base.using(delta):
        return world.logits(world.held[split])


def labels(world: UpperWorld, split: str) -> Tensor:
    return torch.tensor(world.held[split].labels)


def accuracy(world: UpperWorld, found: Tensor, split: str) -> float:
    """Percent correct."""
    return 100 * float((found.argmax(-1) == labels(world, split)).double().mean())


def both(world: UpperWorld, delta: Delta) -> dict[str, float]:
    """Percent correct on the clean and on the shifted test rows."""
    return {s: accuracy(world, logits(world, delta, s), s) for s in ("test", "shift")}


def one_sweep(ctx: Context, sweep: int, sizes: Sizes) -> dict[str, Any]:
    """Every run of a sweep, then soups and the ensemble. Only dev rows choose; test rows are for reporting."""
    world = start(ctx, sweep, sizes)
    runs = configs(sweep, sizes.runs, sizes.epochs)
    deltas = [tuned(world, c) for c in runs]
    changes = DeltaChanges(world.base, deltas)

    def soup(which: list[int]) -> Delta:
        return build(world.base, soups.average(changes, which), name="soup", facts={"soup": which})

    def dev(delta: Delta) -> float:
        return accuracy(world, logits(world, delta, "dev"), "dev")

    singles = [dev(d) for d in deltas]
    greedy = soups.greedy(len(deltas), soup, dev, singles=singles)
    best = greedy.ingredients[0]
    rows = {"best single": both(world, deltas[best]), "uniform": both(world, soup(list(range(len(deltas))))),
            "greedy": both(world, soup(greedy.ingredients))}  # fmt: skip
    mixed = soups.learned(world.base, changes, lambda: _batches(world), _run, rows="tensor")
    rows["learned"] = both(world, build(world.base, soups.mixed(changes, mixed.weights), name="learned", facts={}))
    together = {s: torch.stack([logits(world, d, s) for d in deltas]) for s in ("test", "shift")}
    rows["ensemble"] = {s: accuracy(world, found.mean(0), s) for s, found in together.items()}
    return {
        "arms": {arm: {"metric": (r["test"] + r["shift"]) / 2, **r} for arm, r in rows.items()},
        "configs": runs, "dev": singles, "ingredients": greedy.ingredients, "dev of the soup": greedy.score,
        "every single": [{s: accuracy(world, together[s][i], s) for s in together} for i in range(len(deltas))],
        "learned": {"temperature": mixed.temperature, "losses": mixed.losses},
        "pairs": pairs(world, deltas, changes, sizes.pairs) if sizes.pairs else [],
    }  # fmt: skip


def _batches(world: UpperWorld) -> list[tuple[dict[str, Tensor], Tensor]]:
    rows = world.held["dev"]
    at = [list(range(i, min(i + 64, len(rows)))) for i in range(0, len(rows), 64)]
    return [(rows.some(i), torch.tensor([rows.labels[k] for k in i])) for i in at]


def _run(base: Any, batch: tuple[dict[str, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    return base.model(**batch[0])["logits"], batch[1]


def pairs(world: UpperWorld, deltas: list[Delta], changes: DeltaChanges, most: int) -> list[dict[str, float]]:
    """L(soup) - L(ensemble) of two models and what the formula says, on dev rows, for the first `most` pairs."""
    y = labels(world, "dev")
    alone = [logits(world, d, "dev") for d in deltas]

    def between(i: int, j: int, a: float) -> Tensor:
        row = [0.0] * len(deltas)
        row[i], row[j] = 1 - a, a
        made = build(world.base, soups.mixed(changes, {"": row}), name="pair", facts={})
        return logits(world, made, "dev")

    def loss(f: Tensor) -> float:
        return float(F.cross_entropy(f.double(), y))

    out = []
    for i, j in list(combinations(range(len(deltas)), 2))[:most]:
        middle = between(i, j, ALPHA)
        curvature = (loss(between(i, j, ALPHA + H)) - 2 * loss(middle) + loss(between(i, j, ALPHA - H))) / H**2
        said = soups.soup_minus_ensemble(ALPHA, curvature, middle.softmax(-1), alone[j] - alone[i])
        measured = loss(middle) - loss((1 - ALPHA) * alone[i] + ALPHA * alone[j])
        out.append({"pair": [i, j], "measured": measured, "formula": said})
    return out
