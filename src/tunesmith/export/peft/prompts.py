# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning, P-tuning and prefix tuning, to and from PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.errors import DeltaError, UsageError
from tunesmith.core.sites import Site
from tunesmith.export.peft.layout import Adapter, Piece

KEY = "prompt_embeddings"
MODEL = ""  # the path of the model as a whole


def read_prompt(a: Adapter) -> list[Piece]:
    """The vectors in front of the input. P-tuning is saved as what its net makes, which is the same thing."""
    P = _embeddings(a)
    return [Piece(methods.build("prompt-tuning", {"tokens": len(P)}), {MODEL: {"P": P}})]


def _embeddings(a: Adapter) -> Tensor:
    P = a.tensors.pop(KEY, None)
    n = int(a.number("num_virtual_tokens", 0))
    if P is None or P.dim() != 2 or len(P) != n:
        raise DeltaError(f"{KEY} is missing or holds no {n} vectors", where=a.where)
    return P


def read_prefix(a: Adapter) -> list[Piece]:
    """Keys and values in front of those of every attention.

    PEFT puts them into the cache, which moves the real tokens n positions on; here they stay. With rotary positions the
    keys are turned back by n instead, which gives the same scores. Raises UsageError for learned positions.
    """
    P = _embeddings(a)
    sites = attentions(a.base)
    n, layers = len(P), int(a.number("num_layers", len(sites)))
    heads, width = int(a.number("num_attention_heads", 1)), int(a.number("token_dim", P.shape[1] // max(1, 2 * layers)))
    if layers != len(sites) or P.shape[1] != layers * 2 * width or width % heads:
        raise DeltaError(f"{len(sites)} attentions do not fit {tuple(P.shape)}", where=a.where)
    past = P.view(n, layers * 2, heads, width // heads).permute(1, 2, 0, 3)  # [2 layers, H, n, d]
    tensors = {}
    for i, site in enumerate(sites):
        P_k = turned(a.base, past[2 * i], -n)
        tensors[site.path] = {"P_k": P_k.contiguous(), "P_v": past[2 * i + 1].contiguous()}
    return [Piece(methods.build("prefix-tuning", {"tokens": n}), tensors)]


def attentions(base: Base) -> list[Site]:
    """The attention modules in order of depth."""
    return sorted((s for s in base.sites.all() if s.kind == "attention"), key=lambda s: s.depth)


def turned(base: Base, keys: Tensor, by: int) -> Tensor:
    """Keys [H, n, d] rotated by `by` positions, with the base's own rotary embedding.

    Raises UsageError for a base without one: its positions are learned and cannot be moved.
    """
    rotary: Any = next((m for p, m in base.modules.items() if p.rsplit(".", 1)[-1] == "rotary_emb"), None)
    if rotary is None:
        what = "a prefix moves the positions of the real tokens in PEFT, which learned positions cannot follow"
        raise UsageError(what, where=base.name, hint="train it again here, or use prompt tuning")
    with torch.no_grad():
        cos, sin = rotary(keys[None], torch.tensor([[by]]))  # [1, 1, d]
    if cos.shape[-1] != keys.shape[-1]:
        raise UsageError("rotary positions of a part of each head are not supported", where=base.name)
    half = keys.shape[-1] // 2
    across = torch.cat([-keys[..., half:], keys[..., :half]], -1)
    scale = (cos.square() + sin.square()).sqrt()  # some models scale their angles' cosines; a rotation does not
    return keys * (cos / scale)[0] + across * (sin / scale)[0]


def write_prompt(base: Base, t: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of prompt tuning."""
    P = t["P"]
    return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(P), "token_dim": P.shape[1],
            "num_transformer_submodules": 1, "num_attention_heads": 1, "num_layers": 1}, {KEY: P}  # fmt: skip


def write_prefix(base: Base, tensors: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of prefix tuning; raises UsageError unless every attention has a prefix."""
    sites = attentions(base)
    if {s.path for s in sites} != set(tensors):
        raise UsageError("PEFT's prefixes stand at every attention", hint="targets='attentions'")
    rows = []
    for s in sites:
        P_k, P_v = tensors[s.path]["P_k"], tensors[s.path]["P_v"]
        if P_k.shape != P_v.shape:
            raise UsageError("PEFT's prefixes have keys and values of one width", where=s.path)
        rows += [turned(base, P_k, P_k.shape[1]), P_v]
    past = torch.stack(rows)  # [2 layers, H, n, d]
    layers, heads, n, d = past.shape
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": n, "token_dim": heads * d, "num_layers": layers // 2,
              "num_attention_heads": heads, "num_transformer_submodules": 1, "encoder_hidden_size": heads * d,
              "prefix_projection": False}  # fmt: skip
    return config, {KEY: past.permute(2, 0, 1, 3).reshape(n, layers * heads * d).contiguous()}
