# SPDX-License-Identifier: Apache-2.0
"""Cached prefixes: keys and values that another request may read, in pages of a few tokens.

A page holds the cells of `size` tokens that follow its parent's, under one delta (or the base): what is in it is a
function of the delta and of all tokens up to its end, and it is found by just these, compared token by token. A page that
is written is never written again, so requests share it without a copy; `refs` counts them. Pages nobody reads stay until
their cells are needed, the least recently used first and children before parents; to the pool they are owners like any
other, and to admission their cells are free.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tunesmith.serve.pool import Pool

SIZE = 16
Key = tuple[int, str | None, tuple[int, ...]]  # number of the parent (0: none), digest of the delta, tokens


@dataclass(eq=False)
class Page:
    """`cells` of the tokens of a page, how deep it lies in its chain, who reads it, and when it was last let go."""

    number: int
    key: Key
    cells: Tensor
    depth: int
    refs: int = 0
    used: int = 0


class Pages:
    """The cached prefixes in a pool."""

    def __init__(self, pool: Pool, size: int = SIZE) -> None:
        self.pool, self.size = pool, size
        self.in_use = 0  # cells of pages that somebody reads
        self.found = 0  # tokens that did not have to be read again
        self._pages: dict[Key, Page] = {}
        self._numbers, self._clock = itertools.count(1), itertools.count(1)

    @property
    def unused(self) -> int:
        """Cells of pages nobody reads: they are free to whoever needs them."""
        return len(self._pages) * self.size - self.in_use

    def find(self, delta: str | None, tokens: Sequence[int]) -> list[Page]:
        """The longest chain of pages that `tokens` begin with, but for the last token, which has logits to give."""
        chain: list[Page] = []
        for start in range(0, len(tokens) - self.size, self.size):
            part = tuple(tokens[start : start + self.size])
            page = self._pages.get((chain[-1].number if chain else 0, delta, part))
            if page is None:
                break
            chain.append(page)
        return chain

    def hold(self, chain: Sequence[Page]) -> None:
        """Read these pages from now on. A chain is held from its first page on, so no parent has fewer readers."""
        for page in chain:
            page.refs += 1
            self.in_use += self.size if page.refs == 1 else 0

    def release(self, chain: Sequence[Page]) -> None:
        """Read them no longer."""
        now = next(self._clock)
        for page in chain:
            page.refs -= 1
            page.used = now
            self.in_use -= self.size if page.refs == 0 else 0

    def add(
        self, owner: object, delta: str | None, chain: Sequence[Page], tokens: Sequence[int], cells: Tensor
    ) -> Page:
        """The page after `chain` with these tokens, held: a new one takes `cells` over from `owner`.

        Where there is one already, the cells go back to the pool, and the caller reads the page's instead.
        """
        key = (chain[-1].number if chain else 0, delta, tuple(tokens))
        page = self._pages.get(key)
        if page is None:
            page = Page(next(self._numbers), key, cells.clone(), len(chain))
            self._pages[key] = page
            self.pool.hand_over(owner, cells, ("page", page.number))
        else:
            self.pool.hand_over(owner, cells, None)
        self.hold([page])
        return page

    def make_room(self, cells: int) -> None:
        """Let pages nobody reads go until the pool has `cells` free, as far as that can be."""
        if self.pool.free >= cells or not self.unused:
            return
        for page in sorted((p for p in self._pages.values() if not p.refs), key=lambda p: (p.used, -p.depth)):
            del self._pages[page.key]
            self.pool.give_back(("page", page.number))
            if self.pool.free >= cells:
                return

    def check(self) -> None:
        """Raise AssertionError where the books do not add up: a parent with fewer readers than a child, or lost cells."""
        by_number = {p.number: p for p in self._pages.values()}
        for p in self._pages.values():
            assert p.refs >= 0 and len(p.cells) == self.size
            assert sorted(self.pool.of(("page", p.number)).tolist()) == sorted(p.cells.tolist()), (
                "a page lost its cells"
            )
            parent = by_number.get(p.key[0])
            assert p.key[0] == 0 or (parent is not None and parent.refs >= p.refs), "a page outlived its parent"
        assert self.in_use == self.size * sum(p.refs > 0 for p in self._pages.values())
