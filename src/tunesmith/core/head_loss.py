# SPDX-License-Identifier: Apache-2.0
"""Losses over the outputs of a linear head, from what the head reads: in chunks, without ever holding all logits.

Cross-entropy with labels, and the divergence from a teacher that has the same head: sum_i KL(p(t_i) || p(h_i)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.core.algebra import wide
from tunesmith.core.apply import checkpoint_contexts
from tunesmith.core.fused import rounded_sum

CHUNK_ELEMENTS = 16_000_000  # logits held at once: 64 MB in fp32
TILE_ELEMENTS = 400_000  # logits worked on at once: 1.6 MB in fp32, which stays in the cache


def _accumulator(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32


class _Head(torch.autograd.Function):
    """sum_i -log softmax(W h_i + b)[y_i]: gradients are made in the forward pass, those of W and b where they train.

    A chunk of logits is one product in the dtype of the products; softmax runs over it in tiles of rows that fit in the
    processor's cache, in fp32 or wider, and leaves p - 1[y] in the place of the logits for the product back. With a
    `difference` W is the sum of a frozen weight and of it, and the difference gets the gradient, in its own dtype. With a
    `teacher` (what the frozen weight reads for each row, and its bias) the loss is the divergence, and p - p_teacher is left.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, difference: Tensor | None, bias: Tensor | None, y: Tensor | None,
        teacher: tuple[Tensor, Tensor | None] | None, elements: int, tile: int,
    ) -> Tensor:  # fmt: skip
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (h, weight, difference, bias))
        whole = weight.detach() if difference is None else rounded_sum(weight.detach(), difference.detach())
        narrow, whole = h.detach().to(dtype), whole.to(dtype)
        bias = None if bias is None else bias.detach().to(dtype)
        V, trains = len(whole), any(ctx.needs_input_grad[1:3])
        if trains and dtype.itemsize < _accumulator(h).itemsize:
            elements = max(elements, 2 * whole.numel())  # logits of no more bytes than the gradient in fp32
        rows, short = max(1, min(elements // V, len(h))), max(1, tile // V)
        need = any(ctx.needs_input_grad[:4])
        grad = torch.empty_like(narrow) if ctx.needs_input_grad[0] else None
        up: Tensor | None = None  # of W; over several chunks in fp32 or wider
        shift = torch.zeros(V, dtype=_accumulator(h), device=h.device) if ctx.needs_input_grad[3] else None
        total = torch.zeros((), dtype=_accumulator(h), device=h.device)
        held = torch.empty(rows, V, dtype=dtype, device=h.device)  # [n, V]
        known = None if teacher is None else _Known(*teacher, weight, dtype, rows)
        for i in range(0, len(h), rows):
            part = narrow[i : i + rows]
            logits = held[: len(part)]
            torch.mm(part, whole.T, out=logits)
            if bias is not None:
                logits += bias
            theirs = None if known is None else known.logits(i, i + len(part))
            for j in range(0, len(part), short):
                some = logits[j : j + short]
                if theirs is not None:
                    total += _to_gap(some, theirs[j : j + short], need)
                elif y is not None:
                    total += _to_softmax(some, y[i + j : i + j + len(some), None], need)
            if grad is not None:
                torch.mm(logits, whole, out=grad[i : i + rows])
            if trains:
                up = _plus_product(up, logits.T, part, _accumulator(h))
            if shift is not None:
                shift += logits.sum(0, dtype=shift.dtype)
        if trains and up is None:
            up = torch.zeros_like(whole)
        ctx.at = [0] * (grad is not None) + [1 if difference is None else 2] * trains + [3] * (shift is not None)
        ctx.save_for_backward(*(g for g in (grad, up, shift) if g is not None))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * 8
        for i, g in zip(ctx.at, ctx.saved_tensors, strict=True):
            made = g.to(ctx.dtypes[i])
            found[i] = made * outputs[0].to(made.dtype) if made is g else made.mul_(outputs[0])
        return tuple(found)


class _Known:
    """The logits of a teacher, a chunk at a time in one place: states [N, d] under a frozen head."""

    def __init__(self, states: Tensor, bias: Tensor | None, weight: Tensor, dtype: torch.dtype, rows: int) -> None:
        self.states, self.weight = states.detach().to(dtype), weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.held = torch.empty(rows, len(weight), dtype=dtype, device=states.device)

    def logits(self, start: int, end: int) -> Tensor:
        out = self.held[: end - start]
        torch.mm(self.states[start:end], self.weight.T, out=out)
        return out if self.bias is None else out.add_(self.bias)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """total + a b; the first product stays in its own dtype, sums of several are at least `wide`."""
    if total is None:
        return a @ b
    if total.dtype == a.dtype and a.dtype.itemsize >= wide.itemsize:
        return total.addmm_(a, b)
    return total.to(wide).add_((a @ b).to(wide))


def _to_softmax(logits: Tensor, target: Tensor, need: bool) -> Tensor:
    """The summed loss of logits [n, V] for targets [n, 1]; with `need`, the logits become softmax - 1[target]."""
    z = wide(logits)  # the logits themselves when they are wide already
    high = z.amax(1, keepdim=True)
    chosen = z.gather(1, target)
    e = z.sub_(high).exp_()
    total = e.sum(1, keepdim=True)
    loss = (total.log() + high - chosen).sum()
    if need:
        e.div_(total).scatter_add_(1, target, torch.full_like(chosen, -1.0))
        if e is not logits:
            logits.copy_(e)
    return loss


def _to_gap(logits: Tensor, theirs: Tensor, need: bool) -> Tensor:
    """The summed KL of p = softmax(theirs) from q = softmax(logits), both [n, V]; with `need`, the logits become q - p."""
    q, p = (F.log_softmax(wide(z), dim=1) for z in (logits, theirs))
    shares = p.exp()
    loss = (p.sub_(q).mul_(shares)).sum()
    if need:
        logits.copy_(q.exp_().sub_(shares))
    return loss


def weight_loss(
    h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, difference: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Summed cross-entropy of hidden states h [N, d] under a head W [V, d] and b [V], frozen or trained, with labels y [N].

    With `difference` [V, d] the head is a frozen `weight` plus it, rounded to the dtype of the weight. Products run in the
    dtype of the head, or in autocast's; the rest in fp32 (fp64 for a base in fp64).
    """
    tile = TILE_ELEMENTS if h.device.type == "cpu" else CHUNK_ELEMENTS  # a GPU has no use for many small kernels
    loss: Tensor = _Head.apply(h, weight, difference, bias, y, None, CHUNK_ELEMENTS, tile)  # type: ignore[no-untyped-call]
    return loss


def weight_divergence(
    h: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, difference: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Summed KL(softmax(W t_i + b0) || softmax(W' h_i + b)) of states h [N, d] from a teacher's t [N, d].

    W [V, d] and b0 [V] are the teacher's; W' is W, or W plus a `difference` [V, d]. Gradients reach h, `bias` and
    `difference` (or `weight`, as the student's), never the teacher. Number formats as in `weight_loss`.
    """
    tile = TILE_ELEMENTS if h.device.type == "cpu" else CHUNK_ELEMENTS
    known = (teacher, teacher_bias)
    loss: Tensor = _Head.apply(h, weight, difference, bias, None, known, CHUNK_ELEMENTS, tile)  # type: ignore[no-untyped-call]
    return loss


def head_loss(h: Tensor, head: Callable[[Tensor], Tensor], y: Tensor, width: int) -> Tensor:
    """The same for a head that is adapted in any other way: each chunk of logits is recomputed in backward."""
    rows = max(1, CHUNK_ELEMENTS // width)

    def chunk(part: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(wide(head(part)), target, reduction="sum")

    total = torch.zeros((), dtype=_accumulator(h), device=h.device)
    for i in range(0, max(1, h.shape[0]), rows):  # once also without rows, so that there is a gradient (of zero)
        part, target = h[i : i + rows], y[i : i + rows]
        if torch.is_grad_enabled():
            total = total + checkpoint(chunk, part, target, use_reentrant=False, context_fn=checkpoint_contexts)
        else:
            total = total + chunk(part, target)
    return total
