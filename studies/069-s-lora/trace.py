# SPDX-License-Identifier: Apache-2.0
"""The trace, the bases and the random deltas of study 069."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import torch

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta

TARGETS = "q,k,v,o"


@dataclass(frozen=True)
class Ask:
    """A request of the trace: which adapter, prompt tokens, tokens to write, arrival in seconds."""

    id: str
    adapter: int
    prompt: tuple[int, ...]
    new: int
    arrived: float


@dataclass(frozen=True)
class Lengths:
    """Requests of a trace, their arrivals a second, and the ranges of prompt and output lengths (end excluded)."""

    requests: int
    rate: float
    prompt: tuple[int, int]
    output: tuple[int, int]


def asks(adapters: int, shape: Lengths, vocabulary: int, seed: int) -> list[Ask]:
    """Adapter floor(N U) with U uniform, gamma arrivals of coefficient of variation 1, lengths uniform.

    Only the adapters depend on their number: the same seed gives the same lengths, prompts and arrivals.
    """
    rng = random.Random(zlib.crc32(f"trace {seed}".encode()))
    made, now = [], 0.0
    for i in range(shape.requests):
        now += rng.gammavariate(1.0, 1.0 / shape.rate)
        which, n = int(adapters * rng.random()), rng.randrange(*shape.prompt)
        prompt = tuple(rng.randrange(vocabulary) for _ in range(n))
        made.append(Ask(str(i), which, prompt, rng.randrange(*shape.output), now))
    return made


def deltas(base: Base, ranks: tuple[int, ...]) -> list[Delta]:
    """Random low-rank deltas on the attention projections, of the given ranks."""
    out = []
    for i, r in enumerate(ranks):
        delta = Delta.create(base, ts.LoRA(rank=r, alpha=float(r), targets=TARGETS), name=f"d{i}", seed=i)
        g = torch.Generator().manual_seed(1000 + i)
        with torch.no_grad():
            for key, t in delta.items():
                if key.endswith("/B"):
                    t.copy_(0.02 * torch.randn(t.shape, generator=g))
        out.append(delta)
    return out


def real(dtype: str = "auto") -> Base:
    """SmolLM2-135M-Instruct."""
    return ts.load("smollm2-135m-instruct", dtype=dtype)


def toy() -> Base:
    """A random Llama of two small blocks, for a smoke run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return Base(LlamaForCausalLM(config).eval(), name="toy", family="causal-lm")
