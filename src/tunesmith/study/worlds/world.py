# SPDX-License-Identifier: Apache-2.0
"""What every world offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunesmith.core.base import Base
from tunesmith.train.tasks import Task

SPLITS = ("dev", "test")


@dataclass(frozen=True)
class Score:
    """A model on one split.

    `metric` is what rates are chosen by and arms are compared on. `rows` is the same per row, so that arms can be
    compared row by row: 0 or 1 where the metric is accuracy, mean loss of the row's tokens where it is a loss. The
    metric is the mean of `rows` weighted by `units` (1 for classes, supervised tokens for language). `values` holds
    everything measured, by name.
    """

    metric: float
    rows: list[float]
    units: list[int]
    values: dict[str, float] = field(default_factory=dict)


class World(Protocol):
    """A base with a task to learn. Scores are of the base as it stands, with whatever deltas are in use.

    `companions` are methods that every arm has besides its own (a head). `batch` is the batch size and `precision` the
    number format that arms train and are measured in.
    """

    name: str
    base: Base
    task: Task
    batch: int
    precision: str
    companions: Sequence[Any]
    higher_is_better: bool

    def score(self, split: str) -> Score:
        """The score on "dev" (for choosing) or "test" (for reporting only)."""
        ...

    def retention(self) -> dict[str, float]:
        """How much of what the base did before it still does, on text of another kind; see the world."""
        ...
