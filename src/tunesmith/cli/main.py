# SPDX-License-Identifier: Apache-2.0
"""The `tunesmith` command: reads the verb, runs it, shows its result or its error, returns the exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Annotated, Any

import typer

from tunesmith.cli import (
    between,
    chat,
    compare,
    compress,
    demo,
    diff,
    doctor,
    evaluate,
    exchange,
    list_,
    merge,
    methods,
    output,
    plan,
    preview,
    recommend,
    scale,
    serve,
    show,
    study,
    tune,
    verify,
)
from tunesmith.cli.output import Result
from tunesmith.core.errors import Interrupted, TunesmithError, UsageError, nearest

app = typer.Typer(
    name="tunesmith",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog=output.examples(
        "tunesmith demo",
        "tunesmith tune tickets.jsonl --model smollm2-135m-instruct",
        "tunesmith chat tickets --compare",
    ),
)
VERBS = (
    demo, tune, evaluate, compare, recommend, chat, serve, plan, preview, show, list_, verify, diff, merge, between, scale, compress,
    exchange, methods, study,
    doctor,
)  # fmt: skip
for _verb in VERBS:
    _verb.attach(app)


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Train, apply, merge and undo small deltas on a frozen pre-trained model, with a proof after every step."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; `argv` defaults to the process's arguments."""
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args
    debug = "--debug" in args or os.environ.get("TUNESMITH_DEBUG", "") not in ("", "0")
    stdout = sys.stdout
    try:
        with _streams(quiet=as_json and "--help" not in args):
            if args[:1] == ["--version"]:
                return _version(stdout)
            outcome = app(args=args, prog_name="tunesmith", standalone_mode=False)
            if isinstance(outcome, Result) and os.environ.get("RANK", "0") not in ("", "0"):
                return outcome.exit_code  # of several processes of one run the first one speaks
            if isinstance(outcome, Result):
                return output.show(outcome, as_json=as_json, stdout=stdout)
            if outcome == Interrupted.exit_code:
                raise KeyboardInterrupt
            return outcome if isinstance(outcome, int) else 0
    except BrokenPipeError:
        # The reader has gone (`tunesmith list | head`); nothing more can or need be said.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if _no_arguments(error):
            stdout.write(error.ctx.get_help() + "\n")  # type: ignore[union-attr]
            return UsageError.exit_code
        return output.fail(_usage(error), as_json=as_json, debug=debug, stdout=stdout)


def _version(stdout: IO[str]) -> int:
    from importlib import metadata

    try:
        version = metadata.version("tunesmith")
    except metadata.PackageNotFoundError:
        version = "(source tree)"
    stdout.write(f"tunesmith {version}\n")
    return 0


@contextlib.contextmanager
def _streams(quiet: bool) -> Iterator[None]:
    """Text that a terminal cannot show is escaped; with `quiet`, what libraries print goes to standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
        yield


def _no_arguments(error: BaseException) -> bool:
    return type(error).__name__ == "NoArgsIsHelpError" and getattr(error, "ctx", None) is not None


def _usage(error: BaseException) -> BaseException:
    """A parsing error of the command line as a UsageError with the nearest name; other errors as they are.

    The parser's classes have moved between versions of typer, so they are told by their attributes.
    """
    if isinstance(error, TunesmithError) or not hasattr(error, "format_message"):
        return error
    context: Any = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "tunesmith"
    option = getattr(error, "option_name", None)
    if option and type(error).__name__ == "NoSuchOption":
        known = [o for p in context.command.params for o in p.opts if o.startswith("--")] if context else []
        return UsageError(f"there is no option {option!r}", where=where, hint=nearest(option, known))
    message = str(error.format_message()).strip().rstrip(".")
    unknown = message.removeprefix("No such command ").split("'")
    if message.startswith("No such command") and context is not None and len(unknown) > 1:
        verbs = context.command.list_commands(context)
        return UsageError(f"there is no verb {unknown[1]!r}", where=where, hint=nearest(unknown[1], verbs))
    return UsageError(message[:1].lower() + message[1:], where=where, hint=f"see '{where} --help'")


if __name__ == "__main__":
    sys.exit(main())
