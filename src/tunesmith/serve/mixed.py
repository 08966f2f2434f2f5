# SPDX-License-Identifier: Apache-2.0
"""Deltas of many requests in one batch: the frozen product once for all, each span's change beside it.

A delta is prepared once (`Resident`): at every path its low-rank changes become one pair of factors, everything else
stays the method's own code. A `Mixture` lays out which tokens belong to which delta. Decoding rows (one or a few tokens a
delta) with low-rank changes of one rank run in two batched products (`stacks`), ranks kept apart and none padded; longer
spans and other kinds run span by span.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.core import carriers
from tunesmith.core.apply import Application
from tunesmith.core.base import Base
from tunesmith.core.carriers import Action
from tunesmith.core.decoding import Decoder
from tunesmith.core.delta import Delta, View, as_view
from tunesmith.core.spectrum import low_rank
from tunesmith.serve.products import Product
from tunesmith.serve.stacks import Family, Stacks

FEW = 4  # tokens of one delta up to which rows of several deltas share one batched product


class Merged(Protocol):
    """A delta with its low-rank changes in copies of products, by their paths (see `dominant`)."""

    @property
    def resident(self) -> Resident: ...
    @property
    def products(self) -> Mapping[tuple[str, ...], Product]: ...


Spans = Sequence[tuple["Resident | None", int, int]]


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

    @cached_property
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
    device, dtype = base.device, base.dtype
    for path, actions in Application(base, (view,)).plan.items():
        pairs = [low_rank(a) for a in actions]
        if all(p is not None for p in pairs) and actions[0].site.kind == "linear" and not actions[0].site.transposed:
            found = [p for p in pairs if p is not None]
            A, B = (
                found[0] if len(found) == 1 else (torch.cat([a for a, _ in found]), torch.cat([b for _, b in found], 1))
            )
            out.low[path] = (A.to(device, dtype).contiguous(), B.to(device, dtype).contiguous())
        else:
            out.other[path] = actions
    return out


@dataclass(frozen=True)
class _Rows:
    """The rows of a family: tokens `at` [slots * t] of the input, as [slots, t], and where results `keep` go (`to`).

    `at` None: the rows from `first` on, one for each slot in order.
    """

    family: Family
    first: int
    per: int
    at: Tensor | None
    keep: Tensor | None
    to: Tensor | None


class Mixture:
    """Which delta each of `n` flat tokens runs under: spans `(resident or None, start, end)` in rising order.

    `stacks` hold the factors of deltas that have few tokens here (see `few`); without, it makes its own. `merged` is a
    delta whose low-rank changes are in copies of some products: its first span goes through these.
    """

    def __init__(self, spans: Spans, stacks: Stacks | None = None, merged: Merged | None = None) -> None:
        self.spans = joined(spans)
        self._merged = merged
        self._merged_rows = next(
            ((a, b) for r, a, b in self.spans if merged is not None and r is merged.resident), None
        )
        self.touched = {p for r, a, b in self.spans for p in (r.other if self._is_merged(a, b) else r.paths)}
        if stacks is None:
            stacks = Stacks()
            stacks.settle(few(spans))
        stacked = {id(r) for f in stacks.families.values() for r in f.members}
        self._own: dict[str, list[tuple[Resident, int, int]]] = {}  # spans with changes of other kinds, by path
        self._long: dict[str, list[tuple[Resident, int, int]]] = {}  # spans whose factors are not read from tables
        tokens: dict[int, list[int]] = {}
        for r, a, b in self.spans:
            for path in r.other:
                self._own.setdefault(path, []).append((r, a, b))
            if self._is_merged(a, b):
                continue
            if b - a <= FEW and id(r) in stacked:
                tokens.setdefault(id(r), []).extend(range(a, b))
                continue
            for path in r.low:
                self._long.setdefault(path, []).append((r, a, b))
        self._rows = [_rows(f, tokens) for f in stacks.families.values() if any(id(r) in tokens for r in f.members)]

    @classmethod
    def none(cls, n: int) -> Mixture:
        """No delta anywhere."""
        return cls([(None, 0, n)])

    def _is_merged(self, start: int, end: int) -> bool:
        return self._merged_rows == (start, end)

    def product(self, product: Product, x: Tensor) -> Tensor:
        """The frozen outputs of `product` for x [N, in]; rows of a merged delta go through its copy. Fresh."""
        copy = None if self._merged is None else self._merged.products.get(product.paths)
        if copy is None or self._merged_rows is None:
            return product.call(x)
        a, b = self._merged_rows
        if b - a == len(x):
            return copy.call(x)
        parts = ((product.call, x[:a]), (copy.call, x[a:b]), (product.call, x[b:]))
        return torch.cat([call(part) for call, part in parts if len(part)])

    def add(self, paths: tuple[str, ...], x: Tensor, y: Tensor, product: Product) -> Tensor:
        """`y`, the base's fresh output of the layers `paths` beside each other for inputs `x` (first dimension: tokens),
        with every span's change, in place.

        `product` says where each path's outputs lie (`slices`) and what the base's own forward there is (`own`).
        """
        if self.touched.isdisjoint(paths):
            return y
        for rows in self._rows:
            for group in rows.family.within(paths):
                _add_rows(rows, group, x, y, product.slices)
        for path in paths:
            lo, hi = product.slices[path]
            for r, a, b in self._long.get(path, ()):
                A, B = r.low[path]
                y[a:b, lo:hi] += (x[a:b] @ A.T) @ B.T
            for r, a, b in self._own.get(path, ()):
                part, own = x[a:b], product.own[path]
                if all(c.carrier == "hidden" for c in r.other[path]):  # what rewrites weights needs the true forward
                    own = _Known(own, part, y[a:b, lo:hi])
                y[a:b, lo:hi] = carriers.run(r.other[path], own, (part,), {})
        return y


def joined(spans: Spans) -> list[tuple[Resident, int, int]]:
    """Spans of deltas, neighbours of one delta made one."""
    out: list[tuple[Resident, int, int]] = []
    for r, a, b in spans:
        if r is None or a == b:
            continue
        if out and out[-1][0] is r and out[-1][2] == a:
            out[-1] = (r, out[-1][1], b)
        else:
            out.append((r, a, b))
    return out


def few(spans: Spans) -> list[Resident]:
    """The deltas with low-rank changes that have few tokens in one place: those whose factors are read from tables."""
    return list({id(r): r for r, a, b in joined(spans) if b - a <= FEW and r.low}.values())


def _rows(family: Family, tokens: dict[int, list[int]]) -> _Rows:
    mine = [tokens.get(id(r), []) for r in family.members]
    first, per = (mine[0] or [0])[0], max(len(m) for m in mine)
    if all(m == [first + i] for i, m in enumerate(mine)):
        return _Rows(family, first, 1, None, None, None)
    device = next(iter(family.members[0].low.values()))[0].device
    at = torch.tensor([m[i] if i < len(m) else 0 for m in mine for i in range(per)], device=device)
    keep = torch.tensor([i < len(m) for m in mine for i in range(per)], device=device).nonzero().flatten()
    return _Rows(family, first, per, at, keep, at[keep])


def _add_rows(
    rows: _Rows, group: tuple[str, ...], x: Tensor, y: Tensor, slices: Mapping[str, tuple[int, int | None]]
) -> None:
    A, parts = rows.family.of(group)
    n = len(A)
    if rows.at is None or rows.keep is None or rows.to is None:
        h = torch.bmm(x[rows.first : rows.first + n].to(A.dtype)[:, None], A)  # [slots, 1, R]
        for path, column, rank, B in parts:
            lo, hi = slices[path]
            y[rows.first : rows.first + n, lo:hi] += torch.bmm(h[..., column : column + rank], B)[:, 0]
        return
    h = torch.bmm(x[rows.at].to(A.dtype).view(n, rows.per, -1), A)  # [slots, t, R]
    for path, column, rank, B in parts:
        lo, hi = slices[path]
        change = torch.bmm(h[..., column : column + rank], B).flatten(0, 1)[rows.keep]
        y[:, lo:hi].index_add_(0, rows.to, change.to(y.dtype))


class _Known:
    """The base's own forward, whose outputs for one input are there already."""

    def __init__(self, own: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
        self.own, self.x, self.y = own, x, y

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and args[0] is self.x and not kwargs:
            return self.y.clone()
        return self.own(*args, **kwargs)
