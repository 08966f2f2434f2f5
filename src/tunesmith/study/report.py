# SPDX-License-Identifier: Apache-2.0
"""Check a committed result against its study, and show results."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.study.run import (
    FORMAT,
    NO_INTERVAL,
    find,
    is_interval,
    judge,
    load_study,
    plain_json,
    raw_problems,
    write_result,
)
from tunesmith.study.spec import LABELS, Study, sha256_text

_NUMBER = (int, float)
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": str,
    "id": int,
    "slug": str,
    "paper": str,
    "claim": str,
    "verdict_rule": str,
    "rule_sha256": str,
    "verdict_sha256": str,
    "source_sha256": str,
    "arms": list,
    "raw": dict,
    "statistics": dict,
    "verdict": str,
    "reasons": list,
    "deviations": list,
    "command": str,
    "seeds": list,
    "minutes": _NUMBER,
    "versions": dict,
    "cpu": str,
    "threads": int,
    "commit": str,
    "smoke": bool,
}


def load_result(path: str | Path) -> dict[str, Any]:
    """One result file (or the `result.json` in a folder); raises DataError when it cannot be read."""
    file = Path(path)
    file = file / "result.json" if file.is_dir() else file
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("there is no such result", where=str(file), hint="run the study first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"this result cannot be read: {error}", where=str(file)) from None
    if not isinstance(result, dict):
        raise DataError("a result must be a JSON object", where=str(file))
    return result


def load_results(root: str | Path = "studies") -> list[dict[str, Any]]:
    """Every committed result under `root`, by folder name."""
    return [load_result(file) for file in sorted(Path(root).glob("[0-9][0-9][0-9]-*/result.json"))]


def check(
    result: Mapping[str, Any] | str | Path, study: Study | None = None, *, root: str | Path = "studies"
) -> list[str]:
    """What is wrong with a result, in words; empty when nothing is.

    The verdict is recomputed from the raw numbers by the study's own function and must come out the same, with the same
    statistics; the rule's text and the function must be those of the run. `study` is looked up beside the result's
    path, or by id under `root`, when it is not given.
    """
    if isinstance(result, str | Path):
        file = Path(result)
        if study is None:
            study = load_study(file if file.is_dir() else file.parent)
        result = load_result(file)
    problems = _shape_problems(result)
    if problems:
        return problems
    if study is None:
        study = find(str(result["id"]), root)
    problems += _identity_problems(result, study)
    problems += raw_problems(result["raw"], result["arms"], result["seeds"])
    return problems if problems else _verdict_problems(result, study)


def restate(study: Study) -> dict[str, Any]:
    """Write a result's reasons and statistics anew from its raw numbers, for statistics that were added after the run.

    Raises DataError where the rule's text has changed since, or the verdict would.
    """
    file = study.folder / "result.json"
    result = load_result(file)
    problems = [p for p in _shape_problems(result) if p != NO_INTERVAL]
    if problems:
        raise DataError("; ".join(problems), where=str(file))
    if result["verdict_rule"] != study.verdict_rule:
        raise DataError(
            "the verdict rule is not the one the result was judged by", where=str(file), hint="run it again"
        )
    again = judge(study, result["raw"])
    if again["verdict"] != result["verdict"]:
        what = f"the raw numbers give {again['verdict']!r} now, the result says {result['verdict']!r}"
        raise DataError(what, where=str(file), hint="a verdict changes only with a new run")
    result |= {**again, "verdict_sha256": study.verdict_sha256()}
    write_result(study.folder, result)
    return result


def _shape_problems(result: Mapping[str, Any]) -> list[str]:
    problems = [f"the field {name!r} is missing" for name in _FIELDS if name not in result]
    problems += [f"the field {name!r} is unknown" for name in result if name not in _FIELDS]
    for name, kind in _FIELDS.items():
        value = result.get(name)
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if name in result and wrong:
            problems.append(f"the field {name!r} is a {type(value).__name__}")
    if problems:
        return problems
    if result["format"] != FORMAT:
        return [f"the format is {result['format']!r}, not {FORMAT!r}"]
    if result["smoke"]:
        problems.append("this is a smoke result")
    if not result["seeds"]:
        problems.append("there are no seeds")
    if result["verdict"] not in LABELS:
        problems.append(f"the verdict {result['verdict']!r} is not one of {', '.join(LABELS)}")
    if not math.isfinite(result["minutes"]) or result["minutes"] < 0:
        problems.append(f"minutes is {result['minutes']}")
    if not any(is_interval(value) for value in result["statistics"].values()):
        problems.append(NO_INTERVAL)
    try:
        plain_json(dict(result), "the result")
    except DataError as error:
        problems.append(error.what)
    return problems


def _identity_problems(result: Mapping[str, Any], study: Study) -> list[str]:
    problems = []
    for name in ("id", "slug", "paper", "claim"):
        if result[name] != getattr(study, name):
            problems.append(f"{name} is {result[name]!r} in the result and {getattr(study, name)!r} in the study")
    for name in ("arms", "seeds"):
        if result[name] != list(getattr(study, name)):
            problems.append(f"{name} are {result[name]} in the result and {list(getattr(study, name))} in the study")
    if result["rule_sha256"] != sha256_text(result["verdict_rule"]):
        problems.append("the verdict rule in the result does not have the recorded digest")
    if result["verdict_rule"] != study.verdict_rule:
        problems.append("the study's verdict rule is not the one the result was judged by")
    if result["verdict_sha256"] != study.verdict_sha256():
        problems.append("the study's verdict function is not the one the result was judged by")
    return problems


def _verdict_problems(result: Mapping[str, Any], study: Study) -> list[str]:
    try:
        again = judge(study, result["raw"])
    except Exception as error:  # the verdict function is the study's own code
        return [f"the verdict cannot be recomputed: {type(error).__name__}: {error}"]
    problems = []
    if again["verdict"] != result["verdict"]:
        problems.append(f"the raw numbers give {again['verdict']!r}, the result says {result['verdict']!r}")
    if not _close(again["statistics"], result["statistics"]):
        problems.append("the raw numbers give other statistics than the result holds")
    if again["reasons"] != result["reasons"]:
        problems.append("the raw numbers give other reasons than the result holds")
    return problems


def _close(a: Any, b: Any) -> bool:
    """Equal structure, numbers within 1e-9 relative or absolute."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, _NUMBER) and isinstance(b, _NUMBER):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def statistic_text(value: Any) -> str:
    """A statistic in words: `mean [low, high], n` for an interval."""
    if is_interval(value):
        size = f", n={value['n']}" if "n" in value else ""
        return f"{_number(value['mean'])} [{_number(value['low'])}, {_number(value['high'])}]{size}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {statistic_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(statistic_text, value))
    return _number(value) if isinstance(value, _NUMBER) and not isinstance(value, bool) else str(value)


def plain_cell(text: str) -> str:
    """One table cell of Markdown: no newline, no column break, no HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def studies_md(results: Sequence[Mapping[str, Any]], *, key_numbers: int = 3) -> str:
    """The text of STUDIES.md: one row per result, with its first `key_numbers` intervals."""
    counts = Counter(result["verdict"] for result in results)
    summary = ", ".join(f"{counts[label]} {label}" for label in LABELS if counts[label]) or "none yet"
    lines = [
        "# Studies",
        "",
        "Each study runs one paper's claim small, with a verdict rule fixed before running. This table is generated by "
        "`tunesmith study table` from the committed `result.json` files; `tunesmith study check` recomputes every "
        "verdict from the raw numbers. Intervals are 95 %.",
        "",
        f"{len(results)} studies: {summary}.",
        "",
        "| id | study | claim | verdict | key numbers | minutes | commit |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in sorted(results, key=lambda r: r["id"]):
        shown = [f"{k}: {statistic_text(v)}" for k, v in result["statistics"].items() if is_interval(v)][:key_numbers]
        head, _, dirty = result["commit"].partition("+")
        cells = (
            f"{result['id']:03d}",
            f"[{result['slug']}](studies/{result['id']:03d}-{result['slug']}/README.md)",
            plain_cell(result["claim"]),
            result["verdict"],
            "<br>".join(plain_cell(text) for text in shown),
            f"{result['minutes']:.1f}",
            head[:9] + (f"+{dirty}" if dirty else ""),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def show(result: Mapping[str, Any]) -> str:
    """A result as plain text: claim, rule, verdict, reasons, statistics, deviations, and how it was run."""
    lines = [f"{result['id']:03d} {result['slug']}: {result['verdict']}"]
    if result["smoke"]:
        lines.append("SMOKE RUN: these numbers mean nothing")
    lines += ["", f"paper      {result['paper']}", f"claim      {result['claim']}", "", "rule"]
    lines += [f"  {line}" for line in result["verdict_rule"].strip().splitlines()]
    lines += ["", "reasons", *(f"  {reason}" for reason in result["reasons"])]
    lines += ["", "statistics", *(f"  {name}: {statistic_text(value)}" for name, value in result["statistics"].items())]
    if result["deviations"]:
        lines += ["", "deviations", *(f"  - {text}" for text in result["deviations"])]
    seen = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += [
        "",
        f"run        {result['command']}, seeds {result['seeds']}, {result['minutes']} minutes",
        f"on         {result['cpu']}, {result['threads']} thread(s), {seen}",
        f"commit     {result['commit']}",
    ]
    return "\n".join(lines) + "\n"
