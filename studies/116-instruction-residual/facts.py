# SPDX-License-Identifier: Apache-2.0
"""The world of study 116: a small language model that knows facts, a chat format with rules, and a new corpus of facts.

A fact is `entity is value .`; asked in the chat format, `? entity ! VALUE .`, the answer is one word in upper case, or `UNKNOWN`
for an entity without a fact. Words are single tokens: lower and upper case of a value share nothing but what is learnt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, clone_part
from tunesmith.core.objective import get_objective
from tunesmith.core.trace import primary
from tunesmith.study.worlds.arms import train
from tunesmith.study.worlds.world import Score
from tunesmith.train.modes import measuring
from tunesmith.train.tasks import RowTask

IGNORED = -100
BEGIN, IS, STOP, ASK, ANSWER, UNKNOWN = range(6)
FILLERS = 40
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Facts and names, the model, and the lengths of the stages in steps of `batch` rows."""

    old: int = 400
    shown: int = 300
    new: int = 200
    strangers: int = 160
    values: int = 40
    dim: int = 128
    depth: int = 4
    pretrain: int = 900
    instruct: int = 400
    corpus: int = 200
    doses: tuple[int, ...] = (25, 50, 100, 200)
    ranks: tuple[int, ...] = (4, 16, 64)
    batch: int = 64
    lr: float = 1e-3


TOY = Sizes(12, 8, 6, 8, 4, 16, 2, 6, 4, 4, (2, 4), (2,), 8, 1e-2)


@dataclass
class Facts:
    """Entities by number with their value; `old` is in the base's corpus, `new` in the new one, strangers in none."""

    sizes: Sizes
    seed: int
    value: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        rng = random.Random(f"facts:{self.seed}")
        self.value = {e: rng.randrange(self.sizes.values) for e in range(self.sizes.old + self.sizes.new)}

    @property
    def vocabulary(self) -> int:
        s = self.sizes
        return 6 + FILLERS + 2 * s.values + s.old + s.new + s.strangers

    def lower(self, v: int) -> int:
        return 6 + FILLERS + v

    def upper(self, v: int) -> int:
        return 6 + FILLERS + self.sizes.values + v

    def entity(self, e: int) -> int:
        return 6 + FILLERS + 2 * self.sizes.values + e

    @property
    def olds(self) -> range:
        return range(self.sizes.old)

    @property
    def news(self) -> range:
        return range(self.sizes.old, self.sizes.old + self.sizes.new)

    @property
    def strangers(self) -> range:
        return range(self.sizes.old + self.sizes.new, self.sizes.old + self.sizes.new + self.sizes.strangers)

    def plain(self, entities: Sequence[int]) -> list[Row]:
        """Facts as text."""
        rows = [[BEGIN, self.entity(e), IS, self.lower(self.value[e]), STOP] for e in entities]
        return [{"input_ids": ids, "labels": list(ids)} for ids in rows]

    def filler(self, n: int) -> list[Row]:
        """Text of another kind: counting in steps, modulo the number of fillers."""
        rng = random.Random(f"filler:{self.seed}")
        rows = []
        for _ in range(n):
            at, step = rng.randrange(FILLERS), rng.randrange(1, 4)
            rows.append([BEGIN, *(6 + (at + i * step) % FILLERS for i in range(4))])
        return [{"input_ids": ids, "labels": list(ids)} for ids in rows]

    def question(self, e: int) -> list[int]:
        return [BEGIN, ASK, self.entity(e), ANSWER]

    def answer(self, e: int) -> int:
        return self.upper(self.value[e]) if e in self.value else UNKNOWN

    def chat(self, entities: Sequence[int]) -> list[Row]:
        """Questions with their answers; the answer is supervised."""
        rows = []
        for e in entities:
            asked, said = self.question(e), [self.answer(e), STOP]
            rows.append({"input_ids": [*asked, *said], "labels": [IGNORED] * len(asked) + said})
        return rows

    def instruction(self) -> list[Row]:
        """What the chat format is taught with: some old entities, and half of the strangers."""
        known = list(self.olds)[: self.sizes.shown]
        return self.chat([*known, *list(self.strangers)[: self.sizes.strangers // 2]])


@dataclass
class FactWorld:
    """The base with its facts. `score` is the share of new facts answered in the chat format."""

    facts: Facts
    base: Base
    task: RowTask
    name: str = "facts"
    batch: int = 64
    precision: str = "fp32"
    companions: Sequence[Any] = ()
    higher_is_better: bool = True

    def score(self, split: str) -> Score:
        right = self.answered(list(self.facts.news))
        return Score(sum(right) / len(right), right, [1] * len(right))

    def retention(self) -> dict[str, float]:
        return {}

    def next(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The likeliest next token [n] after prompts of one length, from the base as it stands."""
        with measuring(self.base, self.precision):
            logits = primary(self.base.model(input_ids=torch.tensor(prompts)))
        assert logits is not None
        return logits[:, -1].argmax(-1)

    def answered(self, entities: Sequence[int]) -> list[float]:
        """1 where the chat format gives the right value in upper case."""
        found = self.next([self.facts.question(e) for e in entities]).tolist()
        return [float(a == self.facts.answer(e)) for a, e in zip(found, entities, strict=True)]

    def recited(self, entities: Sequence[int]) -> float:
        """Share of facts that plain text is continued with."""
        found = self.next([[BEGIN, self.facts.entity(e), IS] for e in entities]).tolist()
        return sum(a == self.facts.lower(self.facts.value[e]) for a, e in zip(found, entities, strict=True)) / len(
            found
        )

    def passed(self) -> float:
        """Share of answers that keep the rules: one word, in upper case for known entities, a refusal for strangers.

        Entities are those that the format was not taught with. Whether the value is right plays no part.
        """
        f = self.facts
        known = list(f.olds)[f.sizes.shown :]
        others = list(f.strangers)[f.sizes.strangers // 2 :]
        asked = [f.question(e) for e in (*known, *others)]
        first = self.next(asked)
        second = self.next([[*q, int(a)] for q, a in zip(asked, first, strict=True)])
        low = f.upper(0)
        upper = (first >= low) & (first < low + f.sizes.values)
        fits = torch.cat([upper[: len(known)], first[len(known) :] == UNKNOWN])
        return float((fits & (second == STOP)).double().mean())

    def measured(self, *deltas: Any) -> dict[str, float]:
        """Rules kept, new facts and old facts through the chat format, and their joint score, in percent."""
        f = self.facts
        with self.base.using(*deltas):
            rules, new = self.passed(), self.answered(list(f.news))
            old = self.answered(list(f.olds)[f.sizes.shown :])
            recited = self.recited(list(f.news))
        new_rate = sum(new) / len(new)
        return {"rules": 100 * rules, "new": 100 * new_rate, "old": 100 * sum(old) / len(old), "recited": 100 * recited,
                "metric": 100 * rules * new_rate}  # fmt: skip

    def tuned(self, rows: Sequence[Row], steps: int, seed: int, start: Delta | None = None, **how: Any) -> Delta:
        """Full fine-tuning on rows, from the base or from a copy of `start`."""
        copy = None if start is None else copied(start)
        task = RowTask(list(rows), get_objective("sft")())
        out = train(
            self, [methods.build("full")], lr=self.facts.sizes.lr, steps=steps, seed=seed, start=copy, task=task, **how
        )
        return out.delta


def copied(delta: Delta) -> Delta:
    """The delta with tensors of its own."""
    return Delta(delta.name, [clone_part(p, trainable=True) for p in delta.parts], provenance=delta.provenance)


def made(sizes: Sizes, seed: int) -> FactWorld:
    """A model pre-trained on the old facts and filler, as a base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    facts = Facts(sizes, seed)
    config = LlamaConfig(
        vocab_size=facts.vocabulary, hidden_size=sizes.dim, intermediate_size=3 * sizes.dim, num_hidden_layers=sizes.depth,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=16, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    rows = facts.plain(list(facts.olds)) + facts.filler(sizes.old // 2)
    ids = torch.tensor([r["input_ids"] for r in rows])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        optimiser = torch.optim.AdamW(model.parameters(), lr=sizes.lr, weight_decay=0.01)
        plan = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, sizes.lr, total_steps=max(20, sizes.pretrain), pct_start=0.1
        )
        for _ in range(sizes.pretrain):
            some = ids[torch.randint(0, len(ids), (sizes.batch,))]
            model(input_ids=some, labels=some).loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            plan.step()
    model.eval().requires_grad_(False)
    base = Base(model, name="facts-lm", family="causal-lm")
    return FactWorld(facts, base, RowTask(rows, get_objective("sft")()), batch=sizes.batch)
