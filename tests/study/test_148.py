# SPDX-License-Identifier: Apache-2.0
"""Study 148 at toy size: the starts of its arms, that they differ in nothing else, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.core.delta import Delta
from tunesmith.core.sample import inputs
from tunesmith.study import load_study, run_study
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context
from tunesmith.study.worlds.language import gsm8k_top
from tunesmith.train.config import TrainConfig
from tunesmith.train.sample import sample_of, started

FOLDER = Path(__file__).parents[2] / "studies" / "148-eva"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def starts(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".starts")


@pytest.fixture
def world(tmp_path: Path) -> Any:
    return gsm8k_top(Context(True, [0], tmp_path, Cells(tmp_path / "cells.jsonl", {"test": 148})), blocks=2)


def test_a_smoke_run_gives_every_arm_and_seed_in_both_domains(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for rows in (raw["arms"], raw["language"]):
        assert {arm: [row["seed"] for row in found] for arm, found in rows.items()} == {
            arm: [0, 1] for arm in study.arms
        }
    for arm, rows in raw["language"].items():
        assert all(list(row["curve"]) == ["25%", "50%", "80%", "100%"] for row in rows)
        assert all(sum(row["ranks"]) == 2 * 14 for row in rows), f"{arm} has the same total rank"
    assert len({len(choice["trials"]) for domain in raw["tuning"].values() for choice in domain.values()}) == 1


def start(world: Any, method: Any) -> Delta:
    return started(world.base, [method], world.task, TrainConfig(batch_size=4, steps=4), "d", "both")


def test_all_arms_start_at_the_base_with_the_same_scale(study: Any, starts: Any, world: Any) -> None:
    plain = world.base.probe_outputs()
    for arm in study.arms:
        (method,) = starts.methods(arm, 2, 4)
        delta = start(world, method)
        with world.base.using(delta):
            torch.testing.assert_close(world.base.probe_outputs(), plain, atol=1e-6, rtol=0)
        part = delta.parts[0]
        assert all(method.update(world.base.sites[p], part.tensors(p)).scale == 1.0 for p in part.kind_of), arm


def factors(delta: Delta, path: str) -> Tensor:
    return delta.parts[0].tensors(path)["A"].detach()


def test_the_controls_have_orthonormal_rows_and_the_least_variance(starts: Any, world: Any) -> None:
    path = "layers.0.self_attn.q_proj"
    made = {arm: start(world, starts.methods(arm, 2, 4)[0]) for arm in ("orthogonal", "least variance", "eva rho 1")}
    sample = sample_of(world.task, TrainConfig(batch_size=4, steps=4))
    X = torch.cat([found[path] for found in inputs(world.base, [world.base.sites[path]], sample, supervised=True)])
    spread = {arm: float((X @ factors(delta, path).T).square().sum()) for arm, delta in made.items()}
    for arm, delta in made.items():
        torch.testing.assert_close(
            factors(delta, path) @ factors(delta, path).T, torch.eye(2), atol=1e-5, rtol=0, msg=arm
        )
        assert not delta.parts[0].tensors(path)["B"].any()
    lowest = torch.linalg.eigvalsh(X.double().T @ X.double())[:2].sum()
    assert spread["least variance"] == pytest.approx(float(lowest), abs=1e-2)
    assert spread["least variance"] < spread["orthogonal"] < spread["eva rho 1"]
    other = Delta.create(world.base, starts.methods("orthogonal", 2, 4)[0], seed=1)
    assert not torch.allclose(factors(other, path), factors(made["orthogonal"], path))


def test_a_start_found_once_is_not_changed_by_a_run(study: Any, world: Any) -> None:
    module = import_module(study.run.__module__)
    kept: dict[Any, Any] = {}
    sizes = module.SMOKE
    first = module.language_run(world, "eva rho 2", 0, 4e-3, sizes, kept)
    digest = kept["eva rho 2", 0].digest
    again = module.language_run(world, "eva rho 2", 0, 4e-3, sizes, kept)
    assert first == again and kept["eva rho 2", 0].digest == digest and len(kept) == 1
    assert module.language_run(world, "eva rho 2", 0, 1e30, sizes, kept) is None, "a run that diverges is a lost trial"


def _raw(
    at: float = 1.1, end: float = 1.0, half: float = 1.15, pissa: float = 1.1, words: float = 80.0, wobble: float = 0.0
) -> dict[str, Any]:
    """EVA's loss at 80% and 100%, at 50%, and its accuracy; LoRA ends at 1.2 (1.3 half-way) and 75%, PiSSA at 76%."""
    final = {"kaiming": 1.2, "orthogonal": 1.2, "pissa": pissa, "eva rho 1": 1.1, "least variance": 1.4}
    language: dict[str, Any] = {}
    for arm, loss in {**final, "eva rho 2": end}.items():
        mine = arm == "eva rho 2"
        language[arm] = [
            {
                "seed": s,
                "trainable": 100,
                "curve": {
                    "25%": 1.4, "50%": half if mine else 1.3, "80%": at if mine else 1.25,
                    "100%": loss + (wobble * (s - 1) if mine else 0.001 * s),
                },
            }
            for s in range(3)
        ]  # fmt: skip
    means = {"kaiming": 75.0, "orthogonal": 75.0, "pissa": 76.0, "eva rho 1": 77.0, "least variance": 70.0}
    arms = {
        arm: [{"seed": s, "metric": m + 0.1 * s * (arm != "eva rho 2"), "trainable": 100} for s in range(5)]
        for arm, m in {**means, "eva rho 2": words}.items()
    }
    return {"arms": arms, "language": language}


@pytest.mark.parametrize(
    ("raw", "label", "claims"),
    [
        (_raw(), "reproduced", ["holds", "holds"]),
        (_raw(at=1.25, half=1.29), "inconclusive", ["open", "holds"]),
        (_raw(at=1.25, half=1.3), "not reproduced", ["reversed", "holds"]),
        (_raw(words=75.5), "not reproduced", ["holds", "reversed"]),
        (_raw(pissa=0.9), "not reproduced", ["holds", "reversed"]),
        (_raw(wobble=0.3), "inconclusive", ["holds", "open"]),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, raw: dict[str, Any], label: str, claims: list[str]) -> None:
    found = study.verdict(raw)
    assert found.label == label and found.statistics["claims: faster, best"] == claims
