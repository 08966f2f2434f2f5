# SPDX-License-Identifier: Apache-2.0
"""Label-word prompts for SmolLM2 with and without demonstrations, and one pass of SGD on the same demonstrations.

A prompt ends before the label word; an answer is the label word with the highest logit there. Demonstrations are run once
and their keys and values stand before every query. Queries of one length are one batch, so that nothing is padded and the
last position is the query's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.inspect.readout import block_states
from tunesmith.study.fair import assert_disjoint
from tunesmith.study.spec import Context

MODEL = "smollm2-135m-instruct"
TEMPLATES = {"sst2": ("Review: ", "\nSentiment:"), "ag_news": ("Article: ", "\nCategory:")}
WORDS = {
    "sst2": (" negative", " positive"),
    "ag_news": (" Politics", " Sports", " Business", " Technology"),
}
Row = tuple[list[int], int]
Prefix = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Queries:
    """Rows in batches of one length: token numbers [B, T] and labels, and the place of every row in the list given."""

    batches: list[Tensor]
    y: Tensor

    @staticmethod
    def of(rows: Sequence[Row], most: int = 32) -> Queries:
        by_length: dict[int, list[int]] = {}
        for i, (ids, _) in enumerate(rows):
            by_length.setdefault(len(ids), []).append(i)
        parts = [v[k : k + most] for _, v in sorted(by_length.items()) for k in range(0, len(v), most)]
        y = torch.tensor([rows[i][1] for part in parts for i in part])
        return Queries([torch.tensor([rows[i][0] for i in part]) for part in parts], y)


@dataclass(frozen=True)
class Seen:
    """What a model gave for queries: states [n, d] of every attention module at the last position, and what was right."""

    states: dict[str, Tensor]
    right: list[bool]

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


@dataclass
class Prompted:
    """One task: `pool` has the rows that demonstrations are drawn from, `words` the numbers of the label words."""

    name: str
    base: Base
    pool: list[Row]
    val: Queries
    test: Queries
    words: list[int]
    gap: list[int]

    def drawn(self, k: int, seed: int) -> list[Row]:
        """k demonstrations, as many of each class, in random order."""
        rng = random.Random(f"124:{self.name}:{seed}")
        classes = len(self.words)
        rows = [r for c in range(classes) for r in rng.sample([r for r in self.pool if r[1] == c], k // classes)]
        return rng.sample(rows, len(rows))

    def shuffled(self, rows: Sequence[Row], seed: int) -> list[Row]:
        """The same texts with the labels in another order: at least one is wrong, each is as frequent as before."""
        rng, y = random.Random(f"124:shuffled:{seed}"), [label for _, label in rows]
        other = rng.sample(y, len(y))
        while other == y and len(set(y)) > 1:
            other = rng.sample(y, len(y))
        return [(ids, label) for (ids, _), label in zip(rows, other, strict=True)]

    @torch.no_grad()
    def prefix(self, rows: Sequence[Row]) -> Prefix:
        """Keys and values of demonstrations that follow one another, layer by layer."""
        ids = [t for some, y in rows for t in (*some, self.words[y], *self.gap)]
        with self.base.evaluating():
            cache = self.base.model.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values  # type: ignore[operator, union-attr]
        return [(layer.keys, layer.values) for layer in cache.layers]

    def last(self, ids: Tensor, prefix: Prefix | None = None) -> Tensor:
        """The state [B, d] that the head reads at the last position of queries [B, T]."""
        cache = None
        if prefix is not None:
            from transformers import DynamicCache

            cache = DynamicCache()
            for i, (k, v) in enumerate(prefix):
                cache.update(k.expand(len(ids), -1, -1, -1), v.expand(len(ids), -1, -1, -1), i)
        body: Any = self.base.model.model
        return body(input_ids=ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state[:, -1]

    def seen(self, queries: Queries, delta: Delta | None = None, prefix: Prefix | None = None) -> Seen:
        """What the model gives for queries, under a delta or after demonstrations."""
        W = self.base.model.lm_head.weight[self.words]  # type: ignore[union-attr, index]
        said: list[Tensor] = []

        def run(base: Base, ids: Tensor) -> None:
            said.append(self.last(ids, prefix) @ W.T)

        with self.base.using(delta):
            states = block_states(self.base, queries.batches, run, each="attentions")
        return Seen(states, (torch.cat(said).argmax(-1) == queries.y).tolist())

    def tuned(self, rows: Sequence[Row], lr: float, seed: int) -> Delta:
        """Keys and values trained on the demonstrations: each once, in the order of the prompt, by SGD on the next token."""
        delta = Delta.create(self.base, methods.build("full", {"targets": "k,v", "bias": False}), seed=seed)
        moving = [t for part in delta.parts for _, _, t in part.items()]
        with self.base.frozen(), self.base.evaluating(), self.base.using(delta, check=False):
            for ids, y in rows:
                logits = self.base.model.lm_head(self.last(torch.tensor([ids])))  # type: ignore[operator]
                loss = F.cross_entropy(logits, torch.tensor([self.words[y]]))
                for t, g in zip(moving, torch.autograd.grad(loss, moving), strict=True):
                    t.data.sub_(lr * g)
        return delta


def prompted(ctx: Context, base: Base | None, name: str, val: int, test: int, length: int) -> Prompted:
    """A task with demonstrations and validation rows of its training file and test rows of its test file.

    Texts are cut to `length` tokens. In a smoke run a small random Llama tells small tokens from large ones.
    """
    if ctx.smoke:
        from tunesmith.study.worlds.language import toy_base

        rng = random.Random(f"124:toy:{name}")
        rows = [([rng.randrange(8, 64) for _ in range(rng.randint(3, 5))], i % len(WORDS[name])) for i in range(60)]
        words = list(range(2, 2 + len(WORDS[name])))
        return Prompted(name, base or toy_base(), rows[:32], Queries.of(rows[32 : 32 + val]),
                        Queries.of(rows[32 + val : 32 + val + test]), words, [1])  # fmt: skip
    from tunesmith.data import read

    assert base is not None
    folder = ctx.data_folder(name)
    before, after = TEMPLATES[name]

    def ids(text: str) -> list[int]:
        return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])

    def row(r: dict[str, Any]) -> Row:
        return [*ids(before.strip()), *ids(f" {r['text'].strip()}")[:length], *ids(after)], int(r["label"])

    def file(split: str) -> list[dict[str, Any]]:
        """Rows of six words or more, a text that the file repeats once."""
        path = next(p for e in ("jsonl", "jsonl.gz") if (p := folder / f"{split}.{e}").is_file())  # type: ignore[operator]
        rows = {r["text"].strip(): r for r in read(str(path)).rows if len(r["text"].split()) >= 6}
        return list(rows.values())

    final = random.Random(f"124:test:{name}").sample(file("test"), test)
    known = {r["text"].strip() for r in final}
    learn = [r for r in file("train") if r["text"].strip() not in known]
    learn = random.Random(f"124:train:{name}").sample(learn, 400 + val)
    parts = {"pool": learn[:400], "val": learn[400:], "test": final}
    assert_disjoint(**{k: [r["text"].strip() for r in rows] for k, rows in parts.items()})
    held = [Queries.of([row(r) for r in rows]) for rows in (learn[400:], final)]
    words = [ids(w)[0] for w in WORDS[name]]
    return Prompted(name, base, [row(r) for r in learn[:400]], *held, words, ids("\n\n"))
