# SPDX-License-Identifier: Apache-2.0
"""A base without weights: the real module tree and shapes on torch's meta device, built from the configuration."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers

from tunesmith.core.base import Base
from tunesmith.core.derived_store import is_derived, outline, parent_of
from tunesmith.core.errors import UsageError
from tunesmith.core.fingerprint import Fingerprint
from tunesmith.models import dequantised
from tunesmith.models.bundled import BUNDLED, locate
from tunesmith.models.efficientnet_lite import EfficientNetLite0
from tunesmith.models.load import hub_reported, hub_request
from tunesmith.models.open import image_layout
from tunesmith.models.precision import auto_dtype, parse
from tunesmith.models.pretrained import TASKS, Request, detect_task, load_tokenizer, quiet, reported


def skeleton(name: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Base:
    """The base called `name` with no memory behind its weights: for plans. Raises UsageError like `load`.

    A folder with a derived base gives the forms its layers are held in, so that packed and factored ones count as such.
    """
    label = os.fspath(name)
    if is_derived(label):
        parent, kept = parent_of(label)
        return _unprinted(outline(label, skeleton(parent, dtype=dtype or parse(kept, "cpu"))))
    entry = BUNDLED.get(label)
    if entry is not None and entry.kind == "efficientnet-lite":
        with torch.device("meta"):
            model: torch.nn.Module = EfficientNetLite0()
        example = (torch.zeros(2, 3, 64, 64, device="meta"),)
        base = Base(model.eval(), example=example, name=label, family="vision", source={"image": image_layout(label)})
        return _unprinted(base)
    request = _request(label, dtype or auto_dtype("cpu"))
    with hub_reported(label, request) if request.is_hub else nullcontext(), quiet(), reported(label):
        config = transformers.AutoConfig.from_pretrained(request.location, **request.common())
        task = "causal-lm" if request.gguf else detect_task(config, label)
        auto = getattr(transformers, TASKS[task][0])
        with torch.device("meta"):
            model = auto.from_config(config, dtype=request.dtype, attn_implementation="sdpa").eval()
    tokenizer = load_tokenizer(request, TASKS[task][1])
    return _unprinted(Base(model, tokenizer=tokenizer, name=label, family=TASKS[task][1], source={"name": label}))


def _request(label: str, dtype: torch.dtype) -> Request:
    entry = BUNDLED.get(label)
    if entry is None:
        path = Path(label).expanduser()
        if not path.exists():
            return hub_request(label, Request(label, dtype))
        return Request(str(path.parent), dtype, gguf=path.name) if path.is_file() else Request(str(path), dtype)
    path = locate(entry)
    if entry.kind != "gguf":
        return Request(str(path), torch.float32)
    cached = dequantised.entry_path(
        entry.name, dequantised.file_sha256(path), f"transformers {transformers.__version__}"
    )
    if (cached / "config.json").is_file():
        return Request(str(cached), dtype)
    return Request(str(path.parent), dtype, gguf=path.name)


def _unprinted(base: Base) -> Base:
    """A skeleton has no values to hash, so no delta made on it can be taken for a real one."""
    if base.device.type != "meta":
        raise UsageError("a skeleton must lie on the meta device", where=base.name)
    base.__dict__["fingerprint"] = Fingerprint(base.name, "skeleton", str(base.dtype), "", {})
    return base
