# SPDX-License-Identifier: Apache-2.0
"""RMS norms in one pass, frozen or with a weight that trains by plain differences.

    y = w * x r,  r = (mean(x^2) + eps)^(-1/2),    dL/dx = r (h - x r mean(h x r)),  h = g w,    dL/dw = sum g x r

in fp32, rounded to the dtype of x before the product with w, as the modules of transformers do it. Written out in small
operations a norm keeps three copies of its input for backward, two of them in fp32; here it keeps x and r.

Which modules are such norms is not a matter of names: the function takes a module's place where it gives the same bits and
the same gradient on a probe, for as long as a run lasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.apply import Answer, answering, current
from tunesmith.core.base import Base
from tunesmith.core.carriers import plain_differences
from tunesmith.core.fused import shifted
from tunesmith.core.sites import Site

_EPSILONS = ("variance_epsilon", "eps", "epsilon")


@contextmanager
def fused_norms(base: Base) -> Iterator[list[str]]:
    """Within the block the RMS norms that only plain differences act on, or nothing, run in one pass; gives their paths."""
    app = current(base)
    taken = app.plan if app is not None else {}
    answers: dict[str, Answer] = {}
    for site in base.sites.all():
        if site.kind == "norm" and all(hasattr(a.part.method, "differences") for a in taken.get(site.path, [])):
            eps = epsilon_of(site.module)
            if eps is not None:
                answers[site.path] = _answer(base, site, eps)
    if not answers:
        yield []
        return
    with answering(base, answers):
        yield list(answers)


def epsilon_of(module: nn.Module) -> float | None:
    """The epsilon of a frozen module that is an RMS norm with a weight, as `rms_norm` computes it; else None."""
    weight = getattr(module, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or weight.dim() != 1
        or weight.requires_grad
        or len(list(module.parameters())) != 1
    ):
        return None
    if next(module.buffers(), None) is not None or not weight.is_floating_point() or weight.is_meta:
        return None
    eps = next((getattr(module, n) for n in _EPSILONS if isinstance(getattr(module, n, None), float)), None)
    if eps is None:
        return None
    g = torch.Generator().manual_seed(0)
    x, up = (torch.randn(3, len(weight), generator=g).to(weight) for _ in range(2))
    try:
        with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
            one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
            want, got = type(module).forward(module, one), rms_norm(two, weight, eps)
            if not isinstance(want, Tensor) or want.dtype != got.dtype or not torch.equal(want, got):
                return None
            (slope,), (mine,) = torch.autograd.grad(want, one, up), torch.autograd.grad(got, two, up)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None  # a module that wants other arguments is none of ours
    near = torch.allclose(
        slope.float(), mine.float(), rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-2 * float(slope.abs().max())
    )
    return eps if near else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] over its root mean square, times a weight [d], in the dtype of both."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def _answer(base: Base, site: Site, eps: float) -> Answer:
    module: Any = site.module

    def answer(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        weight = module.weight
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].dtype != weight.dtype:
            return inner(*args, **kwargs)
        app = current(base)
        actions = app.plan.get(site.path) if app is not None else None
        moved = plain_differences(actions, {"weight": weight}) if actions else {}
        if moved is None:
            return inner(*args, **kwargs)
        return rms_norm(args[0], shifted(weight, moved["weight"]) if moved else weight, eps)

    return answer


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.float32)
        r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))  # [..., 1]
        ctx.save_for_backward(x, r, weight)
        return (wide * r).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, r, weight = ctx.saved_tensors
        n = x.to(torch.float32) * r  # x r
        up: Tensor | None = None
        if ctx.needs_input_grad[1]:
            up = (grads[0] * n).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, up, None
        h = (grads[0] * weight).to(torch.float32)
        h.addcmul_(n, (h * n).mean(-1, keepdim=True), value=-1.0)
        return h.mul_(r).to(x.dtype), up, None
