# SPDX-License-Identifier: Apache-2.0
"""A change held dense while it is worked on: scored, or moved by gradients, on the base it belongs to.

The registered method `full` holds a difference for each parameter of a site, so the gradient of its tensors is the
gradient of the parameters themselves at base + change, whatever the layer. That is what learned soups, grafts and learned
rescaling need, and it leaves the base's own tensors and flags alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.algebra import Update
from tunesmith.core.combine import Changes, Place
from tunesmith.core.delta import Delta, Part
from tunesmith.core.errors import UsageError

if TYPE_CHECKING:
    from tunesmith.core.base import Base

Pairs = Iterable[tuple[Place, Update]]


def dense_delta(base: Base, changes: Pairs, name: str = "merged") -> Delta:
    """A delta that holds each change as a dense difference, fp32 or wider, in canonical orientation.

    A tied weight changes on the sides its place names. Raises UsageError for no changes, or one at a place that is no site.
    """
    found: dict[str, tuple[Place, dict[str, Tensor]]] = {}
    for place, change in changes:
        if not place.kind:
            raise UsageError("a tensor that belongs to no site cannot be worked on", where=place.key)
        # a copy: the difference is written in place, and an update may share its tensors
        held = found.setdefault(place.path, (place, {}))
        held[1][place.name] = change.dense().detach().clone()
        if place.tied:
            found[place.path] = (place, held[1])
    if not found:
        raise UsageError("there is no change to work on", where=name)
    method = methods.build("full", {})
    sites = {path: base.sites.of(path, place.kind) for path, (place, _) in found.items()}
    alias = {other: path for path, (place, _) in found.items() for other in place.tied}
    tied = "both" if alias else "untie"
    part = Part(method, [(p, s.kind) for p, s in sites.items()], alias=alias, tied=tied)
    for path, (_, tensors) in found.items():
        for key, value in tensors.items():
            part.put(path, key, value.to(base.device), trainable=True)
    return Delta(name, [part], provenance={"base": base.fingerprint.to_dict(), "untrained": False})


def differences(delta: Delta) -> dict[str, Tensor]:
    """The tensors of a delta of `dense_delta` by the key of their place; they are its parameters, not copies."""
    return {f"{path}.{name}" if path else name: t for path, name, t in delta.parts[0].items()}


def gradients(base: Base, delta: Delta, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradient of a loss at base + delta with respect to each changed parameter, by key, in the dtype of the change.

    `loss` runs the base while the delta is in use. A tensor the loss does not reach has a zero gradient.
    """
    wanted = differences(delta)
    with base.frozen(), base.evaluating(), base.using(delta, check=False):
        found = torch.autograd.grad(loss(), list(wanted.values()), allow_unused=True)
    return {k: torch.zeros_like(t) if g is None else g for (k, t), g in zip(wanted.items(), found, strict=True)}


def dense_changes(changes: Changes, source: int = 0) -> dict[str, Tensor]:
    """One source's changes by key of their place, dense; tensors it leaves alone are left out."""
    out = {}
    for place in changes.places():
        change = changes.at(place)[source]
        if change is not None:
            out[place.key] = change.dense()
    return out


@torch.no_grad()
def write(delta: Delta, values: Mapping[str, Tensor]) -> None:
    """Put new differences into a delta of `dense_delta`, by key."""
    held = differences(delta)
    for key, value in values.items():
        held[key].copy_(value)
