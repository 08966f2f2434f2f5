# SPDX-License-Identifier: Apache-2.0
"""`tunesmith scale` and `tunesmith subtract`: a delta at another strength, and one delta without another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.merging import load_deltas, write_delta
from tunesmith.cli.output import Debug, Device, Json, Model, Result, examples
from tunesmith.core.errors import UsageError

SCALE = examples("tunesmith scale demo 0.5 --to half", "tunesmith scale demo 1.0 --start 0.2 --to lines --json")
SUBTRACT = examples("tunesmith subtract both poems --to rest")
Which = Annotated[str, typer.Argument(metavar="DELTA", help="A delta's folder, a run's folder or a run's name.")]
To = Annotated[Path, typer.Option("--to", metavar="FOLDER", help="The delta's folder.")]


def attach(app: typer.Typer) -> None:
    options = {"ignore_unknown_options": True}  # -1 is a strength
    app.command("scale", epilog=SCALE, short_help="A delta at another strength", context_settings=options)(scale)
    app.command("subtract", epilog=SUBTRACT, short_help="One delta without another")(subtract)


def scale(
    delta: Which,
    strength: Annotated[str, typer.Argument(metavar="NUMBER", help="1 is as trained, -1 turns it round.")],
    to: To,
    start: Annotated[
        float | None, typer.Option("--start", help="Strength of the first block over the last (LiNeS).")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Write a delta times a number, as a delta of its own; low-rank stays low-rank.

    With --start the number grows with depth, from START times it in the first block to the whole of it in the last.
    """
    from tunesmith.compose import scale as scaled

    try:
        s = float(strength)
    except ValueError:
        raise UsageError(f"{strength!r} is no number", where="scale", hint="as in 'tunesmith scale demo 0.5'") from None
    if s != s or abs(s) == float("inf") or s == 0:
        raise UsageError(f"the strength must be finite and not 0, got {strength}", hint="0 is the base itself")
    base, (loaded,) = load_deltas([delta], model, device)
    made = scaled(base, loaded, s) if start is None else scaled(base, loaded, s, depth="linear", start=start)
    return write_delta(base, made, to, "scaled", strength=s)


def subtract(
    first: Which,
    second: Annotated[str, typer.Argument(metavar="OTHER", help="The delta to take away.")],
    to: To,
    model: Model = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Write DELTA - OTHER, two deltas of one base, as a delta."""
    from tunesmith.compose import subtract as difference

    base, (a, b) = load_deltas([first, second], model, device)
    return write_delta(base, difference(base, a, b), to, "subtracted", [a, b])
