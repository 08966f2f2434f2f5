# SPDX-License-Identifier: Apache-2.0
"""A small Llama that knows strings of a skewed prior and two exact tasks on made-up words, and the items to test it on.

Tokens: 26 letters, a start, two task marks, a gap between words and an equals sign. A string is four letters. `acronym` asks
for the first letters of four words, `third` for the third word. In pre-training the answers of acronyms are mostly common
strings, and now and then a word is misspelt in its first letter, so a model that leans on what is likely is mostly right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.sample import Sample

START, ACRONYM, THIRD, GAP, EQUALS = range(26, 31)
VOCAB, LETTERS, WORD = 31, 26, 4
MISSPELT = 0.25  # of the words of an acronym in pre-training
Row = tuple[list[int], int]  # tokens and where the answer starts


@dataclass(frozen=True)
class Strings:
    """The common strings with their weights, and a way to draw."""

    common: list[tuple[int, ...]]
    weights: list[float]

    def likely(self, rng: random.Random) -> tuple[int, ...]:
        return rng.choices(self.common, self.weights)[0]


def strings(n: int, seed: int) -> Strings:
    """`n` different strings with weights 1 / rank."""
    rng = random.Random(f"075:strings:{seed}")
    found: dict[tuple[int, ...], None] = {}
    while len(found) < n:
        found[any_string(rng)] = None
    return Strings(list(found), [1 / (i + 1) for i in range(n)])


def any_string(rng: random.Random) -> tuple[int, ...]:
    """Four letters, all alike likely."""
    return tuple(rng.randrange(LETTERS) for _ in range(WORD))


def acronym(answer: Sequence[int], rng: random.Random, misspelt: float = 0.0) -> Row:
    """Words of two letters that begin with the letters of the answer; `misspelt`: the chance of any letter in its place."""
    ids = [START, ACRONYM]
    for letter in answer:
        shown = rng.randrange(LETTERS) if misspelt and rng.random() < misspelt else letter
        ids += [shown, rng.randrange(LETTERS), GAP]
    return [*ids, EQUALS, *answer], len(ids) + 1


def third(answer: Sequence[int], rng: random.Random) -> Row:
    """Four words of which the third is the answer's first two letters; only they are asked for."""
    words = [[rng.randrange(LETTERS), rng.randrange(LETTERS)] for _ in range(4)]
    words[2] = list(answer[:2])
    ids = [START, THIRD]
    for w in words:
        ids += [*w, GAP]
    return [*ids, EQUALS, *answer[:2]], len(ids) + 1


def matched(answer: Sequence[int], rng: random.Random) -> tuple[int, ...]:
    """The answer's letters in another order: an item as hard, with another prior."""
    other = list(answer)
    while other == list(answer) and len(set(answer)) > 1:
        rng.shuffle(other)
    return tuple(other)


def pretraining_row(s: Strings, rng: random.Random, likely: float) -> list[int]:
    """A bare common string, an acronym or a third word; `likely` of the acronyms have a common answer."""
    kind = rng.random()
    if kind < 0.4:
        return [START, EQUALS, *s.likely(rng)]
    if kind < 0.8:
        return acronym(s.likely(rng) if rng.random() < likely else any_string(rng), rng, MISSPELT)[0]
    return third(any_string(rng), rng)[0]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] padded with 0 and a mask of the real ones."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, r in enumerate(rows):
        ids[i, : len(r)], mask[i, : len(r)] = torch.tensor(r), True
    return ids, mask


def pretrained(seed: int, s: Strings, *, layers: int, width: int, steps: int, batch: int, likely: float) -> Base:
    """A Llama trained from nothing on the mixture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=START, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    rng = random.Random(f"075:pretraining:{seed}")
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / steps)
        ids, mask = padded([pretraining_row(s, rng, likely) for _ in range(batch)])
        answer = ((ids == EQUALS).cumsum(1)[:, :-1] > 0) & mask[:, 1:]  # the made-up words cannot be foreseen
        loss = F.cross_entropy(model(input_ids=ids).logits[:, :-1][answer], ids[:, 1:][answer])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    for p in model.parameters():
        p.requires_grad_(False)
    return Base(model.eval(), example={"input_ids": torch.arange(12)[None]}, name="strings", family="causal-lm")


def items(s: Strings, n: int, seed: str, taken: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """`n` answers nobody has had: half common strings, half the same letters in another order that is not common."""
    rng, common = random.Random(f"075:{seed}"), set(s.common)
    out: list[tuple[int, ...]] = []
    pool = [c for c in s.common if c not in taken]
    rng.shuffle(pool)
    for c in pool:
        other = matched(c, rng)
        if len(out) >= n:
            break
        if other not in common and other not in taken and len(set(c)) > 1:
            out += [c, other]
            taken |= {c, other}
    return out[:n]


def sample_of(rows: Sequence[Row]) -> Sample:
    """Rows as a probe reads them: the answer supervised."""
    ids, mask = padded([r for r, _ in rows])
    answer = mask & (torch.arange(ids.shape[1])[None] >= torch.tensor([a for _, a in rows])[:, None])

    def keep(batch: Any, supervised: bool = False) -> Tensor:
        return batch["answer"] if supervised else batch["mask"]

    batch = {"input_ids": ids, "mask": mask, "answer": answer}
    return Sample(lambda: [batch], lambda b, x: b.model(input_ids=x["input_ids"]), lambda b, x: torch.zeros(()), keep)
