# SPDX-License-Identifier: Apache-2.0
"""`tunesmith compress`: a delta in less room, with the error that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.merging import load_deltas, write_delta
from tunesmith.cli.output import Debug, Device, Json, Model, Result, examples

HELP = examples(
    "tunesmith compress demo --rank 4 --to small",
    "tunesmith compress demo --method dare:density=0.1 --to sparse --json",
)


def attach(app: typer.Typer) -> None:
    app.command("compress", epilog=HELP, short_help="A delta in less room, with its error")(compress)


def compress(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="A delta's folder, a run's folder or a run's name.")],
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="The delta's folder.")],
    method: Annotated[
        str, typer.Option("--method", metavar="NAME[:OPTIONS]", help="svd, or a combiner that drops entries.")
    ] = "svd",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of svd: the largest rank of a matrix.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of combiners that draw at random.")] = 0,
    model: Model = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Write a smaller delta near the given one: the nearest of low rank, or a sparse one, and say how far off it is."""
    from tunesmith.compose import compress as smaller

    base, (loaded,) = load_deltas([delta], model, device)
    found = smaller(base, loaded, method, rank=rank, seed=seed)
    more = {"relative_error": float(found.error), "of_the_bytes": float(found.ratio), "lost": list(found.lost)}
    return write_delta(base, found.delta, to, "compressed", **more)
