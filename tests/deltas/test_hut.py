# SPDX-License-Identifier: Apache-2.0
"""HUT and HiRA against PEFT's HiRA, closed forms, and what the product form promises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.deltas import HUT, IA3, HiRA

peft = pytest.importorskip("peft")


def peft_twin(model: nn.Module, delta: Delta, targets: list[str], rank: int) -> tuple[nn.Module, int]:
    """A PEFT HiRA model with the delta's tensors, and how many layers got them."""
    turned = any(type(m).__name__ == "Conv1D" for m in model.modules())
    config = peft.HiraConfig(r=rank, target_modules=targets, fan_in_fan_out=turned)
    twin = peft.get_peft_model(copy.deepcopy(model), config).eval()
    n = 0
    with torch.no_grad():
        for path, module in twin.named_modules():
            site = path.removeprefix("base_model.model.")
            if not hasattr(module, "hira_A") or site not in delta.parts[0].kind_of:
                continue
            t = delta.parts[0].tensors(site)
            if len(module.hira_embedding_A):  # PEFT stores an embedding's factors turned
                module.hira_embedding_A["default"].copy_(t["B"].T)
                module.hira_embedding_B["default"].copy_(t["A"].T)
            else:
                for factor in ("A", "B"):
                    p = getattr(module, f"hira_{factor}")["default"]
                    p.copy_(t[factor].reshape(p.shape))
            n += 1
    return twin, n


@pytest.mark.parametrize("cls", [HUT, HiRA])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", "q_proj,down_proj"), ("llama", "embed_tokens"), ("gpt2", "c_attn,c_proj"), ("bert", "query,dense")],
)
def test_equals_peft(cls, name, targets, request, ids, moved, same_as_peft) -> None:
    base = Base(request.getfixturevalue(name))
    delta = moved(base, cls(rank=3, targets=targets), size=0.3)
    want, layers = peft_twin(base.model, delta, targets.split(","), 3)
    same_as_peft(base, delta, want, layers, ids, 1e-5)


def test_convolution_equals_peft(moved) -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval(),
        torch.randn(2, 3, 7, 7),
    )
    base = Base(model, example=(x,))
    delta = moved(base, HiRA(rank=3, targets="convs"), size=0.3)
    twin, layers = peft_twin(model, delta, ["0", "2"], 3)
    assert layers == 2
    with torch.no_grad(), base.using(delta):
        torch.testing.assert_close(model(x), twin(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("no_residual", [False, True])
def test_fresh_is_the_identity_bit_for_bit_and_counts(no_residual, llama, ids, undone) -> None:
    base = Base(llama)
    delta = Delta.create(base, HUT(rank=2, no_residual=no_residual, targets="q,v"))
    assert torch.equal(undone(base, delta, input_ids=ids), llama(input_ids=ids)[0])
    assert delta.trainable_parameters == 2 * 2 * ((16 + 16) + (16 + 8))


def test_gradients_are_those_of_the_formula(moved) -> None:
    """dA = B^T (s W * G), dB = (s W * G) A^T with G the gradient of the formed weight."""
    layer, x, c = nn.Linear(5, 4), torch.randn(7, 5), torch.randn(7, 4)
    base = Base(nn.Sequential(layer), example=(x,))
    delta = moved(base, HUT(rank=2, alpha=6.0, targets="0"), size=0.5)
    t = delta.parts[0].tensors("0")
    with base.frozen(), base.using(delta):
        (base.model(x) * c).sum().backward()
    sWG = 3.0 * layer.weight.detach() * (c.T @ x)
    with torch.no_grad():
        torch.testing.assert_close(t["A"].grad, t["B"].T @ sWG)
        torch.testing.assert_close(t["B"].grad, sWG @ t["A"].T)


@pytest.mark.parametrize("no_residual", [False, True])
def test_zeros_stay_zero(no_residual, moved) -> None:
    layer = nn.Linear(12, 8)
    with torch.no_grad():
        layer.weight[torch.rand(8, 12) < 0.5] = 0.0
    x = torch.randn(3, 12)
    base = Base(nn.Sequential(layer), example=(x,))
    pruned = layer.weight == 0
    delta = moved(base, HUT(rank=3, no_residual=no_residual, targets="0"), size=1.0)
    W = base.merged(delta).model[0].weight
    assert torch.equal(W == 0, pruned)
    assert (W - layer.weight).abs().max() > 0.1


def test_rank_one_with_ones_scales_columns_as_ia3_does() -> None:
    layer, x, a = nn.Linear(6, 4), torch.randn(5, 6), torch.randn(6)
    base = Base(nn.Sequential(layer), example=(x,))
    hut, ia3 = Delta.create(base, HUT(rank=1, targets="0")), Delta.create(base, IA3(targets="0", inputs="0"))
    with torch.no_grad():
        hut.parts[0].tensors("0")["A"].copy_(a[None])
        hut.parts[0].tensors("0")["B"].fill_(1.0)
        ia3.parts[0].tensors("0")["l"].copy_(1 + a)
        with base.using(hut):
            got = base.model(x)
        with base.using(ia3):
            torch.testing.assert_close(got, base.model(x), atol=1e-6, rtol=0)
        assert (got - base.model(x)).abs().max() > 0.1


def test_the_change_has_a_rank_far_above_r(moved) -> None:
    layer = nn.Linear(12, 10)
    base = Base(nn.Sequential(layer), example=(torch.randn(2, 12),))
    delta = moved(base, HUT(rank=1, targets="0"), size=1.0)
    change = base.merged(delta).model[0].weight - layer.weight
    assert torch.linalg.matrix_rank(change) == 10


def test_two_parts_multiply(moved) -> None:
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    base = Base(nn.Sequential(layer), example=(x,))
    one, two = (moved(base, HUT(rank=2, targets="0"), size=0.5) for _ in range(2))
    with torch.no_grad():
        factors = [1 + d.parts[0].tensors("0")["B"] @ d.parts[0].tensors("0")["A"] for d in (one, two)]
        want = nn.functional.linear(x, layer.weight * factors[0] * factors[1], layer.bias)
        with base.using(one, two):
            torch.testing.assert_close(base.model(x), want)
        torch.testing.assert_close(base.merged(one, two).model(x), want)


def test_a_change_below_half_precision_acts_on_a_bf16_base() -> None:
    """Every entry grows by 0.1 %, a quarter of bf16's last digit: W' formed and rounded would be W again."""
    W = torch.linspace(0.5, 1.0, 64).repeat(2)
    W[64:] *= -1  # the sum is zero, so a change of it is not lost in rounding the output
    layer, x = nn.Linear(128, 1, bias=False).bfloat16(), torch.ones(1, 128).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(W[None])
    base = Base(nn.Sequential(layer), example=(x,))
    delta = Delta.create(base, HUT(rank=1, targets="0"))
    t = delta.parts[0].tensors("0")
    with torch.no_grad():
        t["A"].copy_(W.sign()[None])
        t["B"].fill_(1e-3)
        assert torch.equal((layer.weight.float() * 1.001).bfloat16(), layer.weight)
        assert float(base.model(x)) == 0.0
        with base.using(delta):
            assert float(base.model(x)) == pytest.approx(1e-3 * float(layer.weight.abs().float().sum()), rel=1e-2)


def test_bad_options_are_refused(llama) -> None:
    base = Base(llama)
    with pytest.raises(UsageError, match="no scale"):
        Delta.create(base, HUT(no_residual=True, alpha=4.0))
    with pytest.raises(UsageError, match="matches none"):
        Delta.create(base, HiRA(rank_pattern={"no_such_layer": 2}))
    assert Delta.create(base, HUT(rank=4, alpha=2.0, targets="q")).parts[0].method.scale(base.sites.role("q")[0]) == 0.5
