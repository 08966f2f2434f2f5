# SPDX-License-Identifier: Apache-2.0
"""Study 064 at toy size: one encoder under many names, arms and splits, the turned pictures, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "064-r-amt"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def helper(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".world")


@pytest.fixture(scope="module")
def world(helper: Any) -> Any:
    torch.set_num_threads(1)
    return helper.build(None, None, helper.SMOKE, "fp32")


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    result = run_study(study, smoke=True, out=tmp_path)
    assert {arm: len(rows) for arm, rows in result["raw"]["arms"].items()} == dict.fromkeys(study.arms, 2)
    for table in result["raw"]["targets"].values():
        for arm, rows in table.items():
            if "tuning" in rows[0]:
                assert [len(r["tuning"]["trials"]) for r in rows] == [3, 1], arm
                assert rows[1]["tuning"]["lr"] == rows[0]["tuning"]["lr"]


def test_one_encoder_serves_every_list_of_names(helper: Any, world: Any) -> None:
    """The names are no part of the base, so one delta fits both; the encoder's numbers are the same objects."""
    digits = world.targets[0]
    assert digits.base.fingerprint.to_dict() == world.origin.base.fingerprint.to_dict()
    assert digits.base.model.vit is world.origin.base.model.vit
    x = digits.test[0][:4]
    with torch.no_grad():
        a, b = digits.base.model(x), world.origin.base.model(x)
    assert not torch.allclose(a, b)
    assert float(a.abs().max()) <= helper.SCALE + 1e-3
    roles = {s.role for s in world.origin.base.sites.select(helper.MASKED, ("linear", "conv2d"))}
    assert roles == {"q", "k", "v", "o", ""}


@pytest.mark.parametrize("arm", ["lora", "mask", "mask + gdr", "mask towards ones"])
def test_an_arm_trains_and_leaves_the_base(helper: Any, world: Any, arm: str) -> None:
    target = world.targets[1]
    before = target.base.digest()
    rows, held = helper.split(target, world.sizes, 0)
    assert not set(rows) & set(held) and torch.bincount(target.pool[1][rows]).tolist() == [2] * 10
    delta = helper.train(world, target, arm, rows, 3e-3, 0)
    assert target.base.digest() == before
    if arm != "lora":
        share = helper.masked_share(world, delta)
        part = delta.parts[0]
        R = torch.cat([part.tensors(p)["R"].flatten() for p in part.kind_of])
        assert share["of_maskable"] == pytest.approx(100 * float((R <= 5e-3).double().mean()))
        encoder = sum(p.numel() for p in world.origin.base.model.parameters())
        assert share["of_encoder"] == pytest.approx(100 * int((R <= 5e-3).sum()) / encoder)
        assert share["of_maskable"] > 0, "a rate of 3e-3 crosses the gap in two steps"


def test_features_are_what_the_last_layer_reads(helper: Any, world: Any) -> None:
    target = world.targets[0]
    x = target.test[0][:6]
    vit = target.base.model.vit
    with torch.no_grad():
        torch.testing.assert_close(vit.head(helper.features(world, target, x)), vit((x - 0.5) / 0.25))
    assert type(vit.head) is torch.nn.Linear


def test_turning_inverts_and_rotates(helper: Any) -> None:
    grey = np.full((1, 32, 32, 3), 55, np.uint8)
    out = helper.turned(grey)
    assert out[0, 16, 16].tolist() == [200] * 3 and out[0, 0, 0].tolist() == [0] * 3
    dot = np.full((1, 32, 32, 3), 255, np.uint8)
    dot[0, 16, 26:28] = 0  # ten to the right of the middle
    found = np.argwhere(helper.turned(dot)[0, :, :, 0] > 60).mean(0) - 15.5
    angle = np.rad2deg(np.arctan2(found[0], found[1]))
    assert abs(abs(angle) - 30) < 4 and abs(np.hypot(*found) - 11) < 1


def _raw(
    gain: float = 30.0, off: float = 5.0, target: float = 2.0, retained: float = 3.0, wobble: float = 0.2
) -> dict[str, Any]:
    arms = ("zero-shot", "linear probe", "lora", "mask", "mask + gdr", "mask towards ones")
    out: dict[str, Any] = {"arms": {a: [] for a in arms}, "targets": {}}
    for t in ("digits", "turned"):
        table: dict[str, list[dict[str, Any]]] = {a: [] for a in arms}
        for s in range(5):
            gdr = 20.0 + gain
            plain = {"target": gdr - target - wobble * (s - 2), "retained": 40.0 - retained}
            for a in arms:
                row = {"target": 20.0, "retained": 45.0} if a in ("zero-shot", "linear probe") else dict(plain)
                if a == "mask + gdr":
                    row = {"target": gdr, "retained": 40.0}
                if a.startswith("mask"):
                    row["masked"] = {"of_encoder": off, "of_maskable": 3 * off}
                table[a].append({"seed": s, **row})
        out["targets"][t] = table
    return out


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (_raw(), "reproduced"),
        (_raw(gain=9.0), "inconclusive"),
        (_raw(off=11.0), "inconclusive"),
        (_raw(target=-1.0, retained=3.0), "reproduced"),
        (_raw(target=-2.0, retained=1.0), "inconclusive"),
        (_raw(target=-1.0, retained=-1.0), "not reproduced"),
        (_raw(gain=-1.0), "not reproduced"),
        (_raw(target=0.1, retained=0.1, wobble=3.0), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label
