# SPDX-License-Identifier: Apache-2.0
"""Gradient dropout: keep the task's gradient where it agrees with staying what the base is.

    a = gradient of the loss,  b = gradient of mean KL(base || base + delta) on the same batch
    P = (1 + sign(a) (a + b) / (|a| + |b| + 1e-8)) / 2,  gradient used = ((1 - l) + l 1[P > U]) a,  U uniform in 0..1

entry by entry, for any delta. Where the two agree P is 1; where b = -k a it is 1 / (1 + k), so an opposed gradient still
passes now and then. The base is this model with the delta off; nothing is copied. It costs two more forward passes and
one more backward pass a step.

R-AMT: Zheng et al. 2023, arXiv 2307.15049.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.train.divergence import divergence
from tunesmith.train.tasks import Task, moved, outputs

EPSILON = 1e-8


def keep_probability(a: Tensor, b: Tensor) -> Tensor:
    """P of two gradients of one shape."""
    return (1 + a.sign() * (a + b) / (a.abs() + b.abs() + EPSILON)) / 2


def dropped(a: Tensor, b: Tensor, U: Tensor, share: float) -> Tensor:
    """The gradient used: ((1 - share) + share 1[P > U]) a."""
    return ((1 - share) + share * (keep_probability(a, b) > U).to(a.dtype)) * a


class Agreement:
    """Drops gradients of one run; `share` is l, in 0..1."""

    def __init__(self, base: Base, delta: Delta, task: Task, share: float, seed: int) -> None:
        self.base, self.delta, self.task, self.share, self.seed = base, delta, task, share, seed

    def drop(
        self,
        step: int,
        batches: Sequence[Any],
        params: Mapping[str, Tensor],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scale: float = 1.0,
    ) -> None:
        """Change the gradients of `params` in place; U is a function of the seed and the step.

        `scale` is the factor that the gradients already carry (fp16). Raises UsageError for a delta whose output has
        another shape than the base's.
        """
        names = [k for k, p in params.items() if p.grad is not None]
        tensors = [params[k] for k in names]
        total: list[Tensor] = [torch.zeros_like(p) for p in tensors]
        count = 0
        for batch in batches:
            with context():
                loss, n = self.divergence(moved(batch, self.base.device))
            count += n
            found = torch.autograd.grad(loss * scale, tensors, allow_unused=True)
            total = [t if g is None else t + g for t, g in zip(total, found, strict=True)]
        g = torch.Generator().manual_seed(_seed(self.seed, step))
        for p, b in zip(tensors, total, strict=True):
            assert p.grad is not None
            U = torch.rand(p.shape, generator=g).to(p.device)
            p.grad = dropped(p.grad, b / max(1, count), U, self.share)

    def divergence(self, batch: Any) -> tuple[Tensor, int]:
        """KL(base || base + delta) summed over the batch's rows, or real tokens, and how many there are."""
        keep = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        run = partial(outputs, self.task, self.base, batch)
        return divergence(self.base, self.delta, run, keep, where="gradient_dropout")


def _seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"dropout:{seed}:{step}".encode()).digest()[:8], "big") >> 1
