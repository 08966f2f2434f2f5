# SPDX-License-Identifier: Apache-2.0
"""Study 116 at toy size: facts and the chat format, every strategy, the residual as a delta, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "116-instruction-residual"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def facts(module: Any) -> Any:
    return import_module(module.__name__.rpartition(".")[0] + ".facts")


def test_a_smoke_run_gives_every_arm_seed_dose_and_rank(study: Any, module: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [0, 1]
        assert all(r["metric"] == pytest.approx(r["rules"] * r["new"] / 100) for r in raw["arms"][arm])
    assert [r["alpha"] for r in raw["alphas"]] == [*module.ALPHAS] * 2
    assert [r["tokens"] for r in raw["doses"]] == [5 * 8 * n for n in (2, 4)] * 2
    assert all(0 < r["error"] < 1 and r["ratio"] < 1 for r in raw["ranks"])
    assert all(0 <= r["zeros"] < 1 and -1 <= r["cosine"] <= 1 for r in raw["facts"])


def test_the_chat_format_asks_for_one_word_in_upper_case(facts: Any) -> None:
    f = facts.Facts(facts.TOY, 0)
    known, stranger = f.chat([0])[0], f.chat([f.strangers[0]])[0]
    v = f.value[0]
    assert known["input_ids"] == [facts.BEGIN, facts.ASK, f.entity(0), facts.ANSWER, f.upper(v), facts.STOP]
    assert known["labels"] == [-100] * 4 + [f.upper(v), facts.STOP] and stranger["labels"][4] == facts.UNKNOWN
    assert f.plain([0])[0]["input_ids"] == [facts.BEGIN, f.entity(0), facts.IS, f.lower(v), facts.STOP]
    tokens = (
        {f.lower(i) for i in range(4)}
        | {f.upper(i) for i in range(4)}
        | {f.entity(e) for e in (*f.olds, *f.news, *f.strangers)}
    )
    assert len(tokens) == 8 + 12 + 6 + len(f.strangers) and max(tokens) == f.vocabulary - 1
    taught = {row["input_ids"][2] for row in f.instruction()}
    assert not taught & {f.entity(e) for e in f.news} and f.entity(f.olds[-1]) not in taught
    assert f.value == facts.Facts(facts.TOY, 0).value != facts.Facts(facts.TOY, 1).value


def test_rules_are_counted_as_they_are_kept(facts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    w = facts.made(facts.TOY, 0)
    f = w.facts
    known = list(f.olds)[f.sizes.shown :]

    def says(first: Any, second: Any) -> None:
        def following(prompts: Any) -> torch.Tensor:
            return torch.tensor([(first if len(p) == 4 else second)(p) for p in prompts])

        monkeypatch.setattr(w, "next", following)

    strangers = {f.entity(e) for e in f.strangers}
    says(lambda p: facts.UNKNOWN if p[2] in strangers else f.upper(0), lambda p: facts.STOP)
    assert w.passed() == 1.0  # the wrong value in the right form keeps the rules
    assert w.answered(known) == [float(f.value[e] == 0) for e in known]
    says(lambda p: facts.UNKNOWN if p[2] in strangers else f.lower(0), lambda p: facts.STOP)
    others = len(f.strangers) - len(f.strangers) // 2
    assert w.passed() == pytest.approx(others / (others + len(known)))  # lower case breaks them
    says(lambda p: facts.UNKNOWN if p[2] in strangers else f.upper(0), lambda p: facts.IS)
    assert w.passed() == 0.0  # two words


def test_the_residual_is_task_arithmetic_and_leaves_the_base_as_it_was(facts: Any) -> None:
    from tunesmith.compose.merge import merge

    w = facts.made(facts.TOY, 0)
    digest = w.base.digest()
    residual = w.tuned(w.facts.instruction(), 3, 0, name="instruct")
    corpus = w.tuned(w.facts.plain(list(w.facts.news)), 3, 1, name="corpus")
    before = {k: t.clone() for k, t in residual.items()}
    w.tuned(w.facts.plain(list(w.facts.news)), 3, 1, residual)
    assert all(torch.equal(t, before[k]) for k, t in residual.items())  # S2 trains a copy
    both = merge(w.base, [corpus, residual], "task-arithmetic", weights=[1.0, 1.0])
    theta = w.base.merged(both).model.state_dict()
    one, two, base = (
        w.base.merged(d).model.state_dict() if d else w.base.model.state_dict() for d in (corpus, residual, None)
    )
    for key, value in theta.items():
        torch.testing.assert_close(value, one[key] + (two[key] - base[key]), atol=1e-6, rtol=1e-5)
    assert w.base.digest() == digest


def _raw(module: Any, s4: tuple[float, float], s2: tuple[float, float], wobble: float = 1.0) -> dict[str, Any]:
    levels = {module.START: (95.0, 0.0), module.S1: (95.0, 80.0), module.S2: s2, module.S3: (90.0, 70.0), module.S4: s4}

    def row(seed: int, rules: float, new: float) -> dict[str, float]:
        rules += wobble * (seed - 2)
        return {"seed": seed, "rules": rules, "new": new, "old": 90.0, "metric": rules * new / 100}

    arms = {
        arm: [row(s, *v) if arm == module.S2 else row(2, *v) | {"seed": s} for s in range(5)]
        for arm, v in levels.items()
    }
    return {"arms": arms, "doses": [{"tokens": 100, "rules": 90.0}, {"tokens": 1000, "rules": 50.0}]}


@pytest.mark.parametrize(
    ("s4", "s2", "wobble", "label"),
    [
        ((90.0, 60.0), (40.0, 50.0), 1.0, "reproduced"),
        ((80.0, 60.0), (40.0, 50.0), 1.0, "inconclusive"),  # the format is not kept
        ((90.0, 60.0), (94.5, 10.0), 1.0, "inconclusive"),  # S2 loses nothing
        ((90.0, 20.0), (40.0, 45.0), 20.0, "inconclusive"),
        ((90.0, 10.0), (60.0, 50.0), 1.0, "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, module: Any, s4: Any, s2: Any, wobble: float, label: str) -> None:
    found = study.verdict(_raw(module, s4, s2, wobble))
    assert found.label == label and found.statistics["slope of S2's rules over log tokens"] < 0
