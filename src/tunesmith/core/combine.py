# SPDX-License-Identifier: Apache-2.0
"""Combiners: several changes of one base in, one change out, tensor by tensor.

`Changes` is what is combined, wherever it comes from (deltas in memory, model folders on disk): the tensors that change
and, one tensor at a time, the change each source makes to it. A combiner declares annotated fields with `option(...)` and

    combine(at, changes, weights, now) -> Update | None

for one tensor: `changes[i]` is source i's `Update`, or None where it leaves the tensor alone; `weights[i]` its weight;
None means no change. One that ranks or measures across tensors also has

    survey(changes, weights) -> Any

which sees all of them first, one by one, and whose result is `now.surveyed`. Nothing holds more than one dense tensor a
source at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.core.algebra import Update
from tunesmith.core.registry import Registry

COMBINERS = Registry("combiner", "tunesmith.compose", "combine")
combiner = COMBINERS.register


@dataclass(frozen=True)
class Place:
    """A tensor of the base that some source changes, in canonical orientation.

    `path` and `name` are the module and its parameter; `kind`, `depth` and `of` are the site's (`kind` "" and `depth`
    None where no site is known, or outside the repeated blocks). `base()` gives its value, fp32 or wider.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    kind: str = ""
    depth: int | None = None
    of: int = 1
    base: Callable[[], Tensor] = field(default=lambda: torch.empty(0), repr=False, compare=False)

    @property
    def key(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


class Changes(Protocol):
    """Changes of one base from several sources."""

    names: Sequence[str]

    def places(self) -> Iterator[Place]:
        """Every tensor that a source changes, in one fixed order."""
        ...

    def at(self, place: Place) -> list[Update | None]:
        """The change of each source at one place, made anew at each call."""
        ...


@dataclass(frozen=True)
class Now:
    """What a combiner may ask for: the seed of the merge and the result of its survey."""

    seed: int = 0
    surveyed: Any = None

    def generator(self, place: Place, source: int = 0) -> torch.Generator:
        """Random numbers of one place and source, the same in whatever order places come."""
        from tunesmith.core.delta import site_seed

        return torch.Generator().manual_seed(site_seed(self.seed, f"{place.key}#{source}"))


class Combiner(Protocol):
    """One way to make one change of several."""

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """The combined change of one tensor."""
        ...


def combined(
    how: Combiner, changes: Changes, weights: Sequence[float], *, seed: int = 0
) -> Iterator[tuple[Place, Update]]:
    """Every changed tensor with its combined change, one at a time."""
    surveyed = how.survey(changes, weights) if hasattr(how, "survey") else None
    now = Now(seed, surveyed)
    for place in changes.places():
        change = how.combine(place, changes.at(place), weights, now)
        if change is not None:
            yield place, change
