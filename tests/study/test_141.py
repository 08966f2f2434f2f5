# SPDX-License-Identifier: Apache-2.0
"""Study 141 at toy size: every arm, equal counts, random pruning, the rising threshold, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.delta import Delta
from tunesmith.deltas import LoRA
from tunesmith.study import load_study, run_study
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context
from tunesmith.study.worlds.encoder import UpperWorld

FOLDER = Path(__file__).parents[2] / "studies" / "141-sora"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def runs(module: Any) -> Any:
    return import_module(module.__name__.rpartition(".")[0] + ".runs")


@pytest.fixture(scope="module")
def world(module: Any, tmp_path_factory: pytest.TempPathFactory) -> UpperWorld:
    folder = tmp_path_factory.mktemp("ctx")
    ctx = Context(True, [0], folder, Cells(folder / "cells.jsonl", {"test": "141"}))
    return module.worlds(ctx, "sst2", module.SMOKE)(0)


def test_a_smoke_run_gives_every_arm_seed_and_set(study: Any, module: Any, tmp_path: Path) -> None:
    result = run_study(study, smoke=True, out=tmp_path)
    raw = result["raw"]
    for arm in study.arms:
        assert {(r["set"], r["seed"]) for r in raw["arms"][arm]} == {(n, s) for n in module.SETS for s in (0, 1)}
        assert all(0 <= r["metric"] <= 100 for r in raw["arms"][arm])
    by = {arm: {(r["set"], r["seed"]): r["parameters"] for r in raw["arms"][arm]} for arm in study.arms}
    for key, count in by[module.SORA].items():
        assert count <= by[module.WHOLE][key]
        for arm in (module.SMALL, module.RANDOM):
            assert abs(by[arm][key] - count) <= 80 / 2  # half a component of the widest layer
    for name in module.SETS:
        assert [row["xi"] for row in raw["sweep"][name]] == list(module.SMOKE.xis)
        assert {len(c["trials"]) for c in raw["tuning"][name].values()} == {2}
        nearest = min(abs(row["share"] - 0.7) for row in raw["sweep"][name])
        assert abs(next(r["share"] for r in raw["sweep"][name] if r["xi"] == raw["xi"][name]) - 0.7) == nearest
    assert [row["xi"] for row in raw["schedule"]] == list(module.SMOKE.levels)


def test_stored_gates_are_counted_and_closed_ones_are_gone(runs: Any, world: UpperWorld) -> None:
    found = runs.sora(world, 4, 0.08, 1e-2, 20, 0)
    sizes = runs.sizes(world, 4)
    assert found["parameters"] == sum(k * sizes[path] for path, k in found["kept"].items())
    assert 0 < found["share"] == sum(found["kept"].values()) / (4 * len(sizes)) < 1
    everything = runs.sora(world, 4, 0.0, 1e-2, 3, 0)
    assert everything["share"] == 1 and everything["parameters"] == 4 * sum(sizes.values())


def test_as_few_parameters_are_as_few_as_can_be(runs: Any) -> None:
    sizes = {"a": 64, "b": 64, "c": 80, "d": 80}
    for wanted in (288, 300, 600, 1000, 1152, 2304):
        rank = runs.spread(sizes, wanted)
        count = sum(rank[p] * n for p, n in sizes.items())
        assert abs(count - wanted) <= 40 and max(rank.values()) - min(rank.values()) <= 1
    kept = runs._drawn(sizes, 8, 1000, 0)
    assert abs(sum(len(at) * sizes[p] for p, at in kept.items()) - 1000) <= 40
    assert kept == runs._drawn(sizes, 8, 1000, 0) != runs._drawn(sizes, 8, 1000, 1)
    assert all(at == sorted(set(at)) and max(at, default=0) < 8 for at in kept.values())


def test_every_arm_has_one_scale(runs: Any, world: UpperWorld) -> None:
    for rank in ({p: 3 + i % 2 for i, p in enumerate(runs.sizes(world, 2))}, dict.fromkeys(runs.sizes(world, 2), 5)):
        method = runs._lora(rank)
        delta = Delta.create(world.base, method)
        part = delta.parts[0]
        for path, kind in part.kind_of.items():
            t = part.tensors(path)
            assert t["A"].shape[0] == rank[path]
            t["B"].data.normal_()
            torch.testing.assert_close(method.update(world.base.sites.of(path, kind), t).dense(), 2 * t["B"] @ t["A"])
    assert isinstance(method, LoRA)


def test_random_pruning_goes_on_from_the_half_trained_lora(runs: Any, world: UpperWorld) -> None:
    wanted = 2 * sum(runs.sizes(world, 4).values())
    found = runs.random_pruned(world, 4, wanted, 5e-3, 8, 0)
    assert abs(found["parameters"] - wanted) <= 40


def test_a_rising_threshold_never_opens_more_than_there_were(runs: Any, world: UpperWorld) -> None:
    rows = runs.rising(world, 4, (0.0, 0.05, 0.3), 5e-3, 6, 6, 0)
    assert [r["share"] for r in rows] == sorted((r["share"] for r in rows), reverse=True)
    assert rows[0]["share"] == 1 and rows[-1]["share"] < 0.5
    assert all(0 <= r["train"] <= 100 and r["kept"] == round(r["share"] * 4 * 6) for r in rows)


def _raw(module: Any, whole: float, small: float, share: float = 0.7, wobble: float = 0.1) -> dict[str, Any]:
    level = {module.SORA: 80.0, module.WHOLE: whole, module.SMALL: small, module.RANDOM: 70.0}
    parameters = {module.SORA: round(1000 * share), module.WHOLE: 1000, module.SMALL: 700, module.RANDOM: 700}
    return {
        "arms": {
            arm: [
                {"seed": s, "set": n, "metric": m + (wobble * (s - 2) if arm == module.SORA else 0), "parameters": parameters[arm]}
                for s in range(5) for n in module.SETS
            ]
            for arm, m in level.items()
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("whole", "small", "options", "label"),
    [
        (80.0, 79.0, {}, "reproduced"),
        (80.3, 79.0, {}, "reproduced"),
        (80.6, 79.0, {}, "inconclusive"),
        (80.0, 79.0, {"share": 0.76}, "inconclusive"),
        (80.0, 79.0, {"wobble": 2.0}, "inconclusive"),
        (80.0, 80.0, {}, "inconclusive"),
        (81.0, 79.0, {}, "inconclusive"),
        (81.0, 80.5, {}, "not reproduced"),
        (81.0, 80.5, {"wobble": 2.0}, "inconclusive"),
    ],
)
def test_the_verdict_follows_the_rule(
    study: Any, module: Any, whole: float, small: float, options: dict[str, float], label: str
) -> None:
    assert study.verdict(_raw(module, whole, small, **options)).label == label
