# SPDX-License-Identifier: Apache-2.0
"""Which few neurons of a tuned model hide an old task: set them to zero and see whether the task is back.

The delta is folded into a copy of the base. For every row w of its weight matrices and the summed loss of the OLD task

    score(row) = sum_j w_j dL/dw_j        to first order, zeroing the row changes the loss by -score

and the K rows of the highest score, whose removal should help most, are set to zero (one shot). The ablation is itself a
delta, so it is taken off exactly. Ranking by the new task's loss would find what that task needs, which is another thing.

Needs a sample of the old task and a delta that merges. The same rows are scored and measured on.
Jain et al. 2024, arXiv 2311.12786 (pruning analysis; 5 to 15 neurons suffice there where the wrapper is thin).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding, probe
from tunesmith.core.registry import option
from tunesmith.core.sample import Sample, gradients
from tunesmith.inspect.revival import mean_loss


def row_scores(base: Base, sample: Sample, targets: str = "all-linear") -> dict[str, Tensor]:
    """By path, w . dL/dw of every row of the site's weight [out], fp32, for the summed loss over the sample."""
    sites = base.sites.select(targets, ("linear", "conv1d", "conv2d"))
    weights = {s.path: s.params()["weight"].detach().float().flatten(1) for s in sites}
    found = {s.path: torch.zeros(s.shape[0], device=weights[s.path].device) for s in sites}
    for got in gradients(base, sites, sample):
        for path, g in got.items():
            found[path] += (weights[path] * g.flatten(1)).sum(1)
    return found


def leading(scores: Mapping[str, Tensor], k: int) -> dict[str, list[int]]:
    """The `k` rows of the highest score over all sites, by path. Raises UsageError for more rows than there are."""
    every = [(float(s), path, i) for path, values in scores.items() for i, s in enumerate(values.tolist())]
    if not 0 <= k <= len(every):
        raise UsageError(f"{k} of {len(every)} rows cannot be chosen", where="top_k")
    out: dict[str, list[int]] = {}
    for _, path, i in sorted(every, key=lambda e: (-e[0], e[1], e[2]))[:k]:
        out.setdefault(path, []).append(i)
    return out


@torch.no_grad()
def ablation(base: Base, rows: Mapping[str, Sequence[int]]) -> Delta | None:
    """A delta under which those rows of the sites' weights are zero exactly; None for no rows.

    Raises UsageError for a path that is no site or a row that is not there.
    """
    chosen = {path: list(some) for path, some in rows.items() if some}
    if not chosen:
        return None
    full = methods.get("full").cls(targets=",".join(chosen), bias=False)
    delta = Delta.create(base, full, name="ablation")
    for path, some in chosen.items():
        W = base.sites[path].params()["weight"].detach()
        if not all(0 <= i < len(W) for i in some):
            raise UsageError(f"rows {some} do not all lie in 0..{len(W) - 1}", where=path)
        delta.parts[0].parameter(path, "weight")[some] = -W[some].float()
    return delta


@probe("wrapper", paper="2311.12786", data=True, slow=True)
class Wrapper:
    """The old task's loss with the few rows zeroed that hide it most."""

    top_k: int = option(15, "rows set to zero; also 1, 5, 15 and 30 below it are tried", low=0, high=1_000_000)
    targets: str = option("all-linear", "which layers' rows are ranked")

    def measure(self, base: Base, delta: Delta | View, sample: Sample | None = None) -> Finding:
        """One row a number of zeroed rows. Raises UsageError without a sample, and for a delta that cannot be merged."""
        batches = [] if sample is None else list(sample.batches())
        if sample is None or not batches:
            raise UsageError("a sample of the old task is needed", where="wrapper")
        before = mean_loss(base, sample, batches)
        tuned = base.merged(delta)
        scores = row_scores(tuned, sample, self.targets)
        after = mean_loss(tuned, sample, batches)
        gap, rows = after - before, []
        for k in sorted({k for k in (0, 1, 5, 15, 30) if k < self.top_k} | {self.top_k}):
            where = leading(scores, k)
            with tuned.using(ablation(tuned, where)):
                loss = mean_loss(tuned, sample, batches)
            share = (after - loss) / gap if gap > 0 else None
            rows.append({"k": k, "loss": loss, "recovered": share, "rows": _named(where)})
        best = min(rows, key=lambda r: (r["loss"], r["k"]))
        values: dict[str, Any] = {
            "loss_base": before,
            "loss_delta": after,
            "best_k": best["k"],
            "loss_best": best["loss"],
        }
        back = (
            "" if best["recovered"] is None else f", which wins back {100 * best['recovered']:.0f} % of what was lost"
        )
        told = f"Zeroing {best['k']} rows moves the loss from {after:.4g} to {best['loss']:.4g}{back}"
        return Finding("wrapper", told, values, rows, {"measured_on": "the rows that were scored"})


def _named(where: Mapping[str, Sequence[int]]) -> list[str]:
    return [f"{path}[{i}]" for path, some in where.items() for i in some]
