# SPDX-License-Identifier: Apache-2.0
"""`tunesmith study`: list, run, show and check studies, and write their table."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.output import Debug, Json, Result, cells, examples, progress_console, table
from tunesmith.core.errors import TunesmithError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.study import Study

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Studies: one paper's claim, run small, with a verdict rule fixed before running.",
    epilog=examples("tunesmith study list", "tunesmith study run 37 --smoke"),
)
Root = Annotated[
    Path | None, typer.Option("--root", metavar="FOLDER", help="The folder of studies (default ./studies).")
]
Which = Annotated[str | None, typer.Argument(metavar="[ID]", help="Number, slug or folder name.")]
All = Annotated[bool, typer.Option("--all", help="Every study.")]
FAILED = 1


def attach(parent: typer.Typer) -> None:
    parent.add_typer(app, name="study", short_help="Run and check the studies of published claims")


def _root(root: Path | None) -> Path:
    if root is not None:
        return root
    from tunesmith.models.resources import repo_root

    checkout = repo_root()
    here = Path("studies")
    return here if here.is_dir() or checkout is None else checkout / "studies"


def _chosen(which: str | None, every: bool, root: Path) -> list[Study]:
    from tunesmith.study import discover, find

    if every == (which is not None):
        raise UsageError("name one study, or all with --all", hint="'tunesmith study list' shows them")
    return discover(root) if which is None else [find(which, root)]


@app.command(
    "list", short_help="Studies with their claims and verdicts", epilog=examples("tunesmith study list --json")
)
def list_studies(root: Root = None, as_json: Json = False, debug: Debug = False) -> Result:
    """List the studies with their claims and committed verdicts."""
    from tunesmith.study import discover

    place = _root(root)
    rows = [_row(s) for s in discover(place)]

    def view(console: Console) -> None:
        shown = table("id", "study", "verdict", "claim", "minutes")
        for r in rows:
            shown.add_row(*cells(f"{r['id']:03d}", r["slug"], r["verdict"] or "not run", r["claim"], r["minutes"]))
        console.print(shown)

    done = sum(r["verdict"] is not None for r in rows)
    return Result({"studies": rows}, f"{len(rows)} studies in {place}, {done} with a result", view)


def _row(study: Study) -> dict[str, Any]:
    from tunesmith.study.report import load_result

    has = (study.folder / "result.json").is_file()
    verdict = load_result(study.folder).get("verdict") if has else None
    return {
        "id": study.id, "slug": study.slug, "paper": study.paper, "claim": study.claim, "minutes": study.minutes,
        "data": list(study.data), "verdict": verdict, "folder": str(study.folder),
    }  # fmt: skip


@app.command(
    "run",
    short_help="Run one study, or all",
    epilog=examples("tunesmith study run 37 --smoke", "tunesmith study run --all --smoke"),
)
def run(
    which: Which = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A run of seconds whose numbers mean nothing.")] = False,
    every: All = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the cells of a run that was stopped.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write here, not into the study's folder.")] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Studies side by side, each in a process with its share of the cores.")
    ] = 1,
    root: Root = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Run one study, or all of them, and write the result."""
    from tunesmith.study import show as text

    studies = _chosen(which, every, _root(root))
    if out is not None and len(studies) > 1:
        raise UsageError("--out takes the result of one study", hint="leave it out with --all")
    if jobs > 1 and len(studies) > 1:
        results, failed = _side_by_side(studies, smoke, fresh, jobs)
    else:
        results, failed = _in_turn(studies, smoke, fresh, out)

    def view(console: Console) -> None:
        for result in results:
            console.print(text(result), soft_wrap=True)

    verdicts = ", ".join(f"{r['id']:03d} {r['verdict']} ({r['minutes']} min)" for r in results)
    proof = f"ran {len(results)} of {len(studies)}{' as smoke runs' if smoke else ''}: {verdicts or 'none finished'}"
    failure = "; ".join(failed)
    return Result(
        {"results": results, "failed": failed}, proof, view, exit_code=FAILED if failed else 0, failure=failure
    )


Done = tuple[list[dict[str, Any]], list[str]]  # results, and what failed in words


def _in_turn(studies: Sequence[Study], smoke: bool, fresh: bool, out: Path | None) -> Done:
    """Run the studies here. Raises the error of a study that is the only one."""
    from tunesmith.study import run_study

    results, failed = [], []
    for study in studies:
        try:
            results.append(run_study(study, smoke, out, fresh=fresh, log=_log, progress=_progress(study)))
        except TunesmithError as error:
            if len(studies) == 1:
                raise
            failed.append(f"{study.id:03d}: {error.what}")
    return results, failed


def _side_by_side(studies: Sequence[Study], smoke: bool, fresh: bool, jobs: int) -> Done:
    """Run the studies in processes, the long ones first; results and failures are in the order of the studies."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    results, failed = [], []
    share = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(studies)), context, _with_threads, (share,)) as pool:
        order = sorted(studies, key=lambda s: -s.minutes)
        coming = {s.id: pool.submit(_elsewhere, s.folder, smoke, fresh) for s in order}
        for study in studies:
            try:
                results.append(coming[study.id].result())
            except TunesmithError as error:
                failed.append(f"{study.id:03d}: {error.what}")
            except BrokenProcessPool:
                failed.append(f"{study.id:03d}: its process, or one beside it, was killed")
    return results, failed


def _with_threads(n: int) -> None:
    import torch

    torch.set_num_threads(n)


def _elsewhere(folder: Path, smoke: bool, fresh: bool) -> dict[str, Any]:
    """A study in a process of its own, where its lines are told apart by its number."""
    from tunesmith.study import load_study, run_study

    study = load_study(folder)
    return run_study(study, smoke, fresh=fresh, log=lambda text: _log(f"{study.id:03d}  {text}"))


def _log(text: str) -> None:
    progress_console().print(text, soft_wrap=True)


def _progress(study: Study) -> Any:
    """A counter on a terminal, nothing elsewhere: the study's own log lines are enough there."""

    def tick(done: int, total: int) -> None:
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            end = "\n" if done >= total else ""
            sys.stderr.write(f"\rstudy {study.id:03d}: {done}/{total}{end}")
            sys.stderr.flush()

    return tick


@app.command("show", short_help="A committed result", epilog=examples("tunesmith study show 37"))
def show(
    which: Annotated[str, typer.Argument(metavar="ID", help="Number, slug or folder name.")],
    root: Root = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Show a study's committed result: claim, rule, verdict, reasons, numbers, how it was run."""
    from tunesmith.study import find
    from tunesmith.study import show as text
    from tunesmith.study.report import load_result

    study = find(which, _root(root))
    result = load_result(study.folder)

    def view(console: Console) -> None:
        console.print(text(result), soft_wrap=True)

    proof = f"{study.id:03d} {result.get('verdict')}; 'tunesmith study check {study.id}' recomputes it"
    return Result({"result": result}, proof, view)


@app.command(
    "check",
    short_help="Recompute verdicts from raw numbers",
    epilog=examples("tunesmith study check --all", "tunesmith study check 37"),
)
def check(
    which: Which = None,
    every: All = False,
    again: Annotated[
        bool,
        typer.Option("--restate", help="First write reasons and statistics anew; rule and verdict must be the same."),
    ] = False,
    root: Root = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Recompute verdicts from the raw numbers of committed results, with the rules they were judged by."""
    from tunesmith.study import check as check_result
    from tunesmith.study.report import restate

    checked: list[dict[str, Any]] = []
    for study in _chosen(which, every, _root(root)):
        has = (study.folder / "result.json").is_file()
        if has and again:
            restate(study)
        problems = check_result(study.folder, study) if has else ["has no result"]
        checked.append({"id": study.id, "study": study.name, "problems": problems})
    bad = [c for c in checked if c["problems"]]

    def view(console: Console) -> None:
        shown = table("id", "study", "")
        for c in checked:
            shown.add_row(*cells(f"{c['id']:03d}", c["study"], "\n".join(c["problems"]) or "holds"))
        console.print(shown)

    failure = f"{len(bad)} of {len(checked)} results do not hold" if bad else ""
    proof = f"{len(checked) - len(bad)} of {len(checked)} results hold: verdicts recomputed from the raw numbers"
    return Result({"checked": checked}, proof, view, exit_code=FAILED if bad else 0, failure=failure)


@app.command(
    "table", short_help="All results as a Markdown table", epilog=examples("tunesmith study table --out STUDIES.md")
)
def write_table(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write here (default: print).")] = None,
    root: Root = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """The table of all committed results, as Markdown."""
    from tunesmith.evaluate.receipt import write_text
    from tunesmith.study import load_results, studies_md

    results = load_results(_root(root))
    text = studies_md(results)
    if out is not None:
        write_text(out, text)

    def view(console: Console) -> None:
        if out is None:
            console.print(text, soft_wrap=True)

    return Result({"markdown": text}, f"{len(results)} results{f' written to {out}' if out else ''}", view)
