# SPDX-License-Identifier: Apache-2.0
"""Numbers in few bits: code books, block scales in two levels, and codes packed into bytes.

A tensor of n values, seen flat, is cut into blocks of B0. Each value is divided by its block's scale (the largest
magnitude) and replaced by the nearest of 2^b code values. The scales less their minimum are held in b0 bits with one
number of format b1 for each B1 blocks. Bits for each value:

    b + b0 / B0 + bits(b1) / (B0 B1)        two levels
    b + bits(b1) / B0                       one level (b0 = 0): scales in format b1

NormalFloat codes and both levels: Dettmers et al. 2023, arXiv 2305.14314, as used by Guo et al. 2023, arXiv 2311.12023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import UsageError

DELTA = 0.9677083  # outermost quantile of the normal distribution that gets a code
BITS = (2, 3, 4, 8)
FORMATS = {
    "fp32": (torch.float32, torch.int32),
    "fp16": (torch.float16, torch.int16),
    "bf16": (torch.bfloat16, torch.int16),
}
CODES = ("nf", "int")


@dataclass(frozen=True)
class Format:
    """How one matrix is held: b bits in blocks of B0 (`block`, 0 for one block a row), scales in b0 bits (`scale_bits`, 0
    for one level) with a number of format b1 (`scale_format`) for each B1 (`scale_block`) of them.

    `code` is "nf" (quantiles of a normal distribution) or "int" (evenly spaced).
    """

    bits: int = 4
    block: int = 64
    scale_bits: int = 8
    scale_block: int = 256
    scale_format: str = "fp32"
    code: str = "nf"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("bits", self.bits, BITS), ("scale_bits", self.scale_bits, (0, *BITS)),
            ("scale_format", self.scale_format, tuple(FORMATS)), ("code", self.code, CODES),
        ):  # fmt: skip
            if value not in choices:
                raise UsageError(
                    f"{value!r} is not a choice", where=name, hint=f"one of {', '.join(map(str, choices))}"
                )
        if self.block < 0 or self.scale_block < 1:
            raise UsageError(f"blocks must hold a value, got {self.block} and {self.scale_block}")

    @property
    def bits_per_weight(self) -> float:
        """The formula above, for blocks that divide the tensor."""
        if not self.block:
            raise UsageError("one block a row: the bits depend on the length of the rows", hint="use nbytes(shape)")
        wide = 8 * FORMATS[self.scale_format][1].itemsize
        if not self.scale_bits:
            return self.bits + wide / self.block
        return self.bits + self.scale_bits / self.block + wide / (self.block * self.scale_block)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the packed tensors of one matrix, its last short blocks and the minimum of its scales included."""
        n, blocks = math.prod(shape), self.blocks(shape)
        wide = FORMATS[self.scale_format][1].itemsize
        if not self.scale_bits:
            return packed_bytes(n, self.bits) + wide * blocks
        steps = -(-blocks // self.scale_block)
        return packed_bytes(n, self.bits) + packed_bytes(blocks, self.scale_bits) + wide * steps + 4

    def blocks(self, shape: tuple[int, ...]) -> int:
        """The number of blocks of one matrix."""
        return -(-math.prod(shape) // self.length(shape))

    def length(self, shape: tuple[int, ...]) -> int:
        """The values of one block."""
        return self.block or shape[-1]


@lru_cache
def codebook(bits: int, code: str = "nf") -> Tensor:
    """The code values, rising, fp32, 2^b of them (2^b - 1 for "int"), with -1, 0 and 1 among them.

    NormalFloat: normal quantiles at linspace(1 - delta, 1/2, 2^(b-1)) and linspace(1/2, delta, 2^(b-1) + 1), the second
    1/2 left out, over the largest.
    """
    if code == "int":
        top = 2 ** (bits - 1) - 1
        return torch.arange(-top, top + 1, dtype=torch.float32) / top
    half = 2 ** (bits - 1)
    below = torch.linspace(1 - DELTA, 0.5, half, dtype=torch.float64)
    above = torch.linspace(0.5, DELTA, half + 1, dtype=torch.float64)[1:]
    values = torch.special.ndtri(torch.cat([below, above]))
    values = values / values.abs().max()
    values[half - 1] = 0.0  # the quantile 1/2, free of rounding
    return values.float()


def nearest(values: Tensor, bits: int, code: str = "nf") -> Tensor:
    """The index [...] uint8 of the nearest code value; half-way goes to the lower one."""
    book = codebook(bits, code)
    middles = (book[1:] + book[:-1]) / 2
    if len(middles) > 8:
        return torch.bucketize(values, middles.to(values.device), out_int32=True).to(torch.uint8)
    out = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for middle in middles.tolist():  # a few comparisons are quicker than a search
        out += values > middle
    return out


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of n packed codes."""
    return -(-n // 4) + -(-n // 8) if bits == 3 else -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [n] uint8 below 2^b as bytes [packed_bytes(n, b)], the first code in the lowest bits.

    Three bits are held as a run of the low two followed by a run of the high one.
    """
    if bits == 8:
        return codes.clone()
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)])
    each = 8 // bits
    rows = F.pad(codes, (0, -len(codes) % each)).reshape(-1, each)
    out = rows[:, 0].clone()
    for i in range(1, each):
        out |= rows[:, i] << (i * bits)
    return out


def unpack(data: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: codes [n] uint8."""
    if bits == 8:
        return data[:n]
    if bits == 3:
        low = -(-n // 4)
        return unpack(data[:low], 2, n) | (unpack(data[low:], 1, n) << 2)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    return ((data[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[:n]


@lru_cache
def _table(bits: int, code: str) -> Tensor:
    """Code values of every byte, [256, codes in a byte], so that a byte is looked up once.

    For three bits [4096, 4]: four codes of a byte of low bits and a half byte of high ones.
    """
    book = codebook(bits, code)
    book = torch.cat([book, book.new_zeros(2**bits - len(book))])
    if bits == 3:
        low = unpack(torch.arange(256, dtype=torch.uint8), 2, 1024).reshape(1, 256, 4)
        high = unpack(torch.arange(16, dtype=torch.uint8), 1, 128).reshape(16, 8)[:, None, :4]
        return book[(low | (high << 2)).reshape(4096, 4).long()]
    return book[unpack(torch.arange(256, dtype=torch.uint8), bits, 256 * (8 // bits)).long()].reshape(256, -1)


def values(data: Tensor, bits: int, n: int, code: str = "nf") -> Tensor:
    """The code values [n] fp32 of packed codes."""
    index = data.int()
    if bits == 3:
        low = -(-n // 4)
        index = index[:low] | (unpack(data[low:], 4, low).int() << 8)
    return F.embedding(index, _table(bits, code).to(data.device)).reshape(-1)[:n]


@torch.no_grad()
def quantised(W: Tensor, form: Format) -> dict[str, Tensor]:
    """W in few bits: `codes`, and `scales`, with two levels also `steps` and `low`; integers all, as raw bits.

    Values are coded with the scales as they are read back, so that coding and reading agree.
    """
    codes, scales = _coded(W, form)
    return {"codes": pack(codes.reshape(-1)[: W.numel()], form.bits), **scales}


@torch.no_grad()
def rounded(W: Tensor, form: Format) -> Tensor:
    """`dequantised(quantised(W))`, without packing."""
    codes, scales = _coded(W, form)
    flat = codebook(form.bits, form.code).to(W.device)[codes.int()] * _read_scales(scales, form, len(codes))[:, None]
    return flat.reshape(-1)[: W.numel()].reshape(W.shape)


def _coded(W: Tensor, form: Format) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes [blocks, B0] uint8, the last block filled up, and the scales."""
    flat, B0 = W.detach().reshape(-1).float(), form.length(tuple(W.shape))
    rows = F.pad(flat, (0, -len(flat) % B0)).reshape(-1, B0)
    scales = _scales(rows.abs().amax(1), form)
    read = _read_scales(scales, form, len(rows))
    unit = rows * torch.where(read > 0, 1 / read, torch.zeros_like(read))[:, None]  # a scale of 0: nothing but zeros
    return nearest(unit, form.bits, form.code), scales


def _scales(scales: Tensor, form: Format) -> dict[str, Tensor]:
    kind, raw = FORMATS[form.scale_format]
    if not form.scale_bits:
        return {"scales": scales.to(kind).view(raw)}
    low = scales.min()
    top, B1 = 2**form.scale_bits - 1, form.scale_block
    above = F.pad(scales - low, (0, -len(scales) % B1)).reshape(-1, B1)
    steps = (above.amax(1) / top).to(kind)
    step = steps.float()[:, None]
    codes = torch.where(step > 0, (above / step.clamp_min(torch.finfo(torch.float32).tiny)).round(), step * 0)
    codes = codes.clamp_(0, top).to(torch.uint8).reshape(-1)[: len(scales)]
    return {"scales": pack(codes, form.scale_bits), "steps": steps.view(raw), "low": low.reshape(1).view(torch.int32)}


def _read_scales(t: Mapping[str, Tensor], form: Format, blocks: int) -> Tensor:
    """The scales [blocks] fp32 as they are read back."""
    kind = FORMATS[form.scale_format][0]
    if not form.scale_bits:
        return t["scales"].view(kind).float()
    steps = t["steps"].view(kind).float().repeat_interleave(form.scale_block)[:blocks]
    return unpack(t["scales"], form.scale_bits, blocks) * steps + t["low"].view(torch.float32)


@torch.no_grad()
def dequantised(t: Mapping[str, Tensor], form: Format, shape: tuple[int, ...]) -> Tensor:
    """The tensor of `shape`, fp32, that `quantised` holds."""
    n, blocks, B0 = math.prod(shape), form.blocks(shape), form.length(shape)
    flat = values(t["codes"], form.bits, n, form.code)
    if n < blocks * B0:
        flat = F.pad(flat, (0, blocks * B0 - n))
    return (flat.reshape(blocks, B0) * _read_scales(t, form, blocks)[:, None]).reshape(-1)[:n].reshape(shape)


def shapes(form: Format, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Empty tensors of the sizes and types that `quantised` gives, to be filled from a file."""
    n, blocks, raw = math.prod(shape), form.blocks(shape), FORMATS[form.scale_format][1]
    codes = torch.zeros(packed_bytes(n, form.bits), dtype=torch.uint8)
    if not form.scale_bits:
        return {"codes": codes, "scales": torch.zeros(blocks, dtype=raw)}
    steps = torch.zeros(-(-blocks // form.scale_block), dtype=raw)
    scales = torch.zeros(packed_bytes(blocks, form.scale_bits), dtype=torch.uint8)
    return {"codes": codes, "scales": scales, "steps": steps, "low": torch.zeros(1, dtype=torch.int32)}
