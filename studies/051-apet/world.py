# SPDX-License-Identifier: Apache-2.0
"""Text of a hidden Markov model, three tasks on it, and small GPTs trained on the text: the world of study 051."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.data import plan_epoch
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit

STATES, TOPICS, WORDS = 4, 4, 8
FIRST_MARKER = STATES * WORDS  # two markers, then two echoes
FIRST_ECHO = FIRST_MARKER + 2
QUESTION = FIRST_ECHO + 2
VOCABULARY = QUESTION + 1
TASKS = ("majority", "parity", "topic")
CLASSES = {"majority": STATES, "parity": 2, "topic": TOPICS}


@dataclass(frozen=True)
class Sizes:
    """Models by name (layers, width), lengths of the runs and numbers of rows."""

    scales: Mapping[str, tuple[int, int]]
    length: int
    pretrain: int
    pretrain_batch: int
    steps: int
    batch: int
    train: int
    dev: int
    test: int
    tasks: tuple[str, ...] = TASKS


FULL = Sizes({"small": (2, 32), "middle": (2, 64), "large": (3, 128)}, 22, 1500, 64, 120, 24, 2000, 400, 1000)
SMOKE = Sizes({"small": (1, 8), "middle": (1, 16)}, 8, 3, 8, 4, 8, 32, 16, 32, ("topic",))


def text(n: int, length: int, rng: np.random.Generator, *, echo: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    """`words` [n, length] with two markers among them, the `states` [n, length] they come from, and the rows' `topic` [n].

    The transitions between states depend on the topic: each has a state that it likes to go on to. A marker (one of two)
    stands at one place of each half of a row. With `echo` the word after the second says whether the two differ, so that a
    model of the text has a use for knowing it; the rows of the tasks have none.
    """
    fixed = np.random.default_rng(11)
    often = 1.0 / (np.arange(WORDS) + 1.0)
    stay = 0.35 * np.eye(STATES)
    step = np.stack([stay + 0.25 * np.roll(np.eye(STATES), k + 1, 1) for k in range(TOPICS)])
    step = step + 0.6 * fixed.dirichlet(np.full(STATES, 0.4), (TOPICS, STATES))
    step /= step.sum(-1, keepdims=True)
    topic = rng.integers(TOPICS, size=n)
    states = np.empty((n, length), dtype=np.int64)
    states[:, 0] = rng.integers(STATES, size=n)
    for i in range(1, length):
        p = step[topic, states[:, i - 1]].cumsum(-1)
        states[:, i] = (rng.random(n)[:, None] > p).sum(-1).clip(0, STATES - 1)
    words = states * WORDS + rng.choice(WORDS, size=states.shape, p=often / often.sum())
    markers = rng.integers(2, size=(n, 2))
    half = length // 2
    for side in range(2):
        at = side * half + rng.integers(half - side, size=n)
        words[np.arange(n), at] = FIRST_MARKER + markers[:, side]
    if echo:
        words[np.arange(n), at + 1] = FIRST_ECHO + (markers[:, 0] ^ markers[:, 1])
    return {"words": words, "states": states, "topic": topic, "markers": markers}


def labels(found: Mapping[str, np.ndarray[Any, Any]], task: str) -> np.ndarray[Any, Any]:
    """The class of each row: its commonest state (the lowest of equals), whether its markers differ, or its topic."""
    if task == "majority":
        return np.stack([(found["states"] == s).sum(1) for s in range(STATES)], 1).argmax(1)
    return found["markers"][:, 0] ^ found["markers"][:, 1] if task == "parity" else found["topic"]


class Block(nn.Module):
    """Pre-norm causal attention with rotary positions, and a GELU MLP of 4 times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        B, T, d = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(B, T, self.heads, d // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(turned(q, angles), turned(k, angles), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: x [B, H, T, c] with angles [T, c / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class GPT(nn.Module):
    """Tokens [B, T], or `inputs_embeds` [B, T, d], to {"logits": [B, T, vocabulary]}; the head shares the embedding."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([Block(width, max(1, width // 16)) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.5 / width**0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        half = x.shape[-1] // self.blocks[0].heads // 2  # type: ignore[operator]
        f = 100.0 ** -(torch.arange(half) / half)
        angles = torch.arange(x.shape[1])[:, None] * f
        for block in self.blocks:
            x = block(x, angles)
        return {"logits": self.head(self.norm(x))}


def pretrained(scale: str, sizes: Sizes) -> Base:
    """A GPT that has learnt to go on with the text; the same on every call."""
    layers, width = sizes.scales[scale]
    rng = np.random.default_rng(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(layers, width)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        for step in range(sizes.pretrain):
            for group in optimiser.param_groups:
                group["lr"] = 3e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / sizes.pretrain))
            ids = torch.from_numpy(text(sizes.pretrain_batch, sizes.length, rng)["words"])
            logits = model(ids)["logits"][:, :-1]
            F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    for p in model.parameters():
        p.requires_grad_(False)
    ids = torch.arange(2 * sizes.length).reshape(2, -1) % VOCABULARY
    return Base(model.eval(), example={"input_ids": ids}, name=f"{scale} GPT", family="causal-lm")


@dataclass(frozen=True)
class LastWord:
    """Cross-entropy of the label's word after the question mark, over the whole vocabulary."""

    unit = "examples"

    def count(self, batch: Mapping[str, Any]) -> int:
        return len(batch["labels"])

    def loss(self, base: Base, batch: Mapping[str, Any]) -> Tensor:
        logits = base.model(input_ids=batch["input_ids"])["logits"][:, -1]
        return F.cross_entropy(logits.float(), batch["labels"], reduction="sum")


@dataclass
class Rows:
    """Rows [n, length + 1] that end in the question mark, and the words [n] of their labels: class c is the word c."""

    ids: Tensor
    y: Tensor
    objective: LastWord = field(default_factory=LastWord)

    def __len__(self) -> int:
        return len(self.y)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch([1] * len(self.y), batch_size, seed=seed, epoch=epoch)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        rows = torch.as_tensor(list(indices))
        return {"input_ids": self.ids[rows], "labels": self.y[rows]}

    def tokens(self, indices: Sequence[int]) -> int:
        return len(indices)


def rows(task: str, split: str, n: int, length: int, seed: int = 0) -> Rows:
    """Rows of one split of a task; training rows are drawn by the seed, the others are always the same."""
    at = ("train", "dev", "test").index(split)
    rng = np.random.default_rng([TASKS.index(task), at, seed if split == "train" else 0])
    found = text(n, length, rng, echo=False)
    ids = np.concatenate([found["words"], np.full((n, 1), QUESTION)], 1)
    return Rows(torch.from_numpy(ids), torch.from_numpy(labels(found, task)).long())


def train(base: Base, methods: Sequence[Any], task: Rows, sizes: Sizes, lr: float, seed: int) -> Delta:
    """One run: AdamW without decay, cosine schedule with 10 % warm-up, no dropout in any arm."""
    delta = Delta.create(base, *methods, seed=seed)
    config = TrainConfig(steps=sizes.steps, batch_size=sizes.batch, lr=lr, warmup=0.1, precision="fp32", seed=seed)
    fit(base, delta, task, config, progress=False)
    return delta


@torch.no_grad()
def accuracy(base: Base, delta: Delta | None, held: Rows, classes: int) -> float:
    """The share of rows whose likeliest label word is the right one."""
    right = 0
    with base.evaluating(), base.using(*([delta] if delta is not None else [])):
        for part, y in zip(held.ids.split(250), held.y.split(250), strict=True):
            right += int((base.model(input_ids=part)["logits"][:, -1, :classes].argmax(-1) == y).sum())
    return right / len(held)
