# SPDX-License-Identifier: Apache-2.0
"""Deltas as adapters for vLLM's multi-LoRA: a folder each, and the command that serves them from one base.

vLLM reads PEFT's files but not all of their meaning: it takes one rank and one scale for a whole adapter, and leaves
`rank_pattern` and `alpha_pattern` unread. So every layer is written with the same rank, filled up with zeros, and with its
scale multiplied in (lora_alpha = r). What vLLM cannot serve is refused with the reason; see `vllm/lora/peft_helper.py`,
`vllm/lora/lora_model.py` and `vllm/config/lora.py` there.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.core.apply import Application
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, as_view
from tunesmith.core.errors import DeltaError, UsageError
from tunesmith.core.spectrum import low_rank
from tunesmith.data.templates import TemplateInfo, template_info
from tunesmith.export.peft.layout import PREFIX
from tunesmith.export.peft.write import lora_config, save_adapter

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
WHY = {
    "dora": "vLLM does not support DoRA", "head": "vLLM's LoRA changes no output layer",
    "prompt-tuning": "vLLM's LoRA holds no prompts", "prefix-tuning": "vLLM's LoRA holds no prefixes",
    "ia3": "vLLM adds to weights and does not scale activations", "bitfit": "vLLM takes no biases",
}  # fmt: skip
FIT = "--fit-rank R writes the nearest LoRA of rank R, with its error"


@dataclass(frozen=True)
class Adapter:
    """A written adapter: its name for requests, its folder, its rank, and what vLLM will do otherwise than here."""

    name: str
    folder: Path
    rank: int
    layers: int
    notes: tuple[str, ...]


@torch.no_grad()
def write_vllm(delta: Delta, base: Base, folder: str | Path, *, name: str | None = None) -> Adapter:
    """Write a delta, all of its parts together, as an adapter that vLLM serves.

    Raises UsageError naming what vLLM cannot serve and why, ResourceError where the folder cannot be written.
    """
    if base.family != "causal-lm":
        raise UsageError(f"vLLM's multi-LoRA is for causal language models, not for a {base.family}", where=base.name)
    label = name or delta.name
    if "=" in label or "," in label or label != label.strip() or not label:
        raise UsageError(
            f"{label!r} cannot stand in --lora-modules", where=delta.name, hint="use a name without = and ,"
        )
    pairs = _pairs(delta, base)
    rank = max(len(A) for A, _ in pairs.values())
    if rank > RANKS[-1]:
        raise UsageError(f"its rank {rank} is more than vLLM's {RANKS[-1]}", where=delta.name, hint=FIT)
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in pairs.items():
        more = rank - len(A)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.cat([A, A.new_zeros(more, A.shape[1])])
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.cat([B, B.new_zeros(len(B), more)], 1)
    save_adapter(lora_config(base, sorted(pairs), rank), tensors, Path(folder))
    return Adapter(label, Path(folder), rank, len(pairs), _notes(delta, base))


def _pairs(delta: Delta, base: Base) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, in] and B [out, r] in fp32, scale in B, of every layer the delta changes."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, actions in Application(base, (as_view(delta),)).plan.items():
        found = []
        for a in actions:
            pair, method = low_rank(a, full=True), a.part.info.name
            if pair is None:
                why = WHY.get(method, f"{method} is no low-rank addition to a weight")
                raise UsageError(
                    f"vLLM cannot serve it: {why}", where=f"{delta.name}: {path or 'the whole model'}", hint=FIT
                )
            found.append(pair)
        site = actions[0].site
        if site.kind != "linear" or site.transposed or site.role not in ROLES:
            what = f"vLLM's multi-LoRA does not reach this layer ({site.role or site.kind})"
            raise UsageError(what, where=f"{delta.name}: {path}", hint="train on the layers of the blocks: all-linear")
        pairs[path] = (torch.cat([A for A, _ in found]).float(), torch.cat([B for _, B in found], 1).float())
    if not any(bool(A.any()) and bool(B.any()) for A, B in pairs.values()):
        raise DeltaError("the delta changes nothing", where=delta.name, hint="train it first")
    return pairs


def _notes(delta: Delta, base: Base) -> tuple[str, ...]:
    """What of the delta's layout vLLM does not know."""
    stored = delta.layout.get("template")
    if not stored or base.tokenizer is None:
        return ()
    info, own = TemplateInfo.from_dict(stored), template_info(base.tokenizer)
    out = []
    if info.template and info.template != own.template:
        out.append(
            "it was trained with another chat template than the base's, which vLLM uses for all: --chat-template"
        )
    if info.system:
        out.append("it was trained with a system message, which requests to vLLM must send themselves")
    return tuple(out)


def limits(adapters: Sequence[Adapter]) -> dict[str, int]:
    """What vLLM must be told to have room for these adapters, all of them in one batch."""
    most = max(a.rank for a in adapters)
    return {
        "max_lora_rank": next(r for r in RANKS if r >= most), "max_loras": len(adapters), "max_cpu_loras": len(adapters),
    }  # fmt: skip


def command(base: Base, adapters: Sequence[Adapter]) -> str:
    """The line that serves them: `vllm serve BASE --enable-lora ... --lora-modules NAME=FOLDER ...`."""
    facts = limits(adapters)
    words = ["vllm", "serve", str(base.source.get("path") or base.source.get("name") or base.name), "--enable-lora"]
    for key, value in facts.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--lora-modules", *(f"{a.name}={a.folder}" for a in adapters)])
