# SPDX-License-Identifier: Apache-2.0
"""Which methods take part: named or all, with their sizes counted on the real base and matched where asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import make_part
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.study.fair import match_rank

# The option that sets how much a method trains, in order of preference where it has several.
KNOBS = ("rank", "width", "tokens", "block", "entries", "n", "share", "density", "budget")
ADAM = 3  # the gradient and two moments that AdamW holds for every number that trains
HEAD = "head"


@dataclass(frozen=True)
class Size:
    """What one method holds on a base: numbers that train, and bytes in training (stored, gradients, moments)."""

    trainable: int
    bytes: int


@dataclass(frozen=True)
class Candidate:
    """A method in the comparison. `method` is None for the head alone; `note` says what was done to its size."""

    label: str
    method: Any
    size: Size
    note: str = ""

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.method is None else dict(methods.chosen(self.method))

    @property
    def recipe_lr(self) -> float:
        """The method's own learning rate."""
        from tunesmith.train.loop import default_lr

        return default_lr(self.method if self.method is not None else methods.build(HEAD))


@dataclass(frozen=True)
class LeftOut:
    """A method that does not take part, and why."""

    label: str
    reason: str


class _Started:
    """A method as `make_part` sees it without what needs data or the weights' values: enough to count."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __getattr__(self, name: str) -> Any:
        if name in ("observe", "calibrate"):
            raise AttributeError(name)
        return getattr(self._method, name)


def size_of(base: Base, method: Any) -> Size:
    """The size of a fresh part of `method` on `base`. Raises what attaching it raises.

    Methods that learn their start from data may take fewer sites in the end.
    """
    part = make_part(base, _Started(method))
    trained = [t for _, _, t in part.items() if t.requires_grad]
    stored = sum(t.numel() * t.element_size() for _, _, t in part.items())
    return Size(sum(t.numel() for t in trained), stored + ADAM * sum(t.numel() * t.element_size() for t in trained))


def parse(wanted: str | Sequence[Any]) -> list[tuple[str, Any]]:
    """(label, method) from "all", a comma-separated text such as `lora:rank=4,bone`, or a list of names and methods.

    A head stands for itself alone (None). Raises UsageError for an unknown name or option, or a method named twice.
    """
    if isinstance(wanted, str) and wanted.strip() == "all":
        return [(info.name, None if info.name == HEAD else info.cls()) for info in methods.methods()]
    given = list(split_names(wanted)) if isinstance(wanted, str) else list(wanted)
    made = []
    for item in given:
        label = item if isinstance(item, str) else _spelt(item)
        method = methods.parse(item) if isinstance(item, str) else item
        made.append((label, None if methods.info_of(method).name == HEAD else method))
    labels = [label for label, _ in made]
    twice = sorted({x for x in labels if labels.count(x) > 1})
    if twice or not made:
        raise UsageError(f"{twice[0]!r} is named twice" if twice else "no method was named", where="methods")
    return made


def _spelt(method: Any) -> str:
    """A method as the command line would name it."""
    options = ",".join(f"{k}={v}" for k, v in methods.chosen(method))
    return methods.info_of(method).name + (f":{options}" if options else "")


def split_names(text: str) -> Iterator[str]:
    """`a:x=1,y=2,b` is `a:x=1,y=2` and `b`: a piece with an equals sign and no colon before it belongs to the last."""
    current = ""
    depth = 0
    for piece in text.split(","):
        more = depth > 0 or ("=" in piece and ":" not in piece.split("=", 1)[0])
        if current and not more:
            yield current
            current = piece.strip()
        else:
            current = f"{current},{piece}" if current else piece.strip()
        depth += piece.count("[") + piece.count("{") - piece.count("]") - piece.count("}")
    if current:
        yield current


def gather(
    base: Base,
    wanted: str | Sequence[Any],
    *,
    has_head: bool,
    equal: str = "time",
    parameters: int | None = None,
) -> tuple[list[Candidate], list[LeftOut], dict[str, Any]]:
    """The methods that attach to `base`, those that do not with the reason, and what sizes were matched to.

    With `equal` "parameters" or "memory" the size option of every method that has one is set so that its count is
    nearest to the target: `parameters`, else that of the first method named (of `lora` among all). Raises UsageError
    when nothing is left.
    """
    listed, left = [], []
    for label, method in parse(wanted):
        if method is None and not has_head:
            left.append(LeftOut(label, "this data needs no head: the base answers itself"))
            continue
        try:
            size = Size(0, 0) if method is None else size_of(base, method)
        except Exception as error:  # whatever it is, it is told and the others go on
            left.append(LeftOut(label, reason_of(error)))
            continue
        if method is not None and not size.trainable:
            left.append(LeftOut(label, "it has nothing to train on this base"))
            continue
        listed.append(Candidate(label, method, size))
    if not listed:
        shown = "; ".join(f"{x.label}: {x.reason}" for x in left)
        raise UsageError("no method can be attached to this base", where=base.name, hint=shown)
    target: dict[str, Any] = {}
    if equal in ("parameters", "memory"):
        listed, target = _matched(base, listed, equal, parameters)
    return listed, left, target


def reason_of(error: BaseException) -> str:
    """The error in one line."""
    found = str(error) if isinstance(error, TunesmithError) else f"{type(error).__name__}: {error}"
    return " ".join(found.split())[:200]


def _matched(
    base: Base, listed: list[Candidate], equal: str, parameters: int | None
) -> tuple[list[Candidate], dict[str, Any]]:
    measure: Callable[[Size], int] = (lambda s: s.trainable) if equal == "parameters" else (lambda s: s.bytes)
    sized = [c for c in listed if c.method is not None]
    if not sized:
        return listed, {}
    first = next((c for c in sized if c.label == "lora"), sized[0])
    if parameters is not None and equal == "memory":
        raise UsageError("it goes with --equal parameters only", where="parameters")
    target = parameters if parameters is not None else measure(first.size)
    out = [c if c.method is None else _fitted(base, c, target, measure) for c in listed]
    unit = "trained numbers" if equal == "parameters" else "bytes held in training"
    return out, {"target": target, "unit": unit, "from": "given" if parameters is not None else first.label}


def knob_of(method: Any) -> str | None:
    """The option that sets how much a method trains: the one it names as `sized_by`, else the first of `KNOBS`."""
    named = getattr(type(method), "sized_by", None)
    options = {row["name"] for row in methods.schema(type(method))}
    return named or next((k for k in KNOBS if k in options), None)


def _fitted(base: Base, candidate: Candidate, target: int, measure: Callable[[Size], int]) -> Candidate:
    """The candidate with its size option nearest to the target; as it is, with a note, where it has none."""
    knob = knob_of(candidate.method)
    gap = measure(candidate.size) / max(1, target) - 1
    if knob is None:
        return dataclasses.replace(candidate, note=f"no size option; {gap:+.0%} of the target")
    found: dict[int, tuple[Any, Size]] = {}
    for i, value in enumerate(_values(candidate.method, knob)):
        try:
            method = dataclasses.replace(candidate.method, **{knob: value})
            found[i] = (method, size_of(base, method))
        except (TunesmithError, RuntimeError, ValueError):
            continue  # a block that does not divide, a rank above what a layer has
        if measure(found[i][1]) > target:
            break
    if not found:
        return dataclasses.replace(candidate, note=f"no value of {knob} fits; {gap:+.0%} of the target")
    match = match_rank(lambda i: measure(found[i][1]), target, found)
    method, size = found[match.rank]
    note = f"{knob}={getattr(method, knob)}" + (f"; {match.relative:+.0%} of the target" if match.gap else "")
    return Candidate(candidate.label, method, size, note)


def _values(method: Any, knob: str) -> list[Any]:
    """Values of a size option to try, growing."""
    row = next(r for r in methods.schema(type(method)) if r["name"] == knob)
    if isinstance(row["default"], float):
        low, high = max(row["low"] or 0.0, 1e-5), min(row["high"] or 1.0, 1.0)
        return [v for k in range(60) if low <= (v := round(1e-5 * 1.25**k, 8)) <= high]
    low, high = row["low"] if row["low"] is not None else 1, row["high"] if row["high"] is not None else 1 << 20
    values = list(range(1, 9)) + [round(base_ * 2**k) for k in range(18) for base_ in (10, 12, 14, 16)]
    return [v for v in values if low <= v <= min(high, 1 << 20)]
