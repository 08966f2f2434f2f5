# SPDX-License-Identifier: Apache-2.0
"""`tunesmith between`: what fine-tuning changed between two model folders, as a delta of the first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.merging import is_model
from tunesmith.cli.output import Debug, Json, Result, cells, examples, table, visible
from tunesmith.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

HELP = examples("tunesmith between base tuned --to delta", "tunesmith between base tuned --rank 16 --to small --json")


def attach(app: typer.Typer) -> None:
    app.command("between", epilog=HELP, short_help="The difference of two models as a delta")(between)


def between(
    first: Annotated[str, typer.Argument(metavar="MODEL_A", help="The model folder that becomes the base.")],
    second: Annotated[str, typer.Argument(metavar="MODEL_B", help="The model folder that was made from it.")],
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="The delta's folder.")],
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Write the nearest change of this rank, and say its error.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Write MODEL_B - MODEL_A as a delta of MODEL_A, one tensor at a time and without building either model.

    Any two full fine-tunes of one architecture will do. The delta can then be applied, scaled, merged, measured and undone
    like any other. With --rank each matrix is the nearest product of that rank, and its error is told.
    """
    from tunesmith.compose.between import between_folders

    for label, place in (("MODEL_A", first), ("MODEL_B", second)):
        if not is_model(place):
            hint = "give a folder with config.json and safetensors; a hub model must be downloaded first"
            raise UsageError(f"{place!r} is no model folder", where=label, hint=hint)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError("is there already", where=str(to), hint="choose a new folder, or empty this one")
    found = between_folders(Path(first).expanduser(), Path(second).expanduser(), to, rank)
    worst = sorted(found.errors.items(), key=lambda e: -e[1])[:5]

    def view(console: Console) -> None:
        console.print(visible(str(to)), soft_wrap=True)
        shown = table("part", "sites")
        for name, n in found.sites.items():
            shown.add_row(*cells(name, n))
        console.print(shown)
        for path, error in worst:
            console.print(visible(f"relative error {error:.2%} at {path}"), soft_wrap=True)

    data = {
        "folder": str(to), "delta": to.resolve().name, "digest": found.saved.digest, "bytes": found.saved.bytes,
        "sites": found.sites, "largest_difference": found.largest, "gap": found.gap, "rank": rank,
        "relative_error": found.error, "errors": found.errors, "left_out": list(found.left_out),
    }  # fmt: skip
    return Result(data, str(found), view, next=(f"tunesmith verify {to} --model {first}",))
