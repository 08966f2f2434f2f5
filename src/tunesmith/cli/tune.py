# SPDX-License-Identifier: Apache-2.0
"""`tunesmith tune`: data in, delta and receipt out."""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith.cli.output import Debug, Json, Model, Require, Result, cells, examples, progress_console, table, visible
from tunesmith.cli.places import check_model_name
from tunesmith.cli.reports import receipt_result
from tunesmith.core.errors import ResourceError, UsageError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.data import Dataset
    from tunesmith.train.runs import Run

HELP = examples(
    "tunesmith tune tickets.jsonl --model smollm2-135m-instruct",
    "tunesmith tune tickets.jsonl -m smollm2-135m-instruct --method lora:rank=16 --epochs 4 --test heldout.jsonl",
    "tunesmith tune reviews.csv -m minilm-l6 --require 'target>=0.8, target>=win' --name reviews",
    "tunesmith tune --resume",
)
# Options of this verb that are settings of `TrainConfig` under the same name.
SETTINGS = (
    "epochs", "steps", "batch_size", "micro_batch", "lr", "schedule", "warmup", "precision", "seed", "max_length",
    "overflow", "packing", "gradient_checkpointing", "evaluate_every", "patience", "checkpoint_every", "tracker",
)  # fmt: skip
BESIDE_RESUME = ("resume", "as_json", "debug")


def attach(app: typer.Typer) -> None:
    app.command("tune", epilog=HELP, short_help="Train a delta on your data and prove what it changed")(tune)


def tune(
    context: typer.Context,
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="A file or folder of examples, or shared:NAME/FILE.")
    ] = None,
    model: Model = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:OPT=V,..]", help="A method with options; may be given several times."),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run and its delta.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write here, not into the registry.")] = None,
    validation: Annotated[str | None, typer.Option(metavar="DATA", help="Picks the best state.")] = None,
    test: Annotated[
        str | None, typer.Option(metavar="DATA", help="What the receipt is measured on (default: a tenth of DATA).")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data (default 3).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, in place of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of one step (default 8).")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Rows computed at a time, with the same result (by itself about 1,024 tokens).")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate (default: the method's).")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, linear, constant or wsd.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of all steps (default 0.05).")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same delta (default 0).")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row (default 1024).")] = None,
    overflow: Annotated[str | None, typer.Option(help="Rows that are longer: error, skip or truncate.")] = None,
    packing: Annotated[
        bool, typer.Option("--packing", help="Several examples in a row, kept apart by a mask.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many validations without gain.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints (default 50).")] = None,
    tracker: Annotated[str | None, typer.Option(help="tensorboard, mlflow or wandb.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message for rows without one.")] = None,
    task: Annotated[str | None, typer.Option(help="The base's task, where its configuration does not say.")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric of the receipt (default: fits the data).")] = None,
    require: Require = None,
    controls: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also measure what should not help; random: a delta of equal norm; shuffled: trained on shuffled answers.",
        ),
    ] = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave bad lines out and count them.")
    ] = False,
    no_receipt: Annotated[bool, typer.Option("--no-receipt", help="Train only; measure nothing.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of training.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Go on even if the plan says it does not fit.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the newest unfinished run; takes no other argument.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Train a delta on DATA and prove what it changed.

    Writes runs/NAME/ with the delta, the log, checkpoints and the receipt. Ctrl-C saves; --resume goes on.
    """
    if resume:
        _refuse_others(context)
        from tunesmith.train import tune as engine

        return run_result(engine.resume())
    if data is None or model is None:
        what, hint = ("no data", "give a file") if data is None else ("no base", f"--model NAME, such as {_bundled()}")
        raise UsageError(f"{what} was given", where="tunesmith tune", hint=hint)
    given = asked(context, SETTINGS)
    settings = merged_settings(given, set_ or [])
    made = parsed_methods(method)
    if require is not None:
        if no_receipt:
            raise UsageError("--require needs the receipt that --no-receipt leaves out")
        _check_gates(require)
    check_model_name(model)
    on_error: Literal["skip", "raise"] = "skip" if skip_bad_lines else "raise"
    from tunesmith.data import read

    dataset = read(data, on_error=on_error)
    progress_console().print(visible(dataset.report.summary()), soft_wrap=True)
    if not yes and task is None:
        check_fits(model, dataset, made, system, settings)
    import tunesmith

    run = tunesmith.tune(
        model if task is None else tunesmith.load(model, task=task), dataset, method=made, name=name, out=out,
        validation=validation, test=test, system=system, metric=metric, receipt=not no_receipt, require=require,
        controls=tuple(controls or ()), on_error=on_error, **settings,
    )  # fmt: skip
    return run_result(run)


def asked(context: typer.Context, names: tuple[str, ...]) -> dict[str, Any]:
    """The options that were given; a flag that is off leaves the default (0 is a value, so `in` would not do)."""
    values = {name: context.params[name] for name in names}
    return {k: v for k, v in values.items() if v is not None and v is not False}


def _bundled() -> str:
    from tunesmith.models.bundled import BUNDLED

    return ", ".join(BUNDLED)


def _refuse_others(context: typer.Context) -> None:
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in BESIDE_RESUME and source is not None and source.name == "COMMANDLINE":
            shown = parameter.opts[0] if parameter.opts[0].startswith("-") else (parameter.name or "").upper()
            hint = "a run goes on with the settings it began with; change them in a new run"
            raise UsageError(f"--resume takes no other argument, and {shown} was given", hint=hint)


def parsed_methods(texts: list[str] | None) -> list[Any] | None:
    """Methods (and recipes) from `name:key=value,..`, or None. Raises UsageError naming the nearest name or option."""
    if not texts:
        return None
    from tunesmith.train.derived import parse_method

    return [parse_method(text) for text in texts]


def _check_gates(require: str) -> None:
    from tunesmith.evaluate.gates import parse_require

    parse_require(require)


def merged_settings(given: dict[str, Any], pairs: list[str]) -> dict[str, Any]:
    """Options and `--set key=value` as checked settings of training. Raises UsageError for an unknown or bad one."""
    from tunesmith.train.config import TrainConfig

    hints = typing.get_type_hints(TrainConfig)
    out = dict(given)
    for pair in pairs:
        key, eq, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not eq or not key:
            raise UsageError(f"expected key=value, got {pair!r}", where="--set")
        if key not in hints:
            raise UsageError(f"there is no training setting {key!r}", where="--set", hint=nearest(key, hints))
        if key in out:
            raise UsageError(f"{key} was given twice", where="--set")
        out[key] = _typed(key, text.strip(), hints[key])
    TrainConfig.build(out)
    return out


def _typed(key: str, text: str, want: Any) -> Any:
    """One value from text: JSON or a bare word, of the setting's type."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    allowed = typing.get_args(want) if isinstance(want, types.UnionType) else (want,)
    plain = tuple(typing.get_origin(a) or a for a in allowed)
    if tuple in plain and isinstance(value, list):
        inner = typing.get_args(next(a for a in allowed if typing.get_origin(a) is tuple))
        if len(value) == len(inner) and all(_is_number(v) for v in value):
            return tuple(value)
    elif float in plain and _is_number(value):
        return float(value)
    elif isinstance(value, plain) and (bool in plain or not isinstance(value, bool)):
        return value
    names = " or ".join("nothing (null)" if a is type(None) else getattr(a, "__name__", str(a)) for a in plain)
    raise UsageError(f"{key} must be {names}, got {text!r}", where="--set")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_fits(
    model: str, dataset: Dataset, methods: list[Any] | None, system: str | None, settings: dict[str, Any]
) -> None:
    """Refuse a run that cannot fit into memory, before any weight is loaded. Raises ResourceError.

    A base on the hub is left to the loader: planning would fetch its configuration twice. So is one that is yet to be derived.
    """
    from tunesmith.models.bundled import BUNDLED

    if model not in BUNDLED and not Path(model).expanduser().exists():
        return
    from tunesmith.core.derive import is_recipe

    if any(is_recipe(m) for m in methods or []):
        return  # what the recipe makes is known once it is made
    from tunesmith.train.plan import plan

    try:
        plan(model, dataset, method=methods, system=system, **settings).require()
    except ResourceError as error:
        raise ResourceError(error.what, where=error.where, hint=f"{error.hint}; --yes goes on anyway") from None


def run_result(run: Run) -> Result:
    """A finished run as a verb's result: its receipt, or what training did where none was asked for."""
    facts = {
        "name": run.name,
        "folder": None if run.folder is None else str(run.folder),
        "delta": {"digest": run.delta.digest, "bytes": run.delta.nbytes, "parameters": run.delta.trainable_parameters},
        "training": {
            "steps": run.trained.steps, "tokens": run.trained.tokens, "seconds": run.trained.seconds,
            "loss": run.trained.losses[-1] if run.trained.losses else None, "best_step": run.trained.best_step,
            "resumed_at": run.trained.resumed_at, "stopped_early": run.trained.stopped_early,
            "skipped": len(run.trained.skipped),
        },
    }  # fmt: skip
    if run.receipt is not None:
        return receipt_result(run.receipt, run.folder, extra=facts)
    from tunesmith.core import store
    from tunesmith.train.tune import next_commands

    def view(console: Console) -> None:
        shown = table("", "")
        for label, value in facts["training"].items():  # type: ignore[union-attr]
            shown.add_row(*cells(label, value))
        console.print(shown)
        console.print(f"written: {visible(str(run.folder))}", soft_wrap=True)

    commands = tuple(next_commands(run.base, run.delta, run.folder)) if run.folder is not None else ()
    return Result({**facts, "receipt": None}, store.proof(run.delta, run.base), view, next=commands)
