# SPDX-License-Identifier: Apache-2.0
"""Combiners: several changes of one base in, one change out, tensor by tensor.

`Changes` is what is combined, wherever it comes from (deltas in memory, model folders on disk): the tensors that change
and, one tensor at a time, the change each source makes to it. A combiner declares annotated fields with `option(...)` and

    combine(at, changes, weights, now) -> Update | None

for one tensor: `changes[i]` is source i's `Update`, or None where it leaves the tensor alone; `weights[i]` its weight,
never 0 (a source without weight is left out before); None means no change. One that ranks or measures across tensors
also has

    survey(changes, weights, now) -> Any

which sees all of them first, one by one, and whose result is `now.surveyed`. One whose result is a weighted sum of the
changes has

    coefficients(weights) -> list[float]

which lets it act on tensors that are no weights (scales, prompts, heads). Nothing holds more than one dense tensor a
source at a time.

Facts declared on registering, beside name and paper: `linear` (the result is linear in the changes), `whole` (options
at which it leaves a single source as it is), `most` (the largest number of sources), `expected` (law -> why it does not
hold).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.core.algebra import Update
from tunesmith.core.errors import UsageError
from tunesmith.core.registry import Registry

COMBINERS = Registry("combiner", "tunesmith.compose", "combine")
combiner = COMBINERS.register


@dataclass(frozen=True)
class Place:
    """A tensor of the base that some source changes, in canonical orientation.

    `path` and `name` are the module and its parameter; `kind` is the site's ("" where none is known); `depth` counts
    from 0 over the `of` repeated blocks of one stack (None outside them). `tied` are other paths whose weight is the same
    tensor and changes with it. `base()` gives its value, fp32 or wider. `head()` says
    whether it makes the model's outputs, which may take a look at the whole model.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    kind: str = ""
    depth: int | None = None
    of: int = 1
    tied: tuple[str, ...] = ()
    base: Callable[[], Tensor] = field(default=lambda: torch.empty(0), repr=False, compare=False)
    head: Callable[[], bool] = field(default=lambda: False, repr=False, compare=False)

    @property
    def key(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


class Changes(Protocol):
    """Changes of one base from several sources."""

    @property
    def names(self) -> Sequence[str]:
        """A name for each source, all different."""
        ...

    def places(self) -> Iterator[Place]:
        """Every tensor that a source changes, in one fixed order."""
        ...

    def at(self, place: Place) -> list[Update | None]:
        """The change of each source at one place, made anew at each call."""
        ...


@dataclass(frozen=True)
class Now:
    """What a combiner may ask for: the seed of the merge, the names of the sources and the result of its survey.

    `dense`: the result is added to a weight at once, so a form that takes less room is of no use.
    """

    seed: int = 0
    surveyed: Any = None
    names: Sequence[str] = ()
    dense: bool = False

    def generator(self, place: Place, source: int = 0) -> torch.Generator:
        """Random numbers of one place and source, the same in whatever order places and sources come."""
        from tunesmith.core.delta import site_seed

        name = self.names[source] if source < len(self.names) else str(source)
        return torch.Generator().manual_seed(site_seed(self.seed, f"{place.key}#{name}"))


def dense(at: Place, changes: Sequence[Update | None]) -> list[Tensor]:
    """Every change as a tensor of the place's shape, zeros where there is none, on one device."""
    found = [None if u is None else u.dense() for u in changes]
    like = next((d for d in found if d is not None), torch.empty(0))
    return [torch.zeros(at.shape, dtype=like.dtype, device=like.device) if d is None else d for d in found]


class Combiner(Protocol):
    """One way to make one change of several."""

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """The combined change of one tensor."""
        ...


@dataclass(frozen=True)
class Chosen:
    """Some of the sources of `changes`, by number."""

    changes: Changes
    kept: Sequence[int]

    @property
    def names(self) -> Sequence[str]:
        return [self.changes.names[i] for i in self.kept]

    def places(self) -> Iterator[Place]:
        return self.changes.places()

    def at(self, place: Place) -> list[Update | None]:
        found = self.changes.at(place)
        return [found[i] for i in self.kept]


def combined(
    how: Combiner, changes: Changes, weights: Sequence[float], *, seed: int = 0
) -> Iterator[tuple[Place, Update]]:
    """Every changed tensor with its combined change, one at a time.

    Raises UsageError for weights that do not fit the sources, or more sources than the combiner takes.
    """
    if len(weights) != len(changes.names):
        raise UsageError(f"{len(changes.names)} sources and {len(weights)} weights", hint="one weight for each source")
    if any(not math.isfinite(w) for w in weights):
        raise UsageError(f"a weight is not finite: {list(weights)}")
    kept = [i for i, w in enumerate(weights) if w != 0]
    if len(kept) < len(weights):
        changes, weights = Chosen(changes, kept), [weights[i] for i in kept]
    info = getattr(how, "info", None)
    most = info.facts.get("most") if info is not None else None
    if info is not None and most is not None and len(weights) > most:
        hint = "merge two, then the result with the next; or use karcher, which takes any number"
        raise UsageError(f"{info.name} takes {most} sources, got {len(weights)}", hint=hint)
    if not weights:
        return
    now = Now(seed, names=tuple(changes.names))
    if hasattr(how, "survey"):
        now = replace(now, surveyed=how.survey(changes, weights, now))
    for place in changes.places():
        found = changes.at(place)
        if all(c is None for c in found):
            continue
        change = how.combine(place, found, weights, now)
        if change is not None:
            yield place, change
