# SPDX-License-Identifier: Apache-2.0
"""Boolean masks as bits: 8 to a byte, the first entry in the lowest bit, unused bits of the last byte zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.core.errors import DeltaError

_PLACES = torch.arange(8, dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """A mask of any shape as bytes [ceil(n / 8)] uint8."""
    flat = mask.detach().reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    return (flat << _PLACES.to(flat.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean mask of `shape` that `pack` made. Raises DeltaError for bytes of another length."""
    n = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != ((n + 7) // 8,):
        raise DeltaError(f"a mask of {list(shape)} takes {(n + 7) // 8} bytes, not {bits.dtype} {list(bits.shape)}")
    ones = (bits[:, None] >> _PLACES.to(bits.device)) & 1
    return ones.reshape(-1)[:n].bool().reshape(tuple(shape))


def count(bits: Tensor) -> int:
    """How many bits are set."""
    return int(((bits[:, None] >> _PLACES.to(bits.device)) & 1).sum())
