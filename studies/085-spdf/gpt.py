# SPDX-License-Identifier: Apache-2.0
"""The byte-level GPT of study 085, its batches and its scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.derive import split

from .texts import PAD, Row

VOCAB = 256


class Block(nn.Module):
    """Pre-norm causal attention and a GELU MLP of 4 times the width; six matrices."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(B, T, self.heads, d // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteGPT(nn.Module):
    """Bytes [B, T] to {"logits": [B, T, 256]}, with learned positions and a tied head.

    Linear layers start from a normal of standard deviation 0.02, those that write to the residual from 0.02 / sqrt(2 L).
    """

    def __init__(self, layers: int, d: int, heads: int, context: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCAB, d), nn.Embedding(context, d)
        self.blocks = nn.ModuleList([Block(d, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                out = name.endswith((".o", ".down"))
                nn.init.normal_(m.weight, std=0.02 / math.sqrt(2 * layers) if out else 0.02)
            if isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        h = self.embed(input_ids) + self.position.weight[: input_ids.shape[1]]
        for block in self.blocks:
            h = block(h)
        return {"logits": self.head(self.norm(h))}


def fresh(layers: int, d: int, heads: int, context: int, seed: int) -> Base:
    """An untrained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ByteGPT(layers, d, heads, context).eval().requires_grad_(False)
    example = {"input_ids": torch.arange(2 * context).reshape(2, context) % 97 + 32}
    return Base(model, example=example, name=f"byte-gpt-{layers}x{d}", family="causal-lm")


def windows(text: Tensor, batch: int, length: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batch i: random windows [batch, length] of a long text (uint8), and the bytes that follow each position."""

    def at(i: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed * 1_000_003 + i)
        starts = torch.randint(0, len(text) - length - 1, (batch,), generator=g)
        rows = torch.stack([text[s : s + length + 1] for s in starts.tolist()]).long()
        return rows[:, :-1], rows[:, 1:]

    return at


@dataclass(frozen=True)
class Packed:
    """Rows as tensors: ids [n, T], labels [n, T] (next byte, -100 outside the answer), and slots for the easy task."""

    ids: Tensor
    labels: Tensor
    slots: Sequence[Sequence[tuple[int, int]]]

    def __len__(self) -> int:
        return len(self.ids)


def packed(rows: Sequence[Row]) -> Packed:
    """Rows padded on the right; the answer and its end mark are supervised."""
    width = max(len(r.source) + len(r.target) for r in rows)
    ids = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), -100)
    for i, r in enumerate(rows):
        whole = torch.tensor([*r.source, *r.target])
        ids[i, : len(whole)] = whole
        first, last = len(r.source) - 1, len(whole) - 1  # the label of a position is the byte after it
        labels[i, first:last] = whole[first + 1 :]
    spots = [[(len(r.source) - 1 + a, len(r.source) - 1 + b) for a, b in r.slots] for r in rows]
    return Packed(ids, labels, spots)


def shuffled(data: Packed, batch: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batch i of an endless run over the rows, in a new order each time."""
    per = max(1, len(data) // batch)

    def at(i: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed * 1_000_003 + i // per)
        rows = torch.randperm(len(data), generator=g)[(i % per) * batch : (i % per + 1) * batch]
        ids, labels = data.ids[rows], data.labels[rows]
        width = int((ids != PAD).any(0).nonzero().max()) + 1
        return ids[:, :width], labels[:, :width]

    return at


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean next-byte loss over labelled positions, nats."""
    ids, labels = batch
    logits = model(ids)["logits"].float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@torch.no_grad()
def score(base: Base, data: Packed, batch: int, precision: str) -> dict[str, Any]:
    """`nll` (nats a byte of the answers), and `slots`: the share of slot values of which every byte is the likeliest one."""
    total = units = hit = spots = 0.0
    with base.evaluating(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for start in range(0, len(data), batch):
            ids, labels = data.ids[start : start + batch], data.labels[start : start + batch]
            logits = base.model(ids)["logits"].float()
            value = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
            total, units = total + float(value), units + int((labels != -100).sum())
            right = logits.argmax(-1) == labels
            for row, places in enumerate(data.slots[start : start + batch]):
                hit += sum(bool(right[row, a:b].all()) for a, b in places)
                spots += len(places)
    return {"nll": total / units, "slots": hit / spots if spots else None}


@torch.no_grad()
def revived(start: Base, end: Base, masks: Mapping[str, Tensor]) -> float:
    """The share of the change's energy, over all masked weights, that lies on entries that were zero in pre-training."""
    paths = list(masks)
    delta = Delta.create(start, ts.Full(targets=",".join(paths), bias=False))
    for path in paths:
        change = end.modules[path].weight - start.modules[path].weight  # type: ignore[operator]
        delta.parts[0].parameter(path, "weight").copy_(change)
    found = split(start, delta, of=masks).values()
    on, off = sum(e.on for e in found), sum(e.off for e in found)
    return off / (on + off) if on + off else 0.0
