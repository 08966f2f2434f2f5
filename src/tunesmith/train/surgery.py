# SPDX-License-Identifier: Apache-2.0
"""What a method may do to the optimiser in mid-run: reset moments, or replace a tensor and carry its moments over.

`before_step(part, now)` sees gradients, `after_step(part, now)` the stepped tensors; `now` is a `Now`. A method that
prunes, grows or re-selects what it trains calls `now.replace`, so that survivors keep their moments and newcomers start
from nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.delta import Part


@dataclass
class Now:
    """One moment of a run, for one part. `step` counts from 1 and is the step being taken; `rate` is lr / peak lr."""

    part: Part
    step: int
    total: int
    rate: float
    optimiser: torch.optim.Optimizer
    on_change: Callable[[], None] = field(default=lambda: None)

    def state(self, path: str, name: str) -> dict[str, Any]:
        """The optimiser's state of a tensor (for AdamW `exp_avg`, `exp_avg_sq`, `step`), live; empty before its first."""
        return self.optimiser.state.get(self.part.parameter(path, name), {})

    def reset(self, path: str, name: str) -> None:
        """Forget the moments and the step count of a tensor."""
        self.optimiser.state.pop(self.part.parameter(path, name), None)

    def learning_rate(self, path: str, name: str) -> float:
        """The rate at which the tensor steps now (0.0 for one that does not train)."""
        p = self.part.parameter(path, name)
        return next((float(g["lr"]) for g in self.optimiser.param_groups if any(q is p for q in g["params"])), 0.0)

    @torch.no_grad()
    def replace(self, path: str, name: str, value: Tensor, *, keep: Tensor | None = None, dim: int = 0) -> None:
        """Put `value` in the tensor's place, of any shape; it trains as the old one did.

        `keep` [value.shape[dim]] int64 says where along `dim` each entry was before, -1 for a new one: moments of
        survivors are carried over, those of newcomers are zero. Without it the tensor starts with no moments.
        """
        old = self.part.parameter(path, name)
        state = self.optimiser.state.pop(old, {})
        self.part.put(path, name, value, trainable=old.requires_grad)
        new = self.part.parameter(path, name)
        for group in self.optimiser.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        if keep is not None and state:
            self.optimiser.state[new] = {k: _carried(v, old, keep, dim) for k, v in state.items()}
        self.on_change()


def _carried(value: Any, old: Tensor, keep: Tensor, dim: int) -> Any:
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value  # the step count
    found = value.index_select(dim, keep.clamp_min(0)) if value.shape[dim] else value.new_zeros(
        [len(keep) if i == dim else n for i, n in enumerate(value.shape)]
    )  # fmt: skip
    fresh = (keep < 0).reshape([-1 if i == dim else 1 for i in range(value.dim())])
    return found.masked_fill(fresh, 0)
