# SPDX-License-Identifier: Apache-2.0
"""Study 104 at toy size: generators, the network, pre-training, scores without labels, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "104-w2pgnn"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def graphs(module: Any) -> Any:
    return import_module(module.__name__.rpartition(".")[0] + ".graphs")


def test_a_smoke_run_gives_every_pair_and_seed(study: Any, module: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    assert {(p["mix"], p["target"]) for p in raw["pairs"]} == {(m, t) for m in ("er", "pa+ws") for t in ("er", "ws")}
    assert all(len(p["gains"]) == 2 and p[module.W2PGNN] <= 0 and p[module.DEGREE] <= 0 for p in raw["pairs"])
    assert all(p[module.W2PGNN] >= p[module.MEAN] - 1e-9 for p in raw["pairs"])  # the optimum is at least the mean
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [0, 1] and all(-1 <= r["metric"] <= 1 for r in raw["arms"][arm])
    assert len(raw["pretext"]) == 4 and len(module.FULL.mixes) == 12 and len(module.FULL.targets) == 6


def test_graphs_are_what_their_generators_say(graphs: Any) -> None:
    for name, how in graphs.GENERATORS.items():
        for A in graphs.source(name, 4):
            assert (A == A.T).all() and not A.diagonal().any() and np.isin(A, (0, 1)).all() and 30 <= len(A) <= 60
        again = graphs.made(name, how.source, 4, 1)
        assert all((a == b).all() for a, b in zip(graphs.source(name, 4), again, strict=True))
        first, other = graphs.target(name, 4, 1)[0], graphs.target(name, 4, 2)[0]
        assert any(a.shape != b.shape or (a != b).any() for a, b in zip(first, other, strict=True))
    rng = np.random.default_rng(0)
    assert graphs.attachment(40, rng, 2, 1.0).sum() / 2 == 3 + 37 * 2
    assert graphs.small_world(40, rng, 2, 0.0).sum(1).tolist() == [4.0] * 40
    assert graphs.small_world(40, rng, 2, 0.3).sum() / 2 == 80
    A = graphs.blocks(60, rng, 2, 1.0, 0.0)
    assert A.sum(1).tolist() == [29.0] * 60


@pytest.mark.parametrize("name", ["sbm2", "sbm4", "ws"])
def test_two_settings_differ_in_structure_and_not_in_density(graphs: Any, name: str) -> None:
    some, y = graphs.target(name, 400, 3)
    degree = np.array([A.sum(1).mean() for A in some])
    one, two = degree[y.numpy() == 0], degree[y.numpy() == 1]
    assert abs(one.mean() - two.mean()) < 4 * np.sqrt(one.var() / 200 + two.var() / 200) + 0.5


def test_the_network_ignores_padding_and_the_order_of_nodes(graphs: Any) -> None:
    torch.manual_seed(0)
    model = graphs.Classifier(graphs.GIN(8), 8)
    small, large = graphs.made("sbm2", graphs.GENERATORS["sbm2"].source, 2, 4)
    alone, both = model(*graphs.batched([small])), model(*graphs.batched([small, large]))[:1]
    torch.testing.assert_close(alone, both)
    order = np.random.default_rng(1).permutation(len(small))
    torch.testing.assert_close(model(*graphs.batched([small[np.ix_(order, order)]])), alone, atol=1e-5, rtol=1e-5)
    walk = graphs.features(torch.tensor([[[0.0, 1, 1], [1, 0, 1], [1, 1, 0]]]))[0, 0]
    torch.testing.assert_close(walk, torch.tensor([1.0, float(np.log(3.0)), 2.0, 1.0, 1.5]))  # 4 times 1/2, 1/4 and 3/8


def test_pre_training_learns_what_can_be_told(graphs: Any) -> None:
    body, right = graphs.pretrained(graphs.source("geometric", 40), 16, 120, 16, 0)
    assert right["edges"] > 0.65 and right["context"] > 0.5
    again, same = graphs.pretrained(graphs.source("geometric", 40), 16, 120, 16, 0)
    assert same == right and all(torch.equal(a, b) for a, b in zip(body.parameters(), again.parameters(), strict=True))


def _raw(module: Any, ours: float, degree: float, seeds: int = 3) -> dict[str, Any]:
    """Scores that are the gain with so much noise."""
    rng = np.random.default_rng(1)
    gain = rng.normal(size=72)
    pairs = []
    for i, g in enumerate(gain):
        noise = rng.normal(size=3)
        pairs.append({"mix": str(i // 6), "target": str(i % 6), "gains": [float(g)] * seeds, module.RANDOM: float(noise[2]),
                      module.W2PGNN: float(ours * g + noise[0]), module.MEAN: float(ours * g + noise[0]),
                      module.DEGREE: float(degree * g + noise[1])})  # fmt: skip
    return {"pairs": pairs}


@pytest.mark.parametrize(
    ("ours", "degree", "label"),
    [(2.0, 0.0, "reproduced"), (1.0, 1.0, "inconclusive"), (0.0, 0.0, "not reproduced"), (-1.0, 0.0, "not reproduced")],
)
def test_the_verdict_follows_the_rule(study: Any, module: Any, ours: float, degree: float, label: str) -> None:
    found = study.verdict(_raw(module, ours, degree))
    assert found.label == label, found.reasons
    assert found.statistics[f"rho, {module.W2PGNN} - {module.MEAN}"]["mean"] == 0
