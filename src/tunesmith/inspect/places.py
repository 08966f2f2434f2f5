# SPDX-License-Identifier: Apache-2.0
"""Which tensors a probe looks at, and how a row of its table names one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.changes import Change, changes, elsewhere
from tunesmith.core.delta import Delta, View, as_view
from tunesmith.core.errors import UsageError
from tunesmith.core.sites import WEIGHTED, Site
from tunesmith.core.spectrum import SVD, svd

TARGETS = "which of the changed layers to look at, as targets of a method; empty for all"
EVERY = "look at every so many-th depth only"


def seen(base: Base, delta: Delta | View, targets: str = "", every: int = 1) -> Iterator[Change]:
    """The changed tensors at the chosen sites, one by one. Raises UsageError where the delta changes no tensor there."""
    wanted = _wanted(base, targets, every)
    any_seen = False
    for change in changes(base, delta, strict=False, only=wanted):
        any_seen = True
        yield change
    if not any_seen:
        raise UsageError("the delta changes no tensor of the base here", where=as_view(delta).delta.name,
                         hint=_why_none(base, delta, targets, every))  # fmt: skip


def matrices(base: Base, delta: Delta | View, targets: str = "", every: int = 1) -> Iterator[Change]:
    """As `seen`, only weights of two or more axes. Raises UsageError where none of them changes."""
    any_seen = False
    for change in seen(base, delta, targets, every):
        if change.name == "weight" and len(change.update.shape) > 1:
            any_seen = True
            yield change
    if not any_seen:
        raise UsageError("the delta changes no weight matrix here", where=as_view(delta).delta.name,
                         hint="it changes biases or norms only; the probes norms, drift and localisation read those")  # fmt: skip


def _wanted(base: Base, targets: str, every: int) -> Callable[[Site], bool]:
    named = {s.path for s in base.sites.select(targets, (*WEIGHTED, "norm"))} if targets else None
    return lambda s: (named is None or s.path in named) and s.depth % every == 0


def _why_none(base: Base, delta: Delta | View, targets: str, every: int) -> str:
    if targets or every > 1:
        return "choose other targets, or every=1"
    beside = elsewhere(base, delta)
    return "; ".join(f"{n}: {why}" for n, why in beside.items()) or "it is empty or at strength 0"


def left_out(base: Base, delta: Delta | View) -> dict[str, Any]:
    """The facts of a probe that reads parameters: parts it cannot see."""
    beside = elsewhere(base, delta)
    return {"not_seen": beside} if beside else {}


def place(change: Change) -> dict[str, Any]:
    """The columns that say where a row belongs."""
    s = change.site
    return {
        "tensor": change.key,
        "path": s.path,
        "role": s.role,
        "kind": s.kind,
        "depth": s.depth,
        "shape": list(change.update.shape),
    }


def before_after(change: Change) -> tuple[SVD, Tensor]:
    """The decomposition of the frozen weight (kept for as long as its module lives) and the changed matrix, fp32."""
    W = change.before().float() + change.update.dense().float()
    return svd(change.site), W.flatten(1)
