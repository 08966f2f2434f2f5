# SPDX-License-Identifier: Apache-2.0
"""Study 036 at toy size: the optimal estimators against brute force, the transform, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "036-conjugate-prompting"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def regression(study: Any) -> Any:
    return import_module(import_module(study.run.__module__).__package__ + ".regression")


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for rows in (raw["rows"], *raw["arms"].values()):
        assert [r["seed"] for r in rows] == [0, 1]
    assert all(len(c) == 4 for c in raw["rows"][0]["curves"].values()) and len(raw["rows"][0]["curves"]) == 5


def test_closed_forms_beat_every_other_estimator(regression: Any) -> None:
    """On their own distribution no estimator has a smaller error than the Bayes one, up to 3 standard errors."""
    world = regression.World(3, 8, 5, 16, 1, 8)
    for share, name in ((0.0, "ridge"), (1.0, "discrete"), (0.5, "mixture")):
        X, y = world.rows(4000, share, regression.seeded("x", share))
        said = {
            "ridge": regression.ridge(world, X, y), "discrete": regression.discrete(world, X, y),
            "mixture": regression.mixture(world, X, y, 0.5), "zero": torch.zeros_like(y).double(),
        }  # fmt: skip
        error = {k: (v - y).square().mean(1) for k, v in said.items()}
        for other in said.keys() - {name}:
            excess = error[other] - error[name]
            assert float(excess.mean()) >= -3 * float(excess.std()) / 4000**0.5, (name, other)
        assert float((error["zero"] - error[name]).mean()) > 0.5


def test_the_mixture_reduces_to_each(regression: Any) -> None:
    world = regression.World(2, 5, 4, 16, 1, 8)
    X, y = world.rows(50, 0.5, regression.seeded("m"))
    for share, other in ((1e-12, regression.ridge), (1 - 1e-12, regression.discrete)):
        torch.testing.assert_close(regression.mixture(world, X, y, share), other(world, X, y), atol=1e-6, rtol=0)
    # by hand, for one row and one example before: weights of both by their densities of y_1
    x, y1, tasks = X[0].double(), float(y[0, 0]), world.vectors().double()
    normal = torch.distributions.Normal
    fixed = normal(x[0] @ tasks.T, 1.0).log_prob(torch.tensor(y1).double()).exp() / 4
    free = normal(0.0, float((1 + x[0] @ x[0]).sqrt())).log_prob(torch.tensor(y1)).exp()
    w = float(fixed.sum() / (fixed.sum() + free))
    both = w * float((fixed / fixed.sum() * (x[1] @ tasks.T)).sum()) + (1 - w) * float(
        regression.ridge(world, X, y)[0, 1]
    )
    assert float(regression.mixture(world, X, y, 0.5)[0, 1]) == pytest.approx(both, abs=1e-5)


def test_tokens_and_the_transform(regression: Any) -> None:
    world = regression.World(2, 3, 4, 16, 1, 8)
    X, y = world.rows(2, 0.0, regression.seeded("t"))
    given = regression.tokens(X, y)
    assert torch.equal(given[:, ::2, :2], X) and torch.equal(given[:, 1::2, 2], y) and not given[:, ::2, 2].any()
    for g in (1.0, 1.5, 2.0, 3.0):
        t = regression.scaled(g)
        turned = t.encode(given[0])
        assert torch.equal(turned[1::2, 2], g * y[0]) and torch.equal(turned[::2], given[0, ::2])
        torch.testing.assert_close(t.decode(turned[1::2, 2]), y[0])
    assert torch.equal(regression.scaled(1.0).encode(given[0]), given[0])


def test_a_prediction_sees_only_the_pairs_before(regression: Any) -> None:
    world = regression.World(2, 4, 4, 16, 1, 8)
    base = regression.pretrained(world, 0, 1, 1e-3)
    X, y = world.rows(2, 0.0, regression.seeded("c"))
    later = y.clone()
    later[:, 2:] += 5
    one, two = (regression.predicted(base, regression.tokens(X, v)) for v in (y, later))
    assert torch.equal(one[:, :3], two[:, :3]) and not torch.equal(one[:, 3], two[:, 3])


def made_up(increase: float, share: float, spread: float = 0.0) -> dict[str, Any]:
    rows = []
    for s in range(5):
        d = increase + spread * (s - 2)
        rows.append({"seed": s, "base": 0.1, "delta": 0.1 + d, "turned": 0.1 + d * (1 - share), "blend": 0.1 + d / 2,
                     "gain_of_base": -0.01, "discrete_base": 0.3, "discrete_delta": 0.1})  # fmt: skip
    return {"rows": rows}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (made_up(0.5, 0.4), "reproduced"),
        (made_up(0.5, 0.02), "not reproduced"),
        (made_up(0.5, 0.15), "inconclusive"),
        (made_up(0.5, 0.4, spread=0.5), "inconclusive"),
        (made_up(-0.1, 0.4), "not reproduced"),
    ],
)
def test_verdict(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label
