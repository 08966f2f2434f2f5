# SPDX-License-Identifier: Apache-2.0
"""The files of a comparison: what is written reads back, the table and the picture show every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tunesmith.arena.report import (
    COLUMNS,
    FORMAT,
    amount,
    cells_of,
    controls_of,
    load_comparison,
    number,
    picture,
    table_md,
    write,
)
from tunesmith.core.errors import DataError


def spread(*values: float) -> dict[str, Any]:
    mean = sum(values) / len(values)
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "values": list(values)}


def row(label: str, target: float, kept: float, **more: Any) -> dict[str, Any]:
    return {
        "label": label, "method": label, "options": {}, "size": "", "lr": 1e-3, "lr_trials": [],
        "lr_at_the_edge": False,
        "steps": 20, "target": spread(target, target + 0.02), "retention": spread(kept, kept), "seeds": [0, 1],
        "scores": [[1.0, 0.0], [0.0, 1.0]], "trainable": 12_345, "own_trainable": 12_000, "stored": 49_380,
        "seconds": 3.21,
        "peak_memory": 900 << 20, "pareto": True, "versus": None, **more,
    }  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    worse = {"difference": -0.2, "low": -0.3, "high": -0.1, "p": 0.004, "verdict": "worse"}
    rows = [
        row("lora", 0.8, 0.9),
        row("bone", 0.6, 0.99, versus=worse, lr_at_the_edge=True, size="block=4; +3% of the target"),
        row("ssf|x", 0.5, 0.8, pareto=False, versus={**worse, "verdict": "tie", "p": 1.0}),
    ]
    controls = [
        {"name": "untrained base", "value": None, "reason": "it has no output", "verdict": None},
        {
            "name": "constant answer",
            "value": 0.1,
            "difference": 0.7,
            "low": 0.6,
            "high": 0.8,
            "p": 0.001,
            "verdict": "beaten",
        },
    ]
    return {
        "format": FORMAT, "created": "2026-01-02T00:00:00+00:00", "minutes": 1.5, "equal": "time",
        "budget_seconds": 600.0,
        "data": {"name": "a.jsonl", "kind": "classification", "source": "s", "train": 9, "dev": 3,
                 "test": 2},
        "base": {"name": "tiny", "family": "encoder"}, "target": {"metric": "accuracy", "higher_is_better": True},
        "retention": {"measure": "cosine"}, "plan": {"seeds": 2, "rates": 3, "steps": {}}, "config": {"batch_size": 8},
        "rows": rows, "controls": controls, "left_out": [{"label": "fourierft", "reason": "no"}], "notes": ["a note"],
        "recommendation": {"method": "lora", "lr": 1e-3, "reason": "It is best.", "options": {}, "convincing": True,
                           "not_shown_worse": ["lora"], "best_on_target": "lora"},
    }  # fmt: skip


def test_what_is_written_reads_back(result: dict[str, Any], tmp_path: Path) -> None:
    result["rows"][0]["target"]["high"] = float("inf")
    write(result, tmp_path)
    found = load_comparison(tmp_path)
    assert found["rows"][0]["target"]["high"] is None and found["rows"][1] == result["rows"][1]
    assert (tmp_path / "table.md").read_text() == table_md(found)
    with pytest.raises(DataError, match="cannot be read"):
        load_comparison(tmp_path / "nothing")
    for broken, what in (({}, "no tunesmith-compare"), ({"format": FORMAT}, "lacks created")):
        (tmp_path / "compare.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match=what):
            load_comparison(tmp_path)


def test_the_table_marks_the_front_the_best_and_rates_at_an_end(result: dict[str, Any]) -> None:
    cells = cells_of(result)
    assert len(cells[0]) == len(COLUMNS)
    assert cells[0] == ["lora *", "0.81 ±0.1", "0.900", "12.3k", "48.2K", "3.21", "900M", "0.001", "best"]
    assert cells[1][7] == "0.001!" and cells[1][8] == "worse (-0.2, p 0.004)"
    assert [c[8] for c in cells_of(result, narrow=True)] == ["best", "worse", "tie"]
    assert cells[2][0] == "ssf|x"
    text = table_md(result)
    for wanted in ("| ssf\\|x |", "**Recommendation: lora**", "| fourierft | no |", "- a note", "block=4; +3%"):
        assert wanted in text, wanted
    assert controls_of(result)[0][1:] == ["-", "it has no output"]


def test_the_picture_is_whole_and_names_every_method(result: dict[str, Any]) -> None:
    svg = picture(result)
    ElementTree.fromstring(svg)
    for wanted in ("lora", "bone", "ssf|x", "retention: cosine", "accuracy on test rows"):
        assert wanted in svg, wanted
    assert "constant answer" not in svg, "far below all methods"
    result["controls"][1]["value"] = 0.55
    assert "constant answer" in picture(result)
    result["controls"][1]["value"] = 0.1
    assert svg == picture(result), "the same numbers give the same bytes"
    result["target"]["higher_is_better"] = False
    assert "lower is better" in picture(result)


def test_counts_are_short() -> None:
    assert [number(n) for n in (0, 999, 55_373, 361_421, 1_221_120)] == ["0", "999", "55.4k", "361k", "1.22M"]
    assert [amount(n) for n in (12, 2048, 1 << 30)] == ["12B", "2K", "1G"]
