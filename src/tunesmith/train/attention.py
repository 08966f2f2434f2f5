# SPDX-License-Identifier: Apache-2.0
"""Attention products of a training step in bf16 on the CPU, block by block through the matrix units.

    P = softmax(q k^T scale + bias),  o = P v
    dv = P^T g,  dP = g v^T,  dS = P (dP - rowsum(dP P)),  dq = dS k scale,  dk = dS^T q scale

torch's own CPU kernel spends more time in its backward pass than all matrix products of a layer of a small model. Here P of
a block (some heads, `BLOCK` queries, the keys they may see) is one product and one softmax in the cache; it is made again in
backward, so nothing of size T x T is kept. Scores are rounded to bf16, softmax runs in fp32 inside.

With dropout o = (P m / (1 - p)) v for a mask m drawn as in `dropout`, one byte for each weight, which is kept for backward;
torch goes by small operations then and keeps three copies.

It takes the place of `F.scaled_dot_product_attention` for as long as a run lasts, whoever calls it; what it cannot do
(other dtypes and devices, a bias that trains) goes to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tunesmith.train.dropout import can_draw, dropped
from tunesmith.train.dropout import scale as scaling

BLOCK = 128  # queries at a time
ELEMENTS = 400_000  # scores at a time: 0.8 MB, which stays in the cache
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class BlockAttention(TorchFunctionMode):
    """Within the block bf16 attention on the CPU runs by `block_attention`; `taken` counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        if not fits(**given):
            return func(*args, **kwargs)
        self.taken += 1
        q, k, v = (given[n].to(torch.bfloat16) for n in _NAMES[:3])
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scale, p = given.get("scale"), given.get("dropout_p", 0.0)
        drop = dropped((q.shape[0] * q.shape[1], q.shape[2], k.shape[2]), p) if p else None
        return block_attention(
            q, k, v, given.get("attn_mask"), bool(given.get("is_causal")),
            1 / math.sqrt(q.shape[-1]) if scale is None else float(scale), drop, scaling(p) if p else 1.0,
        )  # fmt: skip


def fits(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> bool:  # fmt: skip
    """Whether `block_attention` can stand for the call."""
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if query.device.type != "cpu" or not (query.dtype == torch.bfloat16 or (half and query.dtype == torch.float32)):
        return False
    if dropout_p and not can_draw(dropout_p):
        return False
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or not query.numel():
        return False
    if key.shape[1] != query.shape[1] and not (enable_gqa and query.shape[1] % key.shape[1] == 0):
        return False
    if attn_mask is not None and (is_causal or attn_mask.requires_grad or attn_mask.dim() != 4):
        return False
    return not is_causal or query.shape[2] == key.shape[2]


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, drop: Tensor | None = None,
    kept: float = 1.0,
) -> Tensor:  # fmt: skip
    """softmax(q k^T scale + mask) v for q [B, H, T, d], k [B, H, S, d], v [B, H, S, d_v], all bf16.

    `mask` is boolean (True is seen) or added, and broadcasts to [B, H, T, S]. A row that sees nothing gives the mean of v.
    Weights where `drop` [B H, T, S] (boolean) is True count as 0, the others are multiplied by `kept`.
    """
    bias = None
    if mask is not None:
        low = torch.finfo(q.dtype).min
        bias = torch.zeros((), dtype=q.dtype).masked_fill(~mask, low) if mask.dtype == torch.bool else mask.to(q.dtype)
        bias = bias.clamp_min(low)  # no infinities: their difference is NaN
    B, H, T, _ = q.shape
    flat = [t.reshape(B * H, t.shape[2], t.shape[3]) for t in (q * scale, k, v)]
    out: Tensor = _Blocks.apply(*flat, bias, causal, H, drop, kept)  # type: ignore[no-untyped-call]
    return out.view(B, H, T, v.shape[3])


def _blocks(
    N: int, T: int, S: int, H: int, bias: Tensor | None, causal: bool
) -> Iterator[tuple[slice, slice, int, Any]]:
    """(rows of N, queries, keys seen, what is added to the scores or None: [n, t, s], or [n / H, H, t, s])."""
    triangle = torch.full((BLOCK, BLOCK), -math.inf, dtype=torch.bfloat16).triu(1) if causal else None
    alone = bias is not None and (bias.shape[0] > 1 or bias.shape[1] > 1)  # rows of N differ in what is added
    for start in range(0, T, BLOCK):
        end = min(T, start + BLOCK)
        seen = end if causal else S
        at_once = max(1, ELEMENTS // ((end - start) * seen))
        if bias is not None and alone and at_once >= H:  # whole rows of the batch at a time
            some = at_once // H
            for b in range(0, N // H, some):
                last = min(b + some, N // H)
                wide = bias[b:last] if bias.shape[0] > 1 else bias  # [n or 1, 1 or H, 1 or T, 1 or S]
                yield (
                    slice(b * H, last * H),
                    slice(start, end),
                    seen,
                    wide[:, :, start:end] if wide.shape[2] > 1 else wide,
                )
            continue
        groups = [(i, min(i + H, N)) for i in range(0, N, H)] if alone else [(0, N)]
        for first, last in groups:
            for n in range(first, last, at_once):
                rows = slice(n, min(last, n + at_once))
                more: Tensor | None = None
                if bias is not None:
                    more = bias[n // H if bias.shape[0] > 1 else 0]  # [1 or H, 1 or T, 1 or S]
                    more = more[n % H : n % H + rows.stop - rows.start] if more.shape[0] > 1 else more
                    more = more[:, start:end] if more.shape[1] > 1 else more
                elif triangle is not None:
                    more = triangle[: end - start, : end - start]
                yield rows, slice(start, end), seen, more


def _weights(q: Tensor, k: Tensor, more: Tensor | None, causal: bool, H: int) -> Tensor:
    s = torch.bmm(q, k.transpose(1, 2))  # [n, t, s]
    if more is not None:
        seen = s[:, :, -more.shape[-1] :] if causal else s if more.dim() == 3 else s.view(-1, H, *s.shape[1:])
        seen.add_(more)
    return torch.softmax(s, -1)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, causal: bool, H: int, drop: Any, kept: float
    ) -> Tensor:  # fmt: skip
        N, T, _ = q.shape
        out = q.new_empty(N, T, v.shape[2])
        for rows, at, seen, more in _blocks(N, T, k.shape[1], H, bias, causal):
            P = _weights(q[rows, at], k[rows, :seen], more, causal, H)
            if drop is not None:
                P.masked_fill_(drop[rows, at, :seen], 0.0)
            out[rows, at] = torch.bmm(P, v[rows, :seen])
        ctx.save_for_backward(q, k, v, bias, drop)
        ctx.causal, ctx.H, ctx.kept = causal, H, kept
        return out if kept == 1.0 else out.mul_(kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, drop = ctx.saved_tensors
        g = grads[0] if ctx.kept == 1.0 else grads[0] * ctx.kept
        gq, gk, gv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, at, seen, more in _blocks(*q.shape[:2], k.shape[1], ctx.H, bias, ctx.causal):
            some, keys, values, up = q[rows, at], k[rows, :seen], v[rows, :seen], g[rows, at]
            P = _weights(some, keys, more, ctx.causal, ctx.H)
            dP = torch.bmm(up, values.transpose(1, 2))
            left = P
            if drop is not None:
                out = drop[rows, at, :seen]
                left = P.masked_fill(out, 0.0)
                dP.masked_fill_(out, 0.0)
            gv[rows, :seen].baddbmm_(left.transpose(1, 2), up)
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
            gq[rows, at] = torch.bmm(dS, keys)
            gk[rows, :seen].baddbmm_(dS.transpose(1, 2), some)
        return gq, gk, gv, None, None, None, None, None
