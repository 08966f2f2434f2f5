# SPDX-License-Identifier: Apache-2.0
"""PELA's factorised base and its repair: closed forms, counts, gradients, and deltas of factors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.errors import BaseMismatch, TrainingError, UsageError
from tunesmith.derive import FactoredLinear, Factorise, Schedule, dense_delta, factorise, repair, train_own
from tunesmith.derive.factorise import factored, rank_at
from tunesmith.derive.repair import feature_loss, perturbation, perturbed_pairs


@pytest.fixture
def mlp() -> Base:
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 40, bias=False), nn.Tanh(), nn.Linear(40, 3))
    return Base(model, example=(torch.randn(6, 24),), name="mlp")


def test_full_rank_is_the_original(mlp: Base) -> None:
    for path in ("0", "2"):
        site = mlp.sites[path]
        layer = factored(site, min(site.shape))
        x = torch.randn(5, site.shape[1])
        torch.testing.assert_close(layer(x), site.module(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.weight, site.module.weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 17])
def test_the_error_of_truncation_is_the_energy_of_the_tail(mlp: Base, rank: int) -> None:
    site = mlp.sites["2"]
    W = site.module.weight.detach()
    tail = torch.linalg.svdvals(W)[rank:].square().sum().sqrt()
    layer = factored(site, rank)
    torch.testing.assert_close((layer.weight - W).norm(), tail, atol=1e-5, rtol=1e-5)
    norms = layer.first.weight.norm(dim=1), layer.second.weight.norm(dim=0)
    torch.testing.assert_close(*norms, atol=1e-5, rtol=1e-5)  # singular values are split evenly
    quick = factored(site, rank, exact=False)
    assert float((quick.weight - W).norm()) <= 1.02 * float(tail)


@pytest.mark.parametrize("ratio", [1.2, 1.5, 2.0, 3.0, 7.3])
@pytest.mark.parametrize(("inside", "out"), [(24, 40), (40, 40), (192, 768), (10, 1000)])
def test_rank_and_count_follow_the_formula(ratio: float, inside: int, out: int) -> None:
    k = rank_at(inside, out, ratio)
    assert k == math.floor(inside * out / (ratio * (inside + out)))
    base = Base(nn.Sequential(nn.Linear(inside, out), nn.Tanh(), nn.Linear(out, 2)), example=(torch.randn(2, inside),))
    small = factorise(base, ratio, targets="0")
    layer = small.modules["0"]
    assert isinstance(layer, FactoredLinear) and layer.rank == k
    assert sum(p.numel() for p in layer.parameters()) == k * (inside + out) + out
    assert sum(p.numel() for p in layer.parameters()) - out <= inside * out / ratio


def test_what_would_not_shrink_is_left_alone_and_said(mlp: Base) -> None:
    small = factorise(mlp, 2.0, targets="everything")
    assert [p for p, m in small.modules.items() if isinstance(m, FactoredLinear)] == ["0", "2"]
    skipped = small.source["derived"][0]["facts"]["skipped"]
    assert skipped == {"4": "3 outputs, fewer than 10"}
    assert rank_at(40, 40, 0.1) == 40, "clamped to the smaller side"
    with pytest.raises(UsageError, match="shrink"):
        factorise(mlp, 0.9)
    with pytest.raises(UsageError, match="shrink"):
        factorise(mlp, 1000.0)
    square = factorise(mlp, 3.0, ratio_pattern={"2": 1.5})
    assert square.modules["2"].rank == rank_at(40, 40, 1.5) > square.modules["0"].rank * 0 + rank_at(40, 40, 3.0)
    with pytest.raises(UsageError, match="matches none"):
        Factorise(ratio_pattern={"nope": 2.0}).make(mlp, None)


def test_bias_and_dtype_stay_and_the_parent_is_untouched(mlp: Base) -> None:
    before = mlp.digest()
    small = factorise(mlp, 2.0)
    assert torch.equal(small.modules["0"].bias, mlp.modules["0"].bias) and small.modules["2"].bias is None
    assert small.modules["0"].bias is not mlp.modules["0"].bias and mlp.digest() == before
    half = Base(mlp.model.to(torch.bfloat16), example=(torch.randn(6, 24).bfloat16(),))
    again = factorise(half, 2.0)
    assert again.modules["0"].weight.dtype == torch.bfloat16 and again.probe_outputs().dtype == torch.bfloat16


def test_the_state_dict_goes_round(mlp: Base) -> None:
    layer = factorise(mlp, 2.0).modules["0"]
    again = FactoredLinear.blank(layer.describe())
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(again(x), layer(x)) and set(layer.state_dict()) == {"bias", "first.weight", "second.weight"}


def test_heads_and_small_layers_are_left_out_by_role_not_by_name(lm: Base) -> None:
    small = factorise(lm, 1.5)
    left = {s.path for s in small.sites.all() if s.kind == "linear" and not s.held and not s.inside}
    assert left == {"head", *(f"layers.{i}.attention.{n}" for i in (0, 1) for n in ("k", "v"))}  # 8 outputs
    assert {small.sites[f"layers.0.{n}"].role for n in ("gate", "up", "down")} == {"gate", "up", "down"}


def test_code_that_reads_the_weight_still_runs(lm: Base) -> None:
    small = factorise(lm, 1.5)
    m = small.modules["layers.0.gate"]
    torch.testing.assert_close(
        nn.functional.linear(torch.ones(1, 16), m.weight, m.bias), m(torch.ones(1, 16)), atol=1e-5, rtol=1e-5
    )


def test_a_delta_of_factors_goes_back_to_the_dense_base(lm: Base) -> None:
    """dW = R' L' - R L at every factored layer, as a LoRA of rank 2k."""
    small = factorise(lm, 1.5)
    delta = ts.Delta.create(small, ts.Full(targets="first,second"))
    with torch.no_grad():
        for _, t in delta.items():
            t.normal_(std=0.05)
    dense = dense_delta(delta, small, lm)
    moved, carried = small.merged(delta), lm.merged(dense)
    for path, m in small.modules.items():
        if isinstance(m, FactoredLinear):
            change = carried.modules[path].weight - lm.modules[path].weight
            assert isinstance(moved.modules[path], FactoredLinear)
            torch.testing.assert_close(change, moved.modules[path].weight - m.weight, atol=1e-5, rtol=1e-4)
            assert int(torch.linalg.matrix_rank(change, atol=1e-4)) <= 2 * m.rank
    with pytest.raises(UsageError, match="only a delta on the factors"):
        dense_delta(ts.Delta.create(small, ts.BitFit(targets="biases")), small, lm)
    with pytest.raises(BaseMismatch):
        dense_delta(delta, small, factorise(lm, 3.0))


# Repair


def batches(i: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(i)
    x = torch.randn(32, 24, generator=g)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def run(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def loss(output: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1])


TAPS = ["0", "2"]


def test_the_feature_term_is_zero_where_student_is_teacher() -> None:
    same = {"a": torch.randn(3, 4), "b": torch.randn(2)}
    assert float(feature_loss(same, dict(same))) == 0.0
    other = {"a": same["a"] + 2.0, "b": same["b"]}
    assert float(feature_loss(other, same)) == pytest.approx(2.0)  # mean over modules of 4 and 0


def test_the_weight_term_reaches_the_largest_entry_alone(mlp: Base) -> None:
    small = factorise(mlp, 2.0)
    pairs = perturbed_pairs(small, mlp)
    assert len(pairs) == 2
    for layer, W in pairs:
        worst = float((layer.weight - W).abs().max())
        assert float(perturbation([(layer, W)], 1e-3)) == pytest.approx((worst - 1e-3) ** 2, rel=1e-4)
        R, L = layer.second.weight, layer.first.weight
        product = (R @ L).detach().requires_grad_(True)
        ((product - W).abs().max() - 1e-3).square().backward()
        assert int((product.grad != 0).sum()) == 1, "a sub-gradient at the arg-max entry"
        at = (layer.weight - W).abs().flatten().argmax()
        assert product.grad is not None and int(product.grad.flatten().nonzero()[0]) == int(at)
        R.requires_grad_(True), L.requires_grad_(True)
        perturbation([(layer, W)], 1e-3).backward()
        i, j = divmod(int(at), W.shape[1])
        assert R.grad is not None and L.grad is not None
        assert R.grad.abs().sum(1).nonzero().flatten().tolist() == [i]
        assert L.grad.abs().sum(0).nonzero().flatten().tolist() == [j]


def test_repair_comes_closer_in_every_term_and_leaves_both_givers_alone(mlp: Base) -> None:
    small = factorise(mlp, 3.0)
    before = mlp.digest(), small.digest()
    plan = Schedule(60, 5e-3, seed=1)
    fixed = repair(small, mlp, batches, run, loss, plan, taps=TAPS)
    assert (mlp.digest(), small.digest()) == before
    record = fixed.base.source["derived"]
    assert [r["recipe"] for r in record] == ["factorise", "pela-repair"] and record[1]["not_repeatable"]
    assert record[1]["parent"] == small.fingerprint.digest != fixed.base.fingerprint.digest
    assert isinstance(fixed.base.modules["0"], FactoredLinear) and fixed.losses[-1] < fixed.losses[0]
    x, y = batches(999)

    def gap(base: Base) -> float:
        with torch.no_grad():
            return float(nn.functional.mse_loss(base.model[:3](x), mlp.model[:3](x)))  # type: ignore[index]

    alone = repair(small, mlp, batches, run, lambda o, b: o.sum() * 0.0, plan, weight=0.0, taps=TAPS)
    assert gap(alone.base) < 0.9 * gap(small)
    with torch.no_grad():
        assert float(loss(fixed.base.model(x), (x, y))) < float(loss(small.model(x), (x, y)))
    plain = repair(small, mlp, batches, run, loss, plan, feature=0.0, weight=0.0)
    assert gap(fixed.base) < gap(plain.base)
    close = repair(small, mlp, batches, run, lambda o, b: o.sum() * 0.0, plan, feature=0.0, weight=100.0)

    def worst(base: Base) -> float:
        return max(float((m.weight - W).abs().max()) for m, W in perturbed_pairs(base, mlp))

    assert worst(close.base) < 0.9 * worst(small)


def test_each_term_is_in_the_loss(mlp: Base) -> None:
    """The first loss is the sum of the terms, computed by hand."""
    small = factorise(mlp, 3.0)
    x, y = batches(0)
    with torch.no_grad():
        task = float(loss(small.model(x), (x, y)))
        seen = [nn.functional.mse_loss(small.model[: i + 1](x), mlp.model[: i + 1](x)) for i in (0, 2)]  # type: ignore
        logits = float(nn.functional.mse_loss(small.model(x), mlp.model(x)))
        worst = [float((m.weight - W).abs().max()) for m, W in perturbed_pairs(small, mlp)]
    want = task + 2.0 * float(sum(seen)) / 2 + 3.0 * logits + 5.0 * sum((w - 1e-3) ** 2 for w in worst) / 2
    one = Schedule(1, 0.0)
    got = repair(small, mlp, batches, run, loss, one, feature=2.0, logits=3.0, weight=5.0, taps=TAPS)
    assert got.losses[0] == pytest.approx(want, rel=1e-4)


def test_blocks_are_compared_by_default(lm: Base) -> None:
    small = factorise(lm, 1.5)
    ids = lm.probe()["input_ids"]  # type: ignore[index,call-overload]
    got = repair(
        small, lm, lambda i: ids, lambda m, b: m(b), lambda o, b: o["logits"].sum() * 0.0, Schedule(1, 0.0),
        weight=0.0, logits=0.0,
    )  # fmt: skip
    assert got.losses[0] > 0
    same = repair(
        small, small, lambda i: ids, lambda m, b: m(b), lambda o, b: o["logits"].sum() * 0.0, Schedule(1, 0.0),
        weight=0.0,
    )  # fmt: skip
    assert same.losses[0] == 0.0


def test_the_teacher_is_in_eval_mode_and_the_student_trains() -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Dropout(0.5), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))
    teacher = Base(model.train(), example=(torch.randn(2, 24),))
    small = factorise(teacher, 3.0)
    modes: list[tuple[bool, bool]] = []

    def seen(m: nn.Module, batch: Any) -> Any:
        modes.append((m is teacher.model, m[1].training))  # type: ignore[index]
        return m(batch[0])

    repair(small, teacher, batches, seen, loss, Schedule(2, 1e-3), taps=["2"])
    assert modes == [(False, True), (True, False)] * 2
    assert teacher.model.training


def test_what_cannot_be_repaired_is_refused(mlp: Base) -> None:
    small = factorise(mlp, 2.0)
    with pytest.raises(UsageError, match="compared"):
        repair(small, mlp, batches, run, loss, Schedule(1, 1e-3), taps=["nowhere"])
    with pytest.raises(UsageError, match="factored"):
        repair(mlp, mlp, batches, run, loss, Schedule(1, 1e-3), taps=TAPS)
    with pytest.raises(TrainingError, match="nan"):
        train_own(mlp, batches, lambda m, b: m(b[0]).sum() * float("nan"), Schedule(1, 1e-3))
    with pytest.raises(UsageError, match="no parameter"):
        train_own(mlp, batches, lambda m, b: m(b[0]).sum(), Schedule(1, 1e-3), trained=lambda n: False)
