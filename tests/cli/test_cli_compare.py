# SPDX-License-Identifier: Apache-2.0
"""`compare` and `recommend` on a model of a few thousand weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.arena import report

Run = Callable[..., Any]


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    file = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{i} plus {i}?", "response": "even"} for i in range(24)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def test_compare_shows_and_writes_and_recommend_reads_it(
    run: Run, tiny: Path, sums: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "picture", lambda result: "<svg/>")
    words = ("--model", tiny, "--methods", "lora:rank=2,norm-tuning,head", "--budget", "10m", "--epochs", 3,
             "--seeds", 2, "--lrs", "3e-3,1e-2", "--precision", "fp32")  # fmt: skip
    found = run("compare", sums, *words, "--json")
    assert found.code == 0, found.err
    made = found.json
    folder = Path(made["folder"])
    assert folder.parent == home and {r["label"] for r in made["rows"]} == {"lora:rank=2", "norm-tuning"}
    assert [x["label"] for x in made["left_out"]] == ["head"]
    assert {p.name for p in folder.iterdir()} == {"compare.json", "table.md", "picture.svg", "trials.jsonl"}
    assert "learning rates" in found.err and "proof: 2 methods compared, 1 left out" in found.err
    shown = run("compare", sums, *words)  # at once: nothing is left to run
    assert shown.code == 0 and "recommended:" in shown.out and "left out: head" in shown.out
    assert "learning rates" not in shown.err
    assert f"tunesmith tune {sums}" in shown.out.splitlines()[-1]

    advice = run("recommend", sums, "--model", tiny, "--json")
    assert advice.code == 0, advice.err
    assert advice.json["strength"] == "strong" and advice.json["lr"] == made["recommendation"]["lr"]
    assert run("tune", *advice.json["command"].split()[2:], "--no-receipt", "--name", "told").code == 0


def test_recommend_says_when_it_knows_nothing(run: Run, tiny: Path, sums: Path, tmp_path: Path) -> None:
    found = run("recommend", sums, "--model", tiny, "--studies", tmp_path, "--memory", "64GB", "--time", "1h")
    assert found.code == 0, found.err
    assert "evidence: none" in found.out and "not a finding" in found.out and "tunesmith compare" in found.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("compare", "x.jsonl"), "no base"),
        (("compare", "x.jsonl", "-m", "minilm-l6", "--budget", "soon"), "no length of time"),
        (("compare", "x.jsonl", "-m", "minilm-l6", "--equal", "luck"), "unknown rule"),
        (("compare", "x.jsonl", "-m", "minilm-l6", "--methods", "lorra"), "'lora'"),
        (("compare", "x.jsonl", "-m", "minilm-l6", "--lrs", "many"), "neither"),
        (("compare", "x.jsonl", "-m", "minilm-l6", "--set", "lr=0.1"), "--lrs"),
        (("compare", "x.jsonl", "-m", "minilm"), "minilm-l6"),
        (("recommend", "x.jsonl"), "no base"),
        (("recommend", "x.jsonl", "-m", "minilm-l6", "--memory", "lots"), "no size"),
    ],
)
def test_wrong_words_are_named(run: Run, words: tuple[str, ...], said: str) -> None:
    found = run(*words)
    assert found.code == 2 and said in found.err
