# SPDX-License-Identifier: Apache-2.0
"""Study 061 at toy size: masks through retraining, what is measured on a pair, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "061-three-regime-pruning"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def pruning(study: Any) -> Any:
    return import_module(import_module(study.run.__module__).__package__ + ".pruning")


def test_a_smoke_run_gives_every_cell(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    assert len(raw["cells"]) == 2 * 3 * 5 and all(len(c["path"]) == 11 for c in raw["cells"])
    assert all([r["seed"] for r in raw["arms"][arm]] == [0, 1] for arm in study.arms)


def test_pruned_weights_stay_zero_and_a_model_is_connected_with_itself(pruning: Any) -> None:
    learn, held = pruning.toy(40, 40, 8)
    model = pruning.network((4, 6, 6), 0)
    (dense,) = pruning.train(model, learn, [1], 0.05, 0)
    pair = []
    for seed in (0, 1):
        masks = pruning.pruned(model, dense, 0.2)
        for m in masks.values():
            assert abs(float(m.mean()) - 0.2) <= 1 / m.numel()
        pair += pruning.train(model, learn, [2], 0.05, seed, masks)
    for state in pair:
        assert all(not state[k][m == 0].any() and state[k][m == 1].any() for k, m in masks.items())
    assert any(not torch.equal(pair[0][k], pair[1][k]) for k in masks)
    same = pruning.measured(model, pair[0], pair[0], learn, held)
    assert same["lmc"] == 0 and same["cka"] == pytest.approx(1)
    there, back = (pruning.measured(model, *ab, learn, held) for ab in (pair, pair[::-1]))
    assert there["path"] == pytest.approx(back["path"][::-1], abs=2.6) and there["cka"] == pytest.approx(back["cka"])


def made_up(follow: bool, barrier: bool = True, shift: bool = True) -> dict[str, Any]:
    """Errors that fall towards fewer epochs at low densities and towards more at high ones, or the other way round."""
    cells = []
    for seed in (0, 1):
        for i, density in enumerate((0.02, 0.05, 0.1, 0.2, 0.5)):
            low = i < 2
            for j, epochs in enumerate((2, 5, 10, 20)):
                slope = (1 if low else -1) * (1 if follow else -1)
                if not shift and i == 0:
                    slope = -slope
                cka = 0.5 + 0.01 * j + 0.1 * (i == 4)
                cells.append({"seed": seed, "epochs": epochs, "density": density, "lmc": -10.0 if low and barrier else 0.0,
                              "cka": cka - (0.2 if i in (2, 3) else 0), "error": 50.0 + slope * j})  # fmt: skip
    return {"cells": cells, "arms": {}}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (made_up(True), "reproduced"),
        (made_up(False), "not reproduced"),
        (made_up(True, shift=False), "inconclusive"),
        (made_up(True, barrier=False), "inconclusive"),
    ],
)
def test_verdict(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label
