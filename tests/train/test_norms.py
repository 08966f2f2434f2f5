"""RMS norms in one pass: the same bits and gradients as the module, found by what they compute, gone after the run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from serve_cases import tiny_llama
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.deltas import SSF, Full, LoRA, NormTuning
from tunesmith.train.norms import epsilon_of, fused_norms, rms_norm


class RMSNorm(nn.Module):
    """As transformers writes it; `offset` is Gemma's."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.variance_epsilon, self.offset = 1e-5, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight + self.offset) * wide.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_and_gradient_as_the_module(dtype: torch.dtype) -> None:
    module = RMSNorm(24).to(dtype).requires_grad_(False)
    assert epsilon_of(module) == 1e-5
    g = torch.Generator().manual_seed(1)
    x = (3 * torch.randn(2, 5, 24, generator=g)).to(dtype)
    up = torch.randn(2, 5, 24, generator=g).to(dtype)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, got = module(one), rms_norm(two, module.weight, 1e-5)
    assert torch.equal(want, got)
    (a,), (b,) = torch.autograd.grad(want, one, up), torch.autograd.grad(got, two, up)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(b, a, rtol=4 * eps, atol=4 * eps * float(a.abs().max()))


def test_the_gradient_is_that_of_the_formula() -> None:
    weight = torch.linspace(0.5, 1.5, 6)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    exact = torch.autograd.functional.jacobian(
        lambda v: weight.double() * v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 0.1), x.detach().double()
    )
    found = torch.autograd.functional.jacobian(lambda v: rms_norm(v, weight, 0.1), x.detach())
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("module", [nn.LayerNorm(8), RMSNorm(8, offset=1.0), nn.Linear(8, 8), nn.BatchNorm1d(8)])
def test_what_computes_something_else_is_left_alone(module: nn.Module) -> None:
    assert epsilon_of(module.requires_grad_(False)) is None


def test_a_norm_that_trains_is_left_alone() -> None:
    assert epsilon_of(RMSNorm(8)) is None


def outcome(base: Any, delta: Delta, fast: bool) -> tuple[list[str], Tensor, list[Tensor]]:
    ids = torch.arange(12).reshape(2, 6) % 7
    params = [t for _, t in delta.items() if t.requires_grad]
    with base.frozen(), base.using(delta), ExitStack() as stack:
        found = stack.enter_context(fused_norms(base)) if fast else []
        z = base.model(input_ids=ids).logits
        return found, z.detach(), list(torch.autograd.grad(z.logsumexp(-1).sum(), params))


def assert_same_path(base: Base, delta: Delta, least: float = 0.0) -> None:
    """Norms in one pass give the modules' outputs and, for gradients no smaller than `least`, their gradients."""
    found, z, grads = outcome(base, delta, fast=True)
    _, want, expected = outcome(base, delta, fast=False)
    assert len(found) >= 3 and torch.equal(z, want)
    for g, other in zip(grads, expected, strict=True):
        assert float((g - other).norm()) < 1e-4 * max(least, float(other.norm()))


def test_a_language_model_has_the_same_outputs_and_gradients() -> None:
    base = tiny_llama()
    delta = Delta.create(base, LoRA(rank=2))
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(0.05)
    assert_same_path(base, delta)
    assert not any("forward" in m.__dict__ for m in base.model.modules())


def test_a_weight_that_trains_by_differences_gets_its_gradient() -> None:
    x, w, up = (
        torch.randn(s, generator=torch.Generator().manual_seed(i)).double()
        for i, s in enumerate(((2, 5, 6), 6, (2, 5, 6)))
    )
    leaves, others = ([t.clone().requires_grad_() for t in (x, w)] for _ in range(2))
    plain = others[1] * others[0] * torch.rsqrt(others[0].pow(2).mean(-1, keepdim=True) + 0.1)
    got = torch.autograd.grad(rms_norm(*leaves, 0.1), leaves, up)
    for a, b in zip(got, torch.autograd.grad(plain, others, up), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    (alone,) = torch.autograd.grad(rms_norm(x, leaves[1], 0.1), leaves[1], up)  # an input that nothing asks of
    torch.testing.assert_close(alone, got[1])


@pytest.mark.parametrize("method", [NormTuning(), Full()], ids=lambda m: type(m).__name__)
def test_norms_that_train_by_differences_take_the_same_path(method: Any) -> None:
    base = tiny_llama()
    delta = Delta.create(base, method)
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(0.02)
    assert_same_path(base, delta, least=1e-3)


def test_a_norm_that_another_method_acts_on_runs_as_it_is() -> None:
    base = tiny_llama()
    delta = Delta.create(base, SSF(targets="norm"))
    taken = {p for p in delta.parts[0].paths if base.sites[p].kind == "norm"}
    with base.frozen(), base.using(delta), fused_norms(base) as found:
        assert taken and not taken & set(found)
