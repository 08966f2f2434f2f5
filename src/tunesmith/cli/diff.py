# SPDX-License-Identifier: Apache-2.0
"""`tunesmith diff`: what a delta changed of its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.output import Debug, Device, Json, Result, cells, examples, progress_console, table, visible
from tunesmith.cli.places import delta_folder, load_base, registry, run_folder
from tunesmith.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.evaluate.difference import Difference

HELP = examples(
    "tunesmith diff smollm2-135m-instruct demo",
    "tunesmith diff smollm2-135m-instruct demo --probes norms,intruders:k=10,every=3",
    "tunesmith diff smollm2-135m-instruct demo --data tickets.jsonl",
)


def attach(app: typer.Typer) -> None:
    app.command("diff", epilog=HELP, short_help="What a delta changed of its base")(diff)


def diff(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base: a bundled name, a folder or a hub id.")],
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="A delta's folder, a run's folder or a run's name.")],
    probes: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Probes to run, such as norms,intruders:k=10 (default: what fits)."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Examples, for the probes that read some: depth-kl, prior.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Measure the delta at this strength.")] = 1.0,
    limit: Annotated[int, typer.Option(help="Read so many rows of DATA.", min=1)] = 512,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write diff.json and diff.html here (default: beside the run)."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Measure what DELTA changed of BASE: size, rank, place, spectra; with --data also answers. Writes an HTML report."""
    import tunesmith
    from tunesmith.cli.places import check_model_name
    from tunesmith.core import store
    from tunesmith.core.delta import Delta
    from tunesmith.core.probe import PROBES
    from tunesmith.evaluate.difference import split

    if strength == 0:
        raise UsageError("at strength 0 a delta is the base: there is nothing to measure", hint="--strength 1")
    named = None if probes is None else [PROBES.parse(p) for p in split(probes)]
    wanting = [p.info.name for p in named or () if p.info.facts.get("data")]
    if wanting and data is None:
        raise UsageError(f"the probe {wanting[0]!r} reads data", hint="give a file of examples with --data")
    folder = delta_folder(delta)
    head = store.peek(folder)
    check_model_name(base)
    loaded_base = load_base(folder, head, base, device)
    loaded = Delta.load(folder, loaded_base)
    sample = None
    if data is not None:
        rows = tunesmith.read(data, labels=head["layout"].get("labels") or None)
        sample = tunesmith.sample(loaded_base, rows, batches=max(1, limit // 8))
    notes = progress_console()
    found = tunesmith.diff(
        loaded_base, loaded.at(strength), named, sample=sample, tell=lambda name: notes.print(f"measuring {name}")
    )
    place = out or _beside(folder, loaded.name)
    found.write(place / "diff.json")
    found.write_html(place / "diff.html")

    def view(console: Console) -> None:
        render(found, console)
        console.print(f"\nwritten: {visible(str(place / 'diff.json'))}, diff.html", soft_wrap=True)

    return Result({**found.to_dict(), "folder": str(place)}, found.proof(), view)


def _beside(folder: Path, name: str) -> Path:
    """Where a report goes by default: with its run, or in the registry."""
    run = run_folder(folder)
    return run / "diff" if run is not None else registry() / "diffs" / name.replace("/", "-")


def render(found: Difference, console: Console) -> None:
    """Each probe's sentence and numbers, and what was not measured."""
    shown = table("probe", "found")
    for f in found.findings:
        shown.add_row(*cells(f.probe, f.summary))
    for name, why in found.skipped.items():
        shown.add_row(*cells(name, f"not measured: {why}"))
    console.print(shown)
    for f in found.findings:
        rows = f.facts.get("by_depth") if f.probe == "norms" else None
        if rows and len(rows) <= 48:
            by_depth = table("depth", "norm", "relative")
            for r in rows:
                by_depth.add_row(*cells(r["depth"], _short(r["norm"]), _short(r["relative"])))
            console.print("\nchange by depth")
            console.print(by_depth)


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
