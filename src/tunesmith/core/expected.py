# SPDX-License-Identifier: Apache-2.0
"""What a saved delta must contain: its methods and options, its tensor file, and the tensors its methods need."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import SHARED, Part
from tunesmith.core.errors import BaseMismatch, DeltaError, TunesmithError, nearest
from tunesmith.core.header import JSON_LIMIT, strict_json
from tunesmith.core.sites import Site


def retyped(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as read from JSON, with lists made tuples where the method's field is a tuple."""
    hints = typing.get_type_hints(cls)

    def wants_tuple(hint: Any) -> bool:
        kinds = {typing.get_origin(h) or h for h in (hint, *typing.get_args(hint))}
        return tuple in kinds and list not in kinds

    return {k: _tuples(v) if k in hints and wants_tuple(hints[k]) else v for k, v in options.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def build_method(
    entry: Mapping[str, Any], where: str, resolver: Callable[[str], methods.MethodInfo]
) -> tuple[methods.MethodInfo, Any]:
    """The method of a header's part. Raises DeltaError for an unknown method, option, or value out of range."""
    name = entry["method"]
    try:
        info = resolver(name)
    except TunesmithError as e:
        hint = f"{e.hint or ''} (a method is known once its module is imported)".strip()
        raise DeltaError(f"unknown method {name!r}", where=where, hint=hint) from None
    if info.carrier != entry["carrier"]:
        raise DeltaError(f"{name!r} is a {info.carrier} method here, a {entry['carrier']} one there", where=where)
    known = [row["name"] for row in methods.schema(info.cls)]
    for key in entry["options"]:
        if key not in known:
            raise DeltaError(f"{name} has no option {key[:80]!r}", where=where, hint=nearest(key[:80], known))
    try:
        return info, info.cls(**retyped(info.cls, entry["options"]))
    except TunesmithError as e:
        raise DeltaError(str(e), where=where) from None
    except Exception as e:  # a method may check its options in ways of its own
        raise DeltaError(f"{name} refuses its options ({type(e).__name__}: {e})", where=where) from None


def check_tensor_file(head: Mapping[str, Any], path: Path) -> None:
    """Compare the safetensors header with the manifest, without reading a tensor. Raises DeltaError."""
    where, size = str(path), os.stat(path).st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or 8 + length > size:
            raise DeltaError(f"was cut off or is no safetensors file ({size} bytes)", where=where)
        if length > JSON_LIMIT:
            raise DeltaError("its header is too large", where=where)
        inner = strict_json(f.read(length), where)
    inner.pop("__metadata__", None)
    wanted = head["tensors"]
    for key in wanted:
        if key not in inner:
            raise DeltaError(f"the tensor {key!r} is missing", where=where, hint=nearest(key, inner))
    for key in inner:
        if key not in wanted:
            raise DeltaError(
                f"the tensor {key[:120]!r} is in no manifest", where=where, hint=nearest(key[:120], wanted)
            )
    end = 0
    for key, entry in inner.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise DeltaError(f"the entry of {key!r} is damaged", where=where)
        for what in ("dtype", "shape"):
            if entry[what] != wanted[key][what]:
                raise DeltaError(
                    f"{key!r} has {what} {entry[what]}, the manifest says {wanted[key][what]}", where=where
                )
        span = entry["data_offsets"]
        if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)):
            raise DeltaError(f"the entry of {key!r} is damaged", where=where)
        end = max(end, span[1])
    if size != 8 + length + end or size != head["file"]["bytes"]:
        what = f"was altered or cut off: {size} bytes, {max(8 + length + end, head['file']['bytes'])} were saved"
        raise DeltaError(what, where=where, hint="fetch or save the delta again")


def check_part(part: Part, base: Base, where: str) -> None:
    """Check a part's sites, ties and tensor names against `base`. Raises BaseMismatch, DeltaError."""
    here = f"{where} part {part.name!r}"
    known = {(s.path, s.kind): s for s in base.sites.all()}
    sites: list[Site] = []
    for path, kind in part.kind_of.items():
        if (path, kind) not in known:
            others = [s.kind for s in base.sites.all() if s.path == path]
            what = f"is a {others[0]} on this base, not a {kind}" if others else f"this base has no such {kind}"
            raise BaseMismatch(what, where=f"{here} site {path!r}", hint=nearest(path, [p for p, _ in known]))
        sites.append(known[path, kind])
    for other, path in part.alias.items():
        tied = next((s.tied for s in sites if s.path == path), ())
        if other not in base.modules or (other not in tied and base.device.type != "meta"):
            raise BaseMismatch(f"{other!r} does not share its weight with {path!r} on this base", where=here)
    _check_names(part, sites, here)


def _check_names(part: Part, sites: list[Site], where: str) -> None:
    """Compare tensor names with those of a fresh part.

    Methods that bake or prune may have dropped some; none may have more than they make.
    """
    method = part.method
    may_drop = hasattr(method, "bake") or hasattr(method, "after_step")
    calibrates = hasattr(method, "calibrate") and not methods.observes(method)  # that one makes its names in `init`
    have: dict[str, set[str]] = {path: set() for path in [SHARED, *part.kind_of]}
    for path, name, _ in part.items():
        have[path].add(name)
    fresh: dict[str, set[str]] = {}
    calibrated: dict[tuple[str, ...], set[str]] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            if hasattr(method, "shared"):
                fresh[SHARED] = set(method.shared(sites, torch.Generator().manual_seed(0)))
            for s in sorted(sites, key=lambda s: sum(s.shape)):
                tensors = method.init(s, torch.Generator().manual_seed(0))
                group = (s.kind, *sorted(tensors))
                if calibrates and group not in calibrated:  # dear, so once for each set of names
                    calibrated[group] = set(method.calibrate(s, tensors, s.params()))
                fresh.setdefault(s.path, set()).update(calibrated.get(group, tensors))
        except TunesmithError as e:
            raise DeltaError(f"its method cannot be set up on this base: {e}", where=where) from None
        except Exception as e:
            raise DeltaError(
                f"its method cannot be set up on this base ({type(e).__name__}: {e})", where=where
            ) from None
    for path, names in have.items():
        makes = fresh.get(path, set())
        at = f"{where} site {path!r}"
        for name in sorted(makes - names) if not may_drop else []:
            raise DeltaError(f"the tensor {name!r} is missing", where=at, hint=f"there are: {sorted(names) or 'none'}")
        for name in sorted(names - makes):
            raise DeltaError(f"{part.info.name} makes no tensor {name!r}", where=at, hint=nearest(name, makes))
