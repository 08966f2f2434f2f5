# SPDX-License-Identifier: Apache-2.0
"""Study 050 at toy size: the shared net against the ordinary one, masks of the right size, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tunesmith.deltas.weight.hashing import signs
from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "050-stable-rps"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def nets(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".nets")


@pytest.fixture(scope="module")
def shape(nets: Any) -> Any:
    return nets.Shape((4, 8, 8, 16))


@pytest.fixture
def data(nets: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 10
    x = torch.randn(10, 1, 28, 28, generator=g)[y] + 0.3 * torch.randn(60, 1, 28, 28, generator=g)
    return nets.Data(x, y)


def test_a_smoke_run_gives_every_arm_seed_and_budget(study: Any, tmp_path: Path) -> None:
    result = run_study(study, smoke=True, out=tmp_path)
    raw = result["raw"]
    assert {arm: len(rows) for arm, rows in raw["arms"].items()} == dict.fromkeys(study.arms, 2)
    assert all(set(table) == {"0.1", "0.03", "0.01", "0.003"} for table in raw["budgets"].values())
    assert {len(choice["trials"]) for choice in raw["tuning"].values()} == {2}


def test_the_net_has_the_size_that_is_written_down(nets: Any) -> None:
    assert nets.Shape().total == 98_192
    assert abs(nets.narrower(2945).total - 2945) < 0.02 * 2945


def test_at_full_budget_sgd_is_that_of_the_ordinary_net(nets: Any, shape: Any, data: Any) -> None:
    """Momentum SGD on the same first values; the rate is divided by 1.001 for the authors' count / (count + 1e-3)."""
    start = nets.first_values(shape, 0)
    plain = nets.Plain(start)
    a = nets.fit(plain, data, lr=0.01, epochs=4, batch=20, seed=0)
    for std in (0.04, 0.4):
        shared = nets.Shared(shape, shape.total, 0, std, start=start)
        for W, first in zip(shared.weights(), start, strict=True):
            torch.testing.assert_close(W, first, atol=1e-6, rtol=1e-5)
        rate = 0.01 / 1.001
        psi = [p for p in shared.parameters()]
        b = nets.fit(shared, data, lr=rate, epochs=4, batch=20, seed=0)
        assert psi[0] is shared.psi
        for W, want, first in zip(shared.weights(), plain.weights(), start, strict=True):
            torch.testing.assert_close(W, want, atol=1e-4, rtol=0)
            assert (want - first).abs().max() > 3e-3
        torch.testing.assert_close(b[-1], a[-1], atol=1e-3, rtol=0)


def test_with_scaling_the_first_spread_cancels_and_without_it_it_does_not(nets: Any, shape: Any, data: Any) -> None:
    ends: dict[bool, list[Any]] = {True: [], False: []}
    for fold, found in ends.items():
        for std in (0.04, 0.08):
            source = nets.Shared(shape, 200, 3, std, fold=fold, tile=4)
            nets.fit(source, data, lr=0.02, epochs=2, batch=20, seed=0)
            found.append(torch.cat([W.detach().flatten() for W in source.weights()]))
    torch.testing.assert_close(ends[True][0], ends[True][1], atol=1e-4, rtol=0)
    assert (ends[False][0] - ends[False][1]).abs().max() > 1e-3


def test_the_gradient_of_the_vector_is_the_scatter_add(nets: Any, shape: Any, data: Any) -> None:
    source = nets.Shared(shape, 150, 1)
    biases = [torch.zeros(W.shape[0]) for W in source.weights()]
    dense = [W.detach().clone().requires_grad_(True) for W in source.weights()]
    grads = torch.autograd.grad(F.cross_entropy(nets.forward(dense, biases, data.x), data.y), dense)
    F.cross_entropy(nets.forward(source.weights(), biases, data.x), data.y).backward()
    want, total = torch.zeros(150), torch.zeros(150)
    for i, (at, G) in enumerate(zip(source.cells(), grads, strict=True)):
        g = signs(source.offsets[i], G.numel(), source.numbers[3:]).float()
        want.scatter_add_(0, at, source.spreads[i] * g * G.flatten())
        total += torch.bincount(at, minlength=150) * source.spreads[i]
    torch.testing.assert_close(source.psi.grad, want, atol=1e-5, rtol=1e-4)
    before = source.psi.grad.clone()
    source.scale()
    count = source.map.load().float()
    torch.testing.assert_close(source.psi.grad, before / (1e-6 + total**2 / (count + 1e-3)))


def test_tiles_read_neighbours_from_hashed_starts(nets: Any, shape: Any) -> None:
    source = nets.Shared(shape, 150, 1, fold=False, tile=4)
    for at, s in zip(source.cells(), shape.weights, strict=True):
        assert at.min() >= 0 and at.max() < 150
        table = at.reshape(s[0], -1)
        inside = torch.arange(16).reshape(4, 4)[: table[:4].shape[0], : table[:, :4].shape[1]]
        assert torch.equal(table[:4, :4] - table[0, 0], inside)
    assert len({int(c[0]) for c in source.cells()}) > 1


@pytest.mark.parametrize("kind", ["random", "magnitude", "snip", "synflow"])
def test_masks_keep_exactly_the_budget(nets: Any, shape: Any, data: Any, kind: str) -> None:
    values, k = nets.first_values(shape, 0), 137
    none = [torch.zeros(v.shape[0]) for v in values]
    masks = {
        "random": lambda: nets.random_masks(shape, k, 0),
        "magnitude": lambda: nets.keep_largest([v.abs() for v in values], k),
        "snip": lambda: nets.snip(values, none, data.x, data.y, k),
        "synflow": lambda: nets.synflow(values, k),
    }[kind]()
    assert sum(int(m.sum()) for m in masks) == k and all(set(m.unique().tolist()) <= {0.0, 1.0} for m in masks)
    if kind == "synflow":
        assert all(m.sum() > 0 for m in masks), "iterated synaptic flow leaves no layer empty"
    source = nets.Plain(values, masks)
    nets.fit(source, data, lr=0.05, epochs=1, batch=20, seed=0)
    assert all(bool((W[m == 0] == 0).all()) for W, m in zip(source.weights(), masks, strict=True))


def test_an_accuracy_that_is_not_finite_is_wrong(nets: Any, shape: Any, data: Any) -> None:
    values = nets.first_values(shape, 0)
    values[-1].fill_(float("nan"))
    assert nets.accuracy(nets.Plain(values), [torch.zeros(v.shape[0]) for v in values], data) == 0.0


def rows(value: float, wobble: float = 0.1) -> list[dict[str, Any]]:
    return [{"seed": s, "metric": value + wobble * (s - 1)} for s in range(3)]


def made_up(
    rps: float = 90.0, best: float = 80.0, ltr: float = 70.0, span: float = 0.5, roast: float = 40.0, full: float = 98.0,
    wobble: float = 0.1,
) -> dict[str, Any]:  # fmt: skip
    budgets = {"0.1": 1.0, "0.03": 0.0, "0.01": 0.0, "0.003": 0.0}
    level = {"narrower net": 60.0, "random mask": 20.0, "magnitude": 50.0, "snip": 60.0, "synflow": best, "ltr": ltr,
             "roast": 70.0, "stable-rps": rps}  # fmt: skip
    table = {
        arm: {b: rows(v + extra, wobble if arm == "stable-rps" else 0.0) for b, extra in budgets.items()}
        for arm, v in level.items()
    }
    stds = ("0.001", "0.01", "0.1", "1.0")
    return {
        "budgets": table,
        "full": {"ordinary net": rows(98.0), "stable-rps": rows(full)},
        "stability": {
            "stable-rps": {s: rows(90 + span * (i == 0)) for i, s in enumerate(stds)},
            "roast": {s: rows(50 + roast * (i == 0)) for i, s in enumerate(stds)},
        },
        "deltas": {"64": {a: rows(50.0) for a in ("hashed delta", "lora", "random sparse delta")}},
    }


@pytest.mark.parametrize(
    ("raw", "label", "claims"),
    [
        (made_up(), "reproduced", "reproduced reproduced reproduced"),
        (made_up(best=95.0), "not reproduced", "reversed reproduced reproduced"),
        (made_up(ltr=95.0), "not reproduced", "reproduced reversed reproduced"),
        (made_up(full=96.5), "not reproduced", "reproduced reproduced reversed"),
        (made_up(span=41.0), "not reproduced", "reproduced reproduced reversed"),
        (made_up(span=3.0), "inconclusive", "reproduced reproduced open"),
        (made_up(roast=4.0), "inconclusive", "reproduced reproduced open"),
        (made_up(full=97.5), "inconclusive", "reproduced reproduced open"),
        (made_up(best=89.0, ltr=89.0, wobble=2.0), "inconclusive", "open open reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, raw: dict[str, Any], label: str, claims: str) -> None:
    found = study.verdict(raw)
    assert found.label == label
    assert " ".join(found.statistics["claims"][c] for c in "abc") == claims
