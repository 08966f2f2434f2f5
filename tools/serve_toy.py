# SPDX-License-Identifier: Apache-2.0
"""Toy servers for the tools that put load on serving: a tiny Llama and a tiny BERT with deltas, made in seconds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from byte_tokenizer import byte_tokenizer
from serve_cases import moved, tiny_llama
from serve_http import Served

from tunesmith.core.base import Base
from tunesmith.deltas import IA3, BitFit, Head, LoRA, PrefixTuning
from tunesmith.serve.access import Access

ADMIN = "admin-token-0123456789"


def writer() -> Base:
    """A causal model of 512 positions that writes nonsense quickly."""
    made = tiny_llama(vocab_size=300, max_position_embeddings=512, eos_token_id=None, bos_token_id=None)
    return Base(made.model, tokenizer=byte_tokenizer(), name="writer", family="causal-lm")


def reader() -> Base:
    """A sentence encoder of 64 positions."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    return Base(model, tokenizer=byte_tokenizer(), name="reader", family="encoder", source={"task": "encoder"})


def fill(base: Base, root: Path, n: int, seed: int = 0) -> list[str]:
    """Save `n` deltas of mixed kinds, the last one with a head; their names."""
    kinds: list[list[Any]] = [
        [LoRA(rank=2)],
        [IA3()],
        [LoRA(rank=5)],
        [BitFit(targets="biases")],
        [PrefixTuning(tokens=2)],
    ]
    if base.family == "causal-lm":
        del kinds[3]  # a Llama has no biases
    names = []
    for i in range(n):
        methods = [LoRA(rank=2), Head(classes=3)] if i == n - 1 else kinds[i % len(kinds)]
        names.append(f"d{i}")
        moved(base, *methods, seed=seed + i, name=names[-1]).save(root / names[-1])
    return names


def serve(base: Base, root: Path, **settings: Any) -> Served:
    """A server on a free port of this machine, with an admin plane."""
    return Served(base, root, access=Access(admin=ADMIN), **settings)
