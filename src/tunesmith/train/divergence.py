# SPDX-License-Identifier: Apache-2.0
"""How far a delta moves what the base predicts, as a loss: KL(base || base + delta), summed over rows or tokens.

The base is this model with the delta off; nothing is copied. Where the model ends in a linear head, logits exist a chunk at
a time for both (`core/head_loss.py`); everything else goes by full logits, which is also the plain form (`fused.plain()`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core import fused
from tunesmith.core.algebra import wide
from tunesmith.core.apply import current
from tunesmith.core.base import Base
from tunesmith.core.carriers import plain_differences
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.features import features
from tunesmith.core.head_loss import weight_divergence
from tunesmith.core.sites import Site
from tunesmith.core.trace import primary


def divergence(
    base: Base, delta: Delta, run: Callable[[], Any], keep: Tensor | None = None, *, where: str = "divergence"
) -> tuple[Tensor, int]:
    """(summed KL in fp32 or wider, how many rows or tokens) of what `run()` gives without and with the delta.

    `run` calls the base's model; `keep` is a mask over positions, used where it has their shape. The gradient reaches the
    student alone. Raises UsageError for a delta whose output has another shape than the base's.
    """

    def teacher(read: Callable[[], Tensor]) -> Tensor:
        with ExitStack() as stack:
            for context in (torch.no_grad(), delta.off(), base.evaluating()):
                stack.enter_context(context)
            return read()

    def picked(t: Tensor) -> Tensor:
        return t[keep.bool()] if keep is not None and keep.shape == t.shape[:-1] else t.flatten(0, -2)

    head = _head(base, delta)
    if head is not None:
        own: dict[str, Tensor] = {n: p for n, p in head.module._parameters.items() if p is not None}
        app = current(base)
        actions = app.plan.get(head.path) if app is not None else None
        moved = plain_differences(actions, own) if actions else {}
        if moved is not None:
            known, mine = teacher(lambda: features(base, {}, run)), features(base, {}, run)
            if known.shape == mine.shape:
                before, t, h = own.get("bias"), picked(known), picked(mine)
                bias = before if before is None or "bias" not in moved else fused.shifted(before, moved["bias"])
                return weight_divergence(h, t, own["weight"], bias, moved.get("weight"), before), len(h)

    def logits() -> Tensor:
        found = primary(run())
        if found is None:
            raise UsageError("the model's output holds no tensor", where=where)
        return found

    known, mine = teacher(logits), logits()
    if known.shape != mine.shape or mine.dim() < 2 or mine.shape[-1] < 2:
        what = f"the base gives {list(known.shape)}, with the delta {list(mine.shape)}"
        hint = "it needs a delta that leaves the meaning of the outputs alone (no new head), and classes or tokens"
        raise UsageError(what, where=where, hint=hint)
    p, q = (F.log_softmax(wide(picked(z)), dim=-1) for z in (known, mine))
    return F.kl_div(q, p, reduction="sum", log_target=True), len(q)


def _head(base: Base, delta: Delta) -> Site | None:
    """The linear layer whose product is the model's output, where that of teacher and student differ by plain means only."""
    traced = base.sites.trace
    if fused.is_plain() or traced is None or not traced.head or not traced.direct:
        return None
    if any(part.info.carrier == "output" for part in delta.parts):
        return None
    head = base.sites[traced.head]
    if head.kind != "linear" or head.held or head.transposed or head.shape[0] < 2:
        return None
    with delta.off():
        app = current(base)
        return None if app is not None and app.plan.get(head.path) else head
