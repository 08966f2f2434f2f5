# SPDX-License-Identifier: Apache-2.0
"""Watch a run: what should train moves, nothing else does, and where a non-finite value began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import TrainingError
from tunesmith.train.tasks import Task, moved

# A factor that starts at zero gives its partner no gradient in the first step; by the third all must have moved.
PATIENCE = 3
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Guard:
    """Compares tensors before and after the first steps. Raises TrainingError naming what did not behave.

    Without `moving` (a learning rate of zero, or the late steps of a resumed run, too small to show in every tensor)
    only what must stay is watched. Without `all_move` (a delta that was trained before and goes on, where a method may
    have pruned a site for good) one tensor that moves is enough.
    """

    def __init__(self, base: Base, delta: Delta, *, moving: bool = True, all_move: bool = True) -> None:
        self.base, self.delta, self.moving, self.all_move = base, delta, moving, all_move
        self.done = 0
        self.start = {k: checksum(t) for k, t in delta.items()}
        # What a method keeps beside its parameters and writes itself: running statistics, masks, scores.
        self.own = {*STATISTICS, *(n for p in delta.parts if hasattr(p.method, "books") for n in p.method.books())}
        self.frozen = self._base()

    def _base(self) -> dict[str, int]:
        tensors = [*self.base.model.named_parameters(), *self.base.model.named_buffers()]
        return {n: checksum(t) for n, t in tensors}

    def after(self, step: int, finite: bool) -> None:
        """Call once after every optimiser step, with whether it was taken."""
        if not self.start or not finite:
            return
        self.done += 1
        moved = {k for k, t in self.delta.items() if self.start.get(k) != checksum(t)}
        trains = {k for k, t in self.delta.items() if t.requires_grad and t.numel()}
        if self.done == 1:
            self.base_unchanged()
            stray = sorted(k for k in moved - trains if k.rsplit("/", 1)[-1] not in self.own)
            if stray:
                raise TrainingError("frozen tensors of the delta moved", where=", ".join(stray[:3]))
            if not self.moving:
                self.start = {}
                return
            if not moved & trains:
                raise TrainingError("no tensor moved in the first step", hint="is the loss connected to the delta?")
        if self.done >= PATIENCE or not trains - moved:
            still = sorted(trains - moved)
            if still and self.all_move:
                raise TrainingError(
                    f"{len(still)} of {len(trains)} trainable tensors did not move in {self.done} steps",
                    where=", ".join(still[:3]), hint="they get no gradient: does the loss reach these sites?",
                )  # fmt: skip
            self.start = {}

    def base_unchanged(self) -> None:
        """Raise TrainingError naming the tensors of the base that are not as they were."""
        now = self._base()
        changed = [n for n, value in self.frozen.items() if now.get(n) != value]
        if changed:
            raise TrainingError(f"{len(changed)} frozen tensors of the base moved", where=", ".join(changed[:3]))


def checksum(t: Tensor) -> int:
    """A sum over every bit pattern of a tensor: one pass, no copy, and any single change shows."""
    t = t.to_local() if hasattr(t, "to_local") else t  # the part of a sharded tensor that is held here
    flat = t.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if not flat.numel():
        return 0
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return int(flat.view(size).sum(dtype=torch.int64))


@torch.no_grad()
def poisoned(base: Base, task: Task, indices: Sequence[int], epoch: int) -> list[int]:
    """The rows of a batch whose own loss is not finite; all of them when no single one is."""
    if len(indices) < 2:
        return list(indices)
    found = []
    for i in indices:
        loss = task.objective.loss(base, moved(task.batch([i], epoch), base.device))
        if not bool(torch.isfinite(loss)):
            found.append(i)
    return found or list(indices)


@torch.no_grad()
def locate_nonfinite(base: Base, task: Task, batches: list[dict[str, Any]]) -> str:
    """The first layer whose output is not finite on the given batches, or that the gradient is at fault."""
    found: list[str] = []

    def watch(path: str) -> Any:
        def hook(_m: nn.Module, _args: Any, out: Any) -> None:
            values = out if isinstance(out, tuple | list) else list(out.values()) if isinstance(out, Mapping) else [out]
            for v in values:
                if isinstance(v, Tensor) and v.is_floating_point() and not bool(torch.isfinite(v).all()):
                    found.append(path)

        return hook

    handles = [m.register_forward_hook(watch(p)) for p, m in base.modules.items() if p]
    try:
        for batch in batches:
            loss = task.objective.loss(base, batch)
            if found:
                return f"layer {found[0]}"
            if not bool(torch.isfinite(loss)):
                return "the loss itself"
    finally:
        for h in handles:
            h.remove()
    return "the gradient"
