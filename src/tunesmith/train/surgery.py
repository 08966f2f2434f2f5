# SPDX-License-Identifier: Apache-2.0
"""What a method may do to the optimiser in mid-run: reset moments, slow a step, or replace a tensor with its moments.

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
from tunesmith.core.errors import UsageError
from tunesmith.core.sites import SiteMap


@dataclass
class Now:
    """One moment of a run, for one part.

    `step` counts from 1 and is the step being taken; `rate` is lr / peak lr; `sites` is the base's map of sites; `scale` is
    what gradients are still multiplied by in `before_step` (the loss scale of fp16, else 1).
    """

    part: Part
    step: int
    total: int
    rate: float
    optimiser: torch.optim.Optimizer
    on_change: Callable[[], None] = field(default=lambda: None)
    sites: SiteMap | None = None
    scale: float = 1.0

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

    def slow(self, factor: float) -> None:
        """Multiply the learning rate of the part's tensors by `factor`, in this step alone. For `before_step`."""
        mine = {id(t) for _, _, t in self.part.items()}
        # The loop makes groups for each part, and sets their rates anew at every step.
        for group in self.optimiser.param_groups:
            if any(id(p) in mine for p in group["params"]):
                group["lr"] *= factor

    @torch.no_grad()
    def replace(self, path: str, name: str, value: Tensor, *, keep: Tensor | None = None, dim: int = 0) -> None:
        """Put `value` in the tensor's place, of any shape; it trains as the old one did, in its dtype, on its device.

        `keep` [value.shape[dim]] int64 says where along `dim` each entry was before, -1 for a new one: moments (and a
        gradient that is there) of survivors are carried over, those of newcomers are zero. Adam counts steps for the
        whole tensor, so newcomers among survivors miss its bias correction and take larger steps at first. Without `keep`
        the tensor starts with no moments and a count of zero. A value of the old shape is copied in place.

        Raises UsageError for a `keep` that does not fit the two shapes.
        """
        old = self.part.parameter(path, name)
        if keep is not None:
            keep = keep.to(old.device)
            _check_keep(old, value, keep, dim, f"{self.part.name}/{path}/{name}")
        state = self.optimiser.state.pop(old, {})
        grad = None if keep is None or old.grad is None else _carried(old.grad, old, keep, dim)
        if value.shape == old.shape:
            old.copy_(value.clone())  # it may be a view of the tensor itself
            new = old
        else:
            self.part.put(path, name, value.to(old), trainable=old.requires_grad)
            new = self.part.parameter(path, name)
            for group in self.optimiser.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
        new.grad = grad
        if keep is not None and state:
            self.optimiser.state[new] = {k: _carried(v, old, keep, dim) for k, v in state.items()}
        if new is not old and new.requires_grad:
            self.on_change()


def _check_keep(old: Tensor, value: Tensor, keep: Tensor, dim: int, where: str) -> None:
    """Refuse a map that does not lead from the old shape to the new one along `dim`."""
    if old.dim() != value.dim() or not -old.dim() <= dim < old.dim():
        raise UsageError(f"moments of {tuple(old.shape)} cannot go to {tuple(value.shape)} along {dim}", where=where)
    others = [i for i in range(old.dim()) if i != dim % old.dim()]
    if keep.shape != (value.shape[dim],) or any(old.shape[i] != value.shape[i] for i in others):
        what = f"keep of {tuple(keep.shape)} does not lead from {tuple(old.shape)} to {tuple(value.shape)} along {dim}"
        raise UsageError(
            what, where=where, hint="one entry for each index of the new tensor; without keep any shape goes"
        )
    if len(keep) and not -1 <= int(keep.min()) <= int(keep.max()) < old.shape[dim]:
        raise UsageError(f"keep names places outside -1..{old.shape[dim] - 1}", where=where)


def _carried(value: Any, old: Tensor, keep: Tensor, dim: int) -> Any:
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value  # the step count
    dim = dim % old.dim()
    found = value.index_select(dim, keep.clamp_min(0)) if value.shape[dim] else value.new_zeros(
        [len(keep) if i == dim else n for i, n in enumerate(value.shape)]
    )  # fmt: skip
    fresh = (keep < 0).reshape([-1 if i == dim else 1 for i in range(value.dim())])
    return found.masked_fill(fresh, 0)
