# SPDX-License-Identifier: Apache-2.0
"""The chunked losses against plain cross-entropy in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tunesmith.core import head_loss as module
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.head_loss import head_loss, weight_divergence, weight_loss
from tunesmith.core.toys import toys
from tunesmith.deltas import Full, LoRA
from tunesmith.objectives import SFT

N, D, V = 7, 5, 11


@pytest.fixture(params=[1, 22, 10_000], ids=["one row a chunk", "two rows", "all at once"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)
    return int(request.param)


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    w = (3 * torch.randn(V, D, generator=g, dtype=torch.float64)).to(dtype)
    return h, w, torch.randn(V, generator=g, dtype=torch.float64).to(dtype), torch.randint(0, V, (N,), generator=g)


def oracle(
    h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    h = h.detach().double().requires_grad_()
    loss = F.cross_entropy(F.linear(h, w.double(), None if b is None else b.double()), y, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, h)[0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_frozen_head_equals_cross_entropy(chunked: int, dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    h, w, b, y = problem(dtype)
    loss = weight_loss(h, w, b if bias else None, y)
    (grad,) = torch.autograd.grad(2.5 * loss, h)
    expected, slope = oracle(h, w, b if bias else None, y)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), 2.5 * slope, rtol=tolerance, atol=10 * tolerance)


def test_frozen_head_agrees_with_finite_differences() -> None:
    h, w, b, y = problem(torch.float64)
    assert torch.autograd.gradcheck(lambda x: weight_loss(x, w, b, y), (h,))


@pytest.mark.parametrize("tile", [1, 33, 10_000])
@pytest.mark.parametrize("bias", [False, True])
def test_a_head_that_trains_gets_its_gradient(
    chunked: int, tile: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    h, w, b, y = problem(torch.float64)
    leaves = (h, w.requires_grad_(), b.requires_grad_())[: 3 if bias else 2]
    found = torch.autograd.grad(1.5 * weight_loss(h, w, b if bias else None, y), leaves)
    plain = F.cross_entropy(F.linear(h, w, b if bias else None), y, reduction="sum")
    torch.testing.assert_close(found, torch.autograd.grad(1.5 * plain, leaves), rtol=1e-10, atol=1e-12)
    only = torch.autograd.grad(weight_loss(h.detach(), w, None, y), w)[0]
    assert only.shape == w.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_difference_of_a_frozen_head_gets_the_gradient(chunked: int, dtype: torch.dtype) -> None:
    h, w, b, y = problem(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    d = torch.linspace(-0.1, 0.1, V * D, dtype=wide).reshape(V, D).requires_grad_()
    b.requires_grad_()
    loss = weight_loss(h, w, b, y, d)
    got = torch.autograd.grad(1.5 * loss, (h, d, b))
    leaves = [t.detach().double().requires_grad_() for t in (h, (w.to(wide) + d).to(dtype), b)]
    plain = F.cross_entropy(F.linear(*leaves), y, reduction="sum")
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert loss.item() == pytest.approx(plain.item(), rel=tolerance)
    assert [g.dtype for g in got] == [dtype, wide, dtype]
    for g, want in zip(got, torch.autograd.grad(1.5 * plain, leaves), strict=True):
        torch.testing.assert_close(g.double(), want, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("trains", ["states", "difference"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_divergence_from_a_teacher_equals_the_full_logits(
    chunked: int, dtype: torch.dtype, bias: bool, trains: str
) -> None:
    h, w, b, _ = problem(dtype)
    t = torch.linspace(-1, 1, N * D, dtype=torch.float64).reshape(N, D).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    d = torch.linspace(-0.2, 0.1, V * D, dtype=wide).reshape(V, D).requires_grad_() if trains == "difference" else None
    own = (b + 0.5).requires_grad_() if bias else None
    loss = weight_divergence(h, t, w, own, d, b if bias else None)
    given = [x for x in (h, d, own) if x is not None]
    got = torch.autograd.grad(1.5 * loss, given)
    exact = [x.detach().double().requires_grad_() for x in given]
    head = w.double() if d is None else exact[1] + w.double()
    student = F.linear(exact[0], head, exact[-1] if bias else None).log_softmax(-1)
    teacher = F.linear(t.double(), w.double(), b.double() if bias else None).log_softmax(-1)
    plain = F.kl_div(student, teacher, reduction="sum", log_target=True)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert loss.item() == pytest.approx(plain.item(), rel=tolerance)
    for g, x, want in zip(got, given, torch.autograd.grad(1.5 * plain, exact), strict=True):
        assert g.dtype == x.dtype
        torch.testing.assert_close(g.double(), want, rtol=tolerance, atol=20 * tolerance)


def test_a_state_does_not_diverge_from_itself() -> None:
    h, w, b, _ = problem(torch.float32)
    loss = weight_divergence(h, h.detach(), w, b, None, b)
    assert abs(loss.item()) < 1e-5 and float(torch.autograd.grad(loss, h)[0].abs().max()) < 1e-5


def test_the_gradient_of_a_head_can_be_asked_for_twice() -> None:
    h, w, _, y = problem(torch.float32)
    d = torch.zeros(V, D, requires_grad=True)
    loss = 2.0 * weight_loss(h, w, None, y, d)
    one = torch.autograd.grad(loss, (h, d), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (h, d)), one, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_adapted_head_equals_cross_entropy(chunked: int, bias: bool) -> None:
    h, w, b, y = problem(torch.float64)
    w.requires_grad_()
    loss = head_loss(h, lambda x: F.linear(x, w, b if bias else None), y, V)
    dh, dw = torch.autograd.grad(loss, (h, w))
    plain = F.cross_entropy(F.linear(h, w, b if bias else None), y, reduction="sum")
    eh, ew = torch.autograd.grad(plain, (h, w))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    torch.testing.assert_close((dh, dw), (eh, ew), rtol=1e-10, atol=1e-12)


def test_no_supervised_row_is_a_loss_of_zero_with_a_gradient() -> None:
    h, w, _, y = problem(torch.float32)
    w.requires_grad_()
    for loss in (
        weight_loss(h[:0], w.detach(), None, y[:0]),
        head_loss(h[:0], lambda x: F.linear(x, w), y[:0], V),
    ):
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, h)
        assert not grad.any()


def direct(base: Base, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = base.model(input_ids=batch["input_ids"])["logits"][:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), reduction="sum")


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize(
    "method", [*(LoRA(rank=2, targets=t) for t in ("attention.q,attention.v", "embed", "head")), Full()], ids=str
)
def test_sft_equals_the_full_logits(chunked: int, tied: bool, method: Any) -> None:
    """LoRA away from the head, on the embedding (which is the head where tied) and on the head itself; everything."""
    base = toys()[int(tied)]
    base.model.double()
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 37, (3, 6), generator=g)
    labels = torch.where(torch.rand(3, 6, generator=g) < 0.4, -100, ids)
    batch = {"input_ids": ids, "labels": labels}
    delta = Delta.create(base, method)
    delta.double()
    with torch.no_grad():
        for _, t in delta.items():
            t.copy_(torch.randn(t.shape, generator=g))
    with base.frozen(), base.using(delta):
        assert SFT().count(batch) == int((labels[:, 1:] != -100).sum())
        ours, plain = SFT().loss(base, batch), direct(base, batch)
        params = [t for _, t in delta.items()]
        got, want = torch.autograd.grad(ours, params), torch.autograd.grad(plain, params)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-9)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    assert all(x.abs().max() > 0 for x in want)
