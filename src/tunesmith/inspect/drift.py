# SPDX-License-Identifier: Apache-2.0
"""How far each module moved: between a base and a delta, between checkpoints, and right after a task switch.

    xi^l = ||theta^l_n - theta^l_{n-1}||_1 / |theta^l|        mean absolute change, |theta^l| entries of module l
    R^l  = mean_t xi^l_{t,1} / mean_t xi^l_{t,last}           task t, first and last epoch of it

A module's state is its own parameters and floating buffers, so running statistics of batch norm count. R is a statistic
of this library (the paper compares changes at task switches with those within a task). Drift ranks modules and is no proof
that they cause forgetting: fine-tune each group alone to see that. With `rates` changes are divided by the learning rate.

Needs no data. Zhao, Zhou, Long, Jiang and Zhang 2023, arXiv 2304.04158.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import wide
from tunesmith.core.base import Base
from tunesmith.core.changes import Change, changes
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding, option, probe
from tunesmith.core.sample import Sample
from tunesmith.inspect.places import EVERY, TARGETS, left_out, seen


@probe("drift", paper="2304.04158", data=False)
class Drift:
    """Mean absolute change of every module, running statistics included."""

    targets: str = option("", TARGETS)
    every: int = option(1, EVERY, low=1, high=10000)

    @torch.no_grad()
    def measure(self, base: Base, delta: Delta | View, sample: Sample | None = None) -> Finding:
        """One row a module that changed, by falling drift. Raises UsageError where none does."""
        rows: dict[str, dict[str, Any]] = {}
        for c in seen(base, delta, self.targets, self.every):
            if (row := rows.get(c.site.path)) is None:
                s = c.site
                row = rows[s.path] = {"module": s.path, "role": s.role, "kind": s.kind, "depth": s.depth,
                                      "entries": _entries(base, s.path), "moved": 0.0, "base": 0.0}  # fmt: skip
            row["moved"] += float(c.update.dense().abs().sum(dtype=torch.float64))
            row["base"] += float(c.before().abs().sum(dtype=torch.float64))
        for row in rows.values():
            moved, whole = row.pop("moved"), row.pop("base")
            row.update(drift=moved / row["entries"], relative=moved / whole if whole else None)
        ranked = sorted(rows.values(), key=lambda r: -r["drift"])
        first = ranked[0]
        text = f"{first['module']} drifted most: {first['drift']:.3g} an entry on average, of {len(ranked)} modules"
        values = {"modules": len(ranked), "largest": first["drift"], "largest_at": first["module"]}
        note = "drift is not blame: fine-tune each group of modules alone to see what it does"
        return Finding("drift", text, values, ranked, {"note": note, **left_out(base, delta)})


def _entries(base: Base, path: str) -> int:
    params = base.sites[path].params()
    return sum(t.numel() for t in params.values() if t.is_floating_point())


def module_drift(
    checkpoints: Sequence[Mapping[str, Tensor]], *, rates: Sequence[float] | None = None
) -> dict[str, list[float]]:
    """xi of every module between consecutive states (`state_dict`s), by module path.

    `rates` holds the learning rate (summed over the steps) between each pair. Raises UsageError for fewer than two
    states, other names or shapes, or a wrong number of rates.
    """
    if len(checkpoints) < 2:
        raise UsageError("drift needs at least two checkpoints", hint=f"got {len(checkpoints)}")
    if rates is not None and (len(rates) != len(checkpoints) - 1 or not all(r > 0 for r in rates)):
        raise UsageError(f"there must be {len(checkpoints) - 1} rates above 0, one between each pair of checkpoints")
    out: dict[str, list[float]] = {}
    for n, (a, b) in enumerate(pairwise(checkpoints)):
        if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
            different = sorted({k for k in a.keys() | b.keys() if k not in a or k not in b or a[k].shape != b[k].shape})
            raise UsageError(
                "the checkpoints do not hold the same tensors", where=f"checkpoint {n + 1}: {different[0]}"
            )
        sums: dict[str, tuple[float, int]] = {}
        for key, old in a.items():
            if not old.is_floating_point():
                continue
            moved, count = sums.get(module := key.rpartition(".")[0], (0.0, 0))
            change = (wide(b[key].detach()) - wide(old.detach())).abs().sum(dtype=torch.float64)
            sums[module] = (moved + float(change), count + old.numel())
        for module, (moved, count) in sums.items():
            out.setdefault(module, []).append(moved / max(count, 1) / (rates[n] if rates else 1.0))
    return out


@torch.no_grad()
def steps(base: Base, deltas: Iterable[Delta | View | None]) -> dict[str, list[float]]:
    """`module_drift` between saved states of a delta (None is the base), one tensor at a time."""
    views = list(deltas)
    if len(views) < 2:
        raise UsageError("drift needs at least two checkpoints", hint=f"got {len(views)}")
    paths = {
        site: None
        for v in views
        if v is not None
        for p in (v.delta if isinstance(v, View) else v).parts
        for site in p.kind_of
    }
    out: dict[str, list[float]] = {}
    for path in paths:
        if path not in base.sites or base.sites[path].kind in ("model", "block", "attention"):
            continue
        states = [_at(base, v, path) for v in views]
        for a, b in pairwise(states):
            moved = 0.0
            for name in a.keys() | b.keys():
                x, y = a.get(name), b.get(name)
                old = 0.0 if x is None else x.update.dense()
                new = 0.0 if y is None else y.update.dense()
                moved += float(torch.as_tensor(new - old).abs().sum(dtype=torch.float64))
            out.setdefault(path, []).append(moved / _entries(base, path))
    return out


def _at(base: Base, view: Delta | View | None, path: str) -> dict[str, Change]:
    if view is None:
        return {}
    return {c.name: c for c in changes(base, view, strict=False, only=lambda s: s.path == path)}


def sensitivity(drift: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float | None]:
    """R^l of every module, from its drift by task and epoch (xi of epoch 1 reaches over the switch).

    Falling; None, last, where a module does not move in the last epochs. Raises UsageError for a task without epochs.
    """
    out: dict[str, float | None] = {}
    for module, tasks in drift.items():
        if not tasks or not all(len(t) for t in tasks):
            raise UsageError("every task needs the drift of at least one epoch", where=module)
        late = sum(t[-1] for t in tasks)
        out[module] = sum(t[0] for t in tasks) / late if late > 0 else None
    return dict(sorted(out.items(), key=lambda kv: -1.0 if kv[1] is None else kv[1], reverse=True))
