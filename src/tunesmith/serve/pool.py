# SPDX-License-Identifier: Apache-2.0
"""One pool of cells for cached keys and values and for the deltas that are resident (unified paging).

A cell is one vector of `width` numbers in each of two buffers per layer, one for keys and one for values; width is the
number of key-value heads times their size. A cached token takes one cell. A row of a delta's factors takes as many as
it needs: a LoRA of rank r whose rows are wider than a cell takes r * ceil(row / width) of them. So the length of a cache
and the rank of a delta are paid for in the same coin, and either may use what the other leaves.

Sheng et al. 2023, arXiv 2311.03285.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from tunesmith.core.errors import ResourceError, UsageError

RUN = 16  # cells; a page of a cached prefix has as many


class Pool:
    """Which cells are free and who owns the others.

    Owners are any hashable names (a request, a delta). Every operation is O(cells), vectorised; nothing is moved, so an
    index stays good until its owner frees it. Cells come from runs of `RUN` free ones as long as there are any, and a
    request's next cell is the one behind its last: what is read together then lies together, which a gather of
    scattered cells pays for several times over.
    """

    def __init__(self, cells: int) -> None:
        if cells < 1:
            raise UsageError(f"a pool needs at least one cell, got {cells}", where="cells")
        self.cells = cells
        self._free = torch.ones(cells, dtype=torch.bool)
        self._owned: dict[Hashable, list[Tensor]] = {}
        self.free = cells

    @property
    def used(self) -> int:
        return self.cells - self.free

    def take(self, owner: Hashable, n: int, *, together: bool = False, behind: int | None = None) -> Tensor:
        """`n` cells for `owner`, int64 and rising; with `together` neighbours where there is such a run.

        `behind` a cell: those that follow it, as far as they are free, and then others. Raises ResourceError when fewer
        than `n` are free; then nothing was taken.
        """
        if n < 0:
            raise UsageError(f"cannot take {n} cells")
        if n > self.free:
            raise ResourceError(f"{n} cells were asked for and {self.free} of {self.cells} are free", where="pool")
        found = self._run(n) if together and n else None
        if found is None:
            found = self._following(behind, n)
            self._free[found] = False
            found = torch.cat([found, self._from_runs(n - len(found)).sort().values])
        self._free[found] = False
        self.free -= n
        self._owned.setdefault(owner, []).append(found)
        return found

    def take_each(self, owners: Sequence[Hashable], last: Sequence[int] | None = None) -> Tensor:
        """One cell for each owner, int64: the one behind its `last` where that is free. Raises ResourceError as `take` does."""
        n = len(owners)
        if not n:
            return torch.empty(0, dtype=torch.int64)
        if n > self.free:
            raise ResourceError(f"{n} cells were asked for and {self.free} of {self.cells} are free", where="pool")
        found = self._behind(torch.tensor(last if last is not None else [-1] * n))
        self._free[found] = False
        self.free -= n
        for owner, cell in zip(owners, found.split(1), strict=True):
            self._owned.setdefault(owner, []).append(cell)
        return found

    def _behind(self, last: Tensor) -> Tensor:
        """Different free cells, one for each of `last` (-1: none): the next one, else the first of a free run."""
        wanted = last + 1
        good = (last >= 0) & (wanted < self.cells) & self._free[wanted.clamp(max=self.cells - 1)]
        seen, first = torch.unique(wanted, return_inverse=True)
        taker = torch.full((len(seen),), len(last)).scatter_reduce_(0, first, torch.arange(len(last)), "amin")
        good &= taker[first] == torch.arange(len(last))  # two that want one cell: the first gets it
        rest = int((~good).sum())
        if rest:
            self._free[wanted[good]] = False
            wanted[~good] = self._from_runs(rest, step=RUN)
            self._free[wanted[good]] = True
        return wanted

    def _following(self, cell: int | None, n: int) -> Tensor:
        """The free cells that follow one without a gap, at most `n`."""
        if cell is None:
            return torch.empty(0, dtype=torch.int64)
        good = self._free[cell + 1 : cell + 1 + n].long().cumprod(0)
        return torch.arange(cell + 1, cell + 1 + int(good.sum()))

    def _from_runs(self, n: int, step: int = 1) -> Tensor:
        """`n` free cells: every `step`-th of the runs that are free as a whole, then whatever is free."""
        runs = self._free[: self.cells // RUN * RUN].view(-1, RUN).all(1).nonzero().flatten()
        found = (runs[: -(-n * step // RUN), None] * RUN + torch.arange(0, RUN, step)).flatten()[:n]
        if len(found) < n:
            left = self._free.clone()
            left[found] = False
            found = torch.cat([found, left.nonzero().flatten()[: n - len(found)]])
        return found

    def _run(self, n: int) -> Tensor | None:
        """The first `n` free cells that are neighbours."""
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), self._free.long().cumsum(0)])  # free cells before each
        starts = (counts[n:] - counts[:-n] == n).nonzero().flatten()
        return torch.arange(int(starts[0]), int(starts[0]) + n) if len(starts) else None

    def of(self, owner: Hashable) -> Tensor:
        """The cells of `owner` in the order it took them; empty for a stranger."""
        held = self._owned.get(owner)
        if not held:
            return torch.empty(0, dtype=torch.int64)
        if len(held) > 1:
            self._owned[owner] = held = [torch.cat(held)]
        return held[0]

    def give_back(self, owner: Hashable) -> int:
        """Free everything `owner` has; gives how many cells that were (0 for a stranger: giving back twice is harmless)."""
        held = self._owned.pop(owner, [])
        for cells in held:
            self._free[cells] = True
        n = sum(len(c) for c in held)
        self.free += n
        return n

    def hand_over(self, owner: Hashable, cells: Tensor, to: Hashable | None) -> None:
        """Make some of `owner`'s cells another's, or free them (`to` None). Raises UsageError for cells it has not."""
        held = self.of(owner)
        mine = torch.isin(held, cells)
        if int(mine.sum()) != len(cells):
            raise UsageError(f"{owner!r} does not have these cells", where="pool")
        self._owned[owner] = [held[~mine]]
        if to is not None:
            self._owned.setdefault(to, []).append(cells.clone())
            return
        self._free[cells] = True
        self.free += len(cells)

    def owners(self) -> list[Hashable]:
        return list(self._owned)

    def check(self) -> None:
        """Raise AssertionError where the books do not add up: a cell with two owners, or one that is lost."""
        held = [c for cells in self._owned.values() for c in cells]
        every = torch.cat(held) if held else torch.empty(0, dtype=torch.int64)
        assert len(every) == len(torch.unique(every)), "a cell has two owners"
        assert not bool(self._free[every].any()), "a cell is owned and free"
        assert int(self._free.sum()) == self.free == self.cells - len(every), "cells were lost"


def cells_for(rows: Iterable[tuple[int, int]], width: int) -> int:
    """Cells for `(count, length)` rows of numbers: each row starts in a cell of its own.

    A LoRA on q, k, v and o of rank r: `[(r, d_in), (r, d_out)]` a projection, its A and its B^T, the two in the two
    buffers of the same cells, so a projection takes the larger of both (see `lora_cells`).
    """
    return sum(count * -(-length // width) for count, length in rows)


def lora_cells(shapes: Iterable[tuple[int, int, int]], width: int) -> int:
    """Cells of a LoRA with `(rank, in, out)` a projection: A's rows lie in the key buffer, B's columns in the value one."""
    return sum(max(cells_for([(r, d_in)], width), cells_for([(r, d_out)], width)) for r, d_in, d_out in shapes)
