# SPDX-License-Identifier: Apache-2.0
"""The study harness: resuming, atomic results, and verdicts recomputed from raw numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.core.errors import DataError, TrainingError, UsageError
from tunesmith.study import check, discover, find, load_results, load_study, readme, run_study, show, studies_md
from tunesmith.study.cells import Cells
from tunesmith.study.report import restate
from tunesmith.study.spec import Verdict

STUDY = """
from tunesmith.study.spec import Study, Verdict
from . import helper


def run(ctx):
    rows = {"base": [], "tuned": []}
    for seed in ctx.seeds:
        for arm in rows:
            value = ctx.cell({"arm": arm, "seed": seed}, lambda a=arm, s=seed: helper.measure(a, s))
            rows[arm].append({"seed": seed, "metric": value})
        ctx.progress(seed + 1, len(ctx.seeds))
    return {"arms": rows}


def verdict(raw):
    gaps = [t["metric"] - b["metric"] for b, t in zip(raw["arms"]["base"], raw["arms"]["tuned"])]
    mean = sum(gaps) / len(gaps)
    label = "reproduced" if min(gaps) > 0 else "inconclusive"
    return Verdict(label, [f"mean gap {mean:.2f}"], {"gap": {"mean": mean, "low": min(gaps), "high": max(gaps)}})


STUDY = Study(id=7, slug="toy", paper="A paper", claim="tuned | better", verdict_rule="reproduced if every gap > 0",
              arms=["base", "tuned"], run=run, verdict=verdict, seeds=[0, 1, 2], smoke_seeds=[0])
"""
HELPER = """
import pathlib
CALLS = pathlib.Path(__file__).parent / "calls.txt"


def measure(arm, seed):
    with CALLS.open("a") as file:
        file.write(f"{arm}{seed}\\n")
    stop = CALLS.with_name("stop.txt")
    if stop.exists() and stop.read_text() == f"{arm}{seed}":
        raise RuntimeError("killed")
    return seed + (0.5 if arm == "tuned" else 0.0)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "studies" / "007-toy"
    folder.mkdir(parents=True)
    (folder / "study.py").write_text(STUDY)
    (folder / "helper.py").write_text(HELPER)
    return tmp_path / "studies"


def calls(root: Path) -> list[str]:
    file = root / "007-toy" / "calls.txt"
    return file.read_text().split() if file.exists() else []


def test_discover_finds_by_id_slug_and_folder(root: Path) -> None:
    assert [study.id for study in discover(root)] == [7]
    assert {find(word, root).name for word in ("7", "007", "toy", "007-toy")} == {"007-toy"}
    with pytest.raises(UsageError, match="007-toy"):
        find("toi", root)


def test_two_studies_may_use_the_same_file_names(root: Path) -> None:
    other = root / "008-other"
    other.mkdir()
    (other / "study.py").write_text(STUDY.replace("id=7", "id=8").replace('slug="toy"', 'slug="other"'))
    (other / "helper.py").write_text("def measure(arm, seed):\n    return 100.0 + seed + (arm == 'tuned')\n")
    first, second = discover(root)
    assert run_study(first, smoke=True)["raw"]["arms"]["base"][0]["metric"] == 0.0
    assert run_study(second, smoke=True)["raw"]["arms"]["base"][0]["metric"] == 100.0


@pytest.mark.parametrize(
    ("text", "message"),
    [("x = 1", "declares no STUDY"), ("import nothing_here", "ModuleNotFoundError"), ("(", "SyntaxError")],
)
def test_a_broken_study_is_named(root: Path, text: str, message: str) -> None:
    (root / "007-toy" / "study.py").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        discover(root)
    assert "007-toy" in str(caught.value)


def test_a_folder_with_another_name_is_refused(root: Path) -> None:
    (root / "007-toy").rename(root / "009-toy")
    with pytest.raises(UsageError, match="calls itself 007-toy"):
        discover(root)


def test_a_full_run_writes_a_result_that_checks(root: Path) -> None:
    result = run_study(find("7", root))
    folder = root / "007-toy"
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["verdict"] == "reproduced"
    assert result["statistics"]["gap"]["mean"] == 0.5
    assert not (folder / "cells.jsonl").exists()
    assert check(folder / "result.json") == []
    assert check(result, root=root) == []
    assert load_results(root) == [result]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda r: r["raw"]["arms"]["tuned"][0].update(metric=-1.0), "the raw numbers give 'inconclusive'"),
        (lambda r: r.update(verdict="inconclusive"), "the raw numbers give 'reproduced'"),
        (lambda r: r["statistics"]["gap"].update(mean=0.6), "other statistics"),
        (lambda r: r.update(reasons=["it is better"]), "other reasons"),
        (lambda r: r.update(verdict_rule="reproduced if I like it"), "recorded digest"),
        (lambda r: r.update(verdict_sha256="0" * 64), "verdict function"),
        (lambda r: r.update(smoke=True), "smoke"),
        (lambda r: r.pop("commit"), "'commit' is missing"),
        (lambda r: r.update(extra=1), "'extra' is unknown"),
        (lambda r: r.update(threads=True), "'threads' is a bool"),
        (lambda r: r["raw"]["arms"].pop("base"), "'base' is missing"),
        (lambda r: r["raw"]["arms"]["base"].pop(), "misses the seeds [2]"),
        (lambda r: r.update(seeds=[0, 1]), "seeds are [0, 1] in the result"),
        (lambda r: r.update(statistics={"gap": 0.5}), "no statistic has a confidence interval"),
        (lambda r: r.update(format="tunesmith-study/9"), "the format is"),
    ],
)
def test_check_sees_a_tampered_result(root: Path, change: object, word: str) -> None:
    study = find("7", root)
    result = run_study(study)
    change(result)  # type: ignore[operator]
    problems = check(result, study)
    assert any(word in problem for problem in problems), problems


def test_statistics_may_be_added_after_the_run_and_nothing_else_changed(root: Path) -> None:
    run_study(find("7", root))
    file, study = root / "007-toy" / "result.json", root / "007-toy" / "study.py"
    study.write_text(STUDY.replace('[f"mean gap', '[f"the mean gap'))
    assert check(root / "007-toy")
    raw = json.loads(file.read_text())["raw"]
    restate(find("7", root))
    found = json.loads(file.read_text())
    assert check(root / "007-toy") == [] and found["raw"] == raw and found["reasons"][0].startswith("the mean gap")
    study.write_text(STUDY.replace("min(gaps) > 0", "min(gaps) > 9"))
    with pytest.raises(DataError, match="the raw numbers give 'inconclusive' now"):
        restate(find("7", root))
    study.write_text(STUDY.replace("every gap > 0", "every gap > 9"))
    with pytest.raises(DataError, match="is not the one the result was judged by"):
        restate(find("7", root))
    assert json.loads(file.read_text()) == found
    file.write_text(json.dumps({k: v for k, v in found.items() if k != "raw"}))
    with pytest.raises(DataError, match="the field 'raw' is missing"):
        restate(find("7", root))


def test_a_verdict_without_an_interval_is_refused_in_a_smoke_run(root: Path) -> None:
    study = root / "007-toy" / "study.py"
    study.write_text(STUDY.replace('"low": min(gaps), ', ""))
    with pytest.raises(DataError, match="no statistic has a confidence interval"):
        run_study(find("7", root), smoke=True)


def test_check_sees_a_rule_changed_after_the_run(root: Path) -> None:
    run_study(find("7", root))
    file = root / "007-toy" / "study.py"
    file.write_text(file.read_text().replace("every gap > 0", "every gap > -9"))
    assert check(root / "007-toy") == ["the study's verdict rule is not the one the result was judged by"]
    file.write_text(STUDY.replace("min(gaps) > 0", "min(gaps) > -9"))
    assert check(root / "007-toy") == ["the study's verdict function is not the one the result was judged by"]


def test_a_crashed_study_leaves_no_result_and_continues(root: Path) -> None:
    stop = root / "007-toy" / "stop.txt"
    stop.write_text("base1")
    with pytest.raises(RuntimeError, match="killed"):
        run_study(find("7", root))
    assert not (root / "007-toy" / "result.json").exists()
    stop.unlink()
    result = run_study(find("7", root))
    assert calls(root) == ["base0", "tuned0", "base1", "base1", "tuned1", "base2", "tuned2"]
    assert check(result, find("7", root)) == []


def test_cells_of_other_code_are_refused_unless_fresh(root: Path) -> None:
    stop = root / "007-toy" / "stop.txt"
    stop.write_text("tuned0")
    with pytest.raises(RuntimeError):
        run_study(find("7", root))
    stop.unlink()
    helper = root / "007-toy" / "helper.py"
    helper.write_text(HELPER.replace("0.5", "0.25"))
    with pytest.raises(UsageError, match="source_sha256"):
        run_study(find("7", root))
    assert run_study(find("7", root), fresh=True)["statistics"]["gap"]["mean"] == 0.25


def test_a_smoke_run_never_touches_the_real_result(root: Path, tmp_path: Path) -> None:
    study = find("7", root)
    real = run_study(study)
    result = run_study(study, smoke=True, out=tmp_path / "smoke")
    assert result["smoke"] and result["seeds"] == [0]
    assert json.loads((tmp_path / "smoke" / "result.json").read_text())["smoke"] is True
    assert "smoke" in " ".join(check(result, study))
    with pytest.raises(UsageError, match="smoke run must not"):
        run_study(study, smoke=True, out=study.folder)
    assert json.loads((study.folder / "result.json").read_text()) == real


def test_raw_numbers_are_checked_before_anything_is_written(root: Path) -> None:
    file = root / "007-toy" / "study.py"
    file.write_text(STUDY.replace('"tuned": []}', '"other": []}').replace("helper.measure(a, s)", "1.0"))
    with pytest.raises(DataError, match="undeclared arm 'other'"):
        run_study(load_study(root / "007-toy"))
    assert not (root / "007-toy" / "result.json").exists()


def test_a_cell_is_remembered_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    cells = Cells(path, {"code": "a"})
    assert cells.get({"b": 1, "a": 2}, lambda: (1, 2)) == [1, 2]
    cells.get({"a": 3}, lambda: 5)
    path.write_bytes(path.read_bytes()[:-4])
    again = Cells(path, {"code": "a"})
    assert again.get({"a": 2, "b": 1}, lambda: 99) == [1, 2]
    assert again.get({"a": 3}, lambda: 6) == 6
    assert again.computed == 1
    assert Cells(path, {"code": "a"}).get({"a": 3}, lambda: 7) == 6


def test_a_damaged_cell_file_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    Cells(path, {}).get({"a": 1}, lambda: 1)
    path.write_bytes(path.read_bytes() + b"nonsense\n")
    with pytest.raises(DataError, match=r"cells\.jsonl:3"):
        Cells(path, {})
    path.write_bytes(b"[]\n")
    with pytest.raises(DataError, match=r"cells\.jsonl:1"):
        Cells(path, {})


def test_cells_refuse_non_finite_values_and_repeated_keys(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "cells.jsonl", {})
    with pytest.raises(TrainingError, match="finite"):
        cells.get({"a": 1}, lambda: float("nan"))
    cells.get({"a": 2}, lambda: 1)
    with pytest.raises(UsageError, match="twice"):
        cells.get({"a": 2}, lambda: 1)


def test_a_killed_process_continues(root: Path) -> None:
    """SIGKILL inside a cell: the finished cells are kept, the result equals that of a run that was never killed."""
    helper = root / "007-toy" / "helper.py"
    helper.write_text(
        HELPER.replace('raise RuntimeError("killed")', "stop.unlink(); import os; os.kill(os.getpid(), 9)")
    )
    (root / "007-toy" / "stop.txt").write_text("base1")
    code = f"from tunesmith.study import find, run_study; run_study(find('7', {str(root)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -9
    assert not (root / "007-toy" / "result.json").exists()
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    assert calls(root).count("base0") == 1 and calls(root).count("base1") == 2
    assert check(root / "007-toy") == []


def test_studies_side_by_side_give_the_results_of_studies_in_turn(root: Path) -> None:
    other = root / "008-other"
    other.mkdir()
    (other / "study.py").write_text(STUDY.replace("id=7", "id=8").replace('slug="toy"', 'slug="other"'))
    (other / "helper.py").write_text(
        "from tunesmith.core.errors import DataError\n\n\ndef measure(arm, seed):\n    raise DataError('no data')\n"
    )
    command = [sys.executable, "-m", "tunesmith", "study", "run", "--all", "--jobs", "2", "--json", "--root", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["failed"] == ["008: no data"], done.stderr
    assert [r["id"] for r in found["results"]] == [7] and check(root / "007-toy") == []
    alone = run_study(find("7", root), fresh=True)
    assert found["results"][0]["raw"] == alone["raw"]


def test_a_verdict_must_be_one_of_four() -> None:
    with pytest.raises(UsageError, match="did you mean 'reproduced'"):
        Verdict("reproducd", ["x"], {})


def test_table_and_text_show_the_numbers(root: Path) -> None:
    result = run_study(find("7", root))
    table = studies_md([result])
    row = next(line for line in table.splitlines() if line.startswith("| 007"))
    assert "tuned \\| better" in row
    assert "gap: 0.5 [0.5, 0.5]" in row
    assert row.replace("\\|", "").count("|") == 8
    assert "1 studies: 1 reproduced" in table
    text = show(result)
    assert "reproduced if every gap > 0" in text and "mean gap 0.50" in text


def test_the_readme_block_comes_from_the_result(root: Path) -> None:
    folder = root / "007-toy"
    run_study(find("7", root))
    with pytest.raises(DataError, match="marks"):
        readme.fill(folder)
    (folder / "README.md").write_text(f"# Toy\n\nbefore\n{readme.START}\n0.9 by hand\n{readme.END}\nafter\n")
    assert readme.fill(folder) is True
    text = (folder / "README.md").read_text()
    assert "| tuned | 1.5 ± 1.0 |" in text and "| gap | 0.5 [0.5, 0.5] |" in text
    assert "by hand" not in text and "before" in text and text.endswith("after\n")
    assert readme.fill(folder) is False
    with pytest.raises(DataError, match="has no 'accuracy'"):
        readme.fill(folder, "accuracy")


def test_columns_of_the_arms_table_are_the_text_fields() -> None:
    rows = [{"seed": s, "where": w, "metric": 10.0 * s + (w == "b")} for s in (0, 1) for w in ("a", "b")]
    table = readme.arms_table({"arms": {"x": rows}}).splitlines()
    assert table[0] == "| arm | a | b |"
    assert table[2] == "| x | 5.0 ± 7.1 | 6.0 ± 7.1 |"


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, tunesmith.study as s; s.discover, s.check;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
