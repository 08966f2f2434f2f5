# SPDX-License-Identifier: Apache-2.0
"""Four made-up languages with one grammar, and a tiny BERT pre-trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import site_seed
from tunesmith.core.features import features
from tunesmith.core.objective import Objective, get_objective
from tunesmith.data import plan_epoch

LANGUAGES = ("A", "B", "C", "D")
PAD, MASK, FIRST = 0, 1, 2
IGNORED = -100


@dataclass(frozen=True)
class Size:
    """The grammar, the model and the amounts of data."""

    states: int = 12
    words: int = 20
    shared: int = 4
    shortest: int = 8
    longest: int = 20
    width: int = 32
    layers: int = 4
    heads: int = 4
    pretrain_steps: int = 1000
    pretrain_batch: int = 64
    pretrain_lr: float = 5e-3
    raw: int = 5000
    tagged: int = 2000
    dev: int = 300
    test: int = 500
    batch: int = 32

    @property
    def vocabulary(self) -> int:
        return FIRST + len(LANGUAGES) * self.states * self.words


SMOKE = Size(states=4, words=5, shortest=4, longest=7, width=16, layers=2, heads=2, pretrain_steps=6, pretrain_batch=8,
             raw=24, tagged=24, dev=8, test=8, batch=8)  # fmt: skip


@dataclass(frozen=True)
class Grammar:
    """A hidden Markov model: `start` [S], `step` [S, S], and how often each of a state's words comes, [words]."""

    start: np.ndarray[Any, Any]
    step: np.ndarray[Any, Any]
    words: np.ndarray[Any, Any]
    size: Size

    @classmethod
    def drawn(cls, size: Size, seed: int) -> Grammar:
        """Few likely successors for each state, so that neighbours tell much about a word's state; Zipfian words."""
        rng = np.random.default_rng([seed, 1])
        often = 1 / (np.arange(size.words) + 2.0)
        step = rng.dirichlet(np.full(size.states, 0.15), size.states)
        return cls(rng.dirichlet(np.ones(size.states)), step, often / often.sum(), size)

    def sentences(self, language: str, n: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Rows with `input_ids` and `states`. Language B says the two words of each adjacent pair the other way round.

        Every `shared`-th word of a state is that of language A in all languages.
        """
        s, at = self.size, LANGUAGES.index(language)
        states = np.empty((n, s.longest), dtype=np.int64)
        states[:, 0] = _draw(np.broadcast_to(self.start, (n, s.states)), rng)
        for i in range(1, s.longest):
            states[:, i] = _draw(self.step[states[:, i - 1]], rng)
        words = rng.choice(s.words, size=states.shape, p=self.words)
        lengths = rng.integers(s.shortest, s.longest + 1, size=n)
        if language == "B":
            swapped = np.arange(s.longest) ^ 1
            for length in np.unique(lengths):
                mine, pairs = lengths == length, length - length % 2
                states[np.ix_(mine, np.arange(pairs))] = states[np.ix_(mine, swapped[:pairs])]
        tongue = np.full(states.shape, at)
        if s.shared:
            tongue = np.where(words % s.shared == s.shared - 1, 0, tongue)
        ids = FIRST + (tongue * s.states + states) * s.words + words
        return [
            {"input_ids": ids[i, :k].tolist(), "states": states[i, :k].tolist()} for i, k in enumerate(lengths.tolist())
        ]


def _draw(p: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """One column of each row of the probabilities p [n, S]."""
    return (p.cumsum(1) > rng.random((len(p), 1)) * p.sum(1, keepdims=True)).argmax(1)


class Attention(nn.Module):
    """Self-attention over [B, T, d]; `mask` [B, T] is true at words."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = (f(x).view(B, T, self.heads, d // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.o(y.transpose(1, 2).reshape(B, T, d))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(d), Attention(d, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyBert(nn.Module):
    """Words [B, T] to logits [B, T, V] through a tied decoder."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        d = size.width
        self.embed, self.position = nn.Embedding(size.vocabulary, d), nn.Embedding(size.longest, d)
        self.blocks = nn.ModuleList([Block(d, size.heads) for _ in range(size.layers)])
        self.norm, self.decoder = nn.LayerNorm(d), nn.Linear(d, size.vocabulary)
        self.decoder.weight = self.embed.weight
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.normal_(m.weight, std=0.1 if isinstance(m, nn.Embedding) else d**-0.5)

        for block in self.blocks:
            for m in (block.attention.o, block.down):
                nn.init.normal_(m.weight, std=(2 * size.layers * m.in_features) ** -0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids) + self.position(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x, mask.bool())
        return {"logits": self.decoder(self.norm(x))}


class MaskedWords:
    """Summed cross entropy at the masked positions; the decoder is run on those alone."""

    unit = "masked words"

    def count(self, batch: Mapping[str, Any]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, base: Base, batch: Mapping[str, Any]) -> Tensor:
        kept = batch["labels"] != IGNORED
        h = features(base, {k: v for k, v in batch.items() if k != "labels"})[kept]
        return F.cross_entropy(base.model.decoder(h), batch["labels"][kept], reduction="sum")  # type: ignore[operator]


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


def masked(
    rows: Sequence[Mapping[str, Any]], vocabulary: int, g: torch.Generator, share: float = 0.15
) -> dict[str, Tensor]:
    """A batch for masked-word prediction: `share` of the words, of which 80 % hidden, 10 % replaced, 10 % left."""
    ids = padded([r["input_ids"] for r in rows], PAD)
    words = ids != PAD
    chosen = (torch.rand(ids.shape, generator=g) < share) & words
    chosen[:, 0] |= ~chosen.any(1)  # one at least in every sentence
    how = torch.rand(ids.shape, generator=g)
    other = torch.randint(FIRST, vocabulary, ids.shape, generator=g)
    shown = torch.where(chosen & (how < 0.8), MASK, torch.where(chosen & (how > 0.9), other, ids))
    return {"input_ids": shown, "attention_mask": words.long(), "labels": torch.where(chosen, ids, IGNORED)}


@dataclass
class Sentences:
    """Sentences as a training task: raw ones with words masked anew in every epoch, or tagged ones."""

    rows: list[dict[str, Any]]
    vocabulary: int
    tagged: bool = False
    seed: int = 0
    objective: Objective = field(init=False)

    def __post_init__(self) -> None:
        self.objective = get_objective("tagging")() if self.tagged else MaskedWords()

    def __len__(self) -> int:
        return len(self.rows)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch([len(r["input_ids"]) for r in self.rows], batch_size, seed=seed, epoch=epoch)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        rows = [self.rows[i] for i in indices]
        if self.tagged:
            ids = padded([r["input_ids"] for r in rows], PAD)
            labels = padded([r["states"] for r in rows], IGNORED)
            return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}
        g = torch.Generator().manual_seed(site_seed(self.seed, f"{epoch}:{list(indices)}"))
        return masked(rows, self.vocabulary, g)

    def tokens(self, indices: Sequence[int]) -> int:
        return sum(len(self.rows[i]["input_ids"]) for i in indices)


def pretrained(grammar: Grammar, seed: int) -> Base:
    """A tiny BERT after masked-word training on 70 % A and 10 % each of B, C and D, frozen, in eval mode."""
    size = grammar.size
    rng = np.random.default_rng([seed, 2])
    pool = {
        lang: grammar.sentences(lang, n * size.raw // 10, rng) for lang, n in zip(LANGUAGES, (28, 4, 4, 4), strict=True)
    }
    rows = [row for some in pool.values() for row in some]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyBert(size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=size.pretrain_lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, size.pretrain_lr, total_steps=size.pretrain_steps, pct_start=0.1
    )
    g = torch.Generator().manual_seed(seed)
    for _ in range(size.pretrain_steps):
        some = torch.randint(len(rows), (size.pretrain_batch,), generator=g).tolist()
        batch = masked([rows[i] for i in some], size.vocabulary, g, 0.25)
        ids = batch["input_ids"]
        x = model.embed(ids) + model.position(torch.arange(ids.shape[1]))
        for block in model.blocks:
            x = block(x, batch["attention_mask"].bool())
        kept = batch["labels"] != IGNORED
        loss = F.cross_entropy(model.decoder(model.norm(x)[kept]), batch["labels"][kept])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    for p in model.parameters():
        p.requires_grad_(False)
    return Base(model.eval(), example={"input_ids": torch.arange(FIRST, FIRST + 2 * size.shortest).reshape(2, -1)},
                name="tiny-bert", family="encoder")  # fmt: skip
