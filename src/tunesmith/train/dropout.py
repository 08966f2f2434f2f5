# SPDX-License-Identifier: Apache-2.0
"""Dropout on the CPU with its mask drawn four numbers at a time.

    y = x * m / (1 - p),  m = 1[u >= p],  u uniform over 65,536 values

torch's `bernoulli_` computes a double for every entry, which takes longer than what else a small encoder does between its
products. Here 64 random bits of torch's own generator decide four entries. p is rounded to a multiple of 1/65,536, and what
stays is scaled by the rounded one, so the mean is exact. The same seed gives the same mask, but not that of `F.dropout`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.apply import Answer, answering, current
from tunesmith.core.base import Base

LEVELS = 1 << 16


@contextmanager
def quick_dropouts(base: Base) -> Iterator[list[str]]:
    """Within the block the dropout layers that nothing acts on draw by `dropped`; gives their paths. For the CPU."""
    app = current(base)
    taken = app.plan if app is not None else {}
    answers = {
        path: _answer(m)
        for path, m in base.modules.items()
        if path not in taken and type(m).forward is nn.Dropout.forward and not m.inplace and can_draw(m.p)
    }
    if not answers:
        yield []
        return
    with answering(base, answers):
        yield list(answers)


def can_draw(p: float) -> bool:
    """Whether p rounds to a multiple of 1/65,536 above 0 and below 1."""
    return 1 <= round(p * LEVELS) < LEVELS


def _answer(module: Any) -> Answer:
    def answer(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training or len(args) != 1 or kwargs or not args[0].is_floating_point():
            return inner(*args, **kwargs)
        return quick_dropout(args[0], module.p)

    return answer


def quick_dropout(x: Tensor, p: float) -> Tensor:
    """x [...] with entries dropped at random with probability p, in its dtype; 0 < p < 1."""
    return x * (~dropped(x.shape, p)).to(x.dtype).mul_(scale(p))


def dropped(shape: Sequence[int], p: float) -> Tensor:
    """A boolean tensor, True with probability p, from torch's default generator on the CPU."""
    size = prod(shape)
    bits = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None)
    return (bits.view(torch.int16)[:size] < round(p * LEVELS) - LEVELS // 2).view(*shape)


def scale(p: float) -> float:
    """What the entries that stay are multiplied by: one over the share of them."""
    return LEVELS / (LEVELS - round(p * LEVELS))
