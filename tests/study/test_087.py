# SPDX-License-Identifier: Apache-2.0
"""Study 087 at toy size: the questions, what CorDA measures on, equal arms, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.delta import Delta
from tunesmith.deltas import CorDA
from tunesmith.study import load_study, run_study
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context
from tunesmith.study.worlds import language
from tunesmith.study.worlds.language import IGNORED, gsm8k_top
from tunesmith.train.config import TrainConfig
from tunesmith.train.sample import started

FOLDER = Path(__file__).parents[2] / "studies" / "087-corda"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def parts(study: Any) -> Any:
    package = study.run.__module__.rpartition(".")[0]

    class Parts:
        study, probe, facts = (import_module(f"{package}.{name}") for name in ("study", "probe", "facts"))

    return Parts


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context(True, [0], tmp_path, Cells(tmp_path / "cells.jsonl", {"test": 87}))


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    result = run_study(study, smoke=True, out=tmp_path)
    assert {arm: len(rows) for arm, rows in result["raw"]["arms"].items()} == dict.fromkeys(study.arms, 2)
    for rows in result["raw"]["arms"].values():
        assert all({"knowledge", "right"} == set(row["extra"]) for row in rows)
        assert len({row["trainable"] for row in rows}) == 1
    assert len({rows[0]["trainable"] for rows in result["raw"]["arms"].values()}) == 1, "equal trained numbers"


def test_facts_are_questions_that_come_once(parts: Any) -> None:
    found = parts.facts.facts()
    questions = dict(found)
    assert len(found) == len(questions) > 300
    assert all(q.endswith("?") and a == a.strip() and a for q, a in found)
    for question, answer in (
        ("What is the capital of New Zealand?", "Wellington"), ("What is the capital of Bolivia?", "La Paz"),
        ("What is the capital city of the U.S. state of Utah?", "Salt Lake City"),
        ("What is the chemical symbol for gold?", "Au"), ('Who wrote "A Tale of Two Cities"?', "Charles Dickens"),
        ("On which continent is Peru?", "South America"), ("What is the chemical formula of table salt?", "NaCl"),
    ):  # fmt: skip
        assert questions[question] == answer


def test_a_question_is_answered_if_greedy_decoding_gives_the_answer(parts: Any) -> None:
    base = language.toy_base()
    prompts = [[5, 9, 33], [7, 7, 12, 40, 22]]
    rows = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(3):
            ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
    for change in (0, 2):  # the first or the last token of the answer is another
        ids = list(rows[0]["input_ids"])
        ids[3 + change] = (ids[3 + change] + 1) % 64
        rows.append({"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:]})
    assert parts.probe.answered(base, rows, batch=3) == [True, True, False, False]


def test_no_question_is_both_asked_and_measured_on(parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The full path on a toy base: half the questions are taken for known, rows of the others hold only those."""

    class Words:
        def __init__(self) -> None:
            self.vocabulary: dict[str, int] = {}

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            words = self.vocabulary
            return {"input_ids": [words.setdefault(w, len(words)) % 64 for w in text.split()]}

    toy = language.toy_base()
    toy.tokenizer = Words()
    context = Context(False, [0], tmp_path, Cells(tmp_path / "cells.jsonl", {}))
    monkeypatch.setattr(parts.probe, "load", lambda *a, **kw: toy)
    monkeypatch.setattr(parts.probe, "answered", lambda base, rows: [i % 2 == 0 for i in range(len(rows))])
    seen: list[list[tuple[str, str]]] = []
    plain = parts.probe._lines
    monkeypatch.setattr(parts.probe, "_lines", lambda b, rest, n: seen.append(list(rest)) or plain(b, rest, n))
    world = gsm8k_top(Context(True, [0], tmp_path, Cells(tmp_path / "c2.jsonl", {})), blocks=2)
    made = parts.probe.probe(context, world, most=20, samples=6)
    facts = parts.facts.facts()
    assert seen[0] == facts[1::2] and made.counts == {"facts": len(facts), "known": (len(facts) + 1) // 2}
    assert (len(made.known), len(made.other)) == (20, 6)
    assert all(y[0] == IGNORED and y[-1] != IGNORED for y in made.known.labels)


def test_knowledge_is_measured_on_the_rows_it_was_given(parts: Any, ctx: Context) -> None:
    world = gsm8k_top(ctx, blocks=2)
    rows = parts.probe.probe(ctx, world, most=8, samples=4)
    config = TrainConfig(batch_size=4)

    def start(method: Any, task: Any) -> Delta:
        return started(world.base, [method], task, config, "d", "both")

    cls = parts.probe.measured_on(rows.other)
    got = start(cls(rank=2, alpha=2.0, mode="knowledge"), world.task)
    want = start(CorDA(rank=2, alpha=2.0, mode="knowledge"), rows.other)
    other = start(CorDA(rank=2, alpha=2.0, mode="knowledge"), world.task)
    path = "layers.0.self_attn.q_proj"
    values = [d.parts[0].tensors(path) for d in (got, want, other)]
    pieces = [(t["B0"] @ t["A0"]).detach() for t in values]
    torch.testing.assert_close(pieces[0], pieces[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(pieces[0], pieces[2], atol=1e-3)
    with torch.no_grad():
        values[0]["A"].add_(1)
    again = start(cls(rank=2, alpha=2.0, mode="knowledge"), world.task)
    assert torch.equal(again.parts[0].tensors(path)["A"], again.parts[0].tensors(path)["A0"]), "runs share no tensor"


def _raw(
    keep: float = 0.1, learn: float = 1.0, keep_target: float = 1.2, pissa: float = 1.1, wobble: float = 0.0
) -> dict[str, Any]:
    """Forgetting of the knowledge arm (LoRA's is 0.2) and target losses (LoRA's is 1.2) over three seeds."""
    target = {
        "lora": 1.2, "pissa": pissa, "corda knowledge": keep_target, "corda instruction": learn,
        "minor components": 1.3,
    }  # fmt: skip
    lost = {"lora": 0.2, "pissa": 0.3, "corda knowledge": keep, "corda instruction": 0.4, "minor components": 0.15}
    arms = {
        arm: [
            {
                "seed": s,
                "metric": target[arm] + (wobble * (s - 1) if arm == "corda instruction" else 0.001 * s),
                "extra": {"knowledge": 2.0 + lost[arm] + (wobble * (s - 1) if arm == "corda knowledge" else 0.0)},
                "retention": {"loss": 3.1},
            }
            for s in range(3)
        ]
        for arm in target
    }
    return {"arms": arms, "base": {"target": 1.5, "knowledge": 2.0, "loss": 3.0}}


@pytest.mark.parametrize(
    ("raw", "label", "claims"),
    [
        (_raw(), "reproduced", ["holds", "holds"]),
        (_raw(keep=0.2), "not reproduced", ["reversed", "holds"]),
        (_raw(keep=0.3), "not reproduced", ["reversed", "holds"]),
        (_raw(keep_target=1.25), "inconclusive", ["open", "holds"]),
        (_raw(keep_target=1.205), "reproduced", ["holds", "holds"]),
        (_raw(learn=1.15), "not reproduced", ["holds", "reversed"]),
        (_raw(learn=1.25, pissa=1.3), "not reproduced", ["holds", "reversed"]),
        (_raw(wobble=0.15), "inconclusive", ["open", "open"]),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, raw: dict[str, Any], label: str, claims: list[str]) -> None:
    found = study.verdict(raw)
    assert found.label == label and found.statistics["claims: knowledge, instruction"] == claims
