# SPDX-License-Identifier: Apache-2.0
"""Packed layers: memory, forward and backward, files, budgets, and what merging does to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.derive import Format, QuantLinear, quantise
from tunesmith.derive.nf import rounded


def layer(bits: int = 4, dtype: torch.dtype = torch.float32) -> tuple[QuantLinear, torch.Tensor]:
    W, bias = torch.randn(24, 32), torch.randn(24).to(dtype)
    return QuantLinear.of(W, Format(bits, 16), bias, dtype), rounded(W, Format(bits, 16))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_packed_layer_computes_as_a_dense_one_both_ways(bits: int) -> None:
    m, Q = layer(bits)
    dense = nn.Linear(32, 24)
    dense.weight, dense.bias = nn.Parameter(Q), m.bias
    x = torch.randn(3, 5, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    torch.testing.assert_close(m(x), dense(y))
    g = torch.randn(3, 5, 24)
    m(x).backward(g)
    dense(y).backward(g)
    torch.testing.assert_close(x.grad, y.grad)
    assert torch.equal(m.weight, Q)


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    m, _ = layer()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        m(torch.randn(2, 32, requires_grad=True)).sum().backward()
    assert not any(t.is_floating_point() and t.numel() >= 24 * 32 for t in kept)


def test_autocast_and_half_precision_keep_the_packed_bits() -> None:
    m, Q = layer()
    packed = {k: v.clone() for k, v in m.state_dict().items() if k != "bias"}
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 32, requires_grad=True)
        y = m(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
    m.to(torch.bfloat16)
    assert m.dense_weight().dtype == torch.bfloat16 and m(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16
    assert all(torch.equal(v, packed[k]) for k, v in m.state_dict().items() if k != "bias")
    assert torch.equal(m.dense_weight(torch.float32), Q)


def test_the_state_dict_goes_through_safetensors(tmp_path: Path) -> None:
    m, Q = layer(3)
    save_file(m.state_dict(), tmp_path / "m.safetensors")
    again = QuantLinear.blank(m.describe())
    assert not torch.equal(again.dense_weight(), Q)
    again.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    assert torch.equal(again.dense_weight(), Q) and torch.equal(again.bias, m.bias)


def test_memory_is_what_the_formula_says() -> None:
    """Bytes of every tensor of the derived model, against the parent's and the formula."""
    with torch.device("cpu"):
        parent = Base(nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)), example=(torch.randn(2, 128),))
    small = quantise(parent, bits=3, scale_block=16, scale_format="fp16", targets="everything")
    tensors = [*small.model.parameters(), *small.model.buffers()]
    measured = sum(t.numel() * t.element_size() for t in tensors)
    weights, biases = 128 * 256 + 256 * 64, 256 + 64
    assert measured == weights * (3 + 8 / 64 + 16 / (64 * 16)) / 8 + 2 * 4 + biases * 4
    assert small.source["derived"][0]["facts"]["bits_per_weight"] == pytest.approx(3 + 8 / 64 + 16 / 1024, rel=1e-3)
    held = [m for m in small.model.modules() if isinstance(m, QuantLinear)]
    assert sum(m.nbytes for m in held) == small.source["derived"][0]["facts"]["bytes"]


def test_every_target_is_packed_and_the_rest_is_shared(lm: Base) -> None:
    before = lm.digest()
    small = quantise(lm, bits=8)
    packed = {p for p, m in small.modules.items() if isinstance(m, QuantLinear)}
    assert packed == {s.path for s in lm.sites.select("all-linear", ("linear",))}
    assert small.model.embed.weight is lm.model.embed.weight and lm.digest() == before
    assert not torch.equal(small.probe_outputs(), lm.probe_outputs())
    torch.testing.assert_close(small.probe_outputs(), lm.probe_outputs(), atol=0.05, rtol=0.05)


def test_roles_and_groups_are_those_of_the_parent(lm: Base) -> None:
    small = quantise(lm)
    for s in lm.sites.all():
        found = small.sites.of(s.path, s.kind)
        assert (found.kind, found.role, found.shape, found.depth, found.has_bias) == (
            s.kind, s.role, s.shape, s.depth, s.has_bias,
        )  # fmt: skip
        assert found.heads == s.heads


def test_a_budget_is_met_and_used(lm: Base) -> None:
    two = quantise(lm, bits=(2, 3, 4), block=(16, 64), budget=3.3, scale_format="bf16")
    facts = two.source["derived"][0]["facts"]
    assert facts["bits_per_weight"] <= 3.3 and len(facts["formats"]) > 1
    plain = quantise(lm, bits=3, block=64, scale_format="bf16")
    assert plain.source["derived"][0]["facts"]["bits_per_weight"] <= 3.3

    def error(base: Base) -> float:
        gaps = (lm.modules[p].weight.detach() - base.modules[p].weight for p in _paths(base))
        return sum(float(g.square().sum()) for g in gaps)

    assert error(two) < error(plain)


def test_formats_without_a_budget_and_budgets_too_small_are_refused(lm: Base) -> None:
    with pytest.raises(UsageError, match="budget"):
        quantise(lm, bits=(2, 3))
    with pytest.raises(UsageError, match="need"):
        quantise(lm, bits=(2, 3), budget=1.5)
    with pytest.raises(UsageError, match="tied"):
        from tunesmith.core.toys import toys

        quantise(toys()[1], targets="everything")


def test_folding_into_a_packed_layer_gives_a_dense_one_and_leaves_the_others_packed(lm: Base) -> None:
    small = quantise(lm)
    delta = ts.Delta.create(small, ts.LoRA(rank=2, targets="layers.0.gate"))
    with torch.no_grad():
        delta.parts[0].parameter("layers.0.gate", "B").normal_()
    with small.using(delta):
        applied = small.probe_outputs()
    merged = small.merged(delta)
    assert type(merged.modules["layers.0.gate"]) is nn.Linear
    assert isinstance(merged.modules["layers.0.up"], QuantLinear)
    torch.testing.assert_close(merged.probe_outputs(), applied, atol=1e-5, rtol=1e-5)
    shift = ts.Delta.create(small, ts.BitFit(targets="layers.0.up"))
    with torch.no_grad():
        shift.parts[0].parameter("layers.0.up", "bias").normal_()
    still = small.merged(shift)
    assert isinstance(still.modules["layers.0.up"], QuantLinear)
    with small.using(shift):
        torch.testing.assert_close(still.probe_outputs(), small.probe_outputs(), atol=1e-5, rtol=1e-5)


def test_a_conv1d_of_transformers_is_packed_in_canonical_orientation() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    base = Base(model, family="causal-lm")
    small = quantise(base, bits=8)
    assert isinstance(small.modules["transformer.h.0.attn.c_attn"], QuantLinear)
    torch.testing.assert_close(small.probe_outputs(), base.probe_outputs(), atol=0.02, rtol=0.02)


def test_gradients_of_a_packed_weight_are_those_of_the_dense_one(lm: Base) -> None:
    from tunesmith.core.held import dense_layer, put_module
    from tunesmith.core.sample import gradients, probe_sample

    small = quantise(lm)
    dense = quantise(lm)
    for p in _paths(small):
        put_module(dense.model, p, dense_layer(small.modules[p].weight, small.modules[p].bias))
    dense = Base(dense.model, example=lm.probe())
    got, want = (next(iter(gradients(b, [b.sites[p] for p in _paths(small)], probe_sample(b)))) for b in (small, dense))
    assert got.keys() == want.keys() == set(_paths(small))
    for p in got:
        torch.testing.assert_close(got[p], want[p], atol=1e-4, rtol=1e-4)


def _paths(base: Base) -> list[str]:
    return [p for p, m in base.modules.items() if isinstance(m, QuantLinear)]
