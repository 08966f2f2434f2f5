# SPDX-License-Identifier: Apache-2.0
"""The common part of the benchmarks, and how `benchmarks/train.py` sums up, on made-up runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def measure() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        import measure

        yield measure
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def train(measure: Any) -> Any:
    import train

    return train


def test_sides_run_in_turn_and_the_order_turns_round(measure: Any) -> None:
    calls: list[tuple[str, int]] = []

    def run(side: str, i: int) -> dict[str, Any]:
        calls.append((side, i))
        return {"rate": float(i), "name": side}

    found = measure.in_turn(("ours", "peer"), run, 3)
    assert calls == [("ours", 0), ("peer", 0), ("peer", 1), ("ours", 1), ("ours", 2), ("peer", 2)]
    assert measure.medians(found["ours"]) == {"rate": 1.0}


def test_a_goal_is_inclusive_and_a_missing_number_is_no_success(measure: Any) -> None:
    goals = [measure.Goal("speed_ratio", at_least=2.0), measure.Goal("memory_ratio", at_most=0.5)]
    assert measure.judged({"speed_ratio": 2.0, "memory_ratio": 0.5}, goals)["met"]
    missed = measure.judged({"speed_ratio": 2.0}, goals)
    assert not missed["met"] and missed["missed"] == ["memory_ratio <= 0.5"]
    assert not measure.judged({}, [])["met"]


def test_a_worker_is_a_process_that_answers_with_its_last_line(measure: Any, tmp_path: Path) -> None:
    script = tmp_path / "w.py"
    script.write_text(
        "import sys, os, json\nprint('noise')\nprint(json.dumps({'t': os.environ['OMP_NUM_THREADS'], 'j': sys.argv[2]}))"
    )
    assert measure.worker(script, {"a": 1}, threads=3) == {"t": "3", "j": '{"a": 1}'}
    script.write_text("raise SystemExit('no such thing')")
    with pytest.raises(SystemExit, match="no such thing"):
        measure.worker(script, {}, threads=1)


def fake(train: Any, monkeypatch: pytest.MonkeyPatch, speed: float, gap: float = 0.0) -> Any:
    """A session whose workers answer at once: ours is `speed` times as fast as the fastest peer."""

    def start(self: Any, do: str, work: Any, **more: Any) -> dict[str, Any]:
        if do == "prepare":
            return {"path": "data", "units": 100, "first_units": 10, "classes": None}
        if do == "plan":
            return {"peak_memory": 1.1e9, "minutes": 1.0, "flops": 1e12}
        side, seed = more["peer"], more["seed"]
        rate = {"ours": 10.0 * speed, "trainer": 10.0}.get(side, 5.0)
        loss = 2.0 + 0.1 * seed + (gap if side == "ours" else 0.0)
        return {"rate": rate, "cpu_rate": rate, "peak_memory": 1e9 if side == "ours" else 2e9, "final_loss": loss,
                "of_run": 0.01, "losses": [loss], "seconds": 50.0}  # fmt: skip

    monkeypatch.setattr(train.Session, "start", start)
    return train.Session


def test_a_row_is_judged_against_the_fastest_peer(train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = fake(train, monkeypatch, 3.0)(tmp_path, "bf16", 2, 3, 1e11)
    row = session.compare(train.WORKS["lora-packed"])
    assert row["peer"]["name"] == "trainer" and set(row["peers"]) == {"trainer", "trl"}
    assert row["speed_ratio"] == 3.0 and row["memory_ratio"] == 0.5 and row["met"]
    assert row["ours"]["share"] == pytest.approx(1e12 * 0.01 * 30.0 / 1e11)
    assert row["plan"]["peak_error"] == pytest.approx(0.1) and row["plan"]["minutes_error"] == pytest.approx(0.2)
    text = train.table([row], 1e11, "bf16")
    assert "met" in text and "NOT" not in text and "trl" in text


@pytest.mark.parametrize(("speed", "gap", "missed"), [(1.0, 0.0, "speed_ratio"), (3.0, 0.5, "loss_same")])
def test_a_slow_row_or_another_loss_is_not_met(
    train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, speed: float, gap: float, missed: str
) -> None:
    session = fake(train, monkeypatch, speed, gap)(tmp_path, "bf16", 2, 3, 1e11)
    row = session.compare(train.WORKS["lora-packed"])
    assert not row["met"] and missed in row["missed"][0]
    assert f"NOT met: {missed}" in train.table([row], 1e11, "bf16")


@pytest.mark.parametrize("curve", ["growth-length", "growth-rank"])
def test_a_curve_is_drawn(train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, curve: str) -> None:
    session = fake(train, monkeypatch, 2.0)(tmp_path, "bf16", 2, 1, 1e11)
    row = train.growth(session, curve, False, tmp_path / "curve.png")
    assert [p["at"] for p in row["points"]] == list(train.CURVES[curve])
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert all(
        train.point(curve, at, False).batch * train.point(curve, at, False).length >= 2048 for at in train.CURVES[curve]
    )


def test_a_quick_run_writes_no_result(
    train: Any, measure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = measure.options("about", train.ROWS).parse_args(["--quick", "--out", str(tmp_path / "r.json")])
    quick = measure.Results(args, {})
    quick.add({"work": "w"})
    quick.finish("table")
    assert not (tmp_path / "r.json").exists() and "no result" in capsys.readouterr().out


def test_the_file_is_written_row_by_row_and_keeps_the_rows_of_earlier_runs(
    train: Any, measure: Any, tmp_path: Path
) -> None:
    args = measure.options("about", train.ROWS).parse_args(["--out", str(tmp_path / "r.json")])

    def written() -> list[tuple[str, int, str]]:
        rows = json.loads((tmp_path / "r.json").read_text())["rows"]
        return [(r["work"], r["n"], r["measured"]["dtype"]) for r in rows]

    first = measure.Results(args, {"dtype": "fp32"})
    first.add({"work": "a", "n": 1})
    assert written() == [("a", 1, "fp32")]
    first.add({"work": "b", "n": 2}, {"work": "c", "row": "other", "n": 3})
    second = measure.Results(args, {"dtype": "bf16"})
    second.add({"work": "b", "n": 4}, {"work": "d", "n": 5})
    assert written() == [("a", 1, "fp32"), ("b", 4, "bf16"), ("c", 3, "fp32"), ("d", 5, "bf16")]


def test_unlike_rows_are_refused(train: Any, measure: Any) -> None:
    parser = measure.options("about", train.ROWS)
    assert measure.chosen(parser, "full,lora-packed", train.ROWS) == ["lora-packed", "full"]
    with pytest.raises(SystemExit):
        measure.chosen(parser, "ful", train.ROWS)


def test_works_survive_the_way_to_a_worker(train: Any) -> None:
    for work in train.WORKS.values():
        plain = json.loads(json.dumps({**dataclasses.asdict(work), "goals": ()}))
        again = train.Work(**plain)
        assert (again.name, again.method, again.quick().rows) == (work.name, work.method, 6)
