# SPDX-License-Identifier: Apache-2.0
"""What the residual stream says at each depth, read by the model's own last norm and head (logit lens).

Blocks, last norm and head are found by structure. The read-out is checked on every batch: at the last block it must be
the model's own logits, else the model is refused. Deltas in use act, on the norm and the head too.

nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.carriers import hidden_of
from tunesmith.core.errors import UsageError
from tunesmith.core.trace import primary

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Lens:
    """The read-out of one base. Raises UsageError for a base without repeated blocks or output head."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.blocks = [s.path for s in base.sites.all() if s.kind == "block"]
        heads = base.sites.role("head")
        if not self.blocks or not heads:
            missing = "repeated blocks" if not self.blocks else "an output head"
            raise UsageError(f"the lens needs {missing}", where=base.name, hint="use a causal language model")
        traced = base.sites.trace
        self.head = next((h.path for h in heads if traced and h.path == traced.head), heads[0].path)
        outside = [s.path for s in base.sites.all() if s.kind == "norm" and base.sites.block_of(s.path) is None]
        ran = [p for p in (traced.order if traced else ()) if p in outside]
        rank = {p: i for i, p in enumerate(base.modules)}
        late = [p for p in (ran or outside) if rank[p] > rank[self.blocks[0]]]
        self.norm = late[-1] if late else None

    def read(self, h: Tensor) -> Tensor:
        """Logits [..., vocab] of residual states [..., d]."""
        if self.norm is not None:
            h = self.base.modules[self.norm](h)
        return self.base.modules[self.head](h)

    @torch.no_grad()
    def states(self, run: Callable[[], Any]) -> tuple[list[Tensor], Tensor]:
        """The residual stream [B, T, d] after each block of one forward pass, and the model's logits [B, T, vocab].

        Raises UsageError where reading the last state does not give the logits.
        """
        kept: list[Tensor] = []
        with self.base.evaluating(), self._watch(kept):
            logits = primary(run())
        if logits is None or logits.dim() != 3 or len(kept) != len(self.blocks):
            raise UsageError(
                "the lens needs logits [B, T, vocab] and blocks that run once a pass", where=self.base.name
            )
        with self.base.evaluating():
            gap = float((self.read(kept[-1]).float() - logits.float()).abs().max())
        if gap > _TOLERANCE.get(logits.dtype, 1e-4) * max(1.0, float(logits.abs().max())):
            raise UsageError(
                f"the model's logits are not its last state read by {self.norm or 'no norm'} and {self.head}: "
                f"they differ by {gap:.3g}", where=self.base.name,
                hint="logits that are capped or scaled after the head cannot be read this way",
            )  # fmt: skip
        return kept, logits

    @contextmanager
    def _watch(self, kept: list[Tensor]) -> Iterator[None]:
        def hook(_m: nn.Module, _args: Any, out: Any) -> None:
            kept.append(hidden_of(out)[0])

        handles = [self.base.modules[p].register_forward_hook(hook) for p in self.blocks]
        try:
            yield
        finally:
            for h in handles:
                h.remove()
