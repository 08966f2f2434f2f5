# SPDX-License-Identifier: Apache-2.0
"""Study 067 at toy size: arms of equal average rank, growth within the run, nested rows, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.delta import Delta
from tunesmith.study import load_study, run_study
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context
from tunesmith.study.worlds.encoder import UpperWorld

FOLDER = Path(__file__).parents[2] / "studies" / "067-increlora"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def world(module: Any, tmp_path_factory: pytest.TempPathFactory) -> UpperWorld:
    folder = tmp_path_factory.mktemp("ctx")
    ctx = Context(True, [0], folder, Cells(folder / "cells.jsonl", {"test": "067"}))
    return module.worlds(ctx, "ag_news", module.SMOKE)(0)


def test_a_smoke_run_gives_every_arm_set_size_and_seed(study: Any, module: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    wanted = {(name, n, seed) for name in module.SETS for n in (module.FEW, module.ALL) for seed in (0, 1)}
    for arm in study.arms:
        assert {(r["set"], r["n"], r["seed"]) for r in raw["arms"][arm]} == wanted
        for row in raw["arms"][arm]:
            assert sum(row["ranks"].values()) == 2 * 6, "average rank 2 on the 6 layers of one block"
            assert row["parameters"] > 0 and 0 <= row["metric"] <= 100
    assert all(set(r["ranks"].values()) == {2} for r in raw["arms"][module.LORA])
    assert len(raw["tuning"]) == len(module.SETS) * 2 * len(study.arms)
    assert {len(t["trials"]) for t in raw["tuning"].values()} == {2}


def test_growth_ends_in_the_first_half_of_a_full_run(module: Any) -> None:
    sizes = module.FULL
    for arm in (module.GROWN, module.RANDOM, module.PLAIN):
        plan = module.method(arm, sizes).growth(12, sizes.steps)
        assert (plan.first, plan.rounds, plan.last, plan.layers, plan.add) == (16, 4, 40, 3, 1)
    assert module.method(module.RANDOM, sizes).choice == "random"
    assert not module.method(module.PLAIN, sizes).advance
    assert module.method(module.PRUNED, sizes).initial == 3


def test_the_small_setting_is_a_part_of_the_large_one(module: Any, world: UpperWorld, monkeypatch: Any) -> None:
    from tunesmith.study.worlds import arms

    seen: list[tuple[Any, Any, float]] = []
    plain = arms.train

    def spy(w: Any, methods: Any, **kw: Any) -> Any:
        seen.append((kw["task"].rows, w.companions[0].lr_ratio, kw["lr"]))
        return plain(w, methods, **kw)

    monkeypatch.setattr(arms, "train", spy)
    for n in (module.FEW, module.ALL):
        assert module.one(world, module.LORA, n, 2e-3, 0, module.SMOKE) is not None
    (few, _, _), (everything, _, _) = seen
    assert len(few) == module.SMOKE.few and len(everything) == len(world.task)
    assert all(any(s is t for t in everything.states) for s in few.states)
    assert all(ratio * lr == pytest.approx(module.HEAD_LR) for _, ratio, lr in seen)
    assert world.companions[0].lr_ratio == 1.0


def test_every_arm_adapts_the_same_layers(module: Any, world: UpperWorld) -> None:
    paths = {
        arm: set(Delta.create(world.base, module.method(arm, module.SMOKE)).parts[0].kind_of) for arm in module.ARMS
    }
    assert len(set(map(frozenset, paths.values()))) == 1 and len(paths[module.LORA]) == 6


def _raw(module: Any, few: float, everything: float, wobble: float = 0.1, control: float = 79.0) -> dict[str, Any]:
    gap = {module.FEW: few, module.ALL: everything}

    def metric(arm: str, n: str, seed: int) -> float:
        level = {module.GROWN: 80 + gap[n] + wobble * (seed - 2), module.LORA: 80.0, module.RANDOM: control}
        return level.get(arm, 78.0)

    return {
        "arms": {
            arm: [{"seed": s, "set": name, "n": n, "metric": metric(arm, n, s)} for s in range(5) for name in module.SETS
                  for n in (module.FEW, module.ALL)]
            for arm in module.ARMS
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("few", "everything", "wobble", "label"),
    [
        (1.0, 0.2, 0.1, "reproduced"),
        (1.0, -1.0, 0.1, "reproduced"),
        (1.0, 1.2, 0.1, "inconclusive"),
        (1.0, 0.2, 2.0, "inconclusive"),
        (-0.5, 0.5, 0.1, "inconclusive"),
        (0.0, -0.1, 0.0, "not reproduced"),
        (-1.0, -0.1, 0.1, "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(
    study: Any, module: Any, few: float, everything: float, wobble: float, label: str
) -> None:
    assert study.verdict(_raw(module, few, everything, wobble)).label == label


@pytest.mark.parametrize(("control", "said"), [(79.0, "shown"), (81.0, "not shown"), (85.0, "random growth is better")])
def test_the_control_is_reported(study: Any, module: Any, control: float, said: str) -> None:
    found = study.verdict(_raw(module, 1.0, 0.2, control=control))
    assert found.statistics["the score matters at n 200"] == said
