# SPDX-License-Identifier: Apache-2.0
"""Study 046 at toy size: splits, models of equal size, what repair sees, the LoRA arm, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.derive import FactoredLinear
from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "046-pela"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


def sibling(study: Any, name: str) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + "." + name)


@pytest.fixture(scope="module")
def models(study: Any) -> Any:
    return sibling(study, "models")


@pytest.fixture(scope="module")
def plan(models: Any) -> Any:
    return models.Plan(models.Shape(16, 2, 2), 3, 8, 1e-3, 2, 1e-3, 2, 8, "fp32")


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    assert {arm: len(rows) for arm, rows in raw["arms"].items()} == dict.fromkeys(study.arms, 2)
    size = {arm: rows[0]["parameters"] for arm, rows in raw["arms"].items()}
    assert size["full model"] > size["pela, c=1.5"] > size["pela, c=2"] > size["pela, c=3"]
    for c in ("1.5", "2", "3"):
        assert size[f"svd, c={c}"] == size[f"pela, c={c}"]
    assert len(raw["tuning"]) == 2 * len(study.arms) and all(len(t["trials"]) == 2 for t in raw["tuning"].values())


def test_pictures_of_training_dev_and_test_are_different(study: Any) -> None:
    pictures = sibling(study, "pictures")
    task = pictures.omniglot(None, 5, 10, 3, seed=1)
    assert [len(task.train), len(task.dev), len(task.test)] == [50, 15, 35]
    parts = [{tuple(x.flatten()[:20].tolist()) for x in part.x} for part in (task.train, task.dev, task.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert torch.bincount(task.train.y).tolist() == [10] * 5
    digits = pictures.mnist(None, 3, 2, 20, seed=0)
    assert torch.bincount(digits.train.y).tolist() == [3] * 10 and torch.bincount(digits.dev.y).tolist() == [2] * 10


def test_crops_and_flips_are_drawn_and_the_middle_is_measured(study: Any) -> None:
    pictures = sibling(study, "pictures")
    data = pictures.general(None, 8)
    plain, moved = pictures.batches(data, 8, 0)(0), pictures.batches(data, 8, 0, augment=True)(0)
    assert plain[0].shape == moved[0].shape == (8, 1, 28, 28) and torch.equal(plain[1], moved[1])
    assert not torch.equal(plain[0], moved[0])
    again = pictures.batches(data, 8, 0, augment=True)(0)
    assert torch.equal(moved[0], again[0])
    x = torch.arange(32 * 32).reshape(1, 1, 32, 32)
    assert int(pictures.crop(x)[0, 0, 0, 0]) == 2 * 32 + 2
    seen = torch.cat([pictures.batches(data, 8, 3)(i)[1] for i in range(len(data) // 8)])
    assert torch.equal(seen.sort().values, data.y.sort().values), "every picture once an epoch"


def test_the_dense_model_of_equal_size_is_the_nearest(models: Any) -> None:
    shape = models.Shape(32, 2, 4)
    target = models.parameters(models.vit(shape, 8, 0)) // 2
    found = models.of_size(shape, 8, target)
    gap = abs(models.parameters(models.vit(found, 8, 0)) - target)
    for dim in (found.dim - 4, found.dim + 4):
        assert gap <= abs(models.parameters(models.vit(models.Shape(dim, 2, 4), 8, 0)) - target)
    assert found.dim % 4 == 0


def test_blocks_are_factorised_and_nothing_else(study: Any, models: Any, plan: Any) -> None:
    data = sibling(study, "pictures").general(None, 8)
    teacher = models.vit(plan.shape, 8, 0)
    before = teacher.digest()
    for how in ("svd", "task", "pela"):
        base = models.small(teacher, 2.0, how, data, plan, 0)
        made = [p for p, m in base.modules.items() if isinstance(m, FactoredLinear)]
        assert len(made) == 2 * 6 and all(p.startswith("blocks.") for p in made)
        recipes = [s["recipe"] for s in base.source["derived"]]
        assert recipes == ["factorise"] if how == "svd" else recipes == ["factorise", "pela-repair"]
    assert teacher.digest() == before


def test_fine_tuning_changes_everything_and_the_lora_arm_only_its_own(study: Any, models: Any, plan: Any) -> None:
    pictures = sibling(study, "pictures")
    task = pictures.mnist(None, 3, 2, 20, seed=0)
    teacher = models.vit(plan.shape, 8, 0)
    before = teacher.digest()
    for how in (models.fine_tuned, models.lora_tuned):
        measured = how(teacher, task, 1e-2, plan, 0)
        assert 0 <= measured(task.test) <= 100
    assert teacher.digest() == before
    new = models.with_head(teacher, 10, 0)
    assert new.model.head.out_features == 10 and torch.equal(new.model.patch.weight, teacher.model.patch.weight)


def _raw(study: Any, drops: dict[float, float] | None = None, gain: float = 1.0, wobble: float = 0.1) -> dict[str, Any]:
    module = import_module(study.run.__module__)
    at = {1.5: 0.5, 2.0: 0.8, 3.0: 1.5, **(drops or {})}

    def score(arm: str) -> float:
        if arm == module.FULL_ARM:
            return 90.0
        how, _, ratio = arm.partition(", c=")
        if how == "pela":
            return 90 - at[float(ratio)]
        return 90 - at[3.0] - gain if how == "task" else 85.0

    arms = {
        arm: [{"seed": s, "metric": score(arm) + wobble * (s - 1), "parameters": 10, "ms": 0.1} for s in range(3)]
        for arm in module.ARMS
    }
    return {"arms": arms}


@pytest.mark.parametrize(
    ("numbers", "label"),
    [
        ({}, "reproduced"),
        ({"drops": {1.5: 2.5}}, "not reproduced"),
        ({"drops": {1.5: 1.5}}, "inconclusive"),
        ({"drops": {2.0: 1.2}}, "inconclusive"),
        ({"gain": -0.5}, "inconclusive"),
        ({"drops": {1.5: -1.0, 2.0: 0.0}}, "reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, numbers: dict[str, Any], label: str) -> None:
    found = study.verdict(_raw(study, **numbers))
    assert found.label == label and "weight term, pela - feature at c=3" in found.statistics
