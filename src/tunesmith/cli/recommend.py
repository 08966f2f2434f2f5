# SPDX-License-Identifier: Apache-2.0
"""`tunesmith recommend`: a method, its size and a learning rate, with the evidence for them."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith.cli.output import Debug, Json, Model, Result, amount, cells, examples, table, visible
from tunesmith.cli.places import check_model_name, registry
from tunesmith.cli.tune import asked, merged_settings
from tunesmith.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.arena.recommend import Advice

HELP = examples(
    "tunesmith recommend tickets.jsonl --model smollm2-135m-instruct",
    "tunesmith recommend intents.jsonl -m minilm-l6 --memory 4GB --time 10m --json",
)
SETTINGS = ("max_length", "batch_size", "precision")


def attach(app: typer.Typer) -> None:
    app.command("recommend", epilog=HELP, short_help="Name a method, its size and learning rate, with the evidence")(
        recommend
    )


def recommend(
    context: typer.Context,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file or folder of examples, or shared:NAME/FILE.")],
    model: Model = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory that may be used, such as 4GB (default: what is free).")
    ] = None,
    time: Annotated[str | None, typer.Option(metavar="TIME", help="Time training may take: 90s, 10m, 1h.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="As in tune.")] = None,
    max_length: Annotated[int | None, typer.Option(help="As in tune.")] = None,
    precision: Annotated[str | None, typer.Option(help="As in tune.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message for rows without one.")] = None,
    studies: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Committed studies (default: those of the checkout).")
    ] = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave bad lines out and count them.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of training.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Name a method, its size and a learning rate for DATA, from your own comparisons and the committed studies.

    Loads no weights. Says how strong the evidence is, and what would make it stronger.
    """
    if model is None:
        raise UsageError("no base was given", where="tunesmith recommend", hint="--model NAME")
    settings = merged_settings(asked(context, SETTINGS), set_ or [])
    from tunesmith.arena.budget import parse_seconds

    allowed = None if time is None else parse_seconds(time)
    size = None if memory is None else _bytes(memory)
    check_model_name(model)
    from tunesmith.arena.recommend import recommended
    from tunesmith.data import read
    from tunesmith.models.resources import repo_root

    on_error: Literal["skip", "raise"] = "skip" if skip_bad_lines else "raise"
    dataset = read(data, on_error=on_error)
    checkout = repo_root()
    place = studies or (None if checkout is None else checkout / "studies")
    docs = None if checkout is None else checkout / "docs"
    advice = recommended(
        model, dataset, memory=size, seconds=allowed, registry=registry(), studies=place, docs=docs, system=system,
        **settings,
    )  # fmt: skip
    return _result(advice, model, data)


def _bytes(text: str) -> int:
    """Bytes from `4GB`, `512MiB` or a plain number. Raises UsageError."""
    import re

    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in units or not float(found[1]):
        raise UsageError(f"{text!r} is no size", where="--memory", hint="write 4GB or 512MiB")
    return int(float(found[1]) * units[found[2]])


def _result(advice: Advice, model: str, data: str) -> Result:
    words = ["tunesmith", "tune", data, "--model", model, "--method", advice.spec, "--lr", f"{advice.lr:g}",
             "--epochs", f"{advice.epochs:g}"]  # fmt: skip
    for key, value in advice.settings.items():
        words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    facts: dict[str, Any] = {**dataclasses.asdict(advice), "command": shlex.join(words)}

    def view(console: Console) -> None:
        shown = table("", "")
        shown.add_row(*cells("method", advice.spec))
        shown.add_row(*cells("learning rate", f"{advice.lr:g}"))
        shown.add_row(*cells("passes", f"{advice.epochs:g}"))
        if advice.plan:
            minutes = advice.plan["minutes"]
            shown.add_row(*cells("trained", f"{advice.plan['trainable']:,} numbers, {advice.plan['steps']} steps"))
            shown.add_row(*cells("memory", f"{amount(advice.plan['peak'])} of {amount(advice.plan['memory'])}"))
            shown.add_row(*cells("time", "not known" if minutes is None else f"about {60 * minutes:.0f} seconds"))
        shown.add_row(*cells("evidence", advice.strength))
        console.print(shown)
        for e in advice.evidence:
            console.print(f"- {visible(e.says)} ({visible(e.where)})", soft_wrap=True)
        for doubt in advice.doubts:
            console.print(f"note: {visible(doubt)}", soft_wrap=True)

    proof = f"{advice.spec} at lr {advice.lr:g}; evidence: {advice.strength}, {len(advice.evidence)} sources"
    more = () if advice.strength == "strong" else (shlex.join(["tunesmith", "compare", data, "--model", model]),)
    return Result(facts, proof, view, next=(facts["command"], *more))
