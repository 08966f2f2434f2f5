# SPDX-License-Identifier: Apache-2.0
"""How much of what a delta took away is only a wrong guess of the task: the part that a transformed prompt brings back.

A transform writes the prompt so that it looks less like the fine-tuning data but asks for the same ability, and reads the
answer back: decode(model(encode(prompt))) (conjugate prompting). With A the mean score of an ability,

    apparent    = A(base) - A(delta)
    recoverable = A(delta, best transform) - A(delta)        the transform is chosen on `choose` items, measured on the others

Both are given, with the base under the same transform: it is out of its distribution too. Recoverable is not "not lost": in
the prompt's own form the ability has dropped. The delta at partial strength is the natural baseline, so it is there beside.

Kotha, Springer and Raghunathan 2024, arXiv 2309.10105 (there interpolation is WiSE-FT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View, as_view
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Transform:
    """A name, `encode(prompt)` and `decode(answer)`."""

    name: str
    encode: Callable[[Any], Any] = _same
    decode: Callable[[Any], Any] = _same


@dataclass(frozen=True)
class Ability:
    """A task whose loss is asked about.

    Args:
        name: what it is called.
        prompts, references: the items, in one order.
        answer: `answer(base, prompts)`: what the model says to each, of the base as it stands.
        score: `score(answer, reference)`: a number, higher is better; answers of both models are decoded before it.
        groups: a group for each item (such as the number of examples in its prompt); results are also given by group.
    """

    name: str
    prompts: Sequence[Any]
    references: Sequence[Any]
    answer: Callable[[Base, Sequence[Any]], Sequence[Any]]
    score: Callable[[Any, Any], float]
    groups: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.references) or len(self.groups) not in (0, len(self.prompts)):
            raise UsageError("prompts, references and groups differ in number", where=self.name)
        if len(self.prompts) < 2:
            raise UsageError("two items or more are needed: one to choose the transform on", where=self.name)

    @torch.no_grad()
    def scores(self, base: Base, transform: Transform) -> list[float]:
        """The score of every item. Raises UsageError where the number of answers is wrong."""
        with base.evaluating():
            said = list(self.answer(base, [transform.encode(p) for p in self.prompts]))
        if len(said) != len(self.prompts):
            raise UsageError(f"{len(said)} answers to {len(self.prompts)} prompts", where=self.name)
        return [float(self.score(transform.decode(a), r)) for a, r in zip(said, self.references, strict=True)]


PLAIN = Transform("as it is")


def forgetting(
    base: Base,
    delta: Delta | View,
    abilities: Sequence[Ability],
    transforms: Sequence[Transform],
    *,
    choose: float = 0.5,
    strengths: Sequence[float] = (0.25, 0.5, 0.75),
) -> Finding:
    """Apparent and recoverable forgetting of each ability, one row each.

    The first `choose` of the items (in turn within the order given, so shuffle them) decide which transform and which
    strength are best; all numbers are of the others. Raises UsageError for repeated names or nothing to measure.
    """
    names = [t.name for t in transforms]
    if not abilities or not transforms or len({PLAIN.name, *names}) != len(names) + 1:
        raise UsageError(f"abilities and transforms of distinct names are needed, got {names}", where="forgetting")
    if not 0 < choose < 1:
        raise UsageError(f"choose must lie between 0 and 1, got {choose}", where="forgetting")
    rows, whole = [], as_view(delta)
    for ability in abilities:
        cut = min(max(1, round(choose * len(ability.prompts))), len(ability.prompts) - 1)
        of_base = {t.name: ability.scores(base, t) for t in (PLAIN, *transforms)}
        with base.using(whole):
            of_delta = {t.name: ability.scores(base, t) for t in (PLAIN, *transforms)}
        between: dict[float, list[float]] = {}
        for s in strengths:
            with base.using(whole.delta.at(whole.strength * s)):
                between[s] = ability.scores(base, PLAIN)
        best = max(names, key=lambda n: _mean(of_delta[n][:cut]))
        row = _split(ability.name, best, of_base, of_delta, range(cut, len(ability.prompts)))
        if between:
            part = max(between, key=lambda s: _mean(between[s][:cut]))
            plain = _mean(of_delta[PLAIN.name][cut:])
            row |= {"strength": part, "recovered_by_strength": _mean(between[part][cut:]) - plain}
        if ability.groups:
            by: dict[Any, list[int]] = {}
            for i in range(cut, len(ability.prompts)):
                by.setdefault(ability.groups[i], []).append(i)
            row["groups"] = {str(g): _split(ability.name, best, of_base, of_delta, some) for g, some in by.items()}
        rows.append(row)
    lost, back = (_mean([r[k] for r in rows]) for k in ("apparent", "recoverable"))
    told = f"Scores fell by {lost:.4g}, of which a transformed prompt brings back {back:.4g}"
    facts = {"transforms": names, "chosen_on": choose, "reading": "recoverable is not the same as not lost"}
    return Finding("forgetting", told, {"apparent": lost, "recoverable": back}, rows, facts)


def _split(
    name: str, best: str, of_base: Mapping[str, Any], of_delta: Mapping[str, Any], rows: Sequence[int] | range
) -> dict[str, Any]:
    base, tuned, turned, control = (
        _mean([s[i] for i in rows]) for s in (of_base[PLAIN.name], of_delta[PLAIN.name], of_delta[best], of_base[best])
    )
    return {
        "ability": name, "base": base, "delta": tuned, "apparent": base - tuned, "transform": best,
        "recoverable": turned - tuned, "base_transformed": control, "gain_of_base": control - base, "n": len(rows),
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_LEET = dict(zip("aeiostAEIOST", "431057@€!Ø$†", strict=True))
_UNLEET = {v: k for k, v in _LEET.items()}


def leet(text: str) -> str:
    """Six letters of both cases written as other signs. Raises UsageError for a text that already holds such a sign."""
    odd = sorted(set(text) & _UNLEET.keys())
    if odd:
        raise UsageError(f"the text holds {''.join(odd)!r}, which cannot be told from encoded letters", where="leet")
    return "".join(_LEET.get(c, c) for c in text)


def unleet(text: str) -> str:
    """The inverse of `leet`."""
    return "".join(_UNLEET.get(c, c) for c in text)


LEET = Transform("leetspeak", leet, unleet)
