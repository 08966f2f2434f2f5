# SPDX-License-Identifier: Apache-2.0
"""Order statistics over all tensors of a model that are seen one at a time and never all held.

Two passes of counting: the bits of an fp32 number, put in order, are counted by their upper half, then the lower halves
of those that share the upper half of the one looked for. The result is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError

HALF = 1 << 16
PIECE = 1 << 20  # small tensors are counted together, since every count costs a pass over all bins
Stream = Callable[[], Iterator[Sequence[Tensor]]]


def order_statistics(stream: Stream, ranks: Sequence[int]) -> list[list[float]]:
    """For each source the values at `ranks` (0 is the smallest) among all its entries, as fp32.

    `stream()` gives anew, tensor by tensor, one tensor of each source. Raises UsageError for a rank beyond the entries or
    an entry that is NaN.
    """
    upper: list[Tensor] = []
    for tensors in _pieces(stream()):
        upper = upper or [torch.zeros(HALF, dtype=torch.int64) for _ in tensors]
        for count, t in zip(upper, tensors, strict=True):
            count += torch.bincount(_key(t) >> 16, minlength=HALF).cpu()
    found = [[_bin(count, r) for r in ranks] for count in upper]
    lower = [{b: torch.zeros(HALF, dtype=torch.int64) for b, _ in bins} for bins in found]
    for tensors in _pieces(stream()):
        for counts, t in zip(lower, tensors, strict=True):
            key = _key(t)
            for b, count in counts.items():
                count += torch.bincount(key[key >> 16 == b] & (HALF - 1), minlength=HALF).cpu()
    return [
        [_value((b << 16) | _bin(counts[b], left)[0]) for b, left in bins]
        for bins, counts in zip(found, lower, strict=True)
    ]


def _pieces(tensors: Iterator[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
    """The same entries in flat pieces of `PIECE` or more, but for the last."""
    held: list[list[Tensor]] = []
    for some in tensors:
        held.append([t.detach().reshape(-1).float() for t in some])
        if sum(len(h[0]) for h in held) >= PIECE:
            yield [torch.cat(one) for one in zip(*held, strict=True)]
            held = []
    if held:
        yield [torch.cat(one) for one in zip(*held, strict=True)]


def _key(t: Tensor) -> Tensor:
    """Numbers 0 .. 2^32 - 1 [n] int64 in the order of the fp32 values."""
    flat = t.detach().reshape(-1).float() + 0.0  # -0 is 0
    if bool(torch.isnan(flat).any()):
        raise UsageError("an entry is not a number, so the entries cannot be ranked")
    bits = flat.view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -bits - 1, bits + (1 << 31))


def _value(key: int) -> float:
    bits = key - (1 << 31) if key >= 1 << 31 else -key - 1
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _bin(count: Tensor, rank: int) -> tuple[int, int]:
    """The bin in which the entry of a rank lies, and its rank within the bin."""
    if not 0 <= rank < int(count.sum()):
        raise UsageError(f"there is no entry of rank {rank} among {int(count.sum())}")
    ends = count.cumsum(0)
    at = int(torch.searchsorted(ends, rank, right=True))
    return at, rank - int(ends[at] - count[at])
