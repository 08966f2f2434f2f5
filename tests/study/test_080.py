# SPDX-License-Identifier: Apache-2.0
"""Study 080 at toy size: the tasks and their splits, what counts as right, choosing on dev alone, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study
from tunesmith.study.fair import assert_disjoint

FOLDER = Path(__file__).parents[2] / "studies" / "080-meteora"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def tasks(module: Any) -> Any:
    return import_module(module.__package__ + ".tasks")


@pytest.fixture(scope="module")
def runs(module: Any) -> Any:
    return import_module(module.__package__ + ".runs")


@pytest.fixture(scope="module")
def world(module: Any, runs: Any) -> Any:
    return runs.world(runs.opened(True, 1), module.SMOKE.counts, 0)


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [0, 1]
        assert all(len(r["tasks"]) == 8 and len(r["prompts"]) == 3 for r in raw["arms"][arm])
    assert len({(t["c"], t["lr"]) for t in raw["tuning"]["gates"]}) == 4 and raw["chosen"]["T"] in (1.0, 15.0)
    assert [g["seed"] for g in raw["gates"]] == [0, 1]


@pytest.mark.parametrize(
    ("task", "question", "answer"),
    [
        ("sum", "7 8", "15"), ("plural", "city", None), ("plural", "country", "countries"), ("plural", "leaf", "leaves"),
        ("plural", "monkey", "monkeys"), ("plural", "beach", "beaches"), ("opposite", "cold", "hot"),
    ],
)  # fmt: skip
def test_answers(tasks: Any, task: str, question: str, answer: str | None) -> None:
    found = {r.question: r.answer for group in tasks.rows(task) for r in group}
    assert found.get(question) == answer
    for letters in ("reverse", "upper", "vowels", "first"):
        made = [r for group in tasks.rows(letters) for r in group]
        assert len(made) == 270 and all(len(r.question.split()) == 4 for r in made)
        for r in made:
            want = {
                "reverse": r.question[::-1], "upper": r.question.upper(), "first": r.question[0],
                "vowels": str(len([c for c in r.question if c in "aeiou"])),
            }  # fmt: skip
            assert r.answer == want[letters]
    sorts = [r for group in tasks.rows("sort") for r in group]
    assert all(r.answer.split() == sorted(r.question.split()) for r in sorts) and len(sorts) == 240


def test_splits_share_no_question_and_test_is_one_for_all(tasks: Any) -> None:
    for task in tasks.TASKS:
        a, b = tasks.splits(task, 0), tasks.splits(task, 1)
        assert a["test"] == b["test"] and a["train"] != b["train"]
        for s in (a, b):
            words = {
                k: {w for r in rows for w in ((r.question, r.answer) if task == "opposite" else (r.question,))}
                for k, rows in s.items()
            }
            assert_disjoint(**{k: sorted(v) for k, v in words.items()})
            assert len(s["train"]) >= 50 and len(s["dev"]) >= 8 and len(s["test"]) >= 25, task
    sums = tasks.splits("sum", 0)
    assert all((r.question[::-1] in {q.question for q in sums["test"]}) for r in sums["test"]), (
        "3 4 and 4 3 go together"
    )


def test_a_row_is_questions_then_cues_with_supervised_answers(tasks: Any) -> None:
    def code(text: str) -> list[int]:
        return [ord(c) for c in text]

    two = [tasks.Row("upper", "cat", "CAT"), tasks.Row("sum", "3 4", "7")]
    row = tasks.encoded(two, code)
    assert "".join(map(chr, row.ids)) == "upper: cat\nsum: 3 4\nupper -> CAT\nsum -> 7\n"
    assert "".join(chr(t) for t in row.labels if t != -100) == " CAT\n 7\n" and row.text == "upper: cat\nsum: 3 4\n"
    assert {(q, e) for q, e in zip(row.question, row.expert, strict=True)} == {(0, 1), (1, 4)}
    some = tasks.composites({t: tasks.splits(t, 0)["test"] for t in tasks.TASKS}, 20, "x")
    assert all(len({q.task for q in p}) == 3 for p in some)


def test_a_mixture_has_as_many_rows_of_every_task(world: Any) -> None:
    train = world.sets["train"]
    rows = [train.rows[i].expert[0] for i in train.mixture()]
    assert {rows.count(t) for t in range(8)} == {3} and train.of(2) == [6, 7, 8]


def test_right_is_what_greedy_decoding_writes(runs: Any, world: Any, tasks: Any) -> None:
    use = runs.opened(True, 1)
    rows = world.sets["composite test"].rows
    delta = ts_lora(runs, world)
    got = runs.right(world, "composite test", lambda i: delta)
    for row, hits in zip(rows, got, strict=True):
        assert len(hits) == 3
        with torch.no_grad(), world.base.using(delta):
            states = runs.below(use.whole, [{"input_ids": row.ids}], 1, precision="fp32")[0]
            best = world.base.model(states[None])["logits"][0].argmax(-1).tolist()
        for q in range(3):
            at = [i for i, (a, y) in enumerate(zip(row.question, row.labels, strict=True)) if a == q and y != -100]
            assert hits[q] == all(best[i - 1] == row.ids[i] for i in at)
    assert any(any(h) for h in got) and not all(all(h) for h in got), "some are right and some wrong"


def ts_lora(runs: Any, world: Any) -> Any:
    """A delta that has learnt some of the composite answers by heart."""
    delta = runs.Delta.create(world.base, runs.lora(8), name="x", seed=0)
    runs.learn(world, delta, world.sets["composite test"].task([0, 1]), 60, 2, 3e-2, 0)
    return delta


def test_gates_are_measured_by_block(runs: Any, world: Any) -> None:
    deltas = [runs.Delta.create(world.base, runs.lora(2), name=t, seed=i) for i, t in enumerate("abcdefgh")]
    with torch.no_grad():
        for d in deltas:
            for _, t in d.items():
                t.add_(0.1)
    gated = runs.gates(world, deltas, 50.0, 30, 8, 2e-2, 0)
    before = runs.gate_accuracy(world, runs.ts.route(world.base, deltas, seed=0), "train")
    after = runs.gate_accuracy(world, gated, "train")
    assert set(after) == {"0"} and after["0"] > before["0"] + 0.2


def made_up(gap: float, over: float, spread: float = 3.0) -> dict[str, Any]:
    def rows(metric: float, prompt: float) -> list[dict[str, Any]]:
        prompts = [prompt + spread * ((7 * i) % 5 - 2) for i in range(40)]
        return [{"seed": s, "metric": metric + s, "prompts": prompts} for s in range(4)]

    arms = {arm: rows(50, 30) for arm in ("average", "multi-task", "meteora k=1")}
    arms["oracle"], arms["meteora k=2"], arms["nearest task"] = rows(70, 30), rows(70 + gap, 30 + over), rows(60, 30)
    for i, row in enumerate(arms["nearest task"][0]["prompts"]):
        for r in arms["nearest task"]:
            r["prompts"][i] = row + spread * (i % 3 - 1)
    gates = [{"seed": s, "accuracy": {"0": 0.5, "1": 0.9}} for s in range(4)]
    return {"arms": arms, "gates": gates, "chosen": {"c": 50.0, "lr": 0.01, "T": 1.0}}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (made_up(-1, 20), "reproduced"),
        (made_up(-5, 20), "inconclusive"),
        (made_up(-1, 0.5, spread=10), "inconclusive"),
        (made_up(-12, 20), "not reproduced"),
        (made_up(-1, -2), "not reproduced"),
    ],
)
def test_verdict(study: Any, raw: dict[str, Any], label: str) -> None:
    found = study.verdict(raw)
    assert found.label == label
    assert found.statistics["gates right, block 1"] == pytest.approx(0.9)
