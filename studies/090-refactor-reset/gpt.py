# SPDX-License-Identifier: Apache-2.0
"""A small byte-level GPT whose linear layers are full, factorised, or factorised plus sparse, and its text."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of the model: width d, heads, depth, context, rank of the factors and their scale alpha / r."""

    d: int = 128
    heads: int = 4
    depth: int = 2
    context: int = 64
    rank: int = 16
    scale: float = 0.25
    sparse: float = 0.03


class Full(nn.Module):
    """y = W x."""

    def __init__(self, n: int, out: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(out, n))
        nn.init.kaiming_uniform_(self.W, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W)


class Factorised(nn.Module):
    """y = s B A x with B [out, r] and A [r, in], and no W; both start Kaiming uniform with a = sqrt 5."""

    def __init__(self, n: int, out: int, r: int, scale: float) -> None:
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(torch.empty(r, n)), nn.Parameter(torch.empty(out, r)), scale
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A), self.B) * self.scale


class SparsePlus(Factorised):
    """W = s B A + S, with S on a fixed random support of `share` of the entries, whose values train."""

    def __init__(self, n: int, out: int, r: int, scale: float, share: float) -> None:
        super().__init__(n, out, r, scale)
        k = max(1, round(share * n * out))
        self.register_buffer("at", torch.randperm(n * out)[:k].sort().values)
        self.values = nn.Parameter(torch.empty(k).uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n)))
        self.shape = (out, n)

    def forward(self, x: Tensor) -> Tensor:
        S = torch.zeros(self.shape[0] * self.shape[1]).index_put((self.at,), self.values).reshape(self.shape)
        return super().forward(x) + F.linear(x, S)


def linear(kind: str, n: int, out: int, shape: Shape) -> nn.Module:
    """A layer of the kind "full", "low-rank" or "sltrain"."""
    if kind == "full":
        return Full(n, out)
    if kind == "low-rank":
        return Factorised(n, out, shape.rank, shape.scale)
    return SparsePlus(n, out, shape.rank, shape.scale, shape.sparse)


class Block(nn.Module):
    def __init__(self, kind: str, shape: Shape) -> None:
        super().__init__()
        d, self.heads = shape.d, shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (linear(kind, d, d, shape) for _ in range(4))
        self.up, self.down = linear(kind, d, 4 * d, shape), linear(kind, 4 * d, d, shape)

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(B, T, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes [B, T] to logits [B, T, 256]. Embeddings, norms and the head are full in every kind."""

    def __init__(self, kind: str, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(BYTES, shape.d), nn.Embedding(shape.context, shape.d)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.blocks = nn.ModuleList([Block(kind, shape) for _ in range(shape.depth)])
        self.norm, self.head = nn.LayerNorm(shape.d), nn.Linear(shape.d, BYTES, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def layers(self) -> Iterator[Any]:
        """The layers that are full, factorised or both, by the kind of the model."""
        return (m for m in self.modules() if isinstance(m, Full | Factorised))


def loss_on(model: nn.Module, x: Tensor) -> Tensor:
    """Mean next-byte loss in nats on rows of bytes [B, T + 1]."""
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


@dataclass(frozen=True)
class Text:
    """Byte streams for training, for choosing rates ("dev") and for reporting ("test")."""

    train: Tensor
    dev: Tensor
    test: Tensor

    def batch(self, size: int, context: int, generator: torch.Generator) -> Tensor:
        """Random pieces of the training text, [size, context + 1]."""
        at = torch.randint(0, len(self.train) - context - 1, (size,), generator=generator)
        return self.train[at[:, None] + torch.arange(context + 1)]

    def held(self, split: str, context: int, most: int) -> Tensor:
        """The first pieces of a held-out text that do not overlap, at most `most`, [n, context + 1]."""
        stream: Tensor = getattr(self, split)
        n = min(most, (len(stream) - 1) // context)
        return torch.stack([stream[i * context : (i + 1) * context + 1] for i in range(n)])


def news(folder: Path) -> Text:
    """AG News: the training file to train on, its validation file for rates, its test file for reporting."""

    def stream(name: str) -> Tensor:
        path = next(p for p in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if p.is_file())
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        texts = [json.loads(line)["text"] for line in raw.decode().splitlines() if line.strip()]
        return torch.tensor(list("\n".join(texts).encode()), dtype=torch.int64)

    return Text(stream("train"), stream("validation"), stream("test"))


def toy() -> Text:
    """Words drawn from a short list."""
    rng = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three", "is", "the", "and"]

    def stream(n: int) -> Tensor:
        return torch.tensor(list(" ".join(rng.choice(words) for _ in range(n)).encode()), dtype=torch.int64)

    return Text(stream(2000), stream(200), stream(200))
