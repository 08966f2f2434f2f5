# SPDX-License-Identifier: Apache-2.0
"""How few entries carry the change: the share of the squared norm held by the largest ones.

    carried(s) = sum of D_i^2 over the s * P largest |D_i| / ||D||_F^2        P entries of the layers looked at
    needed(x)  = share of entries that carries x of the squared norm
    participation = (sum D_i^2)^2 / (P sum D_i^4)        1 where all entries moved alike, 1/P where one did

The reading at s = 1e-4 is that of grafting; embeddings and the output head are left out as there. A concentrated norm says
where the change lies, not that those entries alone do the task: for that a mask is trained (grafting).

Needs no data. Panigrahi, Saunshi, Zhao and Arora 2023, arXiv 2302.06600 (the starting mask of largest movement).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding, option, probe
from tunesmith.core.sample import Sample
from tunesmith.inspect.places import TARGETS, left_out, place, seen

_STEP = 64  # bins an octave of |D|
_LOW, _HIGH = -140, 60  # octaves
SHARES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.25, 0.5, 1.0)
NORMS = (0.5, 0.9, 0.99)


@probe("localisation", paper="2302.06600", data=False)
class Localisation:
    """The share of entries that carries the change, over all layers and in each."""

    share: float = option(1e-4, "share of all entries whose part of the squared norm is reported", low=1e-9, high=1.0)
    embeddings: bool = option(False, "count embeddings and the output head too")
    targets: str = option("", TARGETS)

    @torch.no_grad()
    def measure(self, base: Base, delta: Delta | View, sample: Sample | None = None) -> Finding:
        """One row a tensor; facts hold the curve over shares. Raises UsageError where no tensor is left."""
        whole, rows, skipped = Histogram(), [], []
        for c in seen(base, delta, self.targets):
            if not self.embeddings and (c.site.kind == "embedding" or c.site.role in ("head", "embed")):
                skipped.append(c.key)
                continue
            one = Histogram()
            one.add(c.update.dense())
            whole.merge(one)
            rows.append({
                **place(c), "entries": one.count, "nonzero": one.nonzero, "squared": one.squared,
                "participation": one.participation(), "needed_90": one.needed(0.9),
                "carried": one.carried(self.share),
            })  # fmt: skip
        if not rows:
            raise UsageError("only embeddings and the output head change", hint="embeddings=true counts them")
        for r in rows:
            r["share_of_norm"] = r.pop("squared") / whole.squared if whole.squared else None
        values: dict[str, Any] = {
            "entries": whole.count, "nonzero": whole.nonzero, "carried": whole.carried(self.share),
            "participation": whole.participation(),
            **{f"needed_{round(100 * x)}": whole.needed(x) for x in NORMS},
        }  # fmt: skip
        tensors, covered = 0, 0.0
        for r in sorted(rows, key=lambda r: -(r["share_of_norm"] or 0.0)):
            if covered < 0.9:
                tensors, covered = tensors + 1, covered + (r["share_of_norm"] or 0.0)
        values["tensors_for_90"] = tensors
        text = (
            f"the largest {100 * self.share:g} % of {whole.count:,} entries carry {_percent(values['carried'])} of the "
            f"squared norm; 90 % of it lies in {_percent(values['needed_90'])} of the entries and in {tensors} of "
            f"{len(rows)} tensors"
        )
        curve = [{"share": s, "carried": whole.carried(s)} for s in SHARES]
        facts = {"share": self.share, "curve": curve, "left_out": skipped, **left_out(base, delta)}
        return Finding("localisation", text, values, rows, facts)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.3g} %"


class Histogram:
    """Counts and sums of squares of entries by the size of |D|, 64 bins an octave; within a bin entries count as equal."""

    def __init__(self) -> None:
        bins = (_HIGH - _LOW) * _STEP
        self.n = torch.zeros(bins, dtype=torch.float64)
        self.sq = torch.zeros(bins, dtype=torch.float64)
        self.count, self.fourth = 0, 0.0

    def add(self, D: Tensor) -> None:
        """Take in every entry of a tensor."""
        x = D.detach().flatten().cpu().double()
        self.count += x.numel()
        x = x[x != 0].abs()
        at = ((x.log2() - _LOW) * _STEP).floor().clamp(0, len(self.n) - 1).long()
        self.n += torch.bincount(at, minlength=len(self.n)).double()
        self.sq += torch.bincount(at, weights=x.square(), minlength=len(self.n))
        self.fourth += float(x.pow(4).sum())

    def merge(self, other: Histogram) -> None:
        self.n += other.n
        self.sq += other.sq
        self.count += other.count
        self.fourth += other.fourth

    @property
    def nonzero(self) -> int:
        return int(self.n.sum())

    @property
    def squared(self) -> float:
        return float(self.sq.sum())

    def participation(self) -> float | None:
        """(sum D^2)^2 / (P sum D^4), None without any change."""
        return self.squared**2 / (self.count * self.fourth) if self.fourth > 0 else None

    def carried(self, share: float) -> float | None:
        """The part of the squared norm in the largest `share` of all entries (at least one), None without change."""
        if self.squared <= 0:
            return None
        left, got = max(share * self.count, 1.0), 0.0
        for n, sq in zip(*self._falling(), strict=True):
            if n >= left:
                return min((got + sq * left / n) / self.squared, 1.0)
            left, got = left - n, got + sq
        return 1.0

    def needed(self, part: float) -> float | None:
        """The share of all entries that carries `part` of the squared norm, None without change."""
        if self.squared <= 0:
            return None
        left, used = part * self.squared, 0.0
        for n, sq in zip(*self._falling(), strict=True):
            if sq >= left:
                return math.ceil(used + n * left / sq - 1e-9) / self.count
            left, used = left - sq, used + n
        return used / self.count

    def _falling(self) -> tuple[list[float], list[float]]:
        at = self.n.nonzero().flatten().flip(0)
        return self.n[at].tolist(), self.sq[at].tolist()
