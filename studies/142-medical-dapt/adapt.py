# SPDX-License-Identifier: Apache-2.0
"""The adapted models of study 142: twelve deltas that cannot have learned a task, and one that has."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.evaluate.controls import random_delta
from tunesmith.evaluate.grammar import Format, Shot
from tunesmith.objectives.sft import IGNORED, SFT
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.tasks import RowTask

from .tasks import Tokenise, prompted, shuffled_words


def toy_base() -> Base:
    """A tiny Llama with random weights, for a smoke run and the tests."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from .tasks import ToyTokenizer

    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.15)
            p.requires_grad_(False)
    return Base(model, tokenizer=ToyTokenizer(4096), name="toy", family="causal-lm")


def lora(base: Base, start: int, name: str, seed: int, rank: int = 8) -> Delta:
    """A fresh LoRA on every linear layer of the blocks from `start` on."""
    count = len(base.model.model.layers)  # type: ignore[union-attr, arg-type]
    blocks = "|".join(str(i) for i in range(start, count))
    method = ts.LoRA(rank=rank, alpha=2.0 * rank, targets=rf"re:^model\.layers\.({blocks})\.(self_attn|mlp)\.")
    return Delta.create(base, method, name=name, seed=seed)


def train(
    base: Base, delta: Delta, rows: list[dict[str, Any]], *, steps: int, batch: int, lr: float, seed: int
) -> Delta:
    """`steps` updates of next-token cross-entropy on `rows` of input_ids and labels."""
    config = TrainConfig(steps=steps, batch_size=batch, lr=lr, warmup=0.1, seed=seed)
    fit(base, delta, RowTask(rows, SFT()), config, progress=False)
    return delta


def pretrained(
    base: Base,
    texts: Sequence[str],
    tokenise: Tokenise,
    *,
    start: int,
    seed: int,
    steps: int,
    batch: int,
    shuffle: bool,
) -> Delta:
    """Continued pre-training on as many of `texts` as the steps use, drawn by `seed`; `shuffle` mixes up each one's words.

    The shuffled delta of a seed sees the same texts as the plain one.
    """
    chosen = random.Random(f"dapt:{seed}").sample(list(texts), min(len(texts), steps * batch))
    if shuffle:
        chosen = [shuffled_words(t, f"{seed}:{i}") for i, t in enumerate(chosen)]
    ids = [tokenise(t)[:96] for t in chosen]
    rows = [{"input_ids": i, "labels": list(i)} for i in ids if len(i) > 1]
    name = f"{'shuffled' if shuffle else 'dapt'}-{seed}"
    return train(base, lora(base, start, name, seed), rows, steps=steps, batch=batch, lr=5e-4, seed=seed)


@torch.no_grad()
def change_norms(delta: Delta) -> dict[str, float]:
    """Frobenius norm of A and B's product at every site."""
    part = delta.parts[0]
    return {p: float((part.tensors(p)["B"] @ part.tensors(p)["A"]).norm()) for p in part.kind_of}  # type: ignore[union-attr, operator]


@torch.no_grad()
def matched_random(base: Base, like: Delta, seed: int) -> Delta:
    """A random LoRA whose change of every weight has the norm of that of `like`."""
    out = random_delta(base, like, seed)
    out.name = f"random-{seed}"
    want, have = change_norms(like), change_norms(out)
    for path in want:
        out.parts[0].tensors(path)["B"].mul_(want[path] / have[path])  # type: ignore[union-attr, operator]
    return out


def control(base: Base, items: Sequence[Shot], format: Format, tokenise: Tokenise, *, steps: int, batch: int) -> Delta:
    """A LoRA on all blocks, fine-tuned on training items of one task, without shots, in one format."""
    rows = []
    for shot in items[: steps * batch]:
        p = prompted([shot], [], format, tokenise)
        ids = [*p.own[0], p.options[shot.answer]]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) - 1) + ids[-1:]})
    return train(base, lora(base, 0, "control", 0, rank=16), rows, steps=steps, batch=batch, lr=6e-4, seed=0)
