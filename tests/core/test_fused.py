"""The low-rank branch in one pass against its plain form: outputs, gradients, what it keeps, and when it steps aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tunesmith.core import fused
from tunesmith.core.algebra import LowRank
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.deltas import Full, LoRA


def layer(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(12, 7, bias=bias, dtype=dtype)
    return module.requires_grad_(False)


def factors(scale: float = 1.7, dtype: torch.dtype = torch.float64) -> LowRank:
    g = torch.Generator().manual_seed(1)
    A, B = torch.randn(3, 12, generator=g, dtype=dtype), torch.randn(7, 3, generator=g, dtype=dtype)
    return LowRank(B.requires_grad_(), A.requires_grad_(), scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 0)])
def test_the_same_as_two_products(bias: bool, scale: float, shape: tuple[int, ...]) -> None:
    module, update = layer(bias=bias), factors(scale)
    x = torch.randn(*shape, 12, dtype=torch.float64, requires_grad=True)
    g = torch.randn(*shape, 7, dtype=torch.float64)
    want = module(x) + update.apply(x, _Site(module))
    got = fused.beside(x, module, update)
    assert torch.allclose(got, want, atol=1e-12)
    leaves = (x, update.A, update.B)
    for a, b in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(want, leaves, g), strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-12)


def test_gradients_against_finite_differences() -> None:
    module, update = layer(), factors()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, A, B: fused.beside(x, module, LowRank(B, A, 0.5)), (x, update.A, update.B)
    )


def test_under_autocast_it_rounds_as_the_plain_form() -> None:
    module, update = layer(torch.float32), factors(2.0, torch.float32)
    x = torch.randn(64, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = fused.beside(x, module, update)
        want = module(x) + update.apply(x, _Site(module))
    assert got.dtype == want.dtype == torch.bfloat16
    exact = module(x) + update.apply(x, _Site(module))
    # one rounding of the sum instead of two: never further from the exact value, up to half a digit of bf16
    assert float((got - exact).detach().norm()) <= 1.1 * float((want - exact).detach().norm())
    (gx, gA) = torch.autograd.grad(got.float().square().sum(), (x, update.A))
    (wx, wA) = torch.autograd.grad(exact.square().sum(), (x, update.A))
    assert gx.dtype == gA.dtype == torch.float32
    assert float((gx - wx).norm()) < 0.02 * float(wx.norm()) and float((gA - wA).norm()) < 0.02 * float(wA.norm())


def test_half_precision_bases_train_wide_factors() -> None:
    module, update = layer(torch.bfloat16), factors(2.0, torch.float32)
    x = torch.randn(64, 12, dtype=torch.bfloat16, requires_grad=True)
    y = fused.beside(x, module, update)
    gx, gA, gB = torch.autograd.grad(y.float().sum(), (x, update.A, update.B))
    assert (y.dtype, gx.dtype, gA.dtype, gB.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)


def test_nothing_of_the_width_of_the_layer_is_kept() -> None:
    module, update = layer(torch.float32), factors(2.0, torch.float32)
    x = torch.randn(50, 12, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        fused.beside(x, module, update)
    assert (50, 7) not in [tuple(s) for s in kept]
    assert sum(s.numel() for s in kept) == 50 * 12 + 50 * 3 + 7 * 12 + 3 * 12 + 7 * 3


def toy() -> Base:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return Base(model, example=torch.randn(2, 6, dtype=torch.float64))


def run(base: Base, delta: Delta, reference: bool, **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)
    params = [t for _, t in delta.items() if t.requires_grad]
    with base.frozen(), base.using(delta):
        if reference:
            with fused.plain():
                y = base.model(x)
        else:
            y = base.model(x)
        return y, list(torch.autograd.grad(y.square().sum(), params))


def test_a_delta_acts_the_same_by_either_form(monkeypatch: pytest.MonkeyPatch) -> None:
    base = toy()
    delta = Delta.create(base, LoRA(targets="0,2,4", rank=2), seed=0)
    with torch.no_grad():
        for i, (_, t) in enumerate(delta.items()):
            t.copy_(torch.linspace(-0.5, 0.5, t.numel()).reshape(t.shape) * (i + 1) / 4)
    calls: list[int] = []
    real = fused.beside
    monkeypatch.setattr(fused, "beside", lambda *a: calls.append(1) or real(*a))
    y, grads = run(base, delta, reference=False)
    assert len(calls) == 3
    want, expected = run(base, delta, reference=True)
    assert len(calls) == 3
    assert torch.allclose(y, want, atol=1e-6)
    for a, b in zip(grads, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("why", ["trainable", "two parts", "half strength", "other forward"])
def test_it_steps_aside(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = toy()
    delta = Delta.create(base, LoRA(targets="2", rank=2), seed=0)
    other = Delta.create(base, LoRA(targets="2", rank=2), name="other", seed=1)
    monkeypatch.setattr(fused, "beside", lambda *a: pytest.fail("the fast form was used"))
    x = torch.zeros(2, 6, dtype=torch.float64)
    if why == "trainable":
        base.modules["2"].weight.requires_grad_(True)
        with base.using(delta):
            base.model(x)
        return
    for p in base.model.parameters():
        p.requires_grad_(False)
    if why == "two parts":
        with base.using(delta, other):
            base.model(x)
    elif why == "half strength":
        with base.using(delta.at(0.5)):
            base.model(x)
    else:
        module = base.modules["2"]
        own = module.forward
        module.forward = lambda x: own(x)
        with base.using(delta):
            base.model(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_differences_train_through_one_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients as by forming the change apart, without a second product; measured without gradients it is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    base = Base(model, example=torch.randn(2, 6).to(dtype))
    delta = Delta.create(base, Full(), seed=0)
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(0.1 * torch.randn(t.shape))
    params = [t for _, t in delta.items() if t.requires_grad]
    x = torch.randn(32, 6).to(dtype)
    made: list[int] = []
    real = fused.shifted
    monkeypatch.setattr(fused, "shifted", lambda *a: made.append(1) or real(*a))

    def grads() -> tuple[torch.Tensor, list[torch.Tensor]]:
        y = base.model(x)
        return y.detach(), list(torch.autograd.grad(y.float().square().sum(), params))

    with base.frozen(), base.using(delta):
        y, fast = grads()
        assert len(made) == len(params)
        with fused.plain():
            want, plain = grads()
        assert len(made) == len(params)
        near = 1e-5 if dtype == torch.float32 else 0.03
        assert float((y - want).float().norm()) <= near * float(want.float().norm())
        for a, b in zip(fast, plain, strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert float((a - b).norm()) <= near * max(1.0, float(b.norm()))
        with torch.no_grad(), fused.plain():
            exact = base.model(x)
        with torch.no_grad():
            assert torch.equal(base.model(x), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 2])
def test_rows_of_a_table_that_trains_are_those_of_the_summed_table(dtype: torch.dtype, padding: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.randn(9, 4, generator=g, dtype=torch.float64).to(dtype)
    difference = (0.01 * torch.randn(9, 4, generator=g, dtype=torch.float64)).to(wide).requires_grad_()
    ids = torch.tensor([[1, 2, 1], [8, 2, 1]])
    up = torch.randn(2, 3, 4, generator=g, dtype=torch.float64).to(dtype)
    got = fused.rows(ids, table, difference, padding)
    want = nn.functional.embedding(ids, fused.shifted(table, difference), padding)
    assert got.dtype == dtype and torch.equal(got, want)
    (mine,) = torch.autograd.grad(got, difference, up)
    exact = torch.zeros(9, 4, dtype=torch.float64).index_add(0, ids.flatten(), up.double().flatten(0, 1))
    if padding is not None:
        exact[padding] = 0
    assert mine.dtype == wide
    torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=1e-12)  # summed in the dtype of the difference


class _Site:
    kind = "linear"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
