# SPDX-License-Identifier: Apache-2.0
"""Study 100 at toy size: forms, pruned bases against masks in use, FLOPs, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.delta import clone_part
from tunesmith.study import load_study, run_study
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context

FOLDER = Path(__file__).parents[2] / "studies" / "100-dsee"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def stages(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".stages")


@pytest.fixture(scope="module")
def trained(stages: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("cells")
    ctx = Context(True, [0], place, Cells(place / "cells.jsonl", {}))
    world = stages.world_of(ctx, "sst2", 0, stages.SMOKE, None)
    return stages.first(world, "robust", 1e-2, 0, stages.SMOKE)


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    result = run_study(study, smoke=True, out=tmp_path)
    raw = result["raw"]
    assert {arm: len(rows) for arm, rows in raw["arms"].items()} == dict.fromkeys(study.arms, 2)
    assert {len(c["trials"]) for c in raw["tuning"].values()} == {2}
    for rows in raw["tasks"].values():
        assert rows["robust"][0]["trainable"] - rows["lora"][0]["trainable"] == 3 * 4  # 2 blocks, query and value
        assert rows["unpruned"][0]["masked"] == 0 < rows["abs 20 %"][0]["masked"] < rows["abs 40 %"][0]["masked"]


def test_forms_of_the_full_run_have_nearly_equal_sizes(stages: Any) -> None:
    lora, robust = (stages.form(arm, stages.FULL)[0] for arm in ("lora", "robust"))
    assert (lora.rank, lora.entries, robust.rank, robust.entries) == (8, 0, 8, 16)
    assert {stages.form(arm, stages.FULL)[0].support for arm in ("robust", "random", "size")} == {
        "robust", "random", "size",
    }  # fmt: skip


@pytest.mark.parametrize("arm", ["abs 40 %", "wabs 20 %", "w 60 %", "random 40 %", "heads by abs", "heads and neurons"])
def test_the_pruned_base_is_the_masks_in_use(stages: Any, trained: Any, arm: str) -> None:
    world, delta = trained.world, trained.delta
    masks = stages.masks(world.base, delta, arm, stages.SMOKE, 0)
    assert len(masks) == (1 if arm == "heads by abs" else 2)
    rows = world.held["dev"]
    with world.base.using(*masks, delta):
        live = world.logits(rows)
    pruned = world.base.merged(*masks)
    from dataclasses import replace

    from tunesmith.core.delta import Delta

    with pruned.using(Delta("copy", [clone_part(p) for p in delta.parts]), check=False):
        torch.testing.assert_close(replace(world, base=pruned).logits(rows), live, atol=1e-5, rtol=0)
    with world.base.using(delta):
        assert (world.logits(rows) - live).abs().max() > 1e-4


def test_shares_are_global_and_in_both_groups(stages: Any, trained: Any) -> None:
    base = trained.world.base
    for arm, share in (("abs 40 %", 0.4), ("w 20 %", 0.2)):
        first, rest = stages.masks(base, trained.delta, arm, stages.SMOKE, 0)
        for mask in (first, rest):
            total = sum(base.sites[p].module.weight.numel() for p in mask.parts[0].kind_of)
            assert stages._off(mask, base) == round(share * total)
        assert not set(first.parts[0].kind_of) & set(rest.parts[0].kind_of)


def test_tuning_on_leaves_the_trained_delta_and_the_base(stages: Any, trained: Any) -> None:
    before, digest = trained.delta.digest, trained.world.base.digest()
    out = stages.again(trained.world, trained.delta, "abs 40 %", 1e-2, 0, stages.SMOKE)
    assert trained.delta.digest == before and trained.world.base.digest() == digest
    assert set(out) == {"dev_before", "metric", "masked"}


def test_multiplications_are_those_of_the_formula(stages: Any, trained: Any) -> None:
    """2 blocks of width 32 with 4 heads and an MLP of 48, on 16 tokens."""
    base, T = trained.world.base, 16
    whole = 2 * (T * (4 * 32 * 32 + 2 * 32 * 48) + T * T * 2 * 32)
    assert stages.flops(base, T) == whole
    less = 2 * (T * (0.75 * 4 * 32 * 32 + 0.6 * 2 * 32 * 48) + 0.75 * T * T * 2 * 32)
    assert stages.flops(base, T, heads=0.25, neurons=0.4) == pytest.approx(less)


def made_up(
    robust: float = 1.0, guided: tuple[float, float] = (1.0, 1.0), gap: float = -0.5, saved: float = 0.33, wobble: float = 0.2
) -> dict[str, Any]:  # fmt: skip
    def rows(value: float, move: float = 0.0) -> list[dict[str, Any]]:
        return [{"seed": s, "metric": value + move * (s - 2)} for s in range(5)]

    arms = {
        "lora": rows(80), "robust": rows(80 + robust, wobble), "random": rows(80), "size": rows(80), "w 40 %": rows(70),
        "abs 40 %": rows(70 + guided[0], wobble), "w 60 %": rows(60), "abs 60 %": rows(60 + guided[1], wobble),
        "heads by abs": rows(75), "heads by w": rows(75), "heads by random": rows(75),
    }  # fmt: skip
    tasks = {t: {"heads and neurons": rows(80 + gap), "unpruned": rows(80)} for t in ("sst2", "clinc150-domains")}
    return {"arms": arms, "tasks": tasks, "flops": {"saved": saved}}


@pytest.mark.parametrize(
    ("raw", "label", "claims"),
    [
        (made_up(), "reproduced", "reproduced reproduced reproduced"),
        (made_up(guided=(0.0, 1.0)), "reproduced", "reproduced reproduced reproduced"),
        (made_up(guided=(-1.0, 1.0)), "inconclusive", "reproduced open reproduced"),
        (made_up(guided=(-1.0, 0.0)), "not reproduced", "reproduced reversed reproduced"),
        (made_up(robust=-1.0), "not reproduced", "reversed reproduced reproduced"),
        (made_up(robust=0.1), "inconclusive", "open reproduced reproduced"),
        (made_up(gap=-2.0), "inconclusive", "reproduced reproduced open"),
        (made_up(gap=-3.5), "not reproduced", "reproduced reproduced reversed"),
        (made_up(saved=0.2), "inconclusive", "reproduced reproduced open"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, raw: dict[str, Any], label: str, claims: str) -> None:
    found = study.verdict(raw)
    assert found.label == label
    assert " ".join(found.statistics["claims"][c] for c in ("entries", "guided", "flops")) == claims
