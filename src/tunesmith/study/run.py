# SPDX-License-Identifier: Apache-2.0
"""Find studies, run one, and write its result."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError, TunesmithError, UsageError, nearest
from tunesmith.study.cells import Cells, write_atomically
from tunesmith.study.spec import Context, Raw, Study, Verdict

FORMAT = "tunesmith-study/1"
NO_INTERVAL = "no statistic has a confidence interval (mean, low, high)"
_FOLDER = re.compile(r"(\d{3})-([a-z0-9-]+)")


def discover(root: str | Path = "studies") -> list[Study]:
    """All studies under `root`, by id. A folder `NNN-slug` must hold a `study.py` that declares `STUDY`.

    The folder is loaded as a package of its own, so `from . import sibling` works and two studies may use the same file
    names. Raises UsageError naming the folder that is wrong.
    """
    base = Path(root)
    if not base.is_dir():
        raise UsageError("there is no such folder of studies", where=str(root))
    folders = [entry for entry in sorted(base.iterdir()) if entry.is_dir() and _FOLDER.fullmatch(entry.name)]
    studies = [load_study(folder) for folder in folders]
    ids = [study.id for study in studies]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise UsageError(f"two studies have the id {twice[0]}", where=str(base))
    return sorted(studies, key=lambda study: study.id)


def load_study(folder: str | Path) -> Study:
    """The study declared in `folder/study.py`; raises UsageError when it is missing, broken or misnamed."""
    place = Path(folder).resolve()
    if not (place / "study.py").is_file():
        raise UsageError("there is no study.py", where=str(folder))
    package = "tunesmith_study_" + re.sub(r"\W", "_", str(place))
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]
    module = types.ModuleType(package)
    module.__path__ = [str(place)]
    sys.modules[package] = module
    importlib.invalidate_caches()
    try:
        study = getattr(importlib.import_module(f"{package}.study"), "STUDY", None)
    except TunesmithError:
        raise
    except Exception as error:
        raise UsageError(f"study.py cannot be loaded: {type(error).__name__}: {error}", where=str(folder)) from error
    if not isinstance(study, Study):
        raise UsageError("study.py declares no STUDY = Study(...)", where=str(folder))
    if study.name != place.name:
        raise UsageError(f"the folder is {place.name}, the study calls itself {study.name}", where=str(folder))
    return replace(study, folder=place)


def find(which: str, root: str | Path = "studies") -> Study:
    """The study with this id ("37", "037"), slug or folder name; raises UsageError naming the near ones."""
    studies = discover(root)
    for study in studies:
        if which in (study.slug, study.name) or (which.isdigit() and int(which) == study.id):
            return study
    raise UsageError(f"there is no study {which!r}", where=str(root), hint=nearest(which, [s.name for s in studies]))


def run_study(
    study: Study,
    smoke: bool = False,
    out: str | Path | None = None,
    *,
    fresh: bool = False,
    seeds: Sequence[int] | None = None,
    log: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run a study and write `result.json` into `out` (default: the study's folder; a temporary one for a smoke run).

    Finished cells are kept in `cells.jsonl` beside it until the result is written, so a killed run continues; `fresh`
    discards them. A smoke run never writes into the study's folder. Nothing is written when the study fails.
    """
    place = _out_folder(study, smoke, out)
    used = list(seeds if seeds is not None else (study.smoke_seeds if smoke else study.seeds))
    path = place / "cells.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    source, verdict_sha = study.source_sha256(), study.verdict_sha256()
    cells = Cells(path, {"study": study.name, "source_sha256": source, "seeds": used, "smoke": smoke})
    commit = git_commit(study.folder)
    start = time.perf_counter()
    raw = study.run(Context(smoke, used, place, cells, log, progress))
    raw = plain_json(raw, f"the raw numbers of study {study.id}")
    problems = raw_problems(raw, study.arms, used)
    if problems:
        raise DataError("; ".join(problems), where=f"study {study.id}")
    elapsed = time.perf_counter() - start
    judged = judge(study, raw)
    if not any(is_interval(value) for value in judged["statistics"].values()):
        hint = "the result of a full run needs one: see evaluate.stats.paired_t"
        raise DataError(NO_INTERVAL, where=f"study {study.id}", hint=hint)
    result = {
        "format": FORMAT,
        "id": study.id,
        "slug": study.slug,
        "paper": study.paper,
        "claim": study.claim,
        "verdict_rule": study.verdict_rule,
        "rule_sha256": study.rule_sha256(),
        "verdict_sha256": verdict_sha,
        "source_sha256": source,
        "arms": list(study.arms),
        "raw": raw,
        **judged,
        "deviations": list(study.deviations),
        "command": f"tunesmith study run {study.id}" + (" --smoke" if smoke else ""),
        "seeds": used,
        "minutes": round(max(elapsed, cells.seconds) / 60, 2),
        "versions": versions(),
        "cpu": cpu_name(),
        "threads": threads(),
        "commit": commit,
        "smoke": smoke,
    }
    write_result(place, result)
    path.unlink(missing_ok=True)
    return result


def judge(study: Study, raw: Any) -> dict[str, Any]:
    """The verdict fields of a result, from a copy of the raw numbers that the study's function may do with as it likes."""
    return verdict_json(study.verdict(json.loads(json.dumps(raw))))


def is_interval(value: Any) -> bool:
    """Whether a statistic is a mean with a confidence interval."""
    return isinstance(value, dict) and all(
        isinstance(value.get(k), int | float) and not isinstance(value.get(k), bool) for k in ("mean", "low", "high")
    )


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, whole or not at all."""
    write_atomically(folder / "result.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def _out_folder(study: Study, smoke: bool, out: str | Path | None) -> Path:
    if out is None:
        return Path(tempfile.mkdtemp(prefix=f"tunesmith-smoke-{study.name}-")) if smoke else study.folder
    place = Path(out)
    if smoke and place.resolve() == study.folder.resolve():
        raise UsageError("a smoke run must not write over the real result", where=str(out), hint="give another folder")
    if place.exists() and not place.is_dir():
        raise UsageError("this is a file, not a folder", where=str(out))
    return place


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """`statistics`, `verdict` and `reasons` as they stand in a result."""
    if not isinstance(verdict, Verdict):
        raise UsageError(f"verdict() must return a Verdict, got {type(verdict).__name__}")
    statistics = plain_json(dict(verdict.statistics), "the statistics")
    return {"statistics": statistics, "verdict": verdict.label, "reasons": list(verdict.reasons)}


def plain_json(value: Any, what: str) -> Any:
    """`value` after a round trip through JSON; raises DataError when it is not plain or not finite."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} must be finite plain JSON: {error}") from None


def raw_problems(raw: Raw, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """What is wrong with raw numbers: arms missing or unknown, rows without a declared seed, seeds without a row."""
    table = raw.get("arms") if isinstance(raw, Mapping) else None
    if not isinstance(table, Mapping):
        return ["raw numbers need an 'arms' table"]
    problems = [f"arm {arm!r} is missing from the raw numbers" for arm in arms if arm not in table]
    problems += [f"raw numbers hold the undeclared arm {arm!r}" for arm in table if arm not in arms]
    for arm, rows in table.items():
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "seed" in row for row in rows):
            problems.append(f"arm {arm!r} must be a list of rows with a seed")
            continue
        found = {row["seed"] for row in rows}
        missing = [seed for seed in seeds if seed not in found]
        extra = sorted(found - set(seeds), key=repr)
        if missing or extra:
            problems.append(f"arm {arm!r} misses the seeds {missing} and has the undeclared seeds {extra}")
    return problems


def versions() -> dict[str, str]:
    """Python and the packages a number may depend on; "absent" where one is not installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "tunesmith"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source tree" if name == "tunesmith" else "absent"
    return found


def cpu_name() -> str:
    """The processor's name and the cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = match.group(1).strip() if match else name
    affinity = getattr(os, "sched_getaffinity", None)
    return f"{name}, {len(affinity(0)) if affinity else os.cpu_count()} cores"


def threads() -> int:
    """Threads torch computes with, when torch was used; else 1."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else 1


def environment() -> dict[str, Any]:
    """What a published number must name: versions, processor, threads, commit of the current folder."""
    return {"versions": versions(), "cpu": cpu_name(), "threads": threads(), "commit": git_commit(Path.cwd())}


def git_commit(folder: Path) -> str:
    """The commit `folder` is at, with "+dirty" when tracked or new files differ; "unknown" outside a repository."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    if status is None:
        return "unknown"
    head = git("rev-parse", "--verify", "HEAD") or "none"
    return head + ("+dirty" if status else "")
