# SPDX-License-Identifier: Apache-2.0
"""What the base knows: questions it answers right, other questions to measure on, and CorDA on a sample of one's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.sample import Sample
from tunesmith.core.sites import Site
from tunesmith.deltas import CorDA
from tunesmith.models.open import load
from tunesmith.study.spec import Context
from tunesmith.study.worlds import language
from tunesmith.study.worlds.language import IGNORED, LanguageWorld, StateTask
from tunesmith.train.config import TrainConfig
from tunesmith.train.modes import measuring
from tunesmith.train.sample import sample_of

from .facts import EXAMPLES, facts

LINES = 5  # questions of one example to measure on


@dataclass(frozen=True)
class Probe:
    """`known`: questions the base answers right. `other`: the rest, several to a row, for measuring inputs on."""

    known: StateTask
    other: StateTask
    counts: dict[str, int]


def probe(ctx: Context, world: LanguageWorld, most: int, samples: int) -> Probe:
    """At most `most` questions the base answers right, token by token, and `samples` rows of those it does not."""
    blocks = len(world.base.model.layers)  # type: ignore[arg-type]
    if ctx.smoke:
        base, known, other = language.toy_base(), *_toy(most, samples)
        counts = {"facts": len(known) + samples * LINES, "known": len(known)}
    else:
        base = load(language.MODEL, dtype="fp32", device="cpu")
        asked = [_row(base, question, answer) for question, answer in facts()]
        right = answered(base, asked)
        known = _drawn([row for row, ok in zip(asked, right, strict=True) if ok], most)
        rest = [fact for fact, ok in zip(facts(), right, strict=True) if not ok]
        other = _lines(base, rest, samples)
        counts = {"facts": len(asked), "known": sum(right)}
    made = [
        StateTask(language.below(base, rows, blocks, precision=world.precision), [list(r["labels"]) for r in rows])
        for rows in (known, other)
    ]
    return Probe(made[0], made[1], counts)


def _row(base: Base, question: str, answer: str) -> dict[str, Any]:
    """Two worked examples, the question, and the answer as what is supervised."""
    encode = base.tokenizer
    before = encode(f"{EXAMPLES}Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
    after = encode(" " + answer, add_special_tokens=False)["input_ids"]
    return {"input_ids": [*before, *after], "labels": [IGNORED] * len(before) + after}


@torch.no_grad()
def answered(base: Base, rows: Sequence[dict[str, Any]], batch: int = 32) -> list[bool]:
    """Whether the likeliest next token is right at every token of the answer, so that greedy decoding gives it."""
    out: list[bool] = []
    with measuring(base, "fp32"):
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            width = max(len(r["input_ids"]) for r in some)
            ids = torch.tensor([r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in some])
            mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in some])
            likeliest = base.model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
            for k, r in enumerate(some):
                want = torch.tensor(r["labels"][1:])
                found = likeliest[k, : len(want)]
                out.append(bool(((found == want) | (want == IGNORED)).all()))
    return out


def _lines(base: Base, rest: Sequence[tuple[str, str]], samples: int) -> list[dict[str, Any]]:
    """Rows of several questions with their right answers; questions come again, in another order, as often as needed."""
    order: list[tuple[str, str]] = []
    rng = random.Random("other")
    while len(order) < samples * LINES:
        order += rng.sample(rest, len(rest))
    rows = []
    for i in range(samples):
        text = "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in order[i * LINES : (i + 1) * LINES])
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows


def _drawn(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    return rows if len(rows) <= most else random.Random("known").sample(rows, most)


def _toy(most: int, samples: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rng = random.Random("toy facts")

    def row(n: int) -> dict[str, Any]:
        ids = [rng.randrange(16, 64) for _ in range(n)]
        return {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}

    return [row(6) for _ in range(min(most, 8))], [row(12) for _ in range(samples)]


def measured_on(task: StateTask, batch: int = 4) -> type[CorDA]:
    """CorDA that measures inputs on these rows, whatever it trains on. What it found is computed once for all runs."""
    sample = sample_of(task, TrainConfig(batch_size=batch), batches=len(task))
    seen: dict[tuple[str, ...], dict[str, dict[str, Tensor]]] = {}
    starts: dict[tuple[str, str, int], dict[str, Tensor]] = {}

    class Measured(CorDA):
        def observe(self, base: Base, sites: list[Site], _: Sample) -> dict[str, dict[str, Tensor]]:
            key = tuple(s.path for s in sites)
            if key not in seen:
                seen[key] = super().observe(base, sites, sample)
            return seen[key]

        def calibrate(
            self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor], found: dict[str, Any]
        ) -> dict[str, Tensor]:
            key = (site.path, self.mode, self.rank)
            if key not in starts:
                starts[key] = super().calibrate(site, t, params, found)
            return {name: value.clone() for name, value in starts[key].items()}

    return Measured
