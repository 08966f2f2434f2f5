# SPDX-License-Identifier: Apache-2.0
"""`tunesmith compare`: methods on your data under one budget, with a table, a picture and a recommendation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith.cli.output import Debug, Json, Model, Result, cells, examples, progress_console, table, visible
from tunesmith.cli.places import check_model_name
from tunesmith.cli.tune import asked, merged_settings
from tunesmith.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

HELP = examples(
    "tunesmith compare tickets.jsonl --model smollm2-135m-instruct --methods lora,dora,ia3 --budget 10m",
    "tunesmith compare intents.jsonl -m minilm-l6 --methods all --test heldout.jsonl --budget 1h",
    "tunesmith compare intents.jsonl -m minilm-l6 --methods lora,vera:rank=64,ssf --equal parameters --seeds 5",
)
SETTINGS = ("epochs", "batch_size", "micro_batch", "precision", "max_length", "gradient_checkpointing")


def attach(app: typer.Typer) -> None:
    app.command("compare", epilog=HELP, short_help="Compare methods on your data under one budget")(compare)


def compare(
    context: typer.Context,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file or folder of examples, or shared:NAME/FILE.")],
    model: Model = None,
    methods: Annotated[
        str, typer.Option(metavar="NAMES", help="Methods with options (lora:rank=4,bone,head), or all.")
    ] = "all",
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Wall-clock time of all trials: 90s, 10m, 1h30m.")
    ] = "10m",
    equal: Annotated[
        str, typer.Option(metavar="WHAT", help="What each method gets the same of: time, parameters or memory.")
    ] = "time",
    test: Annotated[
        str | None, typer.Option(metavar="DATA", help="Rows to report on (default: a fifth of DATA).")
    ] = None,
    dev: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Rows that learning rates are chosen on (default: 15 % of the rest)."),
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Train on so many rows of each class.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds each method is reported on.")] = 3,
    lrs: Annotated[
        str, typer.Option(metavar="N|LIST", help="Learning rates each method tries: how many, or 1e-4,1e-3 for all.")
    ] = "3",
    parameters: Annotated[
        int | None, typer.Option(help="What --equal parameters matches to (default: the first method's count).")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Most passes over the data in one trial (default 10).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of one step (default 8).")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="As in tune.")] = None,
    precision: Annotated[str | None, typer.Option(help="As in tune.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row (default 512).")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="As in tune.")] = False,
    dev_rows: Annotated[int, typer.Option(help="Most dev rows.")] = 200,
    test_rows: Annotated[int, typer.Option(help="Most test rows.")] = 500,
    metric: Annotated[str | None, typer.Option(help="Metric on the test rows (default: fits the data).")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message for rows without one.")] = None,
    task: Annotated[str | None, typer.Option(help="The base's task, where its configuration does not say.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write here, not into the registry.")] = None,
    workers: Annotated[int, typer.Option(help="Trials at a time, by Ray (an extra).")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the trials of the same command before.")] = False,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave bad lines out and count them.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of training.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Compare methods on DATA: each tries the same number of learning rates on a dev split and is then reported on test
    rows over several seeds, with target, retention, size, time and memory, controls, and a recommendation.

    Ctrl-C keeps finished trials; the same command goes on from there.
    """
    if model is None:
        raise UsageError("no base was given", where="tunesmith compare", hint="--model NAME")
    settings = merged_settings(asked(context, SETTINGS), set_ or [])
    for name in ("lr", "seed", "steps"):
        if name in settings:
            raise UsageError("the comparison sets it itself", where=name, hint="--lrs, --seeds and --budget")
    rates = _rates(lrs)
    from tunesmith.arena.budget import check_equal, parse_seconds
    from tunesmith.arena.candidates import parse

    parse_seconds(budget)
    check_equal(equal)
    parse(methods)
    check_model_name(model)
    on_error: Literal["skip", "raise"] = "skip" if skip_bad_lines else "raise"
    import tunesmith
    from tunesmith.arena.compare import run_compare

    result = run_compare(
        model if task is None else tunesmith.load(model, task=task), data, methods=methods, budget=budget, equal=equal,
        test=test, dev=dev, shots=shots, seeds=seeds, lrs=rates, parameters=parameters, dev_rows=dev_rows,
        test_rows=test_rows, system=system, metric=metric, out=out, workers=workers, fresh=fresh, on_error=on_error,
        say=lambda text: progress_console().print(visible(text), soft_wrap=True), **settings,
    )  # fmt: skip
    return compare_result(result, model, data)


def _rates(text: str) -> int | list[float]:
    try:
        return int(text) if text.strip().isdigit() else [float(x) for x in text.split(",")]
    except ValueError:
        hint = "a number of rates such as 3, or rates such as 1e-4,1e-3"
        raise UsageError(f"{text!r} is neither", where="--lrs", hint=hint) from None


def compare_result(result: dict[str, Any], model: str, data: str) -> Result:
    """A finished comparison as a verb's result."""
    from tunesmith.arena.report import COLUMNS, LEGEND, cells_of, controls_of, heading

    told = result["recommendation"]

    def view(console: Console) -> None:
        console.print(visible(heading(result)), soft_wrap=True)
        console.print(f"retention: {result['retention']['measure']}; 1 means nothing was lost\n", soft_wrap=True)
        shown = table(*COLUMNS)
        for row in cells_of(result, narrow=True):
            shown.add_row(*cells(*row))
        console.print(shown)
        console.print(f"{LEGEND}\n", soft_wrap=True)
        shown = table("control", result["target"]["metric"], f"{told['method']} against it")
        for row in controls_of(result):
            shown.add_row(*cells(*row))
        console.print(shown)
        for x in result["left_out"]:
            console.print(f"left out: {visible(x['label'])}: {visible(x['reason'])}", soft_wrap=True)
        for note in result["notes"]:
            console.print(f"note: {visible(note)}", soft_wrap=True)
        console.print(f"\nrecommended: {visible(told['reason'])}", soft_wrap=True)
        console.print(f"written: {visible(str(Path(result['folder']) / 'compare.json'))}, table.md, picture.svg",
                      soft_wrap=True)  # fmt: skip

    head = f"{told['method']} at lr {told['lr']:g}"
    tie = len(told["not_shown_worse"]) - 1
    unsure = "" if told["convincing"] else "; not shown to beat every control"
    proof = (
        f"{len(result['rows'])} methods compared, {len(result['left_out'])} left out; recommended {head}"
        f"{f', in a tie with {tie} more' if tie else ''}{unsure}"
    )
    return Result(result, proof, view, next=(_tune_command(result, model, data),))


def _tune_command(result: dict[str, Any], model: str, data: str) -> str:
    import shlex

    told = result["recommendation"]
    method = told["method"].partition(":")[0]
    options = ",".join(f"{k}={v}" for k, v in _changed(method, told["options"]))
    steps = next(r["steps"] for r in result["rows"] if r["label"] == told["method"])
    words = [
        "tunesmith", "tune", data, "--model", model, "--method", method + (f":{options}" if options else ""),
        "--lr", f"{told['lr']:g}", "--steps", str(steps), "--batch-size", str(result["config"]["batch_size"]),
    ]  # fmt: skip
    return shlex.join(words)


def _changed(method: str, options: dict[str, Any]) -> list[tuple[str, Any]]:
    """The options that are not at their default."""
    from tunesmith.core.method import get, schema

    default = {row["name"]: row["default"] for row in schema(get(method).cls)}
    return [(k, v) for k, v in options.items() if default.get(k) != v]
