# SPDX-License-Identifier: Apache-2.0
"""What the verbs that combine deltas and models share: sources, weights, sizes, and writing the result with its proof."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cli.output import Result, amount, cells, progress_console, table, visible
from tunesmith.cli.places import delta_folder, load_base
from tunesmith.core.errors import DeltaError, UsageError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.core.base import Base
    from tunesmith.core.delta import Delta

FORMS = ("delta", "model")
CANCELLED = 1e-5  # of the largest effect of a source: what is left of it after that is rounding
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Models:
    """Options that only model folders have."""

    dtype: str | None = None
    vocabulary: str | None = None
    missing: str = "base"
    shard_size: str = "5GB"
    resume: bool = True


def checked_form(form: str | None) -> str | None:
    """What to write. Raises UsageError naming the nearest."""
    if form is not None and form not in FORMS:
        raise UsageError(f"unknown form {form!r}", where="--as", hint=nearest(form, FORMS))
    return form


def is_model(text: str) -> bool:
    """Whether the text names a model folder: it has a config.json and no delta."""
    place = Path(text).expanduser() if text.strip() and "\0" not in text else None
    return place is not None and (place / "config.json").is_file() and not (place / "delta.json").is_file()


def are_models(sources: Sequence[str]) -> bool:
    """Whether all sources are model folders. Raises UsageError for a mixture."""
    found = [is_model(s) for s in sources]
    if any(found) and not all(found):
        one, other = sources[found.index(True)], sources[found.index(False)]
        hint = "make a delta of the model first: tunesmith between BASE MODEL --to FOLDER"
        raise UsageError(f"{one!r} is a model folder and {other!r} is none", hint=hint)
    return all(found)


def parsed_weights(text: str | None, count: int) -> list[float] | None:
    """Numbers from "0.5,0.3". Raises UsageError for other text or another count."""
    if text is None:
        return None
    try:
        out = [float(w) for w in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r} is no list of numbers", where="--weights", hint="as in --weights 0.5,0.3") from None
    if len(out) != count:
        raise UsageError(f"{len(out)} weights for {count} sources", where="--weights", hint="give one a source")
    return out


def parsed_size(text: str) -> int:
    """Bytes from "500MB" or "5GiB". Raises UsageError."""
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B?)\s*", text, re.IGNORECASE)
    unit = m[2].upper() if m else "?"
    unit = unit if unit in _UNITS else f"{unit}B"
    if m is None or unit not in _UNITS or float(m[1]) <= 0:
        raise UsageError(f"{text!r} is no size", where="--shard-size", hint="as in 500MB or 5GB")
    return max(1, int(float(m[1]) * _UNITS[unit]))


def chosen_method(method: str | None) -> Any:
    """The combiner that --method names. Raises UsageError with what there is."""
    from tunesmith.core.combine import COMBINERS

    if method is None:
        known = ", ".join(i.name for i in COMBINERS.all()) or "none are installed"
        hint = f"--method with one of {known}; options as in --method ties:density=0.2"
        raise UsageError("how the sources are to be combined is not said", hint=hint)
    return COMBINERS.parse(method)


def local_model(model: str | None) -> Path:
    """The base's folder. Raises UsageError where none is named, or what is named is no folder."""
    if model is None:
        hint = "--model FOLDER; for an average of models any of them can be the base"
        raise UsageError("model folders are merged against a base, and none is named", where="--model", hint=hint)
    if not is_model(model):
        raise UsageError(f"{model!r} is no model folder", where="--model", hint="give a folder with config.json")
    return Path(model).expanduser()


def merge_models(
    sources: Sequence[str],
    into: Path,
    method: str | None,
    weights: str | None,
    form: str,
    seed: int,
    model: str | None,
    options: Models,
) -> Result:
    """Merge model folders out of core into a model folder, or into a delta of the base."""
    from tunesmith.compose.between import between_folders
    from tunesmith.compose.folders import ModelFolder
    from tunesmith.compose.stream import merge_folders
    from tunesmith.compose.vocabulary import align

    base = ModelFolder(local_model(model))
    folders = [ModelFolder(s) for s in sources]
    how, given, size = chosen_method(method), parsed_weights(weights, len(folders)), parsed_size(options.shard_size)
    plan = None
    if options.vocabulary is not None:
        plan = align(base, folders, target=options.vocabulary, missing=options.missing)
        for line in plan.summary().splitlines():
            progress_console().print(visible(line), soft_wrap=True)
    if form == "delta":
        if plan is not None and plan.new_tokens:
            raise UsageError("a delta cannot add rows to the token table", where="--as delta", hint="--vocabulary base")
        _free(into)
        into.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{into.name[:40]}.", dir=into.parent))
        try:
            bar = _bar("merging")
            merge_folders(
                base, folders, how, given, beside / "merged", dtype="float32", vocabulary=plan, seed=seed, progress=bar
            )
            found = between_folders(base, beside / "merged", into)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        data = {
            "folder": str(into), "form": "delta", "delta": into.resolve().name, "digest": found.saved.digest,
            "sites": found.sites, "largest_change": found.largest, "gap": found.gap,
        }  # fmt: skip
        return Result(data, f"merged {len(folders)} models into a delta: {found}")
    made = merge_folders(
        base, folders, how, given, into, dtype=options.dtype, vocabulary=plan, seed=seed, shard_bytes=size,
        resume=options.resume, progress=_bar("merging"),
    )  # fmt: skip

    def view(console: Console) -> None:
        shown = table("file", "size")
        for name, n in made.files.items():
            shown.add_row(*cells(name, amount(n)))
        console.print(visible(str(made.path)), soft_wrap=True)
        console.print(shown)

    data = {
        "folder": str(made.path), "form": "model", "files": made.files, "combiner": made.record["combiner"],
        "options": made.record["options"], "base": made.record["base"], "sources": made.record["sources"],
        "resumed_shards": made.resumed, "vocabulary": made.record["vocabulary"], **made.record["proof"],
    }  # fmt: skip
    return Result(data, f"merged {len(folders)} models by {made.record['combiner']}: {made}", view)


def _bar(what: str) -> Callable[[int, int, str], None] | None:
    """A line of progress on a terminal, nothing elsewhere."""
    console = progress_console()
    if not console.is_terminal:
        return None
    shown = -1

    def say(done: int, total: int, name: str) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        if percent != shown:
            shown = percent
            console.print(f"{what}: {percent} %", end="\n" if done >= total else "\r")

    return say


def merge_deltas(
    sources: Sequence[str], method: str | None, weights: str | None, seed: int, model: str | None, device: str
) -> tuple[Base, Delta, list[Delta]]:
    """The base of all sources, their combination, and the sources."""
    from tunesmith.compose import merge

    how, given = chosen_method(method), parsed_weights(weights, len(sources))
    base, deltas = load_deltas(sources, model, device)
    return base, merge(base, deltas, how, weights=given, seed=seed), deltas


def load_deltas(sources: Sequence[str], model: str | None, device: str) -> tuple[Base, list[Delta]]:
    """The base of the first source, and every source checked against it."""
    from tunesmith.core import store
    from tunesmith.core.delta import Delta

    folders = [delta_folder(s) for s in sources]
    base = load_base(folders[0], store.peek(folders[0]), model, device, exact=True)
    return base, [Delta.load(f, base) for f in folders]


def _free(to: Path) -> None:
    """Raise UsageError for a place that a new delta folder cannot take."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError("is there already", where=str(to), hint="choose a new folder, or empty this one")


def write_delta(base: Base, delta: Delta, to: Path, verb: str, sources: Sequence[Delta] = (), **more: Any) -> Result:
    """Save a delta, read it back, and prove that it has the outputs of the one in memory.

    Raises DeltaError for one that changes nothing, or nothing but rounding where `sources` cancel, or is read back
    otherwise.
    """
    from tunesmith.core.delta import Delta
    from tunesmith.core.store import save

    _free(to)
    before = base.probe_outputs()

    def moved(d: Delta) -> tuple[Any, float]:
        with base.using(d):
            out = base.probe_outputs()
        return out, float((out - before).abs().max())

    want, effect = moved(delta)
    if effect <= CANCELLED * max((moved(d)[1] for d in sources), default=0.0):
        hint = "the sources cancel, or other weights and options would leave more"
        raise DeltaError("the result changes nothing", where=delta.name, hint=hint)
    delta.name = to.resolve().name
    saved = save(delta, to, base=base)
    with base.using(Delta.load(to, base)):
        gap = float((base.probe_outputs() - want).abs().max())
    if gap > 1e-4 * max(1.0, float(want.abs().max())):
        raise DeltaError(f"read back, it differs by {gap:.2e}", where=str(to))

    def view(console: Console) -> None:
        shown = table("part", "method", "sites", "size")
        for p in delta.parts:
            size = sum(t.numel() * t.element_size() for _, _, t in p.items())
            shown.add_row(*cells(p.name, p.info.name, len(p.kind_of), amount(size)))
        console.print(visible(str(to)), soft_wrap=True)
        console.print(shown)

    data = {
        "folder": str(to), "form": "delta", "delta": delta.name, "digest": saved.digest, "bytes": saved.bytes,
        "tensors": saved.tensors, "effect": effect, "largest_gap": gap, **more,
    }  # fmt: skip
    extra = "".join(f", {k.replace('_', ' ')} {v:.3g}" for k, v in more.items() if isinstance(v, float))
    proof = f"{verb} {delta.name} ({saved.digest[:12]}): largest output change {effect:.3g}{extra}, read back with gap {gap:.1e}, {saved.bytes:,} bytes"
    return Result(data, proof, view)
