# SPDX-License-Identifier: Apache-2.0
"""Find and load a base: a bundled short name, a local folder or GGUF file, or a hub id."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tunesmith.core.errors import ResourceError, UsageError, nearest
from tunesmith.models import dequantised, precision
from tunesmith.models.bundled import BUNDLED, Bundled, locate, version
from tunesmith.models.efficientnet_lite import EfficientNetLite0
from tunesmith.models.pretrained import (
    HEAD_SEED,
    Loaded,
    Request,
    check_task,
    load_model,
    load_tokenizer,
    quiet,
    reported,
)
from tunesmith.models.sentence import folder_reader, hub_reader, sentence_layout

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True)
class Parts:
    """A loaded base before it is wrapped.

    `family` is `causal-lm`, `encoder`, `vision` or `module`. `source` says where it came from (`kind`, `location`,
    `task`, `dtype`, `new_tensors`, `unused_tensors`; for bundled models also `package`, `version`, `file`, `sha256`,
    `license`); it holds no machine paths for bundled models.
    """

    model: nn.Module
    tokenizer: Any | None
    name: str
    family: str
    source: dict[str, Any]


def load_parts(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    task: str | None = None,
    num_labels: int | None = None,
) -> Parts:
    """Load a base in evaluation mode.

    `name_or_path` is a short name (`smollm2-135m-instruct`, `minilm-l6`, `efficientnet-lite0`), a folder, a `.gguf`
    file or a hub id `owner/name`. `task` picks the head (see `pretrained.TASKS`); None reads it from the
    configuration. `num_labels` sizes a classification head; a head that the checkpoint lacks is initialised from a
    fixed seed and listed in `source["new_tensors"]`. Code that comes with a model is never run.

    Raises `UsageError` for an unknown name, task, dtype or device and for a model that cannot be read;
    `ResourceError` for a missing package, an unreachable hub or too little memory.
    """
    name = os.fspath(name_or_path)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise UsageError(f"{name!r} names no base", hint="choices: " + ", ".join(BUNDLED) + ", a folder or a hub id")
    check_task(task)
    if num_labels is not None and num_labels < 1:
        raise UsageError(f"num_labels must be at least 1, not {num_labels}")
    place = precision.check_device(device)
    request = Request(name, precision.parse(dtype, place), task, num_labels)
    if name in BUNDLED:
        parts = _load_bundled(BUNDLED[name], request)
    elif (path := Path(name).expanduser()).exists():
        parts = _load_local(path, request)
    else:
        parts = _load_hub(name, request)
    with reported(name):
        parts.model.to(place)
    return parts


def _finish(request: Request, name: str, kind: str, location: str, **details: Any) -> Parts:
    loaded = load_model(request)
    tokenizer = load_tokenizer(request, loaded.family)
    if getattr(loaded.model, "config", None) is not None:
        loaded.model.config._name_or_path = location
    if loaded.family == "encoder":
        read = (
            hub_reader(request.location, request.offline) if request.is_hub else folder_reader(Path(request.location))
        )
        layout = sentence_layout(read)
        details |= {} if layout is None else {"sentence": layout}
    return Parts(loaded.model, tokenizer, name, loaded.family, _source(loaded, request, kind, location) | details)


def _source(loaded: Loaded, request: Request, kind: str, location: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "location": location,
        "task": loaded.task,
        "dtype": str(request.dtype).removeprefix("torch."),
        "new_tensors": loaded.new_tensors,
        "unused_tensors": loaded.unused_tensors,
    }


def _load_bundled(entry: Bundled, request: Request) -> Parts:
    path = locate(entry)
    weights = path / "model.safetensors" if path.is_dir() else path
    details: dict[str, Any] = {
        "package": entry.distribution,
        "version": version(entry),
        "file": weights.name,
        "license": entry.licence,
    }
    with reported(entry.name):
        details["sha256"] = dequantised.file_sha256(weights)
    if entry.kind == "efficientnet-lite":
        return _load_efficientnet(entry, path, request, details)
    if entry.kind == "gguf":
        request = _gguf_request(entry, path, request, details["sha256"])
    else:
        request = replace(request, location=str(path), task=request.task or entry.task)
    return _finish(replace(request, attention="sdpa"), entry.name, "bundled", entry.name, **details)


def _load_efficientnet(entry: Bundled, path: Path, request: Request, details: dict[str, Any]) -> Parts:
    if request.task not in (None, entry.task):
        raise UsageError(f"{entry.name} cannot do {request.task!r}", hint=f"its task is {entry.task!r}")
    model = EfficientNetLite0()
    with reported(entry.name):
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    new: list[str] = []
    if request.num_labels not in (None, model._fc.out_features):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(HEAD_SEED)
            model._fc = nn.Linear(model._fc.in_features, request.num_labels)
        new = ["_fc.bias", "_fc.weight"]
    loaded = Loaded(model.to(request.dtype).eval(), entry.task, "vision", new)
    return Parts(model, None, entry.name, "vision", _source(loaded, request, "bundled", entry.name) | details)


def _gguf_request(entry: Bundled, path: Path, request: Request, sha256: str) -> Request:
    """The request for the dequantised folder in the cache, or for the GGUF file where there can be none."""
    direct = replace(request, location=str(path.parent), gguf=path.name)

    def write(scratch: Path) -> None:
        log.info("converting %s once; later loads read the cached copy", entry.name)
        plain = replace(direct, dtype=torch.float32, task=None, num_labels=None)
        loaded = load_model(plain)
        with quiet():
            loaded.model.save_pretrained(scratch)
            load_tokenizer(plain, loaded.family).save_pretrained(scratch)

    folder = dequantised.entry_path(entry.name, sha256, f"transformers {transformers.__version__}")
    # The bundled file stores about 5 bits a weight and the copy 32.
    cached = dequantised.obtain(folder, write, needs_bytes=8 * path.stat().st_size)
    return direct if cached is None else replace(request, location=str(cached))


def _load_local(path: Path, request: Request) -> Parts:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UsageError("this file is no model", where=str(path), hint="give a model folder or a .gguf file")
        return _finish(
            replace(request, location=str(path.parent), gguf=path.name), path.stem, "gguf", str(path), file=path.name
        )
    _check_folder(path)
    return _finish(replace(request, location=str(path)), path.resolve().name, "folder", str(path))


def _check_folder(path: Path) -> None:
    names = sorted(p.name for p in path.iterdir())
    if "config.json" not in names:
        if "adapter_config.json" in names:
            hint = "this is an adapter: give the folder of the model it was trained on"
        elif any(n.endswith(".gguf") for n in names):
            hint = "give the path of the .gguf file itself"
        else:
            hint = "the folder holds " + (", ".join(names[:6]) if names else "nothing")
        raise UsageError("this folder has no config.json, so it is no model", where=str(path), hint=hint)
    if not any(next(path.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        raise UsageError(
            "this folder has a config.json but no weights",
            where=str(path),
            hint="expected model.safetensors, model.safetensors.index.json with its shards, or pytorch_model.bin",
        )


def _load_hub(name: str, request: Request) -> Parts:
    request = hub_request(name, request)
    with hub_reported(name, request):
        return _finish(request, name, "hub", name)


def hub_request(name: str, request: Request) -> Request:
    """The request for a hub id, offline where the hub does not answer. Raises UsageError for what is no hub id."""
    if not HUB_ID.fullmatch(name):
        looks_like_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name
        if looks_like_path:
            raise UsageError("there is no such folder or file", where=name, hint="check the path")
        hint = f"{nearest(name, BUNDLED)}; a hub id is written owner/name, and a folder must exist"
        raise UsageError(f"unknown base {name!r}", hint=hint)
    return replace(request, location=name, is_hub=True, offline=not _hub_answers())


@contextlib.contextmanager
def hub_reported(name: str, request: Request) -> Iterator[None]:
    """Say that the hub cannot be reached, where that is why a model was not found."""
    try:
        yield
    except UsageError as error:
        if not request.offline or not isinstance(error.__cause__, OSError):
            raise
        raise ResourceError(
            "the model hub cannot be reached and this model is not in the local hub cache",
            where=name,
            hint="bases that need no hub: " + ", ".join(BUNDLED) + "; or give the folder of a downloaded model",
        ) from error


def _hub_answers(timeout: float = 5.0) -> bool:
    """One short request: the hub client itself would retry for half a minute before giving up."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception as error:  # any transport error of the client's HTTP library means the same here
        log.debug("hub probe failed: %s", error)
        return False
    return True
