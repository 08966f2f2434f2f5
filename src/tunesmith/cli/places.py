# SPDX-License-Identifier: Apache-2.0
"""Where runs and deltas lie, and which base a delta names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import DeltaError, UsageError, nearest

if TYPE_CHECKING:
    from tunesmith.core.base import Base

_HEADER = "delta.json"


def registry() -> Path:
    """The folder of runs: `$TUNESMITH_HOME`, else `./runs`. It may not exist."""
    return Path(os.environ.get("TUNESMITH_HOME") or "runs").expanduser()


def run_names(root: Path | None = None) -> list[str]:
    """Names of the runs in the registry."""
    place = root or registry()
    return sorted(p.name for p in place.iterdir() if (p / "run.json").is_file()) if place.is_dir() else []


def delta_folder(text: str) -> Path:
    """The folder of a delta, given as that folder, as a run's folder, or as the name of a run in the registry.

    Raises DeltaError naming the nearest run when there is none.
    """
    if not text.strip() or "\0" in text:
        raise UsageError(f"{text!r} names no delta", hint="give a delta's folder or the name of a run")
    given = Path(text).expanduser()
    plain = given.name == text and text not in (".", "..")
    named = [registry() / text / "delta", registry() / text] if plain else []
    for place in (given, given / "delta", *named):
        if (place / _HEADER).is_file():
            return place
    if os.path.lexists(given):
        return given  # reading it says what is wrong with it
    if plain and (registry() / text / "run.json").is_file():
        hint = "the run is not finished; 'tunesmith tune --resume' continues the newest one"
        raise DeltaError(f"the run {text!r} has no delta yet", where=str(registry() / text), hint=hint)
    hint = nearest(text, run_names()) if plain else "give a delta's folder or the name of a run"
    raise DeltaError(f"there is no delta {text!r}", where=str(registry()) if plain else None, hint=hint)


def run_folder(folder: Path) -> Path | None:
    """The run a delta folder belongs to, or None."""
    parent = folder.resolve().parent
    return parent if (parent / "run.json").is_file() else None


def run_record(folder: Path) -> dict[str, Any]:
    """What `run.json` of the delta's run says; empty where there is none or it cannot be read."""
    run = run_folder(folder)
    if run is None:
        return {}
    try:
        found = json.loads((run / "run.json").read_bytes()[: 1 << 24].decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def base_name(folder: Path, head: dict[str, Any], model: str | None) -> str:
    """The base to load for a delta: the one named, else the one its run or the delta itself records.

    Raises UsageError when nothing is recorded.
    """
    facts = head["provenance"]
    source = facts.get("source") if isinstance(facts.get("source"), dict) else {}
    made_for = facts.get("base") if isinstance(facts.get("base"), dict) else {}
    for name in (model, run_record(folder).get("model"), source.get("location"), made_for.get("name")):
        if isinstance(name, str) and name.strip():
            return name
    raise UsageError("the delta does not say which base it is for", where=str(folder), hint="name it with --model")


def check_model_name(model: str) -> None:
    """Refuse a base that is no bundled name, no folder or file here, and not written like a hub id."""
    import re

    from tunesmith.models.bundled import BUNDLED

    known = model in BUNDLED or ("\0" not in model and Path(model).expanduser().exists())
    if known or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
        return
    hint = f"{nearest(model, BUNDLED)}; a hub id is written owner/name, and a folder must exist"
    raise UsageError(f"unknown base {model!r}", hint=hint)


def load_base(
    folder: Path, head: dict[str, Any], model: str | None, device: str = "auto", *, exact: bool = False
) -> Base:
    """The base of a delta, loaded. Raises UsageError saying where the name came from when it cannot be found.

    With `exact` a base on the CPU is loaded in fp32, where a folded weight and a live delta can be told apart from
    rounding: in bf16 thirty layers of it reach a twentieth of the largest output.
    """
    import torch

    import tunesmith

    name = base_name(folder, head, model)
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    try:
        return tunesmith.load(name, device=device, **({"dtype": "fp32"} if exact and on_cpu else {}))
    except UsageError as error:
        if model is not None:
            raise
        hint = f"the delta records {name!r} as its base; name another place with --model"
        raise UsageError(error.what, where=error.where, hint=f"{error.hint}\n{hint}" if error.hint else hint) from None
