# SPDX-License-Identifier: Apache-2.0
"""Study 055 at toy size: equal sizes, truncation errors against a dense oracle, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "055-flora-tucker"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def pictures(module: Any) -> Any:
    return import_module(module.__package__ + ".pictures")


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [r["seed"] for r in raw["omniglot"][arm]] == [0, 1]
        assert len(raw["tuning"][arm]) == 6
    assert len(raw["layers"]) == 2 * 5
    assert all(0 <= row[k] <= 1 + 1e-6 for row in raw["layers"] for k in ("tucker", "matrix"))


def test_arms_are_of_one_size_within_three_percent(module: Any, pictures: Any) -> None:
    torch.manual_seed(0)
    base = Base(pictures.Plain(15).eval(), example=(torch.randn(2, 1, 28, 28),))
    sizes = {a: pictures.numbers(Delta.create(base, pictures.method(a, 1.0, module.FULL.ranks))) for a in module.ARMS}
    assert sizes == {"flora": 18_090, "lora": 18_176, "loha": 18_176, "loha-tucker": 17_850}
    assert max(sizes.values()) / min(sizes.values()) < 1.03
    flora = sum(pictures.tucker_count(base.modules[p].weight.shape, 12) for p in pictures.LAYERS)
    assert flora == sizes["flora"]


def test_truncation_errors(pictures: Any) -> None:
    g = torch.Generator().manual_seed(0)
    core, out, into = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 2, 3, 3), (7, 2), (5, 2)))
    W = torch.einsum("abkl,oa,ib->oikl", core, out, into)
    assert pictures.tucker_error(W, 2) < 1e-12 < 0.01 < pictures.tucker_error(W, 1)
    assert pictures.svd_error(W, 2) < 1e-7  # rank 2 on the first axis is rank 2 of the matrix
    N = torch.randn(6, 5, 3, 3, generator=g, dtype=torch.float64)
    U, S, V = torch.linalg.svd(N.flatten(1), full_matrices=False)
    cut = (U[:, :3] * S[:3]) @ V[:3]
    assert pictures.svd_error(N, 3) == pytest.approx(float((N.flatten(1) - cut).norm() / N.norm()))
    assert pictures.tucker_error(N, 3) > pictures.svd_error(N, 3)  # it cuts a second axis too
    assert pictures.tucker_count((64, 64, 3, 3), 12) == 12 * 12 * 9 + 2 * 64 * 12 + 18


def made_up(gap: float, tucker: float, spread: float = 0.2) -> dict[str, Any]:
    def rows(mean: float) -> list[dict[str, Any]]:
        return [{"seed": s, "metric": mean + spread * (s - 2) * (mean == 60), "numbers": 1} for s in range(5)]

    arms = {"flora": rows(60), "lora": rows(60.0001 - gap), "loha": rows(50), "loha-tucker": rows(61)}
    layers = [{"tucker": tucker, "matrix": 0.5} for _ in range(25)]
    return {"arms": arms, "omniglot": arms, "layers": layers, "source accuracy": 0.9}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (made_up(2, 0.4), "reproduced"),
        (made_up(-2, 0.6), "not reproduced"),
        (made_up(2, 0.6), "inconclusive"),
        (made_up(-2, 0.4), "inconclusive"),
        (made_up(2, 0.4, spread=4), "inconclusive"),
    ],
)
def test_verdict(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label
