# SPDX-License-Identifier: Apache-2.0
"""Probes: what did a delta change, as plain data.

A probe declares annotated fields with `option(...)` and

    measure(base, delta, sample=None) -> Finding

where `base` is as it stands (the delta not in use on it) and `sample` is a `Sample` of data for probes that need one.
It leaves base and delta bit for bit as they were and gives numbers that JSON can hold; pictures and words are made from
them elsewhere. Probes are registered with `data=True` where they need a sample, and `slow=True` where they run only when
named. A `View` may take the delta's place: the delta at a strength.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.core.registry import Registry, option

if TYPE_CHECKING:
    from tunesmith.core.base import Base
    from tunesmith.core.delta import Delta, View
    from tunesmith.core.sample import Sample

__all__ = ["PROBES", "Finding", "Probe", "option", "probe"]

PROBES = Registry("probe", "tunesmith.inspect", "measure")
probe = PROBES.register


@dataclass(frozen=True)
class Finding:
    """What a probe found.

    Args:
        probe: its registered name.
        summary: one sentence with the number that matters most.
        values: single numbers by name.
        rows: one mapping per site, depth, step or example: a table.
        facts: options used, what was left out and why.
    """

    probe: str
    summary: str
    values: dict[str, float | int | str | None] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Probe(Protocol):
    """One question about a delta."""

    def measure(self, base: Base, delta: Delta | View, sample: Sample | None = None) -> Finding:
        """The answer. Raises UsageError where the base, the delta or the missing sample does not allow one."""
        ...
