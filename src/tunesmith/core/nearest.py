# SPDX-License-Identifier: Apache-2.0
"""The low-rank delta nearest to any delta on weights, with its error: for tools that know nothing but LoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.apply import Application
from tunesmith.core.base import Base
from tunesmith.core.carriers import folded, order
from tunesmith.core.delta import Delta, Part, View, as_view
from tunesmith.core.errors import UsageError
from tunesmith.core.patterns import targets_of


@dataclass(frozen=True)
class Fit:
    """A fitted delta and how far it is off: ||dW - B A||_F / ||dW||_F at each site, and over all of them together.

    `lost` names changes that no low-rank weight can hold, such as those of biases and norms.
    """

    delta: Delta
    errors: dict[str, float]
    error: float
    lost: tuple[str, ...]


@torch.no_grad()
def nearest_lora(base: Base, delta: Delta | View, rank: int) -> Fit:
    """The LoRA of `rank` nearest to `delta` in Frobenius norm, site by site (truncated SVD, balanced factors).

    Raises UsageError for a part that cannot be merged, or a delta that changes no weight matrix.
    """
    if rank < 1:
        raise UsageError(f"a rank is a whole number of 1 or more, got {rank}", where="rank")
    info = methods.get("lora")
    view = as_view(delta)
    plan = Application(base, (view,)).plan
    tensors: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, float] = {}
    lost: list[str] = []
    kinds: dict[str, str] = {}
    off = total = 0.0
    for path, actions in plan.items():
        site = actions[0].site
        old = site.params()
        new = folded(order(actions), old)
        lost += [f"{path}.{n}" for n, v in new.items() if n != "weight" and v is not old.get(n)]
        if site.kind not in info.kinds or new.get("weight") is old.get("weight"):
            lost += [f"{path}.weight"] if site.kind not in info.kinds else []
            continue
        change = (new["weight"].float() - old["weight"].float()).flatten(1)
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        k = min(rank, len(S))
        root = S[:k].sqrt()
        B, A = torch.zeros(change.shape[0], rank), torch.zeros(rank, change.shape[1])
        B[:, :k], A[:k] = U[:, :k] * root, root[:, None] * Vh[:k]
        tensors[path], kinds[path] = {"A": A, "B": B}, site.kind
        size, rest = float(S.square().sum()), float(S[k:].square().sum())
        errors[path] = (rest / size) ** 0.5 if size else 0.0
        off, total = off + rest, total + size
    if not tensors:
        raise UsageError("the delta changes no weight that a LoRA can act on", where=view.delta.name)
    targets = targets_of(base, tensors, info.kinds)
    part = Part(methods.build("lora", {"rank": rank, "alpha": float(rank), "targets": targets}), kinds.items(),
                tied="untie")  # fmt: skip
    for path, t in tensors.items():
        for name, value in t.items():
            part.put(path, name, value, trainable=True)
    facts = {"base": base.fingerprint.to_dict(), "fitted": {"digest": view.delta.digest, "rank": rank}}
    made = Delta(f"{view.delta.name}-rank{rank}", [part], provenance=facts)
    return Fit(made, errors, (off / total) ** 0.5 if total else 0.0, tuple(lost))
