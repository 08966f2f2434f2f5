# SPDX-License-Identifier: Apache-2.0
"""`tunesmith chat`: talk to a base, to base + delta, or to both at once from one copy of the weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.output import Debug, Device, Json, Model, Result, console, examples, visible
from tunesmith.cli.places import delta_folder, load_base
from tunesmith.core.errors import DeltaError, TunesmithError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

    from tunesmith.core.base import Base
    from tunesmith.core.delta import View

HELP = examples(
    "tunesmith chat demo --compare",
    "tunesmith chat demo --message 'My parcel 4711 has not come.'",
    "tunesmith chat --model smollm2-135m-instruct",
)
COMMANDS = "/reset forgets the conversation, /quit or Ctrl-D ends it"


def attach(app: typer.Typer) -> None:
    app.command("chat", epilog=HELP, short_help="Talk to a base, to base + delta, or to both")(chat)


@dataclass
class Arm:
    """One side of the conversation: a name, the delta in use (or none), and its own history."""

    name: str
    view: View | None
    messages: list[dict[str, str]] = field(default_factory=list)


def chat(
    delta: Annotated[
        str | None, typer.Argument(metavar="[DELTA]", help="A delta's folder or a run's name; none is the base alone.")
    ] = None,
    model: Model = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and tuned side by side.")] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this and end.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message (default: as trained).")] = None,
    strength: Annotated[float, typer.Option(help="How much of the delta: 0 is the base, 1 is as trained.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Chat with the template and stop tokens the delta was trained with. /quit or Ctrl-D ends it."""
    if delta is None and model is None:
        raise UsageError("name a delta, or a base with --model", where="tunesmith chat")
    if compare and delta is None:
        raise UsageError("--compare needs a delta to compare with the base", where="tunesmith chat")
    base, view = _open(delta, model, strength, device)
    _require_writer(base)
    arms = [Arm("tuned" if view is not None else "base", view)]
    if compare:
        arms.insert(0, Arm("base", None))
    before = base.probe_outputs()
    settings = {"system": system, "max_new_tokens": max_tokens, "temperature": temperature, "seed": seed}
    turns: list[dict[str, Any]] = []
    if message is not None:
        turns.append({"message": message, "answers": _answers(base, arms, message, settings, console())})
    else:
        _converse(base, arms, settings, turns)
    return _result(base, view, turns, before)


def _converse(base: Base, arms: list[Arm], settings: dict[str, Any], turns: list[dict[str, Any]]) -> None:
    """Read messages until the end of input; an error ends one answer, not the conversation."""
    print(COMMANDS, file=sys.stderr)
    for text in _messages():
        if text == "/reset":
            for arm in arms:
                arm.messages.clear()
        elif text.startswith("/"):
            print(COMMANDS, file=sys.stderr)
        else:
            try:
                turns.append({"message": text, "answers": _answers(base, arms, text, settings, console())})
            except TunesmithError as error:
                print(f"error: {visible(str(error))}", file=sys.stderr)


def _messages() -> Iterator[str]:
    """Lines typed or piped in, empty ones left out."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text in ("/quit", "/exit"):
            return
        if text:
            yield text


def _answers(base: Base, arms: list[Arm], text: str, settings: dict[str, Any], out: Console) -> dict[str, str]:
    """Each arm's answer to the message, after its own history: streamed when alone, in two columns when compared."""
    found: dict[str, str] = {}
    for arm in arms:
        asked = [*arm.messages, {"role": "user", "content": text}]
        write = _writer(out) if len(arms) == 1 else None
        found[arm.name] = _answer(base, arm.view, asked, settings, write)
        arm.messages[:] = [*asked, {"role": "assistant", "content": found[arm.name]}]
    if len(arms) > 1:
        out.print(_columns(found))
    else:
        out.print()
    return found


def _answer(
    base: Base, view: View | None, messages: list[dict[str, str]], settings: dict[str, Any],
    write: Callable[[str], None] | None,
) -> str:  # fmt: skip
    """One answer in the layout stored with the delta; `write` gets the text as it is made."""
    from tunesmith.data import prompt_ids
    from tunesmith.data.layout import layout_for, stop_ids_for
    from tunesmith.evaluate.generate import decode, stream

    info = layout_for(base, view, settings["system"])
    ids = prompt_ids(messages, base.tokenizer, info.system, info.template)
    options = {k: v for k, v in settings.items() if k != "system"}
    made: list[int] = []
    shown = 0
    with base.using(view):
        for token in stream(base, ids, stop_ids=stop_ids_for(base, info), **options):
            made.append(token)
            text = decode(base.tokenizer, made)
            if write is not None and not text.endswith("\ufffd"):  # half a character waits for the rest
                write(text[shown:])
                shown = len(text)
    text = decode(base.tokenizer, made)
    if write is not None:
        write(text[shown:])
    return text.strip()


def _writer(out: Console) -> Callable[[str], None]:
    def write(piece: str) -> None:
        out.file.write(visible(piece))
        out.file.flush()

    return write


def _columns(answers: dict[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    for name in answers:
        made.add_column(name, ratio=1, overflow="fold")
    made.add_row(*(Text(visible(t) or "(empty)") for t in answers.values()))
    return made


def _open(delta: str | None, model: str | None, strength: float, device: str) -> tuple[Base, View | None]:
    if delta is None:
        import tunesmith

        return tunesmith.load(model or "", device=device), None
    from tunesmith.core import store
    from tunesmith.core.delta import Delta

    folder = delta_folder(delta)
    base = load_base(folder, store.peek(folder), model, device)
    return base, Delta.load(folder, base).at(strength)


def _require_writer(base: Base) -> None:
    from tunesmith.evaluate.generate import require_writer

    if base.tokenizer is None:
        raise UsageError(f"{base.name} has no tokenizer, so it cannot read or write text")
    require_writer(base)


def _result(base: Base, view: View | None, turns: list[dict[str, Any]], before: Tensor) -> Result:
    """The turns, and the proof that the base came out of the conversation as it went in."""
    import torch

    from tunesmith.core import store
    from tunesmith.data.layout import layout_for, stop_ids_for

    if not torch.equal(before, base.probe_outputs()):
        raise DeltaError("the base answers otherwise than before the conversation", where=base.name)
    info = layout_for(base, view)
    stops = list(stop_ids_for(base, info))
    stored = view is not None and bool(view.delta.layout.get("template"))
    template = f"template {info.sha256[:12]} ({'stored with the delta' if stored else 'of the tokenizer'})"
    used = store.proof(view.delta, base) if view is not None else f"base {base.name} ({base.fingerprint.short})"
    proof = f"{len(turns)} answers; {used}; {template}, stop tokens {stops}; base outputs after: bit-identical"
    data = {
        "base": base.name, "delta": None if view is None else view.delta.name, "turns": turns,
        "strength": None if view is None else view.strength, "template_sha256": info.sha256, "stop_ids": stops,
    }  # fmt: skip
    return Result(data, proof)
