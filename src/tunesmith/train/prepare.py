# SPDX-License-Identifier: Apache-2.0
"""From data and a base to what the loop needs: rows, objective, head, layout to keep with the delta."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.derive import records
from tunesmith.core.errors import DataError, UsageError
from tunesmith.core.objective import get_objective
from tunesmith.data import Dataset, check_packing, encode, pack, supervision
from tunesmith.data.images import normalised
from tunesmith.train.config import TrainConfig
from tunesmith.train.tasks import PackedTask, RowTask, Task

START = "start"
_OBJECTIVE = {
    "chat": "sft", "text": "sft", "classification": "classification", "image": "classification",
    "audio": "classification", "regression": "regression", "tagging": "tagging",
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A task, the head its data needs (method options, or None), and what must be stored to use the delta later."""

    task: Task
    head: dict[str, Any] | None
    layout: dict[str, Any] = field(default_factory=dict)
    supervised: float = 1.0
    notes: tuple[str, ...] = ()


def prepare(base: Base, dataset: Dataset, config: TrainConfig, *, system: str | None = None) -> Prepared:
    """The task that `dataset` makes on `base`.

    Raises DataError for rows that cannot be used (too long, fully masked, too few classes), UsageError for data the
    base cannot read.
    """
    if dataset.kind not in _OBJECTIVE:
        hint = "preference data is read, but no objective here trains on it"
        raise DataError(f"data of kind {dataset.kind!r} cannot be trained on", where=dataset.report.path, hint=hint)
    objective = get_objective(_OBJECTIVE[dataset.kind])()
    head = _head(dataset)
    layout: dict[str, Any] = {"kind": dataset.kind}
    if dataset.labels:
        layout["labels"] = list(dataset.labels)
    if dataset.kind in ("image", "audio"):
        image = base.source.get("image") if dataset.kind == "image" else None
        if image:
            layout["image"] = dict(image)
        keep = partial(_arrays, image, _token_inputs(base))
        return Prepared(RowTask(dataset.rows, objective, prepare=keep), head, layout)
    if base.tokenizer is None:
        raise UsageError(f"{base.name} has no tokenizer, so it cannot read {dataset.kind} data")
    if dataset.kind == "chat" and base.family != "causal-lm":
        hint = "give text with a label, or use a causal language model"
        raise UsageError(f"{base.name} is no causal language model and cannot write answers", hint=hint)
    length = min(config.max_length, context_length(base))
    overflow: Any = config.overflow
    encoded = encode(dataset, base.tokenizer, max_length=length, system=system, overflow=overflow)
    layout["template"] = encoded.template.to_dict()
    layout["max_length"] = length
    pad = base.tokenizer.pad_token_id
    pad = 0 if pad is None else int(pad)
    share = 1.0
    if dataset.kind in ("chat", "text"):
        report = supervision(encoded)
        report.require()
        share = report.share
    notes = tuple(encoded.notes)
    if config.packing:
        if dataset.kind not in ("chat", "text"):
            raise UsageError("packing is for chat and text data")
        check_packing(base.model)
        packed = pack(encoded.rows, length)
        return Prepared(PackedTask(packed, objective, pad, base.dtype), head, layout, share, notes)
    multiple = 8 if base.device.type == "cuda" else None  # tensor cores want it; a CPU pays for every position
    return Prepared(RowTask(encoded.rows, objective, pad, _token_inputs(base), multiple), head, layout, share, notes)


def context_length(base: Base) -> int:
    """Tokens the base can read at once, or a very large number where it has no limit."""
    value = getattr(getattr(base.model, "config", None), "max_position_embeddings", None)
    return int(value) if value else 1 << 30


def _head(dataset: Dataset) -> dict[str, Any] | None:
    if dataset.kind in ("chat", "text"):
        return None
    if dataset.kind == "regression":
        return {"classes": 1, "task": "regression"}
    classes = len(dataset.labels or ())
    if classes < 2:
        raise DataError(f"classification needs two classes or more, found {classes}", where=dataset.report.path)
    return {"classes": classes, "task": "tagging" if dataset.kind == "tagging" else "classification"}


def _token_inputs(base: Base) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    """Leave out what the base's forward does not take, such as segment ids for a model without segments."""
    import inspect

    taken = set(inspect.signature(type(base.model).forward).parameters) | {"labels"}

    def keep(batch: dict[str, Tensor]) -> dict[str, Any]:
        return {k: v for k, v in batch.items() if k in taken}

    return keep


def _arrays(
    image: Mapping[str, Any] | None, keep: Callable[[dict[str, Tensor]], dict[str, Any]], batch: dict[str, Tensor]
) -> dict[str, Any]:
    if "pixel_values" in batch:
        return {"pixel_values": normalised(batch["pixel_values"], image), "labels": batch["labels"]}
    taken = keep(batch)  # a plain module takes the signal alone, by position and without a mask
    return taken if "input_values" in taken else {k: batch[k] for k in ("input_values", "labels")}


def choose_methods(base: Base, method: Any, prepared: Prepared) -> list[Any]:
    """Method instances from what the user gave (None, name, instance, or a list), with the head the data needs."""
    given = [] if method is None else list(method) if isinstance(method, list | tuple) else [method]
    made = [methods.parse(m) if isinstance(m, str) else m for m in given]
    for m in made:
        methods.info_of(m)
    start = start_of(base)
    if not made and start is not None:
        made = [p.method for p in Delta.load(start, base).parts]
    if not made:
        # A convolutional net has few wide matrices to factorise; per-channel scale and shift suits it.
        made = [methods.build("ssf", {"start": "identity"}) if _has_convs(base) else methods.build("lora")]
    if prepared.head and not any(methods.info_of(m).name == "head" for m in made):
        made.append(methods.build("head", prepared.head))
    return made


def start_of(base: Base) -> Path | None:
    """The delta that training on a derived base begins from, kept beside it; None where there is none."""
    place = Path(base.source["folder"]) / START if records(base) and base.source.get("folder") else None
    return place if place is not None and (place / "delta.json").is_file() else None


def _has_convs(base: Base) -> bool:
    return any(s.kind in ("conv1d", "conv2d") for s in base.sites.all())
