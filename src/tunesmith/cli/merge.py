# SPDX-License-Identifier: Apache-2.0
"""`tunesmith merge`: a delta folded into a full Hugging Face folder, or several sources combined into one."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import targets
from tunesmith.cli.output import Debug, Device, Json, Model, Result, amount, cells, examples, table, visible
from tunesmith.cli.places import delta_folder, load_base
from tunesmith.cli.verify import gap_check
from tunesmith.core import landing
from tunesmith.core.errors import DeltaError, ResourceError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from tunesmith.core.base import Base
    from tunesmith.core.delta import Delta

HELP = examples(
    "tunesmith merge demo --into merged",
    "tunesmith merge poems sums --method ties:density=0.2 --weights 0.5,0.3 --into both",
    "tunesmith merge tuned-a tuned-b --model base --method linear --weights 0.5,0.5 --into soup --json",
)


def attach(app: typer.Typer) -> None:
    app.command("merge", epilog=HELP, short_help="Fold a delta into its base, or combine deltas or models")(merge)


def merge(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Deltas (folders, runs or names), or model folders.")
    ],
    into: Annotated[Path, typer.Option("--into", metavar="FOLDER", help="The folder to write.")],
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME[:OPTIONS]", help="How to combine: see 'methods --family combiners'."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W,...", help="One a source; 1 for all by default.")
    ] = None,
    write_as: Annotated[
        str | None, typer.Option("--as", metavar="FORM", help="delta or model. [default: delta for several deltas]")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of combiners that draw at random.")] = 0,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="Model folders: what to write, when theirs differ.")
    ] = None,
    vocabulary: Annotated[
        str | None, typer.Option("--vocabulary", metavar="WHOSE", help="Model folders: match tokens; base or union.")
    ] = None,
    missing: Annotated[
        str, typer.Option("--missing", metavar="ROWS", help="Rows of tokens a model lacks: base, mean or zero.")
    ] = "base",
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="Model folders: largest file, as 500MB or 5GB.")
    ] = "5GB",
    packed: Annotated[
        Path | None,
        typer.Option("--packed", metavar="FOLDER", help="Of a packed base: also write the result packed again, here."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Model folders: go on with a merge that was cut short.")
    ] = True,
    model: Model = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Fold one delta into its base, or combine several deltas, or several models.

    One delta without --method becomes a plain model folder that needs no tunesmith: safetensors, tokenizer, generation
    settings. It is loaded again before it takes its name, and must give the outputs of the applied delta and not those of
    the base. A packed base is written in full precision, and the gaps of the other choices are told; --packed also writes it
    packed again, as a base derived from that folder. Several sources need a --method; model folders are read and written
    tensor by tensor against the base given with --model. A folder that holds anything but an earlier merge is never overwritten.
    """
    from tunesmith.cli import merging

    form = merging.checked_form(write_as)
    if packed is not None and (merging.are_models(sources) or form == "delta" or (len(sources) > 1 and form is None)):
        raise UsageError("only a model that a delta is folded into is packed again", where="--packed")
    if merging.are_models(sources):
        how = merging.Models(dtype, vocabulary, missing, shard_size, resume)
        return merging.merge_models(sources, into, method, weights, form or "model", seed, model, how)
    if dtype or vocabulary:
        raise UsageError("--dtype and --vocabulary are for model folders, not for deltas")
    if len(sources) == 1 and method is None:
        if weights is not None or form == "delta":
            hint = "'tunesmith scale DELTA 0.5 --to FOLDER' writes a delta at another strength"
            raise UsageError("one delta has nothing to be combined with", where="--weights or --as delta", hint=hint)
        target = landing.free(into)
        folder = delta_folder(sources[0])
        base = load_base(folder, store_peek(folder), model, device, exact=True)
        return write_model(base, _loaded(folder, base), target, into, packed)
    base, merged, deltas = merging.merge_deltas(sources, method, weights, seed, model, device)
    if form == "model":
        return write_model(base, merged, landing.free(into), into, packed)
    return merging.write_delta(base, merged, into, "merged", deltas)


def store_peek(folder: Path) -> dict[str, Any]:
    """The checked header of a delta folder."""
    from tunesmith.core import store

    return store.peek(folder)


def _loaded(folder: Path, base: Base) -> Delta:
    from tunesmith.core.delta import Delta

    return Delta.load(folder, base)


def write_model(base: Base, loaded: Delta, target: Path, into: Path, again: Path | None = None) -> Result:
    """Fold a delta into its base and write a model folder, proved by loading it again; `again` is for it packed."""
    import torch

    _require_mergeable(base, loaded)
    before = base.probe_outputs()
    with base.using(loaded):
        applied = base.probe_outputs()
    if torch.equal(before, applied):
        hint = "a merge would be a copy of the base; train the delta first"
        raise DeltaError("the delta changes nothing", where=loaded.name, hint=hint)
    merged = base.merged(loaded)
    packed = targets.is_packed(base)
    if again is not None:
        if not packed:
            raise UsageError(f"{base.name} is not packed", where="--packed", hint="leave it out")
        targets.require_repeatable(base)
    if packed:
        merged = targets.unpacked(merged)
    choices = targets.target_gaps(base, loaded, merged) if packed else []
    with _scratch(target) as fresh:
        _write(merged, loaded, base, fresh)
        reread = _reload(fresh, base)
        found = gap_check("merge", before, applied, reread)
        if not found.ok:
            raise ResourceError(
                f"the folder, loaded again, is not base + delta: {found.detail}", where=str(into),
                hint="nothing was written; in a coarser dtype a small delta is lost in rounding",
            )  # fmt: skip
        landing.publish(fresh, target)
    if again is not None:
        made = targets.write_packed(base, again, target, applied)
        choices = [made if row["target"] == made["target"] else row for row in choices]
    files = {p.name: p.stat().st_size for p in sorted(target.iterdir()) if p.is_file()}

    def view(console: Console) -> None:
        shown = table("file", "size")
        for name, size in files.items():
            shown.add_row(*cells(name, amount(size)))
        console.print(f"{visible(str(target))}", soft_wrap=True)
        console.print(shown)
        for row in choices:
            said = row["why_not"] or f"gap to applied {row['gap']:.3g}, {amount(row['bytes'])} in memory"
            written = " (written)" if row["target"] == "dequantised" or "folder" in row else ""
            console.print(visible(f"into {row['target']}{written}: {said}"), soft_wrap=True)

    data: dict[str, Any] = {
        "folder": str(target), "files": files, "delta": loaded.name, "digest": loaded.digest, "base": base.name,
        "gap_to_applied": found.measured, "difference_from_base": _largest(reread, before),
    }  # fmt: skip
    if packed:
        data["targets"] = choices
    written = f"{sum(files.values()):,} bytes"
    proof = f"merged {loaded.name} ({loaded.digest[:12]}) and loaded it again: {found.detail}, {written}"
    return Result(data, proof, view)


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.shape == b.shape else float(a.double().abs().max())


def _require_mergeable(base: Base, delta: Delta) -> None:
    for part in delta.parts:
        if not part.info.mergeable:
            raise UsageError(
                f"{part.info.name} cannot be merged: {part.info.merge}", where=f"delta {delta.name!r}",
                hint="keep the delta and apply it: base.using(delta), or 'tunesmith chat'",
            )  # fmt: skip
    if not hasattr(base.model, "save_pretrained"):
        raise UsageError(f"{base.name} is no transformers model, so it has no folder form", hint="keep the delta")


def _write(merged: Base, delta: Delta, base: Base, fresh: Path) -> None:
    """Weights, settings and tokenizer, and a record of what they were made from."""
    from tunesmith.models.pretrained import quiet

    model: Any = merged.model
    with quiet():
        model.save_pretrained(fresh, safe_serialization=True) if _takes_format(model) else model.save_pretrained(fresh)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(fresh)
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(fresh)
    if not any(fresh.glob("*.safetensors")):
        raise ResourceError("no safetensors file was written", where=str(fresh))
    made = sorted(p.name for p in fresh.iterdir())
    record = {
        "format": landing.FORMAT, "files": made, "base": base.name, "base_digest": base.fingerprint.digest, "delta": delta.name,
        "delta_digest": delta.digest, "methods": [p.info.name for p in delta.parts],
    }  # fmt: skip
    (fresh / landing.RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for file in fresh.iterdir():
        file.chmod(0o666 & ~landing.umask())  # safetensors writes for the owner alone


def _takes_format(model: Any) -> bool:
    """Whether this transformers still has the switch for safetensors (version 5 writes nothing else)."""
    import inspect

    return "safe_serialization" in inspect.signature(model.save_pretrained).parameters


def _reload(fresh: Path, base: Base) -> Tensor:
    """The outputs of the written folder on the base's probe."""
    import tunesmith
    from tunesmith.core.base import Base

    task = base.source.get("task")
    opened = tunesmith.load(fresh, dtype=base.dtype, device=str(base.device), task=task)
    return Base(opened.model, example=base.probe(), family=base.family).probe_outputs()


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A folder beside the target that is gone afterwards, whatever happens. Raises ResourceError."""
    made_parents = _missing_parents(target)
    fresh = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.", dir=target.parent))
        yield fresh
    except OSError as error:
        full = "No space left" in str(error) or "quota" in str(error).lower()
        what = "the disk is full" if full else f"cannot be written ({error.strerror or error})"
        raise ResourceError(what, where=str(target), hint="choose another folder; nothing was written") from None
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        for parent in made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only if nothing was put into it


def _missing_parents(target: Path) -> list[Path]:
    """Folders above the target that do not exist yet, deepest first."""
    return [p for p in target.parents if not p.exists()]
