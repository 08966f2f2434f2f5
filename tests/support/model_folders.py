# SPDX-License-Identifier: Apache-2.0
"""Tiny model folders for tests of what reads and writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def tokenizer(tokens: list[str], added: tuple[str, ...] = ()) -> dict[str, Any]:
    """A word-level tokenizer.json: `tokens` have the ids of their places, `added` come after them."""
    extra = [
        {"id": len(tokens) + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, t in enumerate(added)
    ]  # fmt: skip
    model = {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": tokens[0]}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": extra, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip


def llama(folder: Path, **settings: Any) -> Path:
    """Writes a random two-layer Llama in fp32 with an untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    default = dict(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**default, **settings})).save_pretrained(folder)
    return folder


def tuned(folder: Path, source: Path, seed: int = 1, scale: float = 0.05) -> Path:
    """Writes the model of `source` with every parameter moved by seeded noise."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder)
    return folder


def model_folder(
    place: Path, name: str, tensors: dict[str, Tensor], *, shards: int = 1, tokens: Any = None, **config: Any
) -> Path:
    """Writes a toy model folder below `place`."""
    folder = place / name
    folder.mkdir()
    settings = {"model_type": "toy", "architectures": ["Toy"], "vocab_size": 8, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    if tokens is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    table = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {k: v for j, (k, v) in enumerate(tensors.items()) if j % shards == i}
        save_file(part, folder / file)
        table.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def toy(seed: int = 0, dtype: torch.dtype = torch.float32, rows: int = 8, scale: float = 1.0) -> dict[str, Tensor]:
    """Tensors of a toy model with two blocks, a token table and a head."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (rows, 4), "norm.weight": (4,), "head.weight": (rows, 4)}
    shapes |= {f"layers.{i}.{n}.weight": (4, 4) for i in range(2) for n in ("q", "o")}
    return {n: (scale * torch.randn(s, generator=g)).to(dtype) for n, s in shapes.items()}


def moved(tensors: dict[str, Tensor], seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """The same tensors plus seeded noise, in their dtype."""
    g = torch.Generator().manual_seed(seed)
    return {n: (t.float() + scale * torch.randn(t.shape, generator=g)).to(t.dtype) for n, t in tensors.items()}


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder."""
    out: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out.update(load_file(file))
    return out
