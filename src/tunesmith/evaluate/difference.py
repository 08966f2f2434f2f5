# SPDX-License-Identifier: Apache-2.0
"""What a delta changed: several probes on one base and delta, with the proof that measuring left both as they were.

    found = ts.diff(base, delta)
    found.finding("intruders").values
    found.write_html("diff.html")

Probes that read parameters run by default, those that read data where a `sample` is given, slow ones where they are named.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View, as_view
from tunesmith.core.errors import TrainingError, UsageError, nearest
from tunesmith.core.probe import PROBES, Finding
from tunesmith.core.registry import config
from tunesmith.core.sample import Sample

FORMAT = "tunesmith-diff/1"


@dataclass(frozen=True)
class Difference:
    """What the probes found, in the order they ran. `skipped` says of probes that do not apply here why."""

    base: str
    delta: str
    strength: float
    methods: list[str]
    base_digest: str
    delta_digest: str
    findings: list[Finding]
    skipped: dict[str, str] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    created: str = ""

    def finding(self, name: str) -> Finding:
        """The finding of one probe. Raises UsageError naming the nearest, or why it was skipped."""
        for f in self.findings:
            if f.probe == name:
                return f
        known = [f.probe for f in self.findings]
        raise UsageError(f"there is no finding of {name!r}", hint=self.skipped.get(name) or nearest(name, known))

    def proof(self) -> str:
        """One line: what was measured, the number that matters most of it, and that nothing was touched."""
        first = self.findings[0]
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return (
            f"{len(self.findings)} probes{skipped}; {first.summary}; base (sha256 {self.base_digest[:12]}) and delta "
            f"({self.delta_digest[:12]}) bit-identical after measuring"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        plain = asdict(self)
        return {"format": FORMAT, **plain}

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON to `path`, atomically. Raises ResourceError."""
        from tunesmith.evaluate.receipt import write_text

        return write_text(path, json.dumps(finite(self.to_dict()), indent=2, allow_nan=False) + "\n")

    def write_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the page with its plots to `path`, atomically. Raises ResourceError."""
        from tunesmith.evaluate.difference_html import page
        from tunesmith.evaluate.receipt import write_text

        return write_text(path, page(self))


def diff(
    base: Base,
    delta: Delta | View,
    probes: str | Sequence[str | Any] | None = None,
    *,
    sample: Sample | None = None,
    tell: Callable[[str], None] = lambda name: None,
) -> Difference:
    """What `delta` changed of `base`.

    Args:
        probes: names with options ("intruders:k=10"), or probe instances; None for every one that needs no more than is
            given. One that is named must apply; of the others, those that do not are left out with the reason.
        sample: data for the probes that read some, for example `ts.sample(base, "rows.jsonl")`.
        tell: called with the name of each probe before it runs.
    Raises UsageError for an unknown probe, one named twice or one that does not apply, BaseMismatch for a delta of another
    base, TrainingError if a probe left the base or the delta changed.
    """
    view = as_view(delta)
    chosen, named = _chosen(probes, sample is not None)
    with base.using(view):
        pass  # a delta of another base is refused before anything is measured
    before = base.digest(), view.delta.digest
    findings, skipped, seconds, options = [], {}, {}, {}
    first: UsageError | None = None
    for p in chosen:
        name = p.info.name
        tell(name)
        start = time.perf_counter()
        try:
            findings.append(p.measure(base, view, sample))
        except UsageError as error:
            if named:
                raise
            first = first or error
            skipped[name] = error.what if error.where is None else f"{error.where}: {error.what}"
        options[name], seconds[name] = config(p), round(time.perf_counter() - start, 3)
    if not findings:
        assert first is not None
        raise first
    if (base.digest(), view.delta.digest) != before:
        raise TrainingError("a probe left the base or the delta changed", where=", ".join(options))
    return Difference(
        base.name, view.delta.name, view.strength, [p.info.name for p in view.delta.parts], *before, findings, skipped,
        options, seconds, datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _chosen(probes: str | Sequence[str | Any] | None, data: bool) -> tuple[list[Any], bool]:
    if probes is None:
        fitting = [i for i in PROBES.all() if not i.facts.get("slow") and (data or not i.facts.get("data"))]
        return [
            i.cls() for i in sorted(fitting, key=lambda i: (bool(i.facts.get("data")), _ORDER.get(i.name, 99)))
        ], False
    given = split(probes) if isinstance(probes, str) else list(probes)
    if not given:
        raise UsageError("no probes given", hint=f"choices: {', '.join(i.name for i in PROBES.all())}")
    made = [PROBES.parse(p) if isinstance(p, str) else p for p in given]
    names = [p.info.name for p in made]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UsageError(f"the probe {twice!r} is named twice", hint="run it again with other options")
    return made, True


_ORDER = {name: i for i, name in enumerate(("norms", "localisation", "drift", "spectra", "intruders"))}


def split(text: str) -> list[str]:
    """Probes in a comma list whose items may have options: "norms,intruders:k=5,eps=0.6,drift"."""
    out: list[str] = []
    for item in re.split(r",(?![^\[]*\])", text):  # not within a list of values
        item = item.strip()
        option = "=" in item and ":" not in item.split("=", 1)[0]
        if out and ":" in out[-1] and option:
            out[-1] += f",{item}"
        elif item:
            out.append(item)
    return out


def finite(value: Any) -> Any:
    """JSON data in which numbers that are not finite are null."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
