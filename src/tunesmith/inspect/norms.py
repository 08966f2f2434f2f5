# SPDX-License-Identifier: Apache-2.0
"""How large the change is and of how many directions, by site, depth and role.

    relative       ||D||_F / ||W||_F
    stable rank    ||D||_F^2 / s_1(D)^2
    effective rank exp(entropy of s(D) / sum s(D))        s singular values of D flattened to [out, in * kernel]

Needs no data. Low-rank changes are measured through their factors.

Effective rank: Roy and Vetterli 2007, used for deltas by Shuttleworth et al. 2024, arXiv 2410.21228.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from tunesmith.core.algebra import norm
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View
from tunesmith.core.probe import Finding, option, probe
from tunesmith.core.sample import Sample
from tunesmith.core.spectrum import effective_rank, stable_rank, svd_of
from tunesmith.inspect.places import EVERY, TARGETS, left_out, place, seen


@probe("norms", paper="2410.21228", data=False)
class Norms:
    """Size and rank of the change of every tensor."""

    targets: str = option("", TARGETS)
    every: int = option(1, EVERY, low=1, high=10000)

    def measure(self, base: Base, delta: Delta | View, sample: Sample | None = None) -> Finding:
        """One row a tensor; facts hold the sums by depth and by role. Raises UsageError where nothing changes."""
        rows = []
        for c in seen(base, delta, self.targets, self.every):
            size, whole = float(norm(c.update)), float(c.before().norm())
            row = {**place(c), "norm": size, "relative": size / whole if whole else None}
            if len(c.update.shape) > 1 and size > 0:
                S = svd_of(c.update, vectors=False).S
                row.update(
                    top=float(S[0]), stable_rank=stable_rank(S), effective_rank=effective_rank(S),
                    share_of_top=float(S[0]) / size,
                )  # fmt: skip
            rows.append({**row, "base_norm": whole})
        total, whole = (math.sqrt(sum(r[k] ** 2 for r in rows)) for k in ("norm", "base_norm"))
        largest = max(rows, key=lambda r: r["relative"] or 0.0)
        ranks = [r["effective_rank"] for r in rows if "effective_rank" in r]
        values: dict[str, Any] = {
            "norm": total, "relative": total / whole if whole else None, "tensors": len(rows),
            "largest_relative": largest["relative"], "largest_at": largest["tensor"],
            "mean_effective_rank": sum(ranks) / len(ranks) if ranks else None,
        }  # fmt: skip
        share = "" if values["relative"] is None else f", {100 * values['relative']:.3g} % of theirs"
        rank = f", effective rank {values['mean_effective_rank']:.3g} on average" if ranks else ""
        text = f"{len(rows)} tensors changed by a norm of {total:.4g}{share}{rank}; most at {largest['tensor']}"
        facts = {"by_depth": grouped(rows, "depth"), "by_role": grouped(rows, "role"), **left_out(base, delta)}
        return Finding("norms", text, values, rows, facts)


def grouped(rows: Iterable[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Norm and relative norm of the rows with one value of `key`, in rising order."""
    sums: dict[Any, tuple[float, float]] = {}
    for r in rows:
        a, b = sums.get(r[key], (0.0, 0.0))
        sums[r[key]] = (a + r["norm"] ** 2, b + r["base_norm"] ** 2)
    return [
        {key: k, "norm": math.sqrt(a), "relative": math.sqrt(a / b) if b else None}
        for k, (a, b) in sorted(sums.items())
    ]
