# SPDX-License-Identifier: Apache-2.0
"""FSDP2: the frozen base in shards over the processes of a run, the delta whole in each.

What is large and does not train is the base; a delta is small, and its methods look at whole tensors between steps. So
the base alone is sharded, gathered block by block as they are reached, and the delta's gradients are summed by one
exchange a step. The user's module keeps its own tensors and classes: a copy of its tree is sharded and dropped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.core.apply import current, sharing_copy
from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.train.processes import world

if TYPE_CHECKING:
    from accelerate import Accelerator


def wanted() -> bool:
    """Whether the launcher asked for it (`accelerate launch --use_fsdp`) and there is more than one process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes") and world() > 1


@contextmanager
def sharded(base: Base) -> Iterator[Base]:
    """A base of the same weights, of which each process holds a part; deltas in use on `base` are in use on it.

    Repeated blocks are sharded, what lies outside them is whole in each process; a model without blocks is one shard
    group. The process group must be there, and every process must run the same forward passes. While it lasts, a base
    on an accelerator waits in main memory. Raises UsageError for a base with packed or factored layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if any(s.held for s in base.sites.all()):
        hint = "start it without --use_fsdp: packed and factored layers are small enough to be whole in each process"
        raise UsageError("a base with packed or factored layers cannot be sharded", where=base.name, hint=hint)
    device = base.device
    twin = Base(
        sharing_copy(base.model), tokenizer=base.tokenizer, example=base.probe(), name=base.name, family=base.family,
        source=base.source,
    )  # fmt: skip
    twin.__dict__["fingerprint"] = base.fingerprint
    blocks = [s.module for s in twin.sites.all() if s.kind == "block"]  # found while the tensors are whole
    inside = {p for b in blocks for p in b.parameters()}
    # Objectives read embeddings and head on their own, outside a pass of the whole model.
    outside = {p for p in twin.model.parameters() if p not in inside} if blocks else None
    mesh = init_device_mesh(device.type, (world(),))
    for module in blocks:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(twin.model, mesh=mesh, reshard_after_forward=True, ignored_params=outside)
    with ExitStack() as stack:
        if device.type != "cpu":
            base.model.to("cpu")
            stack.callback(base.model.to, device)
        app = current(base)
        if app is not None:
            stack.enter_context(twin.using(*app.stack, check=False))
        yield twin


@torch.no_grad()
def average_gradients(params: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Replace each gradient by its mean over the processes; what no process reached stays without one."""
    reached = torch.tensor([p.grad is not None for p in params], dtype=torch.float32, device=params[0].device)
    chosen = [p for p, any_ in zip(params, accelerator.reduce(reached, "sum").tolist(), strict=True) if any_]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for p in chosen:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        by_dtype.setdefault(p.dtype, []).append(p.grad)
    for grads in by_dtype.values():
        flat = accelerator.reduce(torch.cat([g.reshape(-1) for g in grads]), "mean")
        for g, value in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(value.view_as(g))
