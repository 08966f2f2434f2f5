# SPDX-License-Identifier: Apache-2.0
"""Open a base by name, or wrap a module of the user's."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from tunesmith.core.base import Base
from tunesmith.core.derive import records
from tunesmith.core.derived_store import is_derived, load_derived, parent_of
from tunesmith.models.bundled import BUNDLED
from tunesmith.models.load import load_parts
from tunesmith.models.precision import auto_dtype

# What the vision base was trained with; see `efficientnet_lite`.
_IMAGE = {"efficientnet-lite0": {"size": 224, "mean": [127 / 255] * 3, "std": [128 / 255] * 3}}


def image_layout(name: str) -> dict[str, Any] | None:
    """Size, mean and spread of the pictures that a vision base was trained on, or None."""
    return dict(_IMAGE[name]) if name in _IMAGE else None


def load(
    name: str | os.PathLike[str] | nn.Module | Base,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    example: Any = None,
    task: str | None = None,
) -> Base:
    """A frozen base from a short name, a folder, a `.gguf` file, a hub id, or a module.

    A folder with a derived base (`tunesmith.derive.save_derived`) opens the base it was made from by the name kept there.

    Args:
        dtype: of the weights; "auto" is fp32, but bf16 for language models on hardware that is fast in it.
        device: "auto" is CUDA where there is one.
        example: inputs of one forward pass, for modules that take no token ids.
        task: which head a transformers checkpoint gets; read from its configuration by default.
    Raises UsageError for what cannot be named or read, ResourceError for a missing package or an unreachable hub.
    """
    if isinstance(name, Base):
        return name
    if isinstance(name, nn.Module):
        return Base(name, example=example)
    if is_derived(name):
        parent, kept = parent_of(name)
        opened = load(parent, dtype=kept if dtype == "auto" else dtype, device=device, example=example, task=task)
        return load_derived(name, opened)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    entry = BUNDLED.get(os.fspath(name))
    wanted: str | torch.dtype = dtype
    if dtype == "auto":
        wanted = auto_dtype(place) if entry is None or entry.kind == "gguf" else torch.float32
    parts = load_parts(name, dtype=wanted, device=place, task=task)
    for p in parts.model.parameters():
        p.requires_grad_(False)
    source = {**parts.source, "name": os.fspath(name)}
    if parts.name in _IMAGE:
        source["image"] = image_layout(parts.name)
        if example is None:
            g = torch.Generator().manual_seed(0)
            example = (torch.randn(2, 3, 64, 64, generator=g).to(place, next(parts.model.parameters()).dtype),)
    return Base(
        parts.model, tokenizer=parts.tokenizer, example=example, name=parts.name, family=parts.family, source=source
    )


def opened_as(base: Base) -> str | None:
    """What `load` opens this base by: its folder where it was derived, else the name it was given. None for neither."""
    found = base.source.get("folder") if records(base) else base.source.get("name")
    return None if found is None else str(found)
