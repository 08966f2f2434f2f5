# SPDX-License-Identifier: Apache-2.0
"""`tunesmith diff`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.cli.main import main


def test_it_measures_and_writes_a_report(
    tiny: Path, saved: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert (
        main(["diff", str(tiny), str(saved), "--data", str(data), "--out", str(out), "--device", "cpu", "--json"]) == 0
    )
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [f["probe"] for f in found["findings"]] == [
        "norms", "localisation", "drift", "spectra", "intruders", "depth-kl", "prior",
    ]  # fmt: skip
    assert "measuring norms" in shown.err and "bit-identical" in found["proof"]
    assert json.loads((out / "diff.json").read_text())["delta"] == "moved"
    assert "<svg" in (out / "diff.html").read_text()


def test_chosen_probes_in_the_terminal(
    tiny: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(tiny), str(saved), "--probes", "norms,intruders:k=2", "--out", str(tmp_path / "r")]) == 0
    text = capsys.readouterr().out
    assert "change by depth" in text and "proof: 2 probes" in text and "2 leading vectors" in text


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--probes", "norm"], 2, "did you mean 'norms'"),
        (["--probes", "intruders:kk=2"], 2, "has no option 'kk'"),
        (["--probes", ""], 2, "no probes given"),
        (["--probes", "depth-kl"], 2, "give a file of examples with --data"),
        (["--data", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["--strength", "0"], 2, "nothing to measure"),
        (["--limit", "0"], 2, "limit"),
    ],
)
def test_bad_input_says_what_is_wrong(
    tiny: Path, saved: Path, more: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["diff", str(tiny), str(saved), "--out", str(tmp_path), *more]) == code
    shown = capsys.readouterr()
    assert says in shown.err and not shown.out


def test_unknown_base_and_delta(tiny: Path, saved: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["diff", "nobase", str(saved)]) == 2
    assert "unknown base 'nobase'" in capsys.readouterr().err
    assert main(["diff", str(tiny), str(tmp_path / "none")]) == 4
    assert "there is no delta" in capsys.readouterr().err
