# SPDX-License-Identifier: Apache-2.0
"""A base whose linear layers hold 2, 3, 4 or 8 bits a weight, and run from them.

Weights are packed bytes in memory and in files; each product reads them back for its own duration, forward and backward.
Formats and their bits are in `nf`. With several formats and a `budget` in bits a weight, each matrix gets the one that
leaves the least total squared error (`budget.allocate`).

Defaults: NF4 in blocks of 64 with 8-bit scales (QLoRA's 4.127 bits) on every linear layer but the output head.
Use when: memory is short, as the frozen base of a LoRA. `lq.lq_lora` starts that LoRA at the quantisation error.
Avoid when: weights must be merged back into few bits: folding a delta into a packed layer gives a dense one.
Cost: reading a layer back takes about as long as a product with a few dozen rows.

A packed layer is a linear layer to every delta: additive ones act beside it, the others on its dense weight, formed for
the call.

Dettmers et al. 2023, arXiv 2305.14314; formats by budget: Guo et al. 2023, arXiv 2311.12023.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.derive import Made, derive, recipe
from tunesmith.core.derived_store import form
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option
from tunesmith.core.sample import Sample
from tunesmith.core.sites import Site
from tunesmith.derive.budget import allocate
from tunesmith.derive.decompose import size
from tunesmith.derive.nf import Format, dequantised, quantised, rounded, shapes
from tunesmith.derive.targets import chosen


@form("quantised")
class QuantLinear(nn.Module):
    """x -> x Q^T + bias with Q [out, in] in few bits: buffers `codes`, `scales` and, with two levels, `steps`, `low`."""

    def __init__(
        self,
        packed: Mapping[str, Tensor],
        layout: Format,
        shape: tuple[int, int],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.layout = int(shape[0]), int(shape[1]), layout
        for name, t in packed.items():
            self.register_buffer(name, t)
        # The dtype that the dense weight has: an empty tensor follows `.to(dtype)`, packed integers must not.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, W: Tensor, layout: Format, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
        """W [out, in] in the format, with the dtype that its dense weight is to have."""
        return cls(quantised(W, layout), layout, (W.shape[0], W.shape[1]), bias, dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew, for code that reads it."""
        return self.dense_weight()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values() if b is not None)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Q [out, in], in `dtype` or that of the layer it was made from."""
        packed = {n: b for n, b in self._buffers.items() if n != "like" and b is not None}
        wanted = self._buffers["like"].dtype if dtype is None else dtype  # type: ignore[union-attr]
        return dequantised(packed, self.layout, (self.out_features, self.in_features)).to(wanted)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.layout.bits}"

    def describe(self) -> dict[str, Any]:
        dtype = str(self._buffers["like"].dtype).removeprefix("torch.")  # type: ignore[union-attr]
        sizes = {"in": self.in_features, "out": self.out_features}
        return {**sizes, "bias": self.bias is not None, "dtype": dtype, "format": asdict(self.layout)}

    @classmethod
    def blank(cls, entry: Mapping[str, Any]) -> QuantLinear:
        layout, dtype = Format(**entry["format"]), getattr(torch, entry["dtype"])
        shape = (int(entry["out"]), int(entry["in"]))
        bias = torch.zeros(shape[0], dtype=dtype) if entry["bias"] else None
        return cls(shapes(layout, shape), layout, shape, bias, dtype)


class _Product(torch.autograd.Function):
    """x Q^T; Q is read back for the product in each direction and not kept between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.dense_weight(x.dtype))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad @ ctx.layer.dense_weight(grad.dtype)).to(ctx.dtype), None


@recipe("quantise", paper="2305.14314")
class Quantise:
    """Hold linear layers in few bits; with several formats, the best for each matrix within a budget."""

    bits: tuple[int, ...] = option((4,), "bits b of a weight: 2, 3, 4 or 8")
    block: tuple[int, ...] = option((64,), "weights B0 of a block; 0 for one block a row")
    scale_bits: tuple[int, ...] = option((8,), "bits b0 of a block's scale; 0 for scales that are not quantised")
    scale_block: tuple[int, ...] = option((256,), "scales B1 of a block of scales")
    scale_format: tuple[str, ...] = option(("fp32",), "format b1 of what scales the scales: fp32, fp16 or bf16")
    code: str = option("nf", "code values: quantiles of a normal distribution, or evenly spaced", choices=("nf", "int"))
    budget: float = option(0.0, "bits a weight on average, 0 for no limit", low=0.0, high=32.0)
    targets: str = option("all-linear", "which linear layers")

    def trains(self, base: Base, extra: Any) -> list[Any]:
        """An ordinary LoRA beside the packed layers, as QLoRA does; other methods are named beside the recipe."""
        return [methods.build("lora", {"targets": self.targets})]

    def make(self, base: Base, sample: Sample | None) -> Made:
        """Packed layers by path; `facts` says the bits a weight and how often each format was chosen."""
        sites = chosen(base, self.targets)
        form_of = assigned(sites, formats(self), self.budget, lambda s, f: size(W_of(s) - rounded(W_of(s), f)) ** 2)
        modules: dict[str, nn.Module] = {s.path: packed(s, W_of(s), form_of[s.path]) for s in sites}
        return Made(modules, usage(sites, form_of))


def W_of(site: Site) -> Tensor:
    """The dense weight of the site, fp32."""
    return site.params()["weight"].detach().float()


def packed(site: Site, W: Tensor, layout: Format) -> QuantLinear:
    """A packed layer in the place of the site's, holding `W` in the format and the site's bias."""
    params = site.params()
    return QuantLinear.of(W, layout, None if "bias" not in params else params["bias"].clone(), params["weight"].dtype)


def formats(how: Any) -> list[Format]:
    """Every combination of the options of a recipe (or of anything with these fields), each once."""
    grid = itertools.product(how.bits, how.block, how.scale_bits, how.scale_block, how.scale_format)
    return list(dict.fromkeys(Format(*values, code=how.code) for values in grid))


def assigned(
    sites: Sequence[Site], choices: Sequence[Format], budget: float, error: Callable[[Site, Format], float]
) -> dict[str, Format]:
    """The format of each site: the one there is, or those of least total `error` within `budget` bits a weight.

    Raises UsageError for several formats without a budget, and for a budget that no choice meets.
    """
    weights = sum(s.shape[0] * s.shape[1] for s in sites)
    if not choices:
        raise UsageError("no format is given", hint="bits=(4,)")
    if len(choices) == 1 and not budget:
        return {s.path: choices[0] for s in sites}
    if not budget:
        raise UsageError(
            f"{len(choices)} formats and no budget to choose by", where="budget", hint="bits a weight, as 2.75"
        )
    sizes = [[f.nbytes(s.shape) for f in choices] for s in sites]
    errors = [[error(s, f) for f in choices] if len(choices) > 1 else [0.0] for s in sites]
    least = 8 * sum(min(row) for row in sizes) / weights
    if least > budget:
        raise UsageError(f"{budget} bits a weight are too few: these formats need {least:.3f}", where="budget")
    found = allocate(errors, sizes, budget * weights / 8)
    return {s.path: choices[c] for s, c in zip(sites, found, strict=True)}


def usage(sites: Sequence[Site], form_of: Mapping[str, Format]) -> dict[str, Any]:
    """Bytes, bits a weight, and how many matrices have each format (named b/B0/b0/b1/B1)."""
    total = sum(form_of[s.path].nbytes(s.shape) for s in sites)
    counts: dict[str, int] = {}
    for s in sites:
        f = form_of[s.path]
        name = f"{f.code}{f.bits}/{f.block}/{f.scale_bits}/{f.scale_format}/{f.scale_block}"
        counts[name] = counts.get(name, 0) + 1
    weights = sum(s.shape[0] * s.shape[1] for s in sites)
    return {"bytes": total, "bits_per_weight": 8 * total / weights, "formats": counts}


def quantise(base: Base, bits: int | Sequence[int] = 4, **options: Any) -> Base:
    """`derive(base, Quantise(...))`; an option may be one value or several to choose among."""
    return derive(base, Quantise(**several(bits=bits, **options)))


def several(**options: Any) -> dict[str, Any]:
    """Options with single values of the format's fields made tuples of one."""
    fields = ("bits", "block", "scale_bits", "scale_block", "scale_format")
    return {k: v if k not in fields else tuple(v) if isinstance(v, list | tuple) else (v,) for k, v in options.items()}
