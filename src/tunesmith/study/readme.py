# SPDX-License-Identifier: Apache-2.0
"""Numbers in a study's README come from its result: the block between two marks is generated, never typed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.study.cells import write_atomically
from tunesmith.study.report import load_result, plain_cell, statistic_text

START, END = "<!-- result: generated from result.json -->", "<!-- end of result -->"


def arms_table(raw: Mapping[str, Any], metric: str = "metric") -> str:
    """Mean and standard deviation over seeds of `metric`, one row per arm, one column per combination of text fields.

    A study whose rows carry fields such as a target or a setting gets one column for each. Raises DataError when a row
    lacks the metric.
    """
    cells: dict[str, dict[tuple[str, ...], list[float]]] = {}
    columns: list[tuple[str, ...]] = []
    for arm, rows in raw["arms"].items():
        for row in rows:
            if metric not in row:
                raise DataError(f"a row of arm {arm!r} has no {metric!r}", hint="name the metric the study reports")
            column = tuple(value for value in row.values() if isinstance(value, str))
            if column not in columns:
                columns.append(column)
            cells.setdefault(arm, {}).setdefault(column, []).append(float(row[metric]))
    heads = [" ".join(column) or metric for column in columns]
    lines = ["| arm | " + " | ".join(map(plain_cell, heads)) + " |", "| --- |" + " ---: |" * len(heads)]
    digits = _digits([found.get(column, []) for found in cells.values() for column in columns])
    for arm, found in cells.items():
        values = [_spread(found.get(column, []), digits) for column in columns]
        lines.append(f"| {plain_cell(arm)} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _digits(groups: list[list[float]]) -> int:
    """Digits after the point for a table: one for percentages, for smaller numbers two of the smallest deviation."""
    if max((abs(v) for g in groups for v in g), default=0.0) >= 10:
        return 1
    spread = min((s for g in groups if len(g) > 1 and (s := stdev(g)) > 0), default=1.0)
    return min(5, max(1, 1 - math.floor(math.log10(spread))))


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    middle = f"{mean(values):.{digits}f}"
    return f"{middle} ± {stdev(values):.{digits}f}" if len(values) > 1 else middle


def block(result: Mapping[str, Any], metric: str = "metric") -> str:
    """The generated part of a README: verdict, table of arms, statistics of the rule, and how it was run."""
    seen = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        START,
        "",
        f"**Verdict: {result['verdict']}.**",
        "",
        f"{metric}, mean ± standard deviation over {len(result['seeds'])} seeds:",
        "",
        arms_table(result["raw"], metric),
        "",
        "Statistics of the rule (95 % intervals):",
        "",
        "| quantity | value |",
        "| --- | --- |",
        *(f"| {plain_cell(k)} | {plain_cell(statistic_text(v))} |" for k, v in result["statistics"].items()),
        "",
        f"Run with `{result['command']}` in {result['minutes']:.1f} minutes on {result['cpu']}, {result['threads']} "
        f"thread(s); {seen}; commit {result['commit']}.",
        "",
        END,
    ]
    return "\n".join(lines)


def fill(folder: str | Path, metric: str = "metric") -> bool:
    """Put the generated block into `folder/README.md`; returns whether anything changed.

    Raises DataError when the README or its marks are missing.
    """
    file = Path(folder) / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    head, found, rest = text.partition(START)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise DataError("the README lacks the marks of the generated block", where=str(file), hint=f"{START} ... {END}")
    new = head + block(load_result(folder), metric) + tail
    if new != text:
        write_atomically(file, new.encode())
    return new != text
