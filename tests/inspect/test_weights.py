# SPDX-License-Identifier: Apache-2.0
"""Probes that read parameters: norms, spectra, localisation, drift."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import PROBES
from tunesmith.core.toys import toys
from tunesmith.inspect import Drift, Localisation, Norms, Spectra, module_drift, sensitivity, steps
from tunesmith.inspect.localisation import Histogram

READ = ("norms", "spectra", "intruders", "drift", "localisation")


def flat(value: Any, path: str = "") -> dict[str, float]:
    """Every number in a finding by where it is."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{path}/{i}").items()}
    return {path: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}


@pytest.mark.parametrize("name", READ)
def test_low_rank_and_dense_give_the_same(
    name: str, lm: Base, noisy: Callable[..., Delta], planted: Callable[..., Delta]
) -> None:
    low = noisy(lm, targets="up,down")
    merged = dict(lm.merged(low).model.named_parameters())
    change = {p.replace(".", "__"): merged[f"{p}.weight"] - lm.modules[p].weight for p in low.parts[0].kind_of}
    dense = planted(lm, **change)
    a, b = (PROBES.get(name).cls().measure(lm, d) for d in (low, dense))
    for found in (a, b):
        for r in found.rows:
            r.pop("nonzero", None)
            if "change" in r:
                r["change"] = r["change"][:2]
    x, y = flat(a.rows), flat(b.rows)
    assert x.keys() == y.keys() and len(x) > 8
    for key, value in x.items():
        assert value == pytest.approx(y[key], rel=2e-3, abs=2e-4), key


@pytest.mark.parametrize("name", READ)
def test_base_and_delta_stay_as_they_were_on_every_toy(name: str) -> None:
    for base in toys():
        delta = Delta.create(base, ts.Full())
        g = torch.Generator().manual_seed(0)
        for _, t in delta.items():
            t.data += 0.1 * torch.randn(t.shape, generator=g)
        before = base.digest(), delta.digest, base.model.training, base.probe_outputs()
        found = PROBES.get(name).cls().measure(base, delta)
        assert found.rows and found.summary and found.probe == name
        assert (base.digest(), delta.digest, base.model.training) == before[:3]
        assert torch.equal(base.probe_outputs(), before[3])


@pytest.mark.parametrize("name", READ)
def test_a_delta_without_parameters_is_refused(name: str, lm: Base) -> None:
    with pytest.raises(UsageError, match="changes no tensor"):
        PROBES.get(name).cls().measure(lm, Delta.create(lm, ts.PrefixTuning(tokens=2)))


def test_parts_that_a_probe_cannot_see_are_named(lm: Base) -> None:
    delta = Delta.create(lm, ts.LoRA(targets="q"), ts.PrefixTuning(tokens=2))
    assert "prefix-tuning" in Norms().measure(lm, delta).facts["not_seen"]


def test_norms_are_closed_forms(plain: Base, planted: Callable[..., Delta]) -> None:
    D = torch.zeros(24, 24)
    D[0, 0], D[1, 1] = 3.0, 4.0
    found = Norms().measure(plain, planted(plain, first=D))
    (row,) = found.rows
    size = float(plain.modules["first"].weight.detach().norm())
    assert row["norm"] == pytest.approx(5) and row["relative"] == pytest.approx(5 / size)
    assert row["stable_rank"] == pytest.approx(25 / 16) and row["share_of_top"] == pytest.approx(0.8)
    p = (3 / 7, 4 / 7)
    assert row["effective_rank"] == pytest.approx(math.exp(-sum(v * math.log(v) for v in p)))
    assert found.values["norm"] == pytest.approx(5) and found.facts["by_depth"][0]["norm"] == pytest.approx(5)
    half = Norms().measure(plain, planted(plain, first=D).at(0.5))
    assert half.values["norm"] == pytest.approx(2.5)


def test_norms_add_up_by_depth_and_role(lm: Base, noisy: Callable[..., Delta]) -> None:
    found = Norms().measure(lm, noisy(lm))
    for key in ("by_depth", "by_role"):
        assert math.sqrt(sum(r["norm"] ** 2 for r in found.facts[key])) == pytest.approx(found.values["norm"])
    assert [r["depth"] for r in found.facts["by_depth"]] == [0, 1]
    only = Norms(targets="up", every=2).measure(lm, noisy(lm))
    assert [r["path"] for r in only.rows] == ["layers.0.up"]
    with pytest.raises(UsageError, match="matches no"):
        Norms(targets="upp").measure(lm, noisy(lm))


def test_spectra_of_a_scaled_and_of_a_turned_weight(plain: Base, planted: Callable[..., Delta]) -> None:
    W = plain.modules["first"].weight.detach()
    U, S, Vh = torch.linalg.svd(W)
    (scaled,) = Spectra(k=4).measure(plain, planted(plain, first=0.5 * W)).rows
    assert scaled["overlap"] == pytest.approx(1, abs=1e-4) and scaled["moved"] == pytest.approx(0.5, abs=1e-4)
    assert scaled["after"] == pytest.approx([1.5 * s for s in S.tolist()], rel=1e-3)
    assert scaled["inside"] == pytest.approx(float(S[:4].square().sum() / S.square().sum()), abs=1e-4)
    swapped = U.clone()
    swapped[:, [0, 20]] = U[:, [20, 0]]
    (turned,) = Spectra(k=4).measure(plain, planted(plain, first=swapped @ torch.diag(S) @ Vh - W)).rows
    assert turned["overlap"] == pytest.approx(3 / 4, abs=1e-3) and turned["moved"] == pytest.approx(0, abs=1e-4)


def test_a_planted_sparse_skill_is_localised(lm: Base, planted: Callable[..., Delta]) -> None:
    g = torch.Generator().manual_seed(0)
    up, down = (1e-3 * torch.randn(lm.modules[f"layers.1.{n}"].weight.shape, generator=g) for n in ("up", "down"))
    up[3, 5], up[7, 1], down[2, 2] = 4.0, -3.0, 2.0
    found = Localisation(share=3 / (up.numel() + down.numel())).measure(
        lm, planted(lm, layers__1__up=up, layers__1__down=down)
    )
    assert found.values["carried"] > 0.999 and found.values["needed_99"] == pytest.approx(3 / found.values["entries"])
    assert found.values["participation"] == pytest.approx(
        (16 + 9 + 4) ** 2 / (256 + 81 + 16) / found.values["entries"], rel=0.01
    )
    first = max(found.rows, key=lambda r: r["share_of_norm"])
    assert first["tensor"] == "layers.1.up.weight" and first["share_of_norm"] == pytest.approx(25 / 29, abs=1e-3)
    assert found.values["tensors_for_90"] == 2
    alone = Localisation().measure(lm, planted(lm, layers__1__up=up))
    assert alone.values["carried"] == pytest.approx(16 / 25, abs=0.01)  # 0.01 % of 512 entries is at least one


def test_shares_equal_an_exact_sort() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).pow(3)
    h = Histogram()
    h.add(x[:2000])
    other = Histogram()
    other.add(x[2000:])
    h.merge(other)
    sq = x.double().square().sort(descending=True).values.cumsum(0) / x.double().square().sum()
    for share in (0.001, 0.01, 0.1, 0.5):
        assert h.carried(share) == pytest.approx(float(sq[round(5000 * share) - 1]), abs=2e-3)
    for part in (0.5, 0.9, 0.99):
        assert h.needed(part) == pytest.approx(int((sq < part).sum() + 1) / 5000, abs=2e-3)
    alike = Histogram()
    alike.add(torch.full((50,), 2.0))
    assert (
        alike.participation() == pytest.approx(1)
        and alike.needed(0.5) == 0.5
        and alike.carried(0.2) == pytest.approx(0.2)
    )
    assert Histogram().carried(0.5) is None and Histogram().needed(0.5) is None


def test_embeddings_and_head_are_left_out_and_named(lm: Base) -> None:
    delta = Delta.create(lm, ts.Full())
    found = Localisation().measure(lm, delta)
    assert set(found.facts["left_out"]) == {"embed.weight", "head.weight"}
    assert found.values["carried"] is None  # nothing has moved yet
    assert not Localisation(embeddings=True).measure(lm, delta).facts["left_out"]
    with pytest.raises(UsageError, match="only embeddings"):
        Localisation(targets="embed").measure(lm, delta)


def test_drift_is_the_mean_absolute_change_of_a_module(plain: Base, planted: Callable[..., Delta]) -> None:
    D = torch.zeros(24, 24)
    D[0, :6] = -2.0
    (row,) = Drift().measure(plain, planted(plain, first=D)).rows
    assert row["module"] == "first" and row["entries"] == 24 * 24 + 24
    assert row["drift"] == pytest.approx(12 / (24 * 24 + 24))


def state(base: Base, delta: Any = None) -> dict[str, Tensor]:
    return (base if delta is None else base.merged(delta)).model.state_dict()


def test_drift_between_checkpoints_counts_buffers_and_rates() -> None:
    vision = toys()[2]
    a = {k: v.clone() for k, v in state(vision).items()}
    b = {k: v.clone() for k, v in a.items()}
    b["bn1.running_mean"] += 0.5  # 8 of the module's 32 floating entries
    b["bn1.num_batches_tracked"] += 7
    found = module_drift([a, b, b], rates=[0.1, 1.0])
    assert found["bn1"] == pytest.approx([0.5 * 8 / 32 / 0.1, 0.0]) and found["fc"] == [0.0, 0.0]
    for bad, match in (([a], "two checkpoints"), ([a, {}], "same tensors")):
        with pytest.raises(UsageError, match=match):
            module_drift(bad)
    with pytest.raises(UsageError, match="1 rates"):
        module_drift([a, b], rates=[0.1, 0.1])


def test_drift_between_deltas_is_that_of_the_merged_models(lm: Base, noisy: Callable[..., Delta]) -> None:
    one, two = noisy(lm, targets="up,q", seed=1), noisy(lm, targets="up,q", seed=2)
    found = steps(lm, [None, one, two.at(0.5)])
    wanted = module_drift([state(lm), state(lm, one), state(lm, two.at(0.5))])
    assert set(found) == {"layers.0.up", "layers.1.up", "layers.0.attention.q", "layers.1.attention.q"}
    for path, values in found.items():
        assert values == pytest.approx(wanted[path], rel=1e-4)
    with pytest.raises(UsageError, match="two checkpoints"):
        steps(lm, [one])


def test_sensitivity_is_the_change_at_the_switch_over_the_last() -> None:
    found = sensitivity(
        {"calm": [[1.0, 1.0], [1.0, 1.0]], "norm": [[6.0, 2.0, 1.0], [4.0, 1.0]], "still": [[1.0, 0.0]]}
    )
    assert list(found) == ["norm", "calm", "still"]
    assert found == {"norm": 5.0, "calm": 1.0, "still": None}
    with pytest.raises(UsageError, match="at least one epoch"):
        sensitivity({"a": [[]]})


@pytest.mark.real
def test_on_a_real_encoder() -> None:
    base = ts.load("minilm-l6")
    delta = Delta.create(base, ts.LoRA(rank=1, targets="q,up"))
    g = torch.Generator().manual_seed(0)
    for _, t in delta.items():
        t.data += torch.randn(t.shape, generator=g)
    digest = base.digest()
    for text in ("norms", "spectra:every=3", "intruders:every=3", "localisation", "drift"):
        found = PROBES.parse(text).measure(base, delta)
        assert found.rows, text
    intruders = PROBES.parse("intruders:every=3").measure(base, delta)
    assert intruders.values["intruders"] == intruders.values["matrices_with"] == 4  # one large random direction each
    assert Norms().measure(base, delta).rows[0]["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert base.digest() == digest
