# SPDX-License-Identifier: Apache-2.0
"""Study 040 at toy size: pictures and splits, arms, the collapsed form, costs, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.core.delta import Delta
from tunesmith.study import load_study, run_study
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context
from tunesmith.study.worlds.text import few_shot

FOLDER = Path(__file__).parents[2] / "studies" / "040-block-lora"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def vision(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".vision")


@pytest.fixture(scope="module")
def digits(vision: Any) -> Any:
    target = vision.build({}, None, "fp32", 40)[0]
    return target.few(4, 0, 6, 32, "fp32")


def test_a_smoke_run_gives_every_arm_setting_and_seed(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    settings = ["digits 1", "digits 2", "letters 1", "words 2"]
    for arm in study.arms:
        rows = raw["arms"][arm]
        assert [row["seed"] for row in rows] == [0, 1] and all(list(row["by"]) == settings for row in rows)
        assert all(row["metric"] == pytest.approx(sum(row["by"].values()) / 4) for row in rows)
    assert {(row["domain"], row["n"]) for row in raw["mechanism"]} == {
        (domain, n) for domain in ("digits", "letters", "words") for n in (2, 4, 8)
    }
    assert {len(c["trials"]) for by_arm in raw["tuning"].values() for c in by_arm.values()} == {3}
    assert set(raw["cost"]) == set(study.arms)


def test_shots_held_out_and_test_pictures_are_apart_and_balanced(vision: Any) -> None:
    target = vision.build({}, None, "fp32", 40)[1]  # a pool of ten pictures of each class
    world = target.few(4, 1, 6, 32, "fp32")
    assert torch.bincount(world.task.y).tolist() == [4] * 10 and world.batch == 32
    assert torch.bincount(world.held["dev"][1]).tolist() == [6] * 10 and len(world.held["test"][1]) == 40
    shots, dev = ({tuple(p.flatten().tolist()) for p in x} for x in (world.task.x, world.held["dev"][0]))
    assert len(shots) == 40 and not shots & dev
    larger = target.few(9, 1, 6, 32, "fp32")
    assert shots <= {tuple(p.flatten().tolist()) for p in larger.task.x}
    assert torch.bincount(larger.held["dev"][1]).tolist() == [1] * 10
    assert not torch.equal(target.few(4, 2, 6, 32, "fp32").task.x, world.task.x)
    assert target.few(1, 1, 6, 32, "fp32").batch == 10


def test_letters_are_learnt_from_other_drawers_than_they_are_tested_on(vision: Any) -> None:
    y, drawer = np.repeat(np.arange(30), 20), np.tile(np.arange(1, 21), 30)
    x = np.zeros((600, 28, 28), np.uint8)
    x[:, 0, 0], x[:, 0, 1] = y, drawer
    file = {"X": x, "y": y, "drawer": drawer, "characters": np.array([f"Greek/character{i:02d}" for i in range(30)])}
    (early, classes), (late, tested), names = vision.letters(file, 20)
    assert early.shape == (200, 28, 28) and early[:, 0, 1].max() == 10 and late[:, 0, 1].min() == 11
    assert torch.bincount(classes).tolist() == [10] * 20 == torch.bincount(tested).tolist()
    for pictures, labels in ((early, classes), (late, tested)):
        assert all(names[int(k)] == f"Greek character{int(p[0, 0]):02d}" for p, k in zip(pictures, labels, strict=True))


def test_grey_pictures_are_the_middle_in_luma(vision: Any) -> None:
    x = np.zeros((1, 32, 32, 3), np.uint8)
    x[0, 2, 2], x[0, 29, 29], x[0, 0, 0] = (255, 0, 0), (0, 255, 0), (255, 255, 255)
    found = vision.grey(x)
    assert found.shape == (1, 28, 28) and found[0, 0, 0] == 76 and found[0, 27, 27] == 150 and found.sum() == 226


def test_logits_are_scaled_cosines_with_the_names(vision: Any, digits: Any) -> None:
    x = digits.task.x[:3]
    v = digits.base.model.vit((x - 0.5) / 0.25)
    want = 20 * torch.nn.functional.cosine_similarity(v[:, None], digits.base.model.names[None], dim=-1)
    torch.testing.assert_close(digits.base.model(x), want)


def test_arms_have_the_scale_and_the_numbers_they_should(module: Any, study: Any, digits: Any) -> None:
    d, layers = 16, 2 * 3
    counts = {
        "lora 8": 8 * 2, "lora 5": 5 * 2, "lora 4": 4 * 2, "lora 2": 2 * 2, "lora 1": 2, "lora 2 x4": 2 * 2,
        "block 2": 4 + 8, "block 4": 2 + 8, "block 8": 1 + 8,
    }  # fmt: skip
    assert set(counts) == set(study.arms)
    for arm, per_width in counts.items():
        delta = Delta.create(digits.base, *module.methods(arm, "digits"))
        part = delta.parts[0]
        assert len(part.kind_of) == layers and delta.trainable_parameters == layers * d * per_width, arm
        path = "vit.blocks.0.attention.q"
        update = part.method.update(digits.base.sites[path], part.tensors(path))
        assert update.scale == pytest.approx(8**-0.5)
        assert module.multiply_adds(arm, d, d) == update.rank * 2 * d
    assert counts["lora 5"] == counts["block 4"], "the arm with as many trained numbers"


def test_the_collapsed_form_has_the_same_weights_and_a_plain_one_has_not(
    module: Any, digits: Any, tmp_path: Path
) -> None:
    found = module.gap(digits, "digits", 4, 8)
    assert max(found["A"], found["B"]) < 1e-5 and found["moved"] > 1e-3
    block, plain = (
        module.trained(digits, arm, "digits", 1e-3, 8, 0, precision="fp32").delta.parts[0]
        for arm in ("block 4", "lora 2")
    )
    path = "vit.blocks.0.attention.q"
    assert float((block.tensors(path)["B"].sum(0) - plain.tensors(path)["B"]).detach().abs().max()) > 1e-3
    context = Context(True, [0], tmp_path, Cells(tmp_path / "cells.jsonl", {"test": 40}))
    words = module.gap(few_shot(context, "banking77", 2, 0), "words", 2, 4)
    assert max(words["A"], words["B"]) < 1e-5 and words["moved"] > 1e-4


def _raw(block: float = 70.0, seconds: float = 0.9, wobble: float = 0.1, apart: float = 1e-6) -> dict[str, Any]:
    arms = ["lora 8", "block 2", "block 4", "block 8", "lora 4", "lora 2", "lora 1", "lora 2 x4", "lora 5"]
    rows = {
        arm: [
            {"seed": s, "metric": block + wobble * (s - 2) if arm == "block 4" else 70.0, "by": {"digits 1": 70.0}}
            for s in range(5)
        ]
        for arm in arms
    }
    cost = {arm: {"trainable": 16, "multiply_adds": 16, "seconds": 1.0} for arm in arms}
    cost["block 4"] = {"trainable": 10, "multiply_adds": 4, "seconds": seconds}
    return {"arms": rows, "cost": cost, "mechanism": [{"A": apart, "B": 0.0, "moved": 0.1}]}


@pytest.mark.parametrize(
    ("raw", "label", "claims", "mechanism"),
    [
        (_raw(), "reproduced", ["holds", "holds"], "holds"),
        (_raw(apart=1e-3), "reproduced", ["holds", "holds"], "does not hold"),
        (_raw(block=69.4), "inconclusive", ["open", "holds"], "holds"),
        (_raw(wobble=3.0), "inconclusive", ["open", "holds"], "holds"),
        (_raw(block=68.0), "not reproduced", ["reversed", "holds"], "holds"),
        (_raw(seconds=1.1), "not reproduced", ["holds", "reversed"], "holds"),
    ],
)
def test_the_verdict_follows_the_rule(
    study: Any, raw: dict[str, Any], label: str, claims: list[str], mechanism: str
) -> None:
    found = study.verdict(raw)
    assert found.label == label and found.statistics["claims: competitive, less compute"] == claims
    assert found.statistics["mechanism"] == mechanism
