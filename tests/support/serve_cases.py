# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama with grouped heads, deltas on it, an engine that serves them and requests to it."""

from __future__ import annotations

import random
from typing import Any

import torch

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.requests import Request
from tunesmith.serve.sampling import Sampling

GREEDY = Sampling(temperature=0)


def tiny_llama(seed: int = 0, **changes: Any) -> Base:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**{
        "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True, **changes,
    })  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # logits that differ between tokens
    return Base(model, name="tiny-llama", family="causal-lm")


def moved(base: Base, *methods: Any, seed: int = 0, size: float = 0.2, name: str = "") -> Delta:
    """A delta whose every number was moved, so that it does something."""
    delta = Delta.create(base, *methods, seed=seed, name=name or f"d{seed}")
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, t in delta.items():
            if t.is_floating_point():
                t.add_(size * torch.randn(t.shape, generator=g))
    return delta


def engine(base: Base, deltas: dict[str, Delta] | None = None, **settings: Any) -> Engine:
    library = Library(base, budget=1 << 30)
    for name, delta in (deltas or {}).items():
        library.add(delta, name)
    return Engine(base, library, **{"cells": 4000, **settings})


def ask(id: str, seed: int = 0, n: int = 6, new: int = 8, **more: Any) -> Request:
    rng = random.Random(seed)
    return Request(id, tuple(rng.randrange(67) for _ in range(n)), new, **{"sampling": GREEDY, **more})
