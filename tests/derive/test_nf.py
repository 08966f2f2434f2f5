# SPDX-License-Identifier: Apache-2.0
"""Code books, packing, block scales and storage, against closed forms and published values."""

from __future__ import annotations

import itertools

import pytest
import torch

from tunesmith.core.errors import UsageError
from tunesmith.derive.nf import (
    BITS,
    Format,
    codebook,
    dequantised,
    nearest,
    pack,
    packed_bytes,
    quantised,
    rounded,
    shapes,
    unpack,
)  # fmt: skip

# The NF4 values of bitsandbytes (`create_normal_map` with offset 0.9677083), as its documentation lists them.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.mark.parametrize("bits", BITS)
def test_a_code_book_has_two_to_the_b_rising_values_with_0_and_both_ends(bits: int) -> None:
    book = codebook(bits)
    assert len(book) == 2**bits and len(book.unique()) == 2**bits
    assert torch.equal(book.sort().values, book)
    assert book[0] == -1 and book[-1] == 1 and 0.0 in book.tolist()
    even = codebook(bits, "int")
    assert len(even) == 2**bits - 1 and torch.allclose(even, -even.flip(0)) and 0.0 in even.tolist()


def test_four_bits_are_nf4_of_bitsandbytes() -> None:
    torch.testing.assert_close(codebook(4), torch.tensor(NF4), atol=1e-3, rtol=0)


def test_blocks_of_64_give_the_values_of_an_nf4_reference() -> None:
    """Abs-max scaling, nearest of the published values, scaled back: written out value by value."""
    W = torch.randn(8, 32)
    book = torch.tensor(NF4)
    want = torch.empty(256)
    for start in range(0, 256, 64):
        some = W.reshape(-1)[start : start + 64]
        scale = some.abs().max()
        want[start : start + 64] = book[(some[:, None] / scale - book).abs().argmin(1)] * scale
    got = rounded(W, Format(4, 64, scale_bits=0))
    torch.testing.assert_close(got, want.reshape(8, 32), atol=1e-3, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_the_nearest_value_is_chosen(bits: int) -> None:
    x = torch.linspace(-1.2, 1.2, 3001)
    book = codebook(bits)
    chosen = book[nearest(x, bits).long()]
    torch.testing.assert_close((x - chosen).abs(), (x[:, None] - book).abs().min(1).values)


@pytest.mark.parametrize("bits", [1, *BITS])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 1001])
def test_packing_is_exact_and_as_small_as_it_says(bits: int, n: int) -> None:
    codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8)
    data = pack(codes, bits)
    assert data.dtype == torch.uint8 and data.numel() == packed_bytes(n, bits)
    assert n * bits / 8 <= data.numel() < n * bits / 8 + 2
    assert torch.equal(unpack(data, bits, n), codes)


@pytest.mark.parametrize(
    ("bits", "scale_bits", "scale_format"), list(itertools.product(BITS, (0, 2, 3, 4, 8), ("fp32", "fp16", "bf16")))
)
def test_measured_bytes_are_the_storage_formula(bits: int, scale_bits: int, scale_format: str) -> None:
    """Blocks divide the tensor here; two levels hold one fp32 minimum for the matrix besides."""
    form, W = Format(bits, 16, scale_bits, 16, scale_format), torch.randn(64, 64)
    measured = sum(t.numel() * t.element_size() for t in quantised(W, form).values())
    wide = 32 if scale_format == "fp32" else 16
    per_weight = bits + (wide / 16 if not scale_bits else scale_bits / 16 + wide / 256)
    assert form.bits_per_weight == per_weight
    assert measured == form.nbytes((64, 64)) == per_weight * 64 * 64 / 8 + (4 if scale_bits else 0)
    assert {k: (t.shape, t.dtype) for k, t in shapes(form, (64, 64)).items()} == {
        k: (t.shape, t.dtype) for k, t in quantised(W, form).items()
    }


def test_nf4_of_qlora_takes_4_127_bits() -> None:
    assert Format(4, 64, 8, 256, "fp32").bits_per_weight == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("shape", [(5, 7), (64, 48), (1, 9), (17, 1)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("block", "scale_bits", "code"), [(16, 8, "nf"), (64, 0, "nf"), (48, 3, "nf"), (0, 0, "int")])
def test_packed_values_are_the_rounded_ones_at_any_size(
    shape: tuple[int, int], bits: int, block: int, scale_bits: int, code: str
) -> None:
    form, W = Format(bits, block, scale_bits, 4, "fp16", code), torch.randn(shape)
    held = quantised(W, form)
    assert torch.equal(dequantised(held, form, shape), rounded(W, form))
    assert sum(t.numel() * t.element_size() for t in held.values()) == form.nbytes(shape)


def test_coding_uses_the_scales_as_they_are_read_back() -> None:
    """With scales in 2 bits many values would lie in another bucket of the exact scale; none does of the one read back."""
    W, form = torch.randn(64, 64) * torch.rand(64, 1), Format(3, 16, 2, 16, "bf16")
    held, rows = quantised(W, form), W.reshape(-1, 16)
    top, steps = held["low"].view(torch.float32), held["steps"].view(torch.bfloat16).float()
    read = top + unpack(held["scales"], 2, 256) * steps.repeat_interleave(16)
    codes = unpack(held["codes"], 3, 4096).reshape(-1, 16)
    assert torch.equal(codes, nearest(rows / read[:, None], 3))
    assert int((codes != nearest(rows / rows.abs().amax(1, keepdim=True), 3)).sum()) > 100


def test_zeros_and_constant_blocks_survive() -> None:
    for W in (torch.zeros(4, 16), torch.full((4, 16), 0.3), torch.cat([torch.zeros(2, 16), torch.randn(2, 16)])):
        back = rounded(W, Format(4, 16, 8, 4, "fp32"))
        assert torch.isfinite(back).all() and torch.equal(back[W == 0], W[W == 0])
    torch.testing.assert_close(rounded(torch.full((4, 16), 0.3), Format(4, 16)), torch.full((4, 16), 0.3))


def test_eight_bits_are_close_and_errors_fall_with_bits() -> None:
    W = torch.randn(64, 64)
    errors = [float((W - rounded(W, Format(b, 64))).norm() / W.norm()) for b in BITS]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01


@pytest.mark.parametrize(
    "wrong", [{"bits": 5}, {"scale_bits": 1}, {"scale_format": "fp8"}, {"code": "x"}, {"block": -1}]
)
def test_a_format_that_does_not_exist_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Format(**wrong)  # type: ignore[arg-type]
