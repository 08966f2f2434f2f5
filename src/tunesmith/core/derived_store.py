# SPDX-License-Identifier: Apache-2.0
"""Derived bases as files: a folder with `derived.json` (records, the form of each module) and `derived.safetensors`.

The folder holds what differs from the base that the first recipe was run on, and is refused on any other one. A module
of another form than a dense layer is registered with `@form(name)` and has `describe() -> dict` (plain data) and a class
method `blank(description) -> module`, whose tensors are then filled in.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunesmith.core import replace
from tunesmith.core.apply import sharing_copy
from tunesmith.core.base import Base
from tunesmith.core.derive import changed, changed_digest, records, require_parent
from tunesmith.core.errors import DeltaError, UsageError, nearest
from tunesmith.core.header import strict_json
from tunesmith.core.held import put_module

FORMAT = "tunesmith-derived/1"
HEADER, TENSORS = "derived.json", "derived.safetensors"
C = TypeVar("C", bound=type)
_FORMS: dict[str, type] = {}


def form(name: str) -> Callable[[C], C]:
    """Class decorator that enters a module class under `name`."""

    def wrap(cls: C) -> C:
        _FORMS[name] = cls
        cast(Any, cls).form = name
        return cls

    return wrap


def is_derived(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a derived base."""
    return (Path(folder) / HEADER).is_file()


def save_derived(base: Base, folder: str | Path) -> Path:
    """Write a derived base beside its parent's name and fingerprint; gives the folder.

    Raises UsageError for a base that was not derived, and for a folder that holds something else.
    """
    steps = records(base)
    if not steps:
        raise UsageError("it was not derived from another base, so there is nothing to save", where=base.name)
    target = Path(folder).resolve()
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not is_derived(target)):
        raise UsageError("holds something else, so it is not overwritten", where=str(target), hint="another folder")
    paths = sorted({p for s in steps for p in s["paths"]})
    tensors = {k: t.detach().cpu().contiguous().clone() for k, t in changed(base.model, paths).items()}
    modules = {p: _described(base.modules[p]) for p in paths if p in base.modules and p}
    target.parent.mkdir(parents=True, exist_ok=True)
    replace.recover(target, (HEADER, TENSORS))
    with replace.scratch(target) as fresh:
        save_file(tensors, fresh / TENSORS, metadata={"format": "pt", "tunesmith": FORMAT})
        head = {
            "format": FORMAT, "name": base.name, "opened_as": base.source.get("name"), "derived": steps,
            "dtype": str(base.dtype).removeprefix("torch."), "modules": modules, "sha256": _sha256(fresh / TENSORS),
        }  # fmt: skip
        (fresh / HEADER).write_text(json.dumps(head, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        replace.publish(fresh, target, (HEADER, TENSORS))
    return target


def parent_of(folder: str | os.PathLike[str]) -> tuple[str, str]:
    """The name by which the base that a saved one was made from is opened, and the dtype it had ("float32").

    Raises DeltaError where no name was kept.
    """
    head = _header(Path(folder))
    if not isinstance(head.get("opened_as"), str):
        hint = "open that base and use load_derived(folder, parent)"
        raise DeltaError("does not say by what name its parent is opened", where=str(folder), hint=hint)
    return head["opened_as"], head["dtype"]


def load_derived(folder: str | os.PathLike[str], parent: Base) -> Base:
    """Read a saved derived base. `parent` is the base that the first recipe was run on; what did not change is shared.

    Its tensors take the parent's dtype (packed ones stay as they are). Raises BaseMismatch for another parent, DeltaError
    for damaged files.
    """
    place = Path(folder)
    head = _header(place)
    steps, described = head["derived"], head["modules"]
    require_parent(parent, steps[0])
    path = place / TENSORS
    try:
        if _sha256(path) != head["sha256"]:
            raise DeltaError("its bytes are not those that were saved", where=str(path))
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise DeltaError(f"cannot be read ({e})", where=str(path)) from None
    model = sharing_copy(parent.model)
    _detach_shared(model, steps)
    _put_blanks(model, described, parent.device, str(place / HEADER))
    _fill(model, tensors, {p for s in steps for p in s["paths"]}, parent, str(path))
    if changed_digest(model, steps[-1]) != steps[-1]["digest"]:
        raise DeltaError("the tensors do not give the recorded digest", where=str(path))
    if head["dtype"] != str(parent.dtype).removeprefix("torch."):
        for p in described:
            model.get_submodule(p).to(parent.dtype)
    return _named(model, parent, head, place)


def outline(folder: str | os.PathLike[str], parent: Base) -> Base:
    """A saved derived base without its weights, on the meta device, from its parent without weights: for plans.

    `parent` must have the dtype that `parent_of` gives. Raises DeltaError for a damaged header or another architecture.
    """
    place = Path(folder)
    head = _header(place)
    model = sharing_copy(parent.model)
    _put_blanks(model, head["modules"], torch.device("meta"), str(place / HEADER))
    return _named(model, parent, head, place)


def _named(model: nn.Module, parent: Base, head: Mapping[str, Any], place: Path) -> Base:
    return Base(
        model, tokenizer=parent.tokenizer, example=parent._example, name=str(head["name"]), family=parent.family,
        source={**parent.source, "derived": head["derived"], "folder": str(place)},
    )  # fmt: skip


def _put_blanks(model: nn.Module, described: Mapping[str, Any], device: torch.device, where: str) -> None:
    """Empty modules of the described forms in place of the parent's; the others stay."""
    known = dict(model.named_modules())
    for p, entry in described.items():
        if p not in known:
            raise DeltaError(f"the parent has no module {p!r}", where=where)
        with device:
            blank = _blank(entry, where)
        if blank is not None:
            put_module(model, p, blank.to(device))


def _described(module: nn.Module) -> dict[str, Any]:
    name = next((n for n, cls in _FORMS.items() if type(module) is cls), None)
    return {"form": name, **cast(Any, module).describe()} if name else {"form": "as it was"}


def _blank(entry: Mapping[str, Any], where: str) -> nn.Module | None:
    """An empty module of the entry's form; None for one that keeps its class."""
    name = entry.get("form")
    if name == "as it was":
        return None
    importlib.import_module("tunesmith.derive")
    if name not in _FORMS:
        raise DeltaError(f"unknown form {name!r}", where=where, hint=nearest(str(name), _FORMS))
    try:
        return cast(nn.Module, cast(Any, _FORMS[name]).blank(entry))
    except (KeyError, TypeError, ValueError, UsageError) as e:
        raise DeltaError(f"a module of form {name!r} is described wrongly ({e})", where=where) from None


def _detach_shared(model: nn.Module, steps: list[dict[str, Any]]) -> None:
    """Where a step replaced the whole model, its tensors become this model's own, tied ones once."""
    if not any("" in s["paths"] for s in steps):
        return
    own: dict[int, nn.Parameter] = {}
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = own.setdefault(id(p), nn.Parameter(p.detach().clone(), requires_grad=False))
        for name, b in m._buffers.items():
            m._buffers[name] = None if b is None else b.clone()


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor], paths: set[str], parent: Base, where: str) -> None:
    have = changed(model, paths)
    if have.keys() != tensors.keys():
        odd = sorted(have.keys() ^ tensors.keys())
        raise DeltaError(f"{len(odd)} tensors are missing or in excess, such as {odd[0]!r}", where=where)
    for key, value in tensors.items():
        if have[key].shape != value.shape or have[key].dtype != value.dtype:
            raise DeltaError(f"{key} is {value.dtype} {list(value.shape)}", where=where)
    if "" in paths:
        for key, value in tensors.items():
            have[key].copy_(value)
        return
    for key, value in tensors.items():  # new tensors: those of the parent stay as they are
        at, _, name = key.rpartition(".")
        module = model.get_submodule(at)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value.to(parent.device), requires_grad=False)
        else:
            module._buffers[name] = value.to(parent.device)


def _header(place: Path) -> dict[str, Any]:
    path = place / HEADER
    try:
        head = strict_json(path.read_bytes(), str(path))
    except OSError as e:
        raise DeltaError(f"cannot be read ({e.strerror or e})", where=str(path)) from None
    fields = {"format": str, "name": str, "derived": list, "modules": dict, "sha256": str, "dtype": str}
    if head.get("format") != FORMAT or any(not isinstance(head.get(k), t) for k, t in fields.items()):
        raise DeltaError(f"is no {FORMAT} header", where=str(path))
    wanted = {"recipe": str, "parent": str, "parent_name": str, "paths": list, "digest": str}
    if not head["derived"] or any(
        not isinstance(s, dict) or any(not isinstance(s.get(k), t) for k, t in wanted.items()) for s in head["derived"]
    ):
        raise DeltaError("its records are damaged", where=str(path))
    return head


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
