# SPDX-License-Identifier: Apache-2.0
"""Write a delta that never is in memory as a whole: its tensors come one at a time, in a planned order.

The folder is the one that `store.save` writes (docs/formats.md), read back by `store.load`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core import card, header, replace, store
from tunesmith.core import method as methods
from tunesmith.core.delta import SHARED, Part
from tunesmith.core.errors import DeltaError, ResourceError
from tunesmith.core.header import CARD, DTYPE_NAMES, FILES, FORMAT, HEADER, TENSORS
from tunesmith.core.tensorfile import TensorWriter, disk


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to come: the site it belongs to ("" for all of the part), its name, dtype and shape."""

    path: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def save_streamed(
    folder: str | Path,
    name: str,
    parts: Sequence[tuple[Part, Sequence[PlannedTensor]]],
    tensors: Iterable[Tensor],
    *,
    provenance: Mapping[str, Any],
) -> store.Saved:
    """Write a delta whose tensors are made while it is written.

    Args:
        parts: parts without tensors, each with those it will hold: shared ones first, then site by site.
        tensors: their values, part after part in that order.
    Raises DeltaError for NaN, infinity, or tensors out of order; UsageError for a folder that holds something else;
    ResourceError for a disk that is full or gives back other bytes than were written.
    """
    target = store._as_path(folder).resolve()
    planned = [(f"{part.name}/{t.path}/{t.name}", t) for part, some in parts for t in _in_order(part, some)]
    if not planned:
        raise DeltaError("has no tensors to save", where=f"delta {name!r}")
    h = hashlib.sha256()
    for part, _ in parts:
        h.update(repr((part.name, part.info.name, methods.chosen(part.method), sorted(part.kind_of))).encode())
    with disk(target):
        store._check_target(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace.recover(target, FILES)
        with replace.scratch(target) as fresh:
            plan = [(key, t.dtype, t.shape) for key, t in planned]
            head = {"format": "pt", "tunesmith": FORMAT}
            with TensorWriter(fresh / TENSORS, plan, metadata=head, hashed=True) as writer:
                for (key, t), value in zip(planned, tensors, strict=True):
                    if not bool(torch.isfinite(value).all()):
                        raise DeltaError("holds NaN or infinity", where=f"tensor {key}")
                    h.update(f"{key}:{t.dtype}:{t.shape}".encode())
                    if value.numel():
                        h.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                    writer.put(key, value)
            _finish(fresh, name, [p for p, _ in parts], planned, provenance, h.hexdigest(), writer.sha256)
            replace.publish(fresh, target, FILES)
    size = sum(t.dtype.itemsize * torch.Size(t.shape).numel() for _, t in planned)
    return store.Saved(target, len(planned), size, h.hexdigest(), writer.sha256)


def _in_order(part: Part, some: Sequence[PlannedTensor]) -> Sequence[PlannedTensor]:
    """The tensors, if they come in the order in which a loaded part gives them. Raises DeltaError."""
    place = {path: i for i, path in enumerate([SHARED, *part.kind_of])}
    at = [place.get(t.path, -1) for t in some]
    if -1 in at or at != sorted(at):
        raise DeltaError("tensors must come in the order of the part's sites", where=f"part {part.name!r}")
    return some


def _finish(
    fresh: Path,
    name: str,
    parts: Sequence[Part],
    planned: Sequence[tuple[str, PlannedTensor]],
    provenance: Mapping[str, Any],
    digest: str,
    sha256: str,
) -> None:
    """Header and card beside the tensor file, which is read back whole. Raises ResourceError where it differs."""
    path = fresh / TENSORS
    if store._file_sha256(path) != sha256:
        raise ResourceError("was read back otherwise than written", where=str(path), hint="check the disk")
    facts = {"versions": store._versions(), **provenance}
    head: dict[str, Any] = {
        "format": FORMAT, "name": name, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "written_by": store._versions(), "parts": [store._describe(p) for p in parts],
        "tensors": {
            key: {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "trainable": True} for key, t in planned
        },
        "file": {"name": TENSORS, "bytes": path.stat().st_size, "sha256": sha256}, "digest": digest, "layout": {},
        "provenance": header.plain(facts, "provenance", lossy=True),
    }  # fmt: skip
    data = header.encode(head)
    header.check(header.strict_json(data, HEADER), HEADER)
    (fresh / HEADER).write_bytes(data)
    (fresh / CARD).write_text(card.text(head), encoding="utf-8")
    os.chmod(path, stat.S_IMODE((fresh / HEADER).stat().st_mode))  # the tensor file has the rights of the others
