# SPDX-License-Identifier: Apache-2.0
"""Who is better, who is not shown to be, and what to take: paired statistics over rows and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import DataError
from tunesmith.evaluate.stats import Paired, holm, paired_statistic

LEVEL = 0.05
AS_MUCH_KEPT = 0.01  # retentions nearer than this are taken as equal


@dataclass(frozen=True)
class Against:
    """One method against the best on the same rows. `p` is adjusted for all comparisons by Holm's method; `verdict` is
    "worse", "better" or "tie", of the method against the best.
    """

    difference: float
    low: float
    high: float
    p: float
    verdict: str


def between(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    *,
    higher_is_better: bool,
    n_boot: int = 2000,
    seed: int = 0,
) -> Paired:
    """b - a, each [seeds][rows] on the same rows: a resample draws rows for both and seeds for each.

    So the interval covers which rows were held out and which seeds were drawn. Raises DataError for unequal rows.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise DataError(f"scores of shapes {x.shape} and {y.shape} are not on the same rows")
    draw = np.random.default_rng(seed + 1)
    whole = True

    def statistic(index: NDArray[np.int64]) -> tuple[float, float]:
        nonlocal whole
        if whole:  # the first call is for the estimate itself
            whole = False
            return float(x.mean()), float(y.mean())
        rows = [arm[draw.integers(len(arm), size=len(arm))][:, index] for arm in (x, y)]
        return float(rows[0].mean()), float(rows[1].mean())

    found, _, _ = paired_statistic(
        statistic, x.mean(0), y.mean(0), n_boot=n_boot, seed=seed, higher_is_better=higher_is_better
    )
    return found


def against_best(
    scores: Mapping[str, Sequence[Sequence[float]]], best: str, *, higher_is_better: bool
) -> dict[str, Against]:
    """Every other method against `best`; one is called worse only where the adjusted p is below 0.05."""
    others = [name for name in scores if name != best]
    found = {m: between(scores[best], scores[m], higher_is_better=higher_is_better) for m in others}
    adjusted = holm([found[m].p for m in others])
    out = {}
    for name, p in zip(others, adjusted, strict=True):
        one = found[name]
        verdict = {"loss": "worse", "win": "better"}.get(one.verdict, "tie") if p < LEVEL else "tie"
        out[name] = Against(one.difference, one.low, one.high, p, verdict)
    return out


def recommend(
    rows: Sequence[Mapping[str, Any]], controls: Sequence[Mapping[str, Any]], metric: str, *, higher_is_better: bool
) -> dict[str, Any]:
    """The method to take, with the reason in words.

    Of the methods not shown to be worse than the best on the target, the one that keeps most; where several keep as
    much (within 0.01), the one that stores least. `rows` hold label, target, retention, stored, lr, options and
    `versus` (the verdict against the best, None for the best itself); `controls` their names and verdicts against that
    best.
    """
    sign = 1 if higher_is_better else -1
    best = max(rows, key=lambda r: sign * r["target"]["mean"])
    tied = [r for r in rows if r is best or r["versus"]["verdict"] != "worse"]
    most = max(r["retention"]["mean"] for r in tied)
    keep = [r for r in tied if r["retention"]["mean"] >= most - AS_MUCH_KEPT]
    take = min(keep, key=lambda r: (r["stored"], r["label"]))
    reason = [_standing(take, best, tied, rows, metric), _why(take, tied, keep), _trade(take, tied, rows, metric)]
    unbeaten = [c["name"] for c in controls if c.get("verdict") not in (None, "beaten")]
    if unbeaten:
        reason.append(f"Not shown to be better than these controls: {', '.join(unbeaten)}. More data is needed first")
    return {
        "method": take["label"], "options": take["options"], "lr": take["lr"], "best_on_target": best["label"],
        "not_shown_worse": [r["label"] for r in tied], "convincing": not unbeaten and len(rows) > 0,
        "reason": ". ".join(r for r in reason if r) + ".",
    }  # fmt: skip


def _standing(
    take: Mapping[str, Any], best: Mapping[str, Any], tied: Sequence[Any], rows: Sequence[Any], metric: str
) -> str:
    score = f"{metric} {take['target']['mean']:.4g}"
    if len(tied) == 1:
        also = f", better than each of the other {len(rows) - 1}" if len(rows) > 1 else ", the only method"
        return f"{take['label']} has the best {score}{also}"
    names = ", ".join(r["label"] for r in tied if r is not take)
    top = "" if take is best else f" (best: {best['label']}, {best['target']['mean']:.4g})"
    return f"{take['label']} has {score}{top}; a tie: no difference was shown between it and {names}"


def _why(take: Mapping[str, Any], tied: Sequence[Any], keep: Sequence[Any]) -> str:
    if len(tied) == 1:
        return ""
    if len(keep) == 1:
        return f"Of these it keeps most (retention {take['retention']['mean']:.3f})"
    kept = f"{take['retention']['mean']:.3f}"
    return f"Of those that keep most (retention {kept}) it stores least ({take['stored']:,} bytes)"


def _trade(take: Mapping[str, Any], tied: Sequence[Any], rows: Sequence[Any], metric: str) -> str:
    """Methods that are worse on the target and keep more, if any."""
    others = [
        r for r in rows
        if r not in tied and r.get("pareto") and r["retention"]["mean"] > take["retention"]["mean"] + AS_MUCH_KEPT
    ]  # fmt: skip
    shown = [f"{r['label']} ({r['retention']['mean']:.3f} at {metric} {r['target']['mean']:.4g})" for r in others]
    return f"More is kept, for less on the target, by {', '.join(shown)}" if shown else ""
