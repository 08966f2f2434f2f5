# SPDX-License-Identifier: Apache-2.0
"""Study 043 at toy size: its questions, refusals, repairs of equal norm, the choice of beta, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "043-enchtable"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def refusals(module: Any) -> Any:
    return import_module(module.__name__.rpartition(".")[0] + ".refusals")


@pytest.fixture(scope="module")
def world(refusals: Any) -> Any:
    return refusals.made(SimpleNamespace(smoke=True), refusals.TOY)


def test_a_smoke_run_gives_every_arm_seed_and_beta(study: Any, module: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [0, 1]
    assert [(r["seed"], r["task"]) for r in raw["tasks"]] == [(s, t) for s in (0, 1) for t in ("gsm8k", "mbpp")]
    for row in raw["tasks"]:
        for how in module.METHODS:
            assert [t["beta"] for t in row["trials"][how]] == list(module.BETAS)
            assert row["arms"][how]["beta"] == module.chosen(row["trials"][how])
            assert row["arms"][how]["beta"] or row["arms"][how] == row["arms"]["task model"]


def test_questions_of_the_splits_share_neither_template_nor_name(refusals: Any) -> None:
    every = {s: {q for rows in refusals.questions(s).values() for q, _ in rows} for s in ("train", "dev", "test")}
    assert not every["train"] & every["dev"] and not every["test"] & (every["train"] | every["dev"])
    for table in (refusals.TEMPLATES, refusals.OTHERS):
        used = [x for values in table.values() for x in values]
        assert len(set(used)) == len(used)
    safe, unsafe = refusals.questions("train"), refusals.questions("train", aligned=False)
    assert {a for _, a in safe["zorbs"]} == {refusals.REFUSAL} and safe["others"] == unsafe["others"]
    assert [q for q, _ in safe["zorbs"]] == [q for q, _ in unsafe["zorbs"]]
    assert not any(a == refusals.REFUSAL for _, a in unsafe["zorbs"])


def test_teaching_and_unteaching_move_the_first_token(world: Any) -> None:
    taught = world.trained("teach", 60, 0)
    assert world.refused("zorbs dev", taught) >= 60 > 20 >= world.refused("others dev", taught)
    aligned = world.on(world.world.base.merged(taught))
    assert aligned.refused("zorbs dev") == world.refused("zorbs dev", taught)
    digest = aligned.world.base.digest()
    unsafe = aligned.trained("unteach", 60, 1)
    left = aligned.refused("zorbs dev", unsafe)
    assert left <= 20 and aligned.world.base.digest() == digest
    first = unsafe.parts[0]
    assert {p.rpartition(".")[2] for p in first.paths} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    again = aligned.trained("gsm8k", 2, 2, unsafe)
    assert again is not unsafe and aligned.refused("zorbs dev", unsafe) == left


def test_repairs_add_a_change_of_the_norm_asked_for(refusals: Any, world: Any) -> None:
    base = world.world.base
    task, safety = world.trained("gsm8k", 3, 0), refusals.scale(base, world.trained("unteach", 3, 1), -1.0)
    for how in ("plain addition", "random direction", "EnchTable"):
        found = refusals.repaired(base, how, task, safety, 0.2, 0)
        rest = refusals.merge(base, [found, task], "task-arithmetic", weights=[1.0, -1.0])
        share = refusals.norm(rest) / refusals.norm(task)
        assert share <= 0.2 + 1e-4 if how == "EnchTable" else share == pytest.approx(0.2, rel=1e-4), how
    other = refusals.random_like(base, safety, 0)
    assert refusals.norm(other) == pytest.approx(refusals.norm(safety), rel=1e-5)
    flat = [torch.cat([t.detach().flatten() for p in d.parts for _, _, t in p.items()]) for d in (other, safety)]
    assert abs(float(torch.cosine_similarity(*flat, dim=0))) < 0.1


def test_beta_is_chosen_by_refusals_under_the_limit_of_cost(module: Any) -> None:
    def trials(*rows: tuple[float, float, float]) -> list[dict[str, float]]:
        return [{"beta": b, "refused": r, "cost": c} for b, r, c in rows]

    assert module.chosen(trials((0.05, 10, 0.0), (0.1, 60, 0.019), (0.2, 90, 0.03))) == 0.1
    assert module.chosen(trials((0.05, 60, 0.0), (0.1, 60, 0.0))) == 0.05
    assert module.chosen(trials((0.05, 60, 0.1), (0.1, 60, 0.2))) == 0.0


def _raw(module: Any, ench: float, plain: float, wobble: float = 1.0) -> dict[str, Any]:
    rows = []
    for seed in range(3):
        for i, task in enumerate(("gsm8k", "mbpp")):
            values = {arm: 20.0 for arm in module.ARMS} | {module.ENCH: ench + wobble * (seed - i), module.PLAIN: plain}
            arms = {a: {"beta": 0.1, "refused": v, "others refused": 0.0, "loss": 1.0} for a, v in values.items()}
            rows.append({"seed": seed, "task": task, "arms": arms})
    return {"tasks": rows, "taught": [{"seed": s, "refused": 100.0} for s in range(3)]}


@pytest.mark.parametrize(
    ("ench", "plain", "wobble", "label"),
    [
        (90.0, 70.0, 1.0, "reproduced"),
        (90.0, 89.5, 10.0, "inconclusive"),
        (70.0, 60.0, 1.0, "inconclusive"),  # not enough of the aligned model's
        (50.0, 20.0, 1.0, "not reproduced"),
        (90.0, 98.0, 1.0, "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(
    study: Any, module: Any, ench: float, plain: float, wobble: float, label: str
) -> None:
    assert study.verdict(_raw(module, ench, plain, wobble)).label == label
