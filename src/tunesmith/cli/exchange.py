# SPDX-License-Identifier: Apache-2.0
"""`tunesmith export` and `tunesmith import`: deltas as adapters of PEFT or vLLM, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.output import Debug, Device, Json, Model, Result, amount, cells, examples, table, visible
from tunesmith.cli.places import delta_folder, load_base
from tunesmith.core.errors import DeltaError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.core.base import Base
    from tunesmith.core.delta import Delta

EXPORT = examples(
    "tunesmith export demo --to adapter",
    "tunesmith export demo --to adapter --fit-rank 16",
    "tunesmith export demo runs/other --format vllm --to adapters",
)
FORMATS = ("peft", "vllm")
IMPORT = examples("tunesmith import adapter --model smollm2-135m-instruct --to delta")


def attach(app: typer.Typer) -> None:
    app.command("export", epilog=EXPORT, short_help="Write deltas as adapters that PEFT or vLLM can read")(export)
    app.command("import", epilog=IMPORT, short_help="Read an adapter that PEFT wrote")(import_)


def export(
    deltas: Annotated[
        list[str], typer.Argument(metavar="DELTA...", help="Delta folders, run folders or names of runs.")
    ],
    to: Annotated[
        Path, typer.Option("--to", metavar="FOLDER", help="The adapter's folder, for vllm that of them all.")
    ],
    format_: Annotated[str, typer.Option("--format", help="peft, or vllm for its multi-LoRA.")] = "peft",
    part: Annotated[str | None, typer.Option("--part", help="The part to write, of a delta with several.")] = None,
    fit_rank: Annotated[
        int | None, typer.Option("--fit-rank", min=1, help="Write the nearest LoRA of this rank, and say its error.")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Write a delta as a PEFT adapter, or several of one base for vLLM with the command that serves them.

    Every written adapter is read back and must have the delta's outputs. What the format cannot hold is an error that
    says so; --fit-rank writes the nearest low-rank change instead, with its error.
    """
    if format_ not in FORMATS:
        raise UsageError(f"unknown format {format_!r}", where="--format", hint=f"one of {', '.join(FORMATS)}")
    _free(to)
    if format_ == "vllm":
        if part is not None:
            raise UsageError("vLLM's adapter holds all parts of a delta", where="--part")
        return _to_vllm(deltas, to, fit_rank, model, device)
    if len(deltas) != 1:
        raise UsageError(f"a PEFT folder holds one delta, {len(deltas)} were named", where="DELTA")
    return _to_peft(deltas[0], to, part, fit_rank, model, device)


def _to_peft(delta: str, to: Path, part: str | None, fit_rank: int | None, model: str | None, device: str) -> Result:
    from tunesmith.core import store
    from tunesmith.core.delta import Delta
    from tunesmith.export.peft import nearest_lora, read_peft, write_peft

    folder = delta_folder(delta)
    base = load_base(folder, store.peek(folder), model, device)
    loaded = Delta.load(folder, base)
    written, error, lost = loaded, None, ()
    if fit_rank is not None:
        fit = nearest_lora(base, loaded, fit_rank)
        written, error, lost = fit.delta, fit.error, fit.lost
    write_peft(written, base, to, part=part)
    meant = Delta(written.name, [written.part(part)]) if part is not None else written
    gap, effect = _gap(base, meant, read_peft(to, base), to)
    size = sum(p.stat().st_size for p in to.iterdir())
    data = {
        "folder": str(to), "delta": loaded.name, "digest": loaded.digest, "format": "peft", "bytes": size,
        "largest_gap": gap, "effect": effect, "fit_rank": fit_rank, "fit_error": error, "lost": list(lost),
    }  # fmt: skip

    def view(console: Console) -> None:
        shown = table("file", "size")
        for p in sorted(to.iterdir()):
            shown.add_row(*cells(p.name, amount(p.stat().st_size)))
        console.print(f"{visible(str(to))}", soft_wrap=True)
        console.print(shown)
        if error is not None:
            console.print(f"nearest rank-{fit_rank} change: relative error {error:.2%}")
        for name in lost:
            console.print(f"not carried over: {name}")

    fitted = "" if error is None else f", fit error {error:.2%}"
    proof = f"exported {loaded.name} ({loaded.digest[:12]}): read back, largest gap {gap:.1e}{fitted}, {size:,} bytes"
    return Result(data, proof, view)


def _to_vllm(names: list[str], to: Path, fit_rank: int | None, model: str | None, device: str) -> Result:
    """Each delta in a folder of its own below `to`, under its name there."""
    from tunesmith.core import store
    from tunesmith.core.delta import Delta
    from tunesmith.export.peft import nearest_lora, read_peft
    from tunesmith.export.vllm import command, limits, write_vllm

    folders = [delta_folder(n) for n in names]
    base = load_base(folders[0], store.peek(folders[0]), model, device)
    loaded = [Delta.load(f, base) for f in folders]
    labels = [d.name for d in loaded]
    if len(set(labels)) < len(labels):
        twice = next(n for n in labels if labels.count(n) > 1)
        raise UsageError(f"two deltas are called {twice!r}, and requests name them", where=str(to))
    made, rows = [], []
    for delta in loaded:
        fit = None if fit_rank is None else nearest_lora(base, delta, fit_rank)
        adapter = write_vllm(delta if fit is None else fit.delta, base, to / delta.name, name=delta.name)
        gap, effect = _gap(base, delta if fit is None else fit.delta, read_peft(adapter.folder, base), adapter.folder)
        made.append(adapter)
        rows.append({
            "name": delta.name, "digest": delta.digest, "folder": str(adapter.folder), "rank": adapter.rank,
            "layers": adapter.layers, "largest_gap": gap, "effect": effect, "notes": list(adapter.notes),
            "fit_error": None if fit is None else fit.error, "lost": [] if fit is None else list(fit.lost),
        })  # fmt: skip
    line = command(base, made)

    def view(console: Console) -> None:
        shown = table("adapter", "rank", "layers", "largest gap", "fit error")
        for r in rows:
            error = "" if r["fit_error"] is None else f"{r['fit_error']:.2%}"
            shown.add_row(*cells(r["name"], str(r["rank"]), str(r["layers"]), f"{r['largest_gap']:.1e}", error))
        console.print(shown)
        for r in rows:
            for note in [*r["notes"], *(f"not carried over: {n}" for n in r["lost"])]:
                console.print(f"{visible(r['name'])}: {visible(note)}", soft_wrap=True)
        console.print(visible(line), soft_wrap=True)

    worst = max(r["largest_gap"] for r in rows)
    proof = f"exported {len(rows)} for vLLM: read back, largest gap {worst:.1e}, rank up to {max(a.rank for a in made)}"
    data = {"format": "vllm", "folder": str(to), "adapters": rows, "limits": limits(made), "command": line}
    return Result(data, proof, view)


def import_(
    adapter: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that PEFT saved.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The base the adapter was trained on.")],
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="The delta's folder.")],
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Read a PEFT adapter as a delta that can be applied, merged, measured, composed and undone like any other."""
    import tunesmith
    from tunesmith.core.delta import Delta
    from tunesmith.core.effect import effect
    from tunesmith.export.peft import read_peft

    _free(to)
    base = tunesmith.load(model, device=device)
    delta = read_peft(adapter, base, name=to.resolve().name)
    delta.provenance["effect"] = effect(base, delta)
    delta.save(to)
    gap, moved = _gap(base, delta, Delta.load(to, base), to)
    methods = [p.info.name for p in delta.parts]

    def view(console: Console) -> None:
        shown = table("part", "method", "sites", "numbers")
        for p in delta.parts:
            n = sum(t.numel() for _, _, t in p.items())
            shown.add_row(*cells(p.name, p.info.name, len(p.kind_of), amount(n)))
        console.print(shown)

    data = {
        "folder": str(to), "delta": delta.name, "digest": delta.digest, "methods": methods, "largest_gap": gap,
        "effect": moved, "trainable": delta.trainable_parameters,
    }  # fmt: skip
    read_back = f"read back, largest gap {gap:.1e}, largest output change {moved:.3g}"
    proof = f"imported {delta.name} ({delta.digest[:12]}): {', '.join(methods)}, {read_back}"
    return Result(data, proof, view)


def _free(to: Path) -> None:
    """Raise UsageError for a place that a folder cannot take."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError("is there already", where=str(to), hint="choose a new folder, or empty this one")


def _gap(base: Base, delta: Delta, reread: Delta, folder: Path) -> tuple[float, float]:
    """The largest gap between a delta and what was read back of it, and the largest change it makes.

    Raises DeltaError where they differ, or where the delta does nothing.
    """
    before = base.probe_outputs()
    with base.using(delta):
        want = base.probe_outputs()
    with base.using(reread):
        got = base.probe_outputs()
    gap, effect = float((got - want).abs().max()), float((want - before).abs().max())
    if effect == 0:
        raise DeltaError("the delta changes nothing", where=delta.name, hint="train it first")
    if gap > 1e-3 * max(1.0, float(want.abs().max())):
        raise DeltaError(f"read back, it differs by {gap:.2e}", where=str(folder))
    return gap, effect
