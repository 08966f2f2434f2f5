# SPDX-License-Identifier: Apache-2.0
"""A frozen linear layer and a low-rank change of it in one pass.

    y = x W^T + b + s (x A^T) B^T,    dL/dx = g W + s (g B) A,    dL/dA = s (g B)^T x,    dL/dB = s g^T (x A^T)

Both branches add into one output, and both gradients of x into one tensor, so nothing of the width of the layer is made
twice; only x and x A^T are kept for backward. Under autocast the frozen weight is cast again in backward instead of
being kept. The plain form, two products and a sum, is `LowRank.apply` beside the layer; `plain()` chooses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.algebra import LowRank, Update

_PLAIN: ContextVar[bool] = ContextVar("tunesmith_plain", default=False)


@contextmanager
def plain() -> Iterator[None]:
    """Every delta acts by its reference form for the block."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Whether the block asks for reference forms."""
    return _PLAIN.get()


def fits(module: Any, update: Update) -> bool:
    """Whether `beside` can stand for the layer and the change: a frozen `nn.Linear`, two factors and a number."""
    if is_plain() or type(update) is not LowRank or len(update.shape) != 2 or isinstance(update.scale, Tensor):
        return False
    weight, bias = module.weight, module.bias
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return frozen and weight.is_floating_point() and update.A.device == weight.device


def beside(x: Tensor, module: Any, update: LowRank) -> Tensor:
    """The output [..., out] of a frozen linear layer with a low-rank change, for x [..., in], in the dtype of the layer's own."""
    y: Tensor = _Beside.apply(x, module.weight, module.bias, update.A, update.B, update.scale)  # type: ignore[no-untyped-call]
    return y


def shifted(old: Tensor, difference: Tensor) -> Tensor:
    """A frozen tensor plus a difference of it that may train, in the dtype of the tensor; only the sum is made and kept."""
    y: Tensor = _Shifted.apply(old, difference)  # type: ignore[no-untyped-call]
    return y


def rounded_sum(old: Tensor, difference: Tensor) -> Tensor:
    """Their sum in the wider dtype of the two, rounded to the dtype of `old`."""
    if old.dtype.itemsize < difference.dtype.itemsize:  # a sum of two dtypes takes three times as long
        return old.to(difference.dtype).add_(difference).to(old.dtype)
    return (old + difference).to(old.dtype)


def rows(ids: Tensor, table: Tensor, difference: Tensor, padding: int | None = None) -> Tensor:
    """The rows `ids` [...] of a frozen table [V, d] plus a difference of it that may train, as [..., d] in the table's dtype.

    The bits of `F.embedding` on `shifted`, but the sum is made for these rows alone, and the gradient is summed up in the
    dtype of the difference. The row `padding` gets none.
    """
    y: Tensor = _Rows.apply(ids, table, difference, padding)  # type: ignore[no-untyped-call]
    return y


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, difference: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.like, ctx.padding = (len(difference), difference.dtype), -1 if padding is None else padding
        return rounded_sum(F.embedding(ids, table), F.embedding(ids, difference))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        count, dtype = ctx.like
        up = torch.ops.aten.embedding_dense_backward(grads[0].to(dtype), ids, count, ctx.padding, False)
        return None, None, up, None


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, old: Tensor, difference: Tensor) -> Tensor:
        ctx.dtype = difference.dtype
        return rounded_sum(old, difference)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0].to(ctx.dtype)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:  # fmt: skip
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)  # [N, in]
        a, b = A.to(dtype), (B if scale == 1.0 else B * scale).to(dtype)
        y = F.linear(flat, weight.to(dtype), None if bias is None else bias.to(dtype))  # [N, out]
        h = flat @ a.T  # [N, r]
        y.addmm_(h, b.T)
        ctx.save_for_backward(flat, h, weight, a, b)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, A.dtype, B.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, h, weight, a, b = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])  # [N, out]
        gb = g @ b  # [N, r]
        gx = gA = gB = None
        if ctx.needs_input_grad[0]:
            gx = (g @ weight.to(g.dtype)).addmm_(gb, a).to(ctx.dtypes[0]).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            gA = (gb.T @ flat).to(ctx.dtypes[1])
        if ctx.needs_input_grad[4]:
            gB = (g.T @ h).to(ctx.dtypes[2])
            gB = gB if ctx.scale == 1.0 else gB * ctx.scale
        return gx, None, None, gA, gB, None
