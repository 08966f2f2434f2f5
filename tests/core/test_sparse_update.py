# SPDX-License-Identifier: Apache-2.0
"""The sparse update's own passes: gradients, what is kept for the backward pass, autocast, and tables too large to form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.core.algebra import Sparse, apply_dense
from tunesmith.core.sites import Site

LAYERS: dict[str, tuple[str, Any, tuple[int, ...]]] = {
    "linear": ("linear", lambda: nn.Linear(4, 5), (2, 3, 4)),
    "embedding": ("embedding", lambda: nn.Embedding(7, 4), (2, 3)),
    "conv1d": ("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 7)),
    "conv1d-circular": ("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 7)),
    "conv2d": ("conv2d", lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2), (2, 4, 5, 6)),
    "conv2d-same": ("conv2d", lambda: nn.Conv2d(4, 6, (4, 1), padding="same"), (2, 4, 5, 6)),
    "conv2d-valid": ("conv2d", lambda: nn.Conv2d(4, 6, 2, padding="valid"), (2, 4, 5, 6)),
    "conv2d-groups": ("conv2d", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 6)),
    "conv2d-reflect": ("conv2d", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 6)),
}


def place(layer: str, dtype: torch.dtype = torch.float64) -> tuple[Site, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    kind, build, shape = LAYERS[layer]
    module = build()
    x = torch.randint(0, 7, shape) if kind == "embedding" else torch.randn(shape, dtype=dtype)
    indices = torch.randperm(module.weight.numel())[:9]
    return Site("m", kind, tuple(module.weight.shape), module), x, indices, torch.randn(9, dtype=dtype)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_by_finite_differences(layer: str) -> None:
    site, x, indices, values = place(layer)
    values.requires_grad_()
    if site.kind == "embedding":
        assert torch.autograd.gradcheck(lambda v: Sparse(indices, v, site.shape).apply(x, site), (values,))
        return
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: Sparse(indices, v, site.shape).apply(x, site), (x, values))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_gradient_is_the_dense_one_at_the_places(layer: str) -> None:
    site, x, indices, values = place(layer, torch.float32)
    dense = Sparse(indices, values, site.shape).dense().requires_grad_()
    target = torch.randn_like(apply_dense(dense, x, site))
    (apply_dense(dense, x, site) * target).sum().backward()
    values.requires_grad_()
    (Sparse(indices, values, site.shape).apply(x, site) * target).sum().backward()
    torch.testing.assert_close(values.grad, dense.grad.reshape(-1)[indices], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layer", [k for k in LAYERS if k != "embedding"])
def test_under_autocast_the_passes_are_half_precision_and_the_values_are_not(layer: str) -> None:
    site, x, indices, values = place(layer, torch.float32)
    x.requires_grad_(), values.requires_grad_()
    want = Sparse(indices, values, site.shape).apply(x, site)
    full = torch.autograd.grad(want.square().sum(), (x, values))
    with torch.autocast("cpu", torch.bfloat16):
        y = Sparse(indices, values, site.shape).apply(x, site)
        assert y.dtype == torch.bfloat16
        loss = y.float().square().sum()
    half = torch.autograd.grad(loss, (x, values))
    for a, b in zip((y.float(), *half), (want, *full), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.05 * float(b.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward_pass(layer: str) -> None:
    site, x, indices, values = place(layer, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Sparse(indices, values.requires_grad_(), site.shape).apply(x, site)
    assert not [t.shape for t in kept if t.is_floating_point() and t.numel() == site.module.weight.numel()]


def test_a_table_that_could_not_be_held_is_looked_up_by_its_rows() -> None:
    rows, dim = 2**33, 4  # flat places above 2^34, far beyond 32 bits
    site = Site("m", "embedding", (rows, dim), nn.Embedding(2, dim))
    indices = torch.tensor([5, (rows - 1) * dim + 2, (rows - 1) * dim + 3])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    y = Sparse(indices, values, site.shape).apply(torch.tensor([[1, rows - 1], [rows - 1, 7]]), site)
    want = torch.tensor([[[0, 1, 0, 0], [0, 0, 2, 3]], [[0, 0, 2, 3], [0, 0, 0, 0]]]).float()
    assert torch.equal(y, want)
    (y * torch.tensor([1.0, 10, 100, 1000])).sum().backward()
    assert values.grad.tolist() == [10, 200, 2000]


def test_an_empty_store_or_no_tokens_give_nothing() -> None:
    site = Site("m", "embedding", (7, 4), nn.Embedding(7, 4))
    none = Sparse(torch.empty(0, dtype=torch.int64), torch.empty(0), (7, 4))
    assert torch.equal(none.apply(torch.tensor([1, 2]), site), torch.zeros(2, 4))
    some = Sparse(torch.tensor([3]), torch.ones(1), (7, 4))
    assert some.apply(torch.empty(0, 3, dtype=torch.int64), site).shape == (0, 3, 4)
