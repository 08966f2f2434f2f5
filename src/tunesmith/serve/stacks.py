# SPDX-License-Identifier: Apache-2.0
"""Factors of many deltas beside each other, as batched products read them.

Deltas that change the same layers with the same ranks are a family. A family is one table [slots, numbers]: a row holds
a delta's factors product by product, so those of one product are `A` [slots, in, R] (the layers of the product side by
side, R the sum of their ranks) and a `B` [slots, r, out] for each layer. Ranks are kept apart, so none is padded. Slots
in use have no gaps: what leaves is replaced by the last, so a running batch needs no gathering of factors, and the cost
of a delta that joins is one copy of its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tunesmith.serve.mixed import Resident

Groups = Sequence[tuple[str, ...]]
Shape = tuple[
    tuple[str, int, int, int], ...
]  # (path, rank, in, out) of the low-rank changes, in the order of the groups


@dataclass(frozen=True)
class Factors:
    """Where a family's factors of one product lie in a row: A, and for each changed path its B and its columns of A."""

    start: int
    width: int
    ranks: int
    parts: tuple[tuple[str, int, int, int, int], ...]  # (path, first column of A, rank, start of B, out)


class Family:
    """The deltas in use that have one `Shape`. `members` are in the order of their slots."""

    def __init__(self, shape: Shape, groups: Groups, dtype: torch.dtype, device: torch.device) -> None:
        of = {path: (rank, width, out) for path, rank, width, out in shape}
        self.members: list[Resident] = []
        self.factors: dict[tuple[str, ...], Factors] = {}
        at = 0
        for group in groups:
            paths = [p for p in group if p in of]
            if not paths:
                continue
            ranks, width = sum(of[p][0] for p in paths), of[paths[0]][1]
            start, column, parts = at, 0, []
            at += ranks * width
            for p in paths:
                rank, _, out = of[p]
                parts.append((p, column, rank, at, out))
                column, at = column + rank, at + rank * out
            self.factors[group] = Factors(start, width, ranks, tuple(parts))
        self._table = torch.empty(0, at, dtype=dtype, device=device)
        self._views: dict[tuple[str, ...], tuple[Tensor, list[tuple[str, int, int, Tensor]]]] = {}
        self._within: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def settle(self, wanted: Iterable[Resident], keep: Iterable[Resident]) -> None:
        """Have all of `wanted` in slots, and of the others none but those of `keep`."""
        wanted, kept = list(wanted), {id(r) for r in keep}
        kept |= {id(r) for r in wanted}
        for slot in range(len(self.members) - 1, -1, -1):
            if id(self.members[slot]) not in kept:
                last = self.members.pop()
                if slot < len(self.members):
                    self.members[slot] = last
                    self._table[slot].copy_(self._table[len(self.members)])
        here = {id(r) for r in self.members}
        new = [r for r in wanted if id(r) not in here]
        self._reserve(len(self.members) + len(new))
        for r in new:
            self._write(len(self.members), r)
            self.members.append(r)

    def _reserve(self, slots: int) -> None:
        if slots > len(self._table):
            table = self._table.new_empty(max(slots, 2 * len(self._table), 4), self._table.shape[1])
            table[: len(self.members)] = self._table[: len(self.members)]
            self._table = table
            self._views.clear()

    def _write(self, slot: int, r: Resident) -> None:
        row = self._table[slot]
        for f in self.factors.values():
            A = row[f.start : f.start + f.width * f.ranks].view(f.width, f.ranks)
            for path, column, rank, start, out in f.parts:
                a, b = r.low[path]
                A[:, column : column + rank] = a.T
                row[start : start + rank * out].view(rank, out).copy_(b.T)

    def within(self, paths: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The groups whose factors act on the layers `paths`."""
        if paths not in self._within:
            self._within[paths] = [g for g in self.factors if not set(g).isdisjoint(paths)]
        return self._within[paths]

    def of(self, group: tuple[str, ...]) -> tuple[Tensor, list[tuple[str, int, int, Tensor]]]:
        """A [slots, in, R] and (path, first column, rank, B [slots, r, out]) of a product, over the slots in use."""
        found = self._views.get(group)
        n = len(self.members)
        if found is None or len(found[0]) != n:
            f, table = self.factors[group], self._table[:n]
            A = table[:, f.start : f.start + f.width * f.ranks].view(n, f.width, f.ranks)
            parts = [
                (path, column, rank, table[:, start : start + rank * out].view(n, rank, out))
                for path, column, rank, start, out in f.parts
            ]
            self._views[group] = found = (A, parts)
        return found


class Stacks:
    """The families of the deltas in use.

    Args:
        groups: paths whose layers read one input and are computed as one product; others stand alone.
        dtype: of the tables; on the CPU fp32 also for a bf16 base, whose small batched products are slower.
    """

    def __init__(self, groups: Groups = (), dtype: torch.dtype | None = None) -> None:
        self.groups, self.dtype = tuple(groups), dtype
        self._grouped = {p: g for g in self.groups for p in g}
        self.families: dict[Shape, Family] = {}
        self.version = 0  # rises when a delta changes its place
        self._order: dict[int, tuple[int, int]] = {}
        self._shapes: dict[int, tuple[Resident, Shape]] = {}

    def group(self, path: str) -> tuple[str, ...]:
        return self._grouped.get(path, (path,))

    def settle(self, wanted: Iterable[Resident], keep: Iterable[Resident] = ()) -> None:
        """Have the factors of `wanted` in tables, and let go all others but those of `keep`."""
        by_shape: dict[Shape, tuple[list[Resident], list[Resident]]] = {s: ([], []) for s in self.families}
        for i, some in enumerate((wanted, keep)):
            for r in some:
                if r.low:
                    by_shape.setdefault(self._shape(r), ([], []))[i].append(r)
        for shape, (here, kept) in by_shape.items():
            if shape not in self.families and here:
                self.families[shape] = self._family(shape, here[0])
            if shape in self.families:
                self.families[shape].settle(here, kept)
                if not self.families[shape].members:
                    del self.families[shape]
        members = [(k, slot, r) for k, f in enumerate(self.families.values()) for slot, r in enumerate(f.members)]
        order = {id(r): (k, slot) for k, slot, r in members}
        self.version += order != self._order
        self._order = order
        self._shapes = {id(r): self._shapes[id(r)] for _, _, r in members}

    def place(self, r: Resident | None) -> tuple[int, int]:
        """(family, slot) of a delta, for sorting a batch; those without low-rank factors come last, the base after them."""
        far = 1 << 30
        return (far, far) if r is None else self._order.get(id(r), (far, id(r) % far))

    def _shape(self, r: Resident) -> Shape:
        if id(r) not in self._shapes:
            shape = tuple((p, len(a), a.shape[1], len(b)) for p, (a, b) in r.low.items())
            self._shapes[id(r)] = (r, shape)  # holding the delta keeps its id its own
        return self._shapes[id(r)][1]

    def _family(self, shape: Shape, like: Resident) -> Family:
        a = next(iter(like.low.values()))[0]
        dtype = self.dtype or (torch.float32 if a.device.type == "cpu" and a.dtype == torch.bfloat16 else a.dtype)
        groups = list(dict.fromkeys(self.group(p) for p, *_ in shape))
        return Family(shape, groups, dtype, a.device)
