# SPDX-License-Identifier: Apache-2.0
"""The loss gradient with respect to a whole low-rank change, for scores that its factors' gradients do not give.

`Watched` acts as the low-rank change it is; in the backward pass it also adds dL/d(dW), a full matrix in fp32, to a tally
under a tensor of the part. A hook takes it from there with `taken`, which frees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tunesmith.core.algebra import LowRank, apply_dense

_TALLY = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Watched(LowRank):
    """A low-rank change whose gradient as a whole [out, in, *kernel] is tallied under `key`."""

    key: Tensor | None = None

    def apply(self, x: Tensor, site: Any) -> Tensor:
        y = LowRank(self.B, self.A, self.scale, self.full).apply(x, site)
        if self.key is None or not y.requires_grad:
            return y
        watched: Tensor = _Watch.apply(y, x, site, self.key)  # type: ignore[no-untyped-call]
        return watched

    def dense(self) -> Tensor:
        dW, key = super().dense(), self.key
        if key is not None and dW.requires_grad:
            dW.register_hook(lambda G: _add(key, G))
        return dW


def taken(key: Tensor) -> Tensor | None:
    """The gradients tallied under `key` since the last call, summed, [out, in, *kernel] fp32; None where there were none."""
    found: Tensor | None = _TALLY.pop(key, None)
    return found


def _add(key: Tensor, G: Tensor) -> None:
    before = _TALLY.get(key)
    _TALLY[key] = G.detach().float() if before is None else before + G


class _Watch(torch.autograd.Function):
    """y as it is; backward adds the gradient of the weight that would map x to y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, site: Any, key: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.site, ctx.key = site, key
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        _add(ctx.key, _weight_gradient(x, grad, ctx.site))
        return grad, None, None, None


def _weight_gradient(x: Tensor, grad: Tensor, site: Any) -> Tensor:
    """dL/dW [out, in, *kernel], fp32, from the input and the output's gradient of a site."""
    if site.kind == "linear":
        return (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)).float()
    with torch.enable_grad():
        W = torch.zeros(site.shape, device=grad.device, requires_grad=True)
        y = apply_dense(W, x.detach(), site)
        return torch.autograd.grad(y, W, grad.to(y.dtype))[0]
