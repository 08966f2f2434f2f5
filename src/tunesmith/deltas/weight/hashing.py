# SPDX-License-Identifier: Apache-2.0
"""The fold map: every position of a long vector is read from one cell of a short one, through integer hashes alone.

    chunk c = i div m, o = i mod m;  h(i) = (u(c) + o) mod m,  u(c) = ((a1 c + a2 c^2 + a3) mod P) mod m
    g(i) = +1 or -1 by bit (i mod 16) of (b1 w + b2 w^2 + b3) mod P with w = i div 16,  P = 2038074743

A full chunk uses every cell once, so loads differ by at most one, and with m >= n the map is injective. Within a chunk
the cells follow each other, so a stretch of the vector is gathered as a few slices: no table of indices is ever made.
The six numbers a, b are the whole specification; the same numbers give the same map on any machine and version. The map
is that of the authors of STABLE-RPS (ICLR 2024); their signs come from a hash of single positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

P = 2038074743
_WORD = 16  # signs read from one hash


def draw_numbers(generator: torch.Generator) -> Tensor:
    """Six odd numbers below P, int64: a1, a2, a3 of the map and b1, b2, b3 of the signs."""
    return 2 * torch.randint(1, P // 2 - 1, (6,), generator=generator, dtype=torch.int64) + 1


def polynomial(x: Tensor, a: Tensor) -> Tensor:
    """(a1 x + a2 x^2 + a3) mod P of int64 x >= 0, exact: no product exceeds 62 bits."""
    x = x % P
    return ((a[0] * x) % P + (a[1] * ((x * x) % P)) % P + a[2]) % P


def signs(start: int, length: int, b: Tensor) -> Tensor:
    """g(i) for i = start .. start + length - 1, int8 on the device of b."""
    first, last = start // _WORD, (start + length - 1) // _WORD
    h = polynomial(torch.arange(first, last + 1, device=b.device), b)
    pairs = torch.stack([h & 255, (h >> 8) & 255], 1).to(torch.uint8).reshape(-1, 1)  # two bytes a word
    bits = (pairs >> torch.arange(8, dtype=torch.uint8, device=b.device)) & 1
    at = start - first * _WORD
    return 1 - 2 * bits.reshape(-1)[at : at + length].to(torch.int8)


@dataclass(frozen=True)
class Fold:
    """The map of n positions onto m cells; `numbers` [6] int64 as `draw_numbers` gives them."""

    n: int
    m: int
    numbers: Tensor

    def turn(self, chunk: int) -> int:
        """u(c), in Python's own integers."""
        a1, a2, a3 = self._a
        return (a1 * chunk + a2 * chunk * chunk + a3) % P % self.m

    @cached_property
    def _a(self) -> list[int]:
        return [int(v) for v in self.numbers[:3].tolist()]

    def cells(self, i: Tensor) -> Tensor:
        """h(i) of int64 positions, written out: what `gather` does without it."""
        return (polynomial(i // self.m, self.numbers[:3].to(i.device)) % self.m + i % self.m) % self.m

    def gather(self, psi: Tensor, start: int, length: int) -> Tensor:
        """psi[h(i)] for i = start .. start + length - 1; its gradient adds up over the positions that share a cell."""
        pieces = []
        while length:
            chunk, o = divmod(start, self.m)
            at = (self.turn(chunk) + o) % self.m
            take = min(length, self.m - o, self.m - at)  # up to the end of the chunk, or of psi
            pieces.append(psi[at : at + take])
            start, length = start + take, length - take
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def signed(self, psi: Tensor, start: int, length: int) -> Tensor:
        """g(i) psi[h(i)] of a stretch, in the dtype of psi."""
        return self.gather(psi, start, length) * signs(start, length, self.numbers[3:].to(psi.device)).to(psi.dtype)

    def load(self) -> Tensor:
        """How many positions read each cell, int64 [m]: n div m, one more for the cells of the last chunk."""
        full, rest = divmod(self.n, self.m)
        out = torch.full((self.m,), full, dtype=torch.int64)
        at = self.turn(full)
        out[at : at + rest] += 1
        out[: max(0, at + rest - self.m)] += 1
        return out
