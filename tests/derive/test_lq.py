# SPDX-License-Identifier: Apache-2.0
"""LQ-LoRA's and LoftQ's decompositions against closed forms, brute force and PEFT's own pieces."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.sample import Sample, gradients, probe_sample
from tunesmith.derive import LQ, QuantLinear, derive, fisher_weights, loftq, lq_lora, quantise
from tunesmith.derive import decompose as d
from tunesmith.derive.nf import Format, dequantised, quantised, rounded

FORM = Format(3, 16, 8, 4, "fp32")


def matrix(out: int = 32, inside: int = 48, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    spread = torch.rand(out, 1, generator=g) + 0.2
    return spread * torch.randn(out, inside, generator=g)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_falls_until_the_stop_and_the_best_is_kept(seed: int, bits: int) -> None:
    form = Format(bits, 16, 8, 4)
    W = matrix(seed=seed)
    found = d.lq(W, form, 6, exact=True)
    assert len(found.errors) >= 2
    until = found.errors[:-1]
    assert all(b < a for a, b in itertools.pairwise(until))
    assert found.errors[-1] >= until[-1], "it stops where the error no longer falls"
    kept = W - found.L1 @ found.L2 - rounded(found.residual, form)
    assert found.error == min(found.errors) == pytest.approx(d.size(kept), rel=1e-6)


def test_rounds_bound_the_alternation() -> None:
    assert len(d.lq(matrix(), FORM, 6, rounds=2).errors) == 2


def test_rank_0_is_plain_quantisation() -> None:
    W = matrix()
    found = d.lq(W, FORM, 0)
    assert torch.equal(found.residual, W) and found.L1.shape == (32, 0)
    assert found.error == pytest.approx(float((W - rounded(W, FORM)).norm()), rel=1e-6)


def test_a_low_rank_part_repairs_what_plain_quantisation_loses() -> None:
    W = matrix()
    plain, one, four = (d.lq(W, FORM, k, exact=True).error for k in (0, 1, 8))
    assert four < one < plain


def test_constant_weights_are_no_weights() -> None:
    W, F = matrix(), torch.full((32, 48), 3.0)
    plain, weighted = d.lq(W, FORM, 5, exact=True), d.lq(W, FORM, 5, weights=d.Weights.of(F), exact=True)
    torch.testing.assert_close(weighted.L1 @ weighted.L2, plain.L1 @ plain.L2, atol=1e-5, rtol=1e-5)
    assert weighted.error == pytest.approx(3.0**0.5 * plain.error, rel=1e-5)


def als(W: Tensor, F: Tensor, k: int, starts: int = 4, rounds: int = 300) -> float:
    """The least ||sqrt(F) * (W - L1 L2)|| that alternating weighted least squares finds from several starts."""
    best = float("inf")
    W, F = W.double(), F.double()
    for seed in range(starts):
        L2 = torch.randn(k, W.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for _ in range(rounds):
            G = torch.einsum("oi,ki,li->okl", F, L2, L2) + 1e-12 * torch.eye(k, dtype=torch.float64)
            L1 = torch.linalg.solve(G, torch.einsum("oi,ki->ok", F * W, L2))
            G = torch.einsum("oi,ok,ol->ikl", F, L1, L1) + 1e-12 * torch.eye(k, dtype=torch.float64)
            L2 = torch.linalg.solve(G, torch.einsum("oi,ok->ik", F * W, L1)).T
        best = min(best, float((F.sqrt() * (W - L1 @ L2)).norm()))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_rank_one_weights_give_the_weighted_optimum(seed: int) -> None:
    """F = r c^T: the two-sided decomposition is as good as alternating least squares, the unweighted one is not."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(8, 10, generator=g)
    F = torch.outer(torch.rand(8, generator=g) * 4 + 0.1, torch.rand(10, generator=g) * 4 + 0.1)
    weights = d.Weights.of(F)
    L1, L2 = d.low_rank(W, 3, weights, exact=True)
    got, best = d.size(W - L1 @ L2, weights), als(W, F, 3)
    assert got == pytest.approx(best, rel=1e-4)
    P1, P2 = d.low_rank(W, 3, exact=True)
    assert d.size(W - P1 @ P2, weights) > 1.001 * got


def test_any_weights_are_better_used_than_ignored() -> None:
    g = torch.Generator().manual_seed(1)
    W, F = torch.randn(24, 32, generator=g), torch.rand(24, 32, generator=g).pow(4) * torch.rand(24, 1, generator=g)
    weights = d.Weights.of(F)
    with_, without = d.low_rank(W, 4, weights, exact=True), d.low_rank(W, 4, exact=True)
    assert als(W, F, 4) <= d.size(W - with_[0] @ with_[1], weights) < d.size(W - without[0] @ without[1], weights)


@pytest.mark.parametrize("dead", ["row", "column", "all"])
def test_rows_and_columns_that_saw_no_gradient_do_not_divide_by_zero(dead: str) -> None:
    F = torch.rand(32, 48)
    if dead == "row":
        F[3] = 0
    elif dead == "column":
        F[:, 5] = 0
    else:
        F.zero_()
    found = d.lq(matrix(), FORM, 4, weights=d.Weights.of(F))
    assert torch.isfinite(found.L1).all() and torch.isfinite(found.L2).all() and torch.isfinite(found.residual).all()
    assert found.error < float("inf") and float((found.L1 @ found.L2).abs().max()) < 1e3


def test_randomised_decompositions_do_as_well_as_full_ones() -> None:
    W = matrix(96, 128)
    assert d.lq(W, FORM, 8).error == pytest.approx(d.lq(W, FORM, 8, exact=True).error, rel=0.02)


def test_base_and_delta_are_the_decomposed_weights(lm: Base) -> None:
    base, delta = lq_lora(lm, rank=4, budget=4.2, bits=(3, 4), block=(16,), exact=True)
    part = delta.parts[0]
    for site in lm.sites.select("all-linear", ("linear",)):
        m = base.modules[site.path]
        assert isinstance(m, QuantLinear)
        t = part.tensors(site.path)
        assert t["A"].shape[0] == min(4, *site.shape)
        x = torch.randn(3, site.shape[1])
        want = x @ (m.dense_weight() + t["B"] @ t["A"]).T + m.bias
        with base.using(delta), torch.no_grad():
            torch.testing.assert_close(m(x), want, atol=1e-5, rtol=1e-5)
        whole = d.lq(site.params()["weight"], m.layout, 4, exact=True)
        torch.testing.assert_close(t["B"] @ t["A"], whole.L1 @ whole.L2, atol=1e-5, rtol=1e-4)
        assert torch.equal(m.dense_weight(), dequantised(quantised(whole.residual, m.layout), m.layout, site.shape))


@pytest.mark.parametrize("alpha", [None, 1.0, 16.0])
def test_the_start_is_the_same_model_whatever_alpha(lm: Base, alpha: float | None) -> None:
    base, delta = lq_lora(lm, rank=4, budget=0, bits=4, block=16, alpha=alpha)
    plain, first = lq_lora(lm, rank=4, budget=0, bits=4, block=16)
    with base.using(delta), plain.using(first):
        torch.testing.assert_close(base.probe_outputs(), plain.probe_outputs(), atol=1e-5, rtol=1e-5)
    assert first.provenance["untrained"] and not torch.equal(plain.probe_outputs(), lm.probe_outputs())


def test_the_start_is_closer_to_the_parent_than_its_quantised_base(lm: Base) -> None:
    base, delta = lq_lora(lm, rank=6, budget=3.5, bits=(2, 3, 4), block=(16, 64))
    with base.using(delta):
        near = (base.probe_outputs() - lm.probe_outputs()).norm()
    plain = quantise(lm, bits=(2, 3, 4), block=(16, 64), budget=3.5)
    assert near < 0.8 * (plain.probe_outputs() - lm.probe_outputs()).norm()
    facts = base.source["derived"][0]["facts"]
    assert facts["bits_per_weight"] <= 3.5 and facts["error"] <= facts["error_after_one_round"]


def test_fisher_weights_are_summed_squared_per_example_gradients(lm: Base) -> None:
    probe = probe_sample(lm)
    rows = lm.probe()["input_ids"]  # type: ignore[index,call-overload]
    one_by_one = Sample(lambda: [{"input_ids": rows[i : i + 1]} for i in range(len(rows))], probe.run, probe.loss)
    sites = [lm.sites["layers.0.gate"], lm.sites["layers.1.attention.q"]]
    got = fisher_weights(lm, sites, one_by_one)
    for s in sites:
        want = sum(g[s.path].square() for g in gradients(lm, [s], one_by_one))
        torch.testing.assert_close(got[s.path], want)
        assert got[s.path].shape == s.shape and bool((got[s.path] >= 0).all())
    with pytest.raises(UsageError, match="no batch"):
        fisher_weights(lm, sites, Sample(lambda: [], probe.run, probe.loss))


def test_fisher_changes_the_split_and_lowers_its_own_error(lm: Base) -> None:
    sites = lm.sites.select("all-linear", ("linear",))
    g = torch.Generator().manual_seed(0)
    F = {s.path: torch.rand(s.shape, generator=g).pow(6) * 10.0 ** (i % 3) for i, s in enumerate(sites)}
    how = {"rank": 3, "bits": (2, 3, 4), "block": (16,), "budget": 3.6, "exact": True}
    with_, without = lq_lora(lm, fisher=F, **how), lq_lora(lm, **how)  # type: ignore[arg-type]

    def error(pair: tuple[Base, ts.Delta]) -> float:
        base, delta = pair
        total = 0.0
        for s in sites:
            t = delta.parts[0].tensors(s.path)
            gap = s.params()["weight"].detach() - base.modules[s.path].dense_weight() - (t["B"] @ t["A"]).detach()
            total += float((F[s.path] * gap.square()).sum())
        return total

    assert error(with_) < 0.9 * error(without)
    assert with_[0].source["derived"][0]["not_repeatable"] and not without[0].source["derived"][0]["not_repeatable"]


def test_a_table_of_errors_is_filled_once_and_used_again(lm: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[str, dict[Format, float]] = {}
    how = {"rank": 2, "bits": (2, 4), "block": (16,)}
    first, _ = lq_lora(lm, budget=3.5, table=table, **how)  # type: ignore[arg-type]
    assert len(table) == 14 and all(len(row) == 2 for row in table.values())
    calls: list[int] = []
    real = LQ._split
    monkeypatch.setattr(LQ, "_split", lambda self, s, f, F, rounds: calls.append(rounds) or real(self, s, f, F, rounds))
    again, _ = lq_lora(lm, budget=3.5, table=table, **how)  # type: ignore[arg-type]
    assert calls == [100] * 14
    assert again.source["derived"][0]["digest"] == first.source["derived"][0]["digest"]


def test_derive_alone_gives_the_same_base(lm: Base) -> None:
    base, _ = lq_lora(lm, rank=2, budget=4.0, bits=(2, 4), block=16)
    same = derive(lm, LQ(rank=2, budget=4.0, bits=(2, 4), block=(16,)))
    assert same.source["derived"] == base.source["derived"] and same.digest() == base.digest()


def test_loftq_is_the_loop_of_peft() -> None:
    """PEFT's `loftq_init` with its own truncated SVD and the rounding of NF4 in blocks of 64."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    W, form = matrix(32, 64), Format(4, 64, 0, 1, "fp32")
    for rounds in (1, 3):
        residual = W.clone()
        for i in range(rounds):
            Q = rounded(residual, form)
            out = _low_rank_decomposition(W - Q, 8)
            if i + 1 < rounds:
                residual = W - out["L"] @ out["R"]
        found = d.loftq(W, form, 8, rounds=rounds)
        torch.testing.assert_close(rounded(found.residual, form), Q, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.L1 @ found.L2, out["L"] @ out["R"], atol=1e-5, rtol=1e-4)


def test_loftq_as_a_base_and_its_delta(lm: Base) -> None:
    base, delta = loftq(lm, rank=4)
    m = base.modules["layers.0.gate"]
    assert isinstance(m, QuantLinear) and m.layout == Format(4, 64, 0, 256, "fp32")
    t = delta.parts[0].tensors("layers.0.gate")
    W = lm.modules["layers.0.gate"].weight.detach()
    U, S, Vh = torch.linalg.svd(W - m.dense_weight(), full_matrices=False)
    torch.testing.assert_close(t["B"] @ t["A"], (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-5, rtol=1e-4)
    eight, _ = loftq(lm, rank=4, bits=8)
    row = eight.modules["layers.0.gate"]
    want = (W / W.abs().amax(1, keepdim=True) * 127).round() / 127 * W.abs().amax(1, keepdim=True)
    torch.testing.assert_close(row.dense_weight(), want, atol=1e-6, rtol=1e-5)


def test_training_goes_on_from_the_start(lm: Base) -> None:
    base, delta = lq_lora(lm, rank=2, budget=3.5, bits=(2, 3), block=(16,))
    before = base.digest()
    ids = lm.probe()["input_ids"]  # type: ignore[index,call-overload]
    optimiser = torch.optim.Adam([t for _, t in delta.items() if t.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        with base.frozen(), base.using(delta):
            logits = base.model(ids)["logits"]
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
        losses.append(float(loss.detach()))
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0] and base.digest() == before
