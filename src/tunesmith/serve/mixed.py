# SPDX-License-Identifier: Apache-2.0
"""Deltas of many requests in one batch: the frozen product once for all, each span's change beside it.

A delta is prepared once (`Resident`): at every path its low-rank changes become one pair of factors, everything else
stays the method's own code. A `Mixture` lays out which tokens belong to which delta. Decoding rows (one or a few tokens a
delta) with low-rank changes of one rank run in two batched products, ranks kept apart and none padded; longer spans and
other kinds run span by span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.core import carriers
from tunesmith.core.apply import Application
from tunesmith.core.base import Base
from tunesmith.core.carriers import Action
from tunesmith.core.decoding import Decoder
from tunesmith.core.delta import Delta, View, as_view
from tunesmith.core.spectrum import low_rank

FEW = 4  # tokens of one delta up to which rows of several deltas share one batched product


@dataclass
class Resident:
    """A delta ready to serve: `low` has factors A [r, in] and B [out, r] (scale folded in), `other` the rest, by path.

    `view` is the delta at its strength, `digest` names its content. With a `decoder`, that writes and nothing else does.
    """

    name: str
    view: View
    low: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    other: dict[str, list[Action]] = field(default_factory=dict)
    digest: str = ""
    decoder: Decoder | None = None

    @property
    def paths(self) -> set[str]:
        return {*self.low, *self.other}

    @property
    def nbytes(self) -> int:
        """Bytes of its factors and of the delta it was made from."""
        factors = sum(t.numel() * t.element_size() for pair in self.low.values() for t in pair)
        return factors + self.view.delta.nbytes

    def silent(self) -> bool:
        """Whether all it does is add low-rank matrices that are zero."""
        return not self.other and not any(bool(A.any()) and bool(B.any()) for A, B in self.low.values())


@torch.no_grad()
def resident(base: Base, delta: Delta | View, name: str | None = None) -> Resident:
    """Prepare a delta for serving on `base`, its factors in the base's dtype."""
    view = as_view(delta)
    out = Resident(name or view.delta.name, view, digest=view.delta.digest)
    for path, actions in Application(base, (view,)).plan.items():
        pairs = [low_rank(a) for a in actions]
        if all(p is not None for p in pairs) and actions[0].site.kind == "linear" and not actions[0].site.transposed:
            found = [p for p in pairs if p is not None]
            A = torch.cat([a for a, _ in found]).to(base.device, base.dtype)
            B = torch.cat([b for _, b in found], 1).to(base.device, base.dtype)
            out.low[path] = (A.contiguous(), B.contiguous())
        else:
            out.other[path] = actions
    return out


@dataclass(frozen=True)
class _Grouped:
    """Rows of several deltas with one rank: tokens `at` [g, t] (padded by repeating), A [g, r, in], B [g, out, r]."""

    at: Tensor
    keep: Tensor
    A: Tensor
    B: Tensor


class Mixture:
    """Which delta each of `n` flat tokens runs under: spans `(resident or None, start, end)` in rising order."""

    def __init__(self, spans: Sequence[tuple[Resident | None, int, int]]) -> None:
        self.spans: list[tuple[Resident, int, int]] = []
        for r, a, b in spans:
            if r is None or a == b:
                continue
            last = self.spans[-1] if self.spans else None
            if last is not None and last[0] is r and last[2] == a:
                self.spans[-1] = (r, last[1], b)
            else:
                self.spans.append((r, a, b))
        self.touched = {p for r, _, _ in self.spans for p in r.paths}
        self._grouped: dict[str, list[_Grouped]] = {}

    @classmethod
    def none(cls, n: int) -> Mixture:
        """No delta anywhere."""
        return cls([(None, 0, n)])

    def add(self, path: str, x: Tensor, y: Tensor, own: Callable[..., Tensor]) -> Tensor:
        """`y`, the base's fresh output at `path` for inputs `x` (first dimension: tokens), with every span's change.

        `own` is the base's forward at `path`, for changes that are no additions. `y` is changed in place.
        """
        if path not in self.touched:
            return y
        if path not in self._grouped:
            self._grouped[path] = self._group(path)
        for g in self._grouped[path]:
            h = x[g.at] @ g.A.transpose(1, 2)  # [g, t, r]
            change = (h @ g.B.transpose(1, 2)).flatten(0, 1)[g.keep]  # [tokens, out]
            y.index_add_(0, g.at.flatten()[g.keep], change.to(y.dtype))
        for r, a, b in self.spans:
            if path in r.other:
                y[a:b] = carriers.run(r.other[path], own, (x[a:b],), {})
            elif path in r.low and b - a > FEW:
                A, B = r.low[path]
                y[a:b] += (x[a:b] @ A.T) @ B.T
        return y

    def _group(self, path: str) -> list[_Grouped]:
        by_rank: dict[int, list[tuple[Resident, int, int]]] = {}
        for r, a, b in self.spans:
            if path in r.low and b - a <= FEW:
                by_rank.setdefault(len(r.low[path][0]), []).append((r, a, b))
        out = []
        for rows in by_rank.values():
            most = max(b - a for _, a, b in rows)
            at = torch.tensor([[min(a + i, b - 1) for i in range(most)] for _, a, b in rows])
            keep = torch.tensor([[a + i < b for i in range(most)] for _, a, b in rows]).flatten().nonzero().flatten()
            A = torch.stack([r.low[path][0] for r, _, _ in rows])
            B = torch.stack([r.low[path][1] for r, _, _ in rows])
            out.append(_Grouped(at.to(A.device), keep.to(A.device), A, B))
        return out
