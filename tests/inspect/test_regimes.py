# SPDX-License-Identifier: Apache-2.0
"""Paths between models, similarity of outputs, masks, and the rule of three regimes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tunesmith as ts
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys
from tunesmith.inspect.regimes import (
    between,
    cka,
    connectivity,
    deltas_between,
    jensen_shannon,
    magnitude_masks,
    recalibrated,
    regime,
    regimes,
)


def state(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(5, 4, generator=g), "b": torch.randn(3, 5, generator=g)}


def loss_on(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> object:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(9))
    y = torch.arange(40) % 3

    def at(t: float) -> float:
        w = between(a, b, t)
        return float(F.cross_entropy(torch.tanh(x @ w["a"].T) @ w["b"].T, y))

    return at


def test_a_model_is_connected_with_itself_and_the_path_has_no_direction() -> None:
    one, two = state(0), state(1)
    path = connectivity(loss_on(one, one))
    assert path.lmc == 0 and len(set(path.losses)) == 1 and len(path.points) == 11
    there, back = connectivity(loss_on(one, two)), connectivity(loss_on(two, one))
    assert there.lmc == pytest.approx(back.lmc, rel=1e-6) and there.lmc != 0
    assert there.losses == pytest.approx(back.losses[::-1], rel=1e-6)


def test_a_barrier_is_negative_and_a_valley_positive() -> None:
    assert connectivity(lambda t: 1 + t * (1 - t)).lmc == pytest.approx(-0.25)
    assert connectivity(lambda t: 1 - t * (1 - t)).lmc == pytest.approx(0.25)
    assert abs(connectivity(lambda t: t).lmc) == pytest.approx(0.4)  # t = 0.1 is as far from the mean as t = 0.9
    with pytest.raises(UsageError):
        connectivity(lambda t: t, 2)


def test_masked_zeros_stay_zero_on_the_path_where_masks_agree() -> None:
    one, two = state(0), state(1)
    mask = magnitude_masks(one, 0.3)
    one, two = ({k: v * mask[k] for k, v in s.items()} for s in (one, two))
    for t in (0.0, 0.1, 0.37, 0.9, 1.0):
        assert all(not v[~mask[k]].any() for k, v in between(one, two, t).items())
    other = magnitude_masks(state(1), 0.3)
    dense = between({k: v * mask[k] for k, v in state(0).items()}, {k: v * other[k] for k, v in state(1).items()}, 0.5)
    assert sum(int((v != 0).sum()) for v in dense.values()) > sum(int(m.sum()) for m in mask.values())
    with pytest.raises(UsageError, match="different tensors"):
        between(one, {"a": one["a"]}, 0.5)


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
def test_density_is_met_in_every_layer(density: float) -> None:
    found = magnitude_masks(state(0), density)
    for k, m in found.items():
        assert abs(float(m.float().mean()) - density) <= 0.5 / m.numel() + 1e-6
        kept, gone = state(0)[k][m].abs(), state(0)[k][~m].abs()
        assert not len(kept) or not len(gone) or kept.min() >= gone.max()
    whole = magnitude_masks(state(0), density, "global")
    assert sum(int(m.sum()) for m in whole.values()) == round(density * 35)
    with pytest.raises(UsageError):
        magnitude_masks(state(0), density, "rows")


def test_cka() -> None:
    g = torch.Generator().manual_seed(0)
    X, Y = torch.randn(50, 6, generator=g), torch.randn(50, 4, generator=g)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=g)).Q
    assert cka(X, X) == pytest.approx(1)
    assert cka(X @ Q, X) == pytest.approx(1, abs=1e-6) and cka(3.7 * X + 2, X) == pytest.approx(1, abs=1e-6)
    assert cka(X @ Q, Y) == pytest.approx(cka(X, Y), abs=1e-6) and 0 < cka(X, Y) < 0.5
    K, L = ((Z - Z.mean(0)).double() @ (Z - Z.mean(0)).double().T for Z in (X, Y))
    assert cka(X, Y) == pytest.approx(float((K * L).sum() / (K.norm() * L.norm())), rel=1e-5)  # by Gram matrices
    with pytest.raises(UsageError):
        cka(X, Y[:10])


def test_jensen_shannon() -> None:
    P, Q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert jensen_shannon(P, P) == 0
    assert jensen_shannon(P, Q) == pytest.approx(torch.tensor(2.0).log().item() / 2)


def test_batch_norms_are_measured_anew_and_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = torch.randn(4, 50, 3) * 2 + 1
    with recalibrated(model, lambda: [model(x) for x in batches]):
        h = torch.stack([model[0](x) for x in batches])
        torch.testing.assert_close(model[1].running_mean, h.mean((0, 1)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model[1].running_var, h.var(1).mean(0), atol=1e-4, rtol=1e-4)
        assert not any(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model] == [False, True, True] and model.training and model[1].momentum == 0.1


def test_deltas_have_paths_too() -> None:
    base = toys()[2]
    a, b = (Delta.create(base, ts.Full(targets="fc"), seed=s) for s in (0, 1))
    for i, d in enumerate((a, b)):
        for _, t in d.items():
            t.data.fill_(float(i + 1))
    middle = deltas_between(a, b, 0.25)
    assert all(float(t.detach().flatten()[0]) == 1.25 for _, t in middle.items())
    with base.using(deltas_between(a, b, 0.0)):
        at_zero = base.probe_outputs()
    with base.using(a):
        assert torch.equal(base.probe_outputs(), at_zero)


def test_the_rule() -> None:
    assert [regime(-0.5, 0.99), regime(0.0, 0.5), regime(0.1, 0.95)] == ["I", "II-A", "II-B"]
    assert regime(-0.05, 0.95, barrier=0.1) == "II-B" and regime(0, 0.95, similar=0.99) == "II-A"
    found = regimes([{"lmc": -1, "cka": 0.5, "density": 0.05}, {"lmc": 0, "cka": 0.99, "density": 0.5}])
    assert [r["advice"] for r in found.rows] == ["train hotter", "stop"] and found.values["I"] == 1
    with pytest.raises(UsageError, match="lmc and cka"):
        regimes([{"lmc": 0.0}])
    with pytest.raises(UsageError, match="no cells"):
        regimes([])
