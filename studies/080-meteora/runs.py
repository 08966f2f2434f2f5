# SPDX-License-Identifier: Apache-2.0
"""The base, the deltas, the routers and their scores: study 080."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.features import features
from tunesmith.core.gates import watched
from tunesmith.core.objective import get_objective
from tunesmith.study.worlds.language import StateTask, TopModel, below, toy_base
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.modes import measuring
from tunesmith.train.router import Nearest

from .tasks import IGNORED, TASKS, Encoded, composites, encoded, splits

PRECISION = "auto"


@dataclass
class Set:
    """Rows of one split as states below the adapted blocks, with what is needed to score and route them."""

    rows: list[Encoded]
    states: list[Tensor]

    def task(self, rows: Sequence[int] | None = None, objective: Any = None) -> GatedTask:
        """Some of the rows (default: all) as a training task; a row may occur several times."""
        some = range(len(self.rows)) if rows is None else rows
        return GatedTask(
            [self.states[i] for i in some], [self.rows[i].labels for i in some], objective or get_objective("sft")(),
            [self.rows[i].expert for i in some],
        )  # fmt: skip

    def of(self, task: int) -> list[int]:
        """The rows that begin with a task."""
        return [i for i, r in enumerate(self.rows) if r.expert[0] == task]

    def mixture(self) -> list[int]:
        """As many rows of every task, those of short ones repeated."""
        each = [self.of(t) for t in range(len(TASKS))]
        most = max(map(len, each))
        return [i for rows in each for i in itertools.islice(itertools.cycle(rows), most)]


@dataclass
class GatedTask(StateTask):
    """States and labels, and with the objective `routed` the task number of every token."""

    experts: list[list[int]] = field(default_factory=list)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        made = super().batch(indices, epoch)
        if hasattr(self.objective, "c"):
            made["experts"] = torch.full_like(made["labels"], IGNORED)
            for k, i in enumerate(indices):
                made["experts"][k, : len(self.experts[i])] = torch.tensor(self.experts[i])
        return made


@dataclass
class World:
    """The upper blocks of the base, and for one set of adapters train, dev and test rows and composites."""

    base: Base
    precision: str
    sets: dict[str, Set]
    nearest: Nearest


@dataclass(frozen=True)
class Opened:
    """The whole base, its upper blocks, the encoder that routes whole texts, and text to tokens."""

    whole: Base
    top: Base
    encoder: Base
    code: Callable[[str], list[int]]
    blocks: int
    precision: str


def opened(smoke: bool, blocks: int) -> Opened:
    """SmolLM2 and MiniLM, or a random Llama for both in a smoke run."""
    if smoke:
        whole = toy_base()

        def code(text: str) -> list[int]:
            return [ord(c) % 62 + 2 for c in text]

        whole.tokenizer = lambda text: {"input_ids": code(text)}
        encoder = whole
    else:
        whole, encoder = ts.load("smollm2-135m-instruct", dtype="float32"), ts.load("minilm-l6")

        def code(text: str) -> list[int]:
            return list(whole.tokenizer(text, add_special_tokens=False)["input_ids"])

    first = torch.zeros(1, 8, whole.model.config.hidden_size)
    top = Base(TopModel(whole.model, blocks), example={"inputs_embeds": first}, name="top", family="causal-lm")
    top.model.eval()
    return Opened(whole, top, encoder, code, blocks, "fp32" if smoke else PRECISION)


def world(use: Opened, counts: dict[str, int], which: int) -> World:
    """Rows of adapter set `which`, run through the lower blocks once. Test rows are those of every set."""
    parts = {t: splits(t, which) for t in TASKS}
    by_split = {s: {t: parts[t][s][: counts[s]] for t in TASKS} for s in ("train", "dev", "test")}
    questions: dict[str, list[Any]] = {
        s: [[r] for rows in tasks.values() for r in rows] for s, tasks in by_split.items()
    }
    questions["composite dev"] = composites(by_split["dev"], counts["composite dev"], f"dev {which}")
    questions["composite test"] = composites(by_split["test"], counts["composite test"], "test")
    made = {}
    for name, some in questions.items():
        rows = [encoded(q, use.code) for q in some]
        states = below(use.whole, [{"input_ids": r.ids} for r in rows], use.blocks, precision=use.precision)
        made[name] = Set(rows, states)
    texts = {t: [r.prompt for r in by_split["train"][t]] for t in TASKS}
    return World(use.top, use.precision, made, Nearest.fit(use.encoder, texts))


def lora(rank: int) -> Any:
    return ts.LoRA(rank=rank, alpha=2.0 * rank)


def adapters(w: World, rank: int, steps: int, batch: int, lr: float, seed: int) -> list[Delta]:
    """One delta for each task, on its training rows alone."""
    made, train = [], w.sets["train"]
    for i, task in enumerate(TASKS):
        delta = Delta.create(w.base, lora(rank), name=task, seed=seed * 100 + i)
        learn(w, delta, train.task(train.of(i)), steps, batch, lr, seed)
        made.append(delta)
    return made


def learn(w: World, delta: Delta, task: Any, steps: int, batch: int, lr: float, seed: int) -> None:
    config = TrainConfig(steps=steps, batch_size=batch, lr=lr, warmup=0.1, precision=w.precision, seed=seed)
    fit(w.base, delta, task, config, progress=False)


def gates(w: World, deltas: Sequence[Delta], c: float, steps: int, batch: int, lr: float, seed: int) -> Delta:
    """Gates over the deltas, trained on the mixture of all tasks."""
    delta = ts.route(w.base, deltas, top_k=2, name="gated", seed=seed)
    train = w.sets["train"]
    learn(w, delta, train.task(train.mixture(), get_objective("routed")(c=c)), steps, batch, lr, seed)
    return delta


@torch.no_grad()
def right(w: World, split: str, used: Callable[[int], Delta | None], batch: int = 16) -> list[list[bool]]:
    """For each row and question, whether every token of its answer is the likeliest one given what stands before.

    That is greedy decoding where the answer is right; in composites earlier answers are the right ones. `used` gives each
    row its delta.
    """
    some = w.sets[split]
    task = some.task()
    groups: dict[int, tuple[Delta | None, list[int]]] = {}
    for i in range(len(task)):
        delta = used(i)
        groups.setdefault(id(delta), (delta, []))[1].append(i)
    out: list[list[bool]] = [[] for _ in range(len(task))]
    for delta, rows in groups.values():
        rows.sort(key=lambda i: len(task.labels[i]))
        with measuring(w.base, w.precision), w.base.using(delta):
            for start in range(0, len(rows), batch):
                few = rows[start : start + batch]
                given = task.batch(few, 0)
                labels = given.pop("labels")[:, 1:]
                keep = labels != IGNORED
                best = w.base.model.lm_head(features(w.base, given)[:, :-1][keep]).argmax(-1)
                hit = torch.ones_like(keep)
                hit[keep] = best == labels[keep]
                for k, i in enumerate(few):
                    asked = torch.tensor(some.rows[i].question[1:])
                    mine = hit[k, : len(asked)]
                    out[i] = [bool(mine[asked == q].all()) for q in range(int(asked.max()) + 1)]
    return out


@torch.no_grad()
def gate_accuracy(w: World, delta: Delta, split: str = "test") -> dict[str, float]:
    """How often the largest gate is the token's own task, by block, from the second token on."""
    task, hits = w.sets[split].task(), dict[str, list[float]]()
    with measuring(w.base, w.precision), w.base.using(delta):
        for i in range(len(task)):
            given = task.batch([i], 0)
            given.pop("labels")
            with watched() as seen:
                features(w.base, given)
            n, own = len(task.labels[i]), task.experts[i][0]
            for path, g in seen.items():
                hits.setdefault(path.split(".")[1], []).append(float((g[0, 1:n].argmax(-1) == own).float().mean()))
    return {block: sum(v) / len(v) for block, v in hits.items()}
