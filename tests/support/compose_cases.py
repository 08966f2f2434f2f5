# SPDX-License-Identifier: Apache-2.0
"""Deltas of every additive form on the toy bases, and dense fp64 views of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.checks import Case
from tunesmith.compose import DeltaChanges
from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View

FORMS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "low-rank": [("lora", {"rank": 2}), ("lora", {"rank": 3, "alpha": 6.0}), ("lora", {"rank": 2})],
    "sparse": [("sparse", {"rank": 1, "select": "magnitude"}), ("sparse", {"count": 9, "select": "random"})],
    "dense": [("full", {}), ("full", {"bias": False})],
    "kronecker": [("lokr", {}), ("lokr", {})],
    "mixed": [("lora", {"rank": 2}), ("full", {}), ("sparse", {"rank": 1, "select": "random"}), ("dora", {"rank": 2})],
}


def moved(base: Base, name: str, options: dict[str, Any] | None = None, seed: int = 0, noise: float = 0.2) -> Delta:
    """A delta of one method whose trainable tensors were moved at random."""
    delta = Case(methods.build(name, options or {}), base, noise).moved(seed)
    delta.name = f"{name}-{seed}"
    return delta


def form(base: Base, which: str) -> list[Delta]:
    """The deltas of one entry of `FORMS`."""
    return [moved(base, name, options, seed) for seed, (name, options) in enumerate(FORMS[which])]


def dense(base: Base, *deltas: Delta | View) -> dict[str, list[Tensor]]:
    """{tensor: the change by each delta, fp64}."""
    changes = DeltaChanges(base, deltas)
    return {
        p.key: [torch.zeros(p.shape).double() if u is None else u.dense().double() for u in changes.at(p)]
        for p in changes.places()
    }


def gap(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> float:
    """The largest difference of the first changes of two views, over the largest entry."""
    size = max([float(t[0].abs().max()) for t in (*a.values(), *b.values())], default=1.0)
    zero = torch.zeros(())
    found = [float((a.get(k, [zero])[0] - b.get(k, [zero])[0]).abs().max()) for k in {**a, **b}]
    return max(found, default=0.0) / max(size, 1e-12)
