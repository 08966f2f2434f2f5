# SPDX-License-Identifier: Apache-2.0
"""Two guards at decode time: the aligned model writes the first tokens, or a stock refusal does.

Hand-off (aligned-model defence):    y_1 .. y_k ~ pi_aligned(. | x),    y_{k+1} .. ~ pi_tuned(. | x, y_<=k)

At the hand-off the tuned model reads prompt and first tokens under its delta (exact), or goes on from the cache that was
filled without it (`recompute=False`, an approximation that saves one pass). Forced refusal (`Forced`): the first tokens
are given, and the tuned model continues.

Neither vouches for what comes after: a model taught to refuse first and answer then passes both. Judge whole answers.

Kazdan et al. 2025, arXiv 2502.19537; k = 15 there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.decoding import Member, decoder, vocabulary
from tunesmith.core.errors import UsageError
from tunesmith.core.reading import can_cache


@dataclass(frozen=True)
class Handoff:
    """The first of two members writes `k` tokens, the second the rest. Made by `handoff`."""

    members: tuple[Member, Member]
    size: int
    k: float = 15
    recompute: bool = True

    @property
    def caches(self) -> tuple[int, int]:
        return (0, 1) if self.recompute else (0, 0)

    def needs(self, step: int) -> tuple[int]:
        """The one whose turn it is."""
        return (0,) if step < self.k else (1,)

    def step(self, logits: Mapping[int, Tensor], step: int, rows: int) -> Tensor:
        """log p [rows, V] of the one whose turn it is."""
        return torch.log_softmax(logits[self.needs(step)[0]][:, : self.size].float(), -1)


@decoder("handoff")
def handoff(base: Any, delta: Any, k: float = 15, *, aligned: Any = None, recompute: bool = True) -> Handoff:
    """Write `k` tokens without `delta`, then on with it.

    Args:
        base: what the delta is of.
        k: 0 is the tuned model, `math.inf` the aligned one.
        aligned: the model that begins, where it is not the base itself.
        recompute: read prompt and first tokens anew under the delta; else keep the cache, which needs one base for both.
    Raises UsageError for vocabularies that differ, a `k` that is no whole number of 0 or more, or a cache that cannot be
    kept.
    """
    if isinstance(k, bool) or not (k == math.inf or (k >= 0 and float(k).is_integer())):
        raise UsageError(f"must be a whole number of tokens or infinity, got {k!r}", where="k")
    first = Member.of(base if aligned is None else aligned, Member.of(base).base)
    second = Member.of(delta, Member.of(base).base)
    if not recompute:
        if first.base is not second.base:
            raise UsageError("a cache cannot be handed to another base", where="recompute", hint="recompute=True")
        for m in (first, second):
            with m.base.using(*m.deltas):
                if not can_cache(m.base):
                    raise UsageError("it keeps no cache to hand on", where=m.base.name, hint="recompute=True")
    return Handoff((first, second), vocabulary((first, second)), k, recompute)


@dataclass(frozen=True)
class Forced:
    """A member that continues tokens which are given (`forced`): they cost no pass of their own."""

    members: tuple[Member]
    size: int
    tokens: tuple[int, ...]
    caches: tuple[int] = (0,)

    def needs(self, step: int) -> tuple[int, ...]:
        """Nobody while tokens are given."""
        return () if step < len(self.tokens) else (0,)

    def step(self, logits: Mapping[int, Tensor], step: int, rows: int) -> Tensor:
        """log p [rows, V]: certainty while tokens are given."""
        if step < len(self.tokens):
            out = torch.full((rows, self.size), -math.inf)
            out[:, self.tokens[step]] = 0.0
            return out
        return torch.log_softmax(logits[0][:, : self.size].float(), -1)


@decoder("forced")
def forced(base: Any, delta: Any, tokens: Sequence[int]) -> Forced:
    """Begin every answer with `tokens` (a short refusal), then let the tuned model go on. Raises UsageError."""
    member = Member.of(delta, Member.of(base).base)
    size = vocabulary((member,))
    if not tokens or not all(0 <= t < size for t in tokens):
        raise UsageError(f"token numbers from 0 to {size - 1} are wanted", where="tokens")
    return Forced((member,), size, tuple(tokens))
