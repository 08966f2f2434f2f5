# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: both sides in turn, each run in a process of its own; medians, goals, one file of results.

A benchmark says what one run of one side does (`process` starts it, the worker answers with one line of JSON), and the
rest is here: `in_turn` alternates the sides so that a change of load reaches all of them, `medians` sums the runs up,
`judged` holds a row against its goals, `matrix_rate` measures what the machine could do at most, and `Results` prints and
writes, row by row. Nothing here imports tunesmith, so that a peer's worker can use it without paying for it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
Result = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A bound on one number of a row: `at_least` or `at_most`, inclusive."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, row: Mapping[str, Any]) -> bool:
        """False also where the number is missing."""
        value = row.get(self.metric)
        if value is None:
            return False
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"{self.metric} {bound}"


# Running


def options(about: str | None, rows: Sequence[str]) -> argparse.ArgumentParser:
    """The parser with what every benchmark takes. `--worker` is how it starts itself for one run of one side."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", metavar="A,B", help=f"some of: {', '.join(rows)} (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side in each row (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each run (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write the rows with their environment here; others that are there stay",
    )
    parser.add_argument("--quick", action="store_true", help="see that it works: tiny sizes, once, no result")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def chosen(parser: argparse.ArgumentParser, given: str | None, rows: Sequence[str]) -> list[str]:
    """The rows asked for, in their order. Ends the program for one that is not there."""
    asked = [r.strip() for r in given.split(",")] if given else list(rows)
    unknown = [r for r in asked if r not in rows]
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; rows: {', '.join(rows)}")
    return [r for r in rows if r in asked]


def process(
    command: Sequence[str], *, threads: int, source: bool = True, env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Result:  # fmt: skip
    """Run `command` with `threads` threads and no network; the last line it prints is its answer.

    `source` lets it import this checkout's tunesmith. Ends the program with the last lines of stderr when it fails.
    """
    around = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **(env or {}),
    }  # fmt: skip
    around.pop("PYTHONPATH", None)
    if source:
        around["PYTHONPATH"] = str(SOURCE)
    done = subprocess.run(list(command), capture_output=True, text=True, env=around, check=False, timeout=timeout)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:300]} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    found: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def worker(script: str | Path, job: Mapping[str, Any], *, threads: int, timeout: float | None = None) -> Result:
    """Start `script --worker JOB` and give its answer."""
    command = [sys.executable, str(script), "--worker", json.dumps(job)]
    return process(command, threads=threads, timeout=timeout)


def in_turn(
    sides: Sequence[str], run: Callable[[str, int], Result], repeats: int, *, say: Callable[[str], None] | None = None
) -> dict[str, list[Result]]:
    """`run(side, repeat)` for every side in every repeat, the order turned round each time."""
    found: dict[str, list[Result]] = {s: [] for s in sides}
    for i in range(repeats):
        for side in sides if i % 2 == 0 else tuple(reversed(sides)):
            found[side].append(run(side, i))
            if say is not None:
                say(f"  {side:14} {brief(found[side][-1])}")
    return found


def say(text: str) -> None:
    """One line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def brief(result: Mapping[str, Any]) -> str:
    """The plain numbers of one run on one line."""
    return ", ".join(f"{k} {number(k, v)}" for k, v in result.items() if isinstance(v, int | float))


def number(name: str, value: float) -> str:
    return f"{value / 2**20:,.0f} MiB" if "memory" in name and value > 1e4 else f"{value:.4g}"


# Summing up


def medians(runs: Sequence[Result]) -> Result:
    """The median over the runs of every number that each of them has."""
    keys = [k for k, v in runs[0].items() if isinstance(v, int | float) and not isinstance(v, bool)]
    return {k: statistics.median(r[k] for r in runs) for k in keys if all(k in r for r in runs)}


def judged(row: Result, goals: Iterable[Goal]) -> Result:
    """The row with its goals in words, which of them it misses, and whether it meets all."""
    listed = list(goals)
    missed = [str(g) for g in listed if not g.met(row)]
    return {**row, "goals": [str(g) for g in listed], "missed": missed, "met": bool(listed) and not missed}


def facts(packages: Sequence[str] = ()) -> Result:
    """What the numbers hold for: processor, load, versions, commit."""
    versions = {}
    for name in ("torch", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(), "versions": versions, "processor": processor(), "cpus": os.cpu_count(),
        "load_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None, "commit": commit(),
    }  # fmt: skip


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit of this checkout, with "+dirty" when files differ; "unknown" outside a repository."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=SOURCE.parent, capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return "unknown" if head is None or status is None else head + ("+dirty" if status else "")


class Results:
    """The rows of one run of a benchmark, and their file, which is written after every row.

    Rows that were measured before and are not measured now stay in the file. Each says what it was `measured` with. A
    quick run writes no file.
    """

    def __init__(self, args: argparse.Namespace, about: Mapping[str, Any]) -> None:
        self.args, self.rows = args, list[Result]()
        self.measured = {"command": " ".join(["python", *sys.argv]), **about, "threads": args.threads}
        self._out: Path | None = None if args.quick else args.out
        self._before = json.loads(self._out.read_text())["rows"] if self._out and self._out.is_file() else []

    def add(self, *rows: Result) -> None:
        self.rows += [{**row, "measured": self.measured} for row in rows]
        if self._out is None:
            return
        now = {named(row): row for row in self.rows}
        whole = [now.pop(named(row), row) for row in self._before] + list(now.values())
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps({"rows": whole}, indent=1) + "\n", encoding="utf-8")

    def finish(self, text: str) -> None:
        """Print the table, or the rows of this run as JSON; a quick run says what it is."""
        whole: Result = {"rows": self.rows}
        if self.args.quick:
            whole = {"quick": "tiny sizes, once: no result", **whole}
            text = f"{text}\nquick run: tiny sizes, once; these numbers are no result"
        print(json.dumps(whole) if self.args.json else text)


def named(row: Result) -> str:
    name: str = row.get("row", row["work"])
    return name


# Inside a worker


def reset_peak_resident() -> None:
    """Start the high-water mark of resident memory anew, where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_resident() -> int:
    """The high-water mark of this process's resident memory, in bytes (VmHWM; the peak of `getrusage` elsewhere).

    A worker must read its own: what `wait4` gives for a child starts at the size of its parent.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def answer(result: Mapping[str, Any]) -> None:
    """The worker's last line."""
    print(json.dumps(dict(result)), flush=True)


# The machine


def matrix_rate(dtype: str, threads: int) -> float:
    """Floating-point operations per second of the fastest matrix product found in a short probe, in a fresh process."""
    command = [sys.executable, __file__, dtype]
    return max(float(process(command, threads=n, source=False)["rate"]) for n in {1, threads})


def _probe(dtype: str, seconds: float = 0.3) -> float:
    """The best of shapes of small models and of one large square, each tried for `seconds`.

    Other work on the machine only ever slows a product down: the fastest of many counts, in processor time where one
    thread does the work.
    """
    import torch

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = 0.0
    for m, k, n in ((256, 576, 1536), (512, 576, 1536), (1024, 1536, 576), (64, 576, 8192), (768, 768, 768)):
        a, b = torch.randn(m, k).to(kind), torch.randn(n, k).to(kind)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = clock()
            for _ in range(4):
                torch.nn.functional.linear(a, b)
            best = max(best, 4 * 2.0 * m * k * n / max(1e-9, clock() - began))
    return best


if __name__ == "__main__":
    answer({"rate": _probe(sys.argv[1])})
