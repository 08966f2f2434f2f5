# SPDX-License-Identifier: Apache-2.0
"""The lazy algebra of additive weight changes.

An `Update` is a change of one weight in canonical orientation `[out, in, *kernel]` (`[rows, dim]` for an embedding),
held as dense, sparse, low-rank, Kronecker or row factors. It can be applied to an input, scaled, measured and
made dense one matrix at a time, so nothing densifies a whole model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Update(Protocol):
    """An additive change of one weight of shape `shape`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def dense(self) -> Tensor:
        """The change as a tensor of `shape`, in fp32 or wider."""
        ...

    def apply(self, x: Tensor, site: Any) -> Tensor:
        """The change of the site's output for input `x`, in the dtype of `x` (embedding: of the factors)."""
        ...

    def scaled(self, s: float | Tensor) -> Update:
        """The change times `s`."""
        ...


def wide(t: Tensor) -> Tensor:
    """fp32 at least; fp64 is kept."""
    return t if t.dtype == torch.float64 else t.float()


def apply_dense(weight: Tensor, x: Tensor, site: Any) -> Tensor:
    """Output of a site for input `x` with `weight` in canonical orientation and no bias."""
    if site.kind == "embedding":
        return F.embedding(x, weight)
    weight = weight.to(x.dtype)
    if site.kind in ("conv1d", "conv2d"):
        conv = F.conv1d if site.kind == "conv1d" else F.conv2d
        m = site.module
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
            return conv(x, weight, None, m.stride, 0, m.dilation, m.groups)
        return conv(x, weight, None, m.stride, m.padding, m.dilation, m.groups)
    return F.linear(x, weight)


@dataclass(frozen=True)
class Dense:
    """A full matrix or kernel."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def dense(self) -> Tensor:
        return wide(self.value)

    def apply(self, x: Tensor, site: Any) -> Tensor:
        return apply_dense(self.value, x, site)

    def scaled(self, s: float | Tensor) -> Dense:
        return Dense(self.value * s)


@dataclass(frozen=True)
class LowRank:
    """`scale * B A` with B [out, r] and A [r, in * kernel], reshaped to `full`."""

    B: Tensor
    A: Tensor
    scale: float | Tensor = 1.0
    full: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.full or (self.B.shape[0], self.A.shape[1])

    @property
    def rank(self) -> int:
        return int(self.B.shape[1])

    def dense(self) -> Tensor:
        return (self.scale * (wide(self.B) @ wide(self.A))).reshape(self.shape)

    def apply(self, x: Tensor, site: Any) -> Tensor:
        if site.kind == "embedding":
            return F.embedding(x, self.B) @ (self.A * self.scale)
        if site.kind in ("conv1d", "conv2d"):
            return self._conv(x, site)
        h = F.linear(x, self.A.to(x.dtype))  # [.., r]
        unit = not isinstance(self.scale, Tensor) and self.scale == 1.0
        return F.linear(h if unit else h * self.scale, self.B.to(x.dtype))

    def _conv(self, x: Tensor, site: Any) -> Tensor:
        if site.module.groups > 1:  # the factors mix rows of different groups: only the product is a kernel
            return apply_dense(self.dense(), x, site)
        kernel = self.A.reshape(self.rank, *self.shape[1:])
        h = apply_dense(kernel, x, site)  # [N, r, ...]
        up = self.B.to(x.dtype).reshape(*self.B.shape, *([1] * (len(self.shape) - 2)))
        return (F.conv1d if site.kind == "conv1d" else F.conv2d)(h * self.scale, up)

    def scaled(self, s: float | Tensor) -> LowRank:
        return LowRank(self.B, self.A, self.scale * s, self.full)


@dataclass(frozen=True)
class Sparse:
    """`values` at flat `indices` (int64, unique) of a tensor of shape `full`."""

    indices: Tensor
    values: Tensor
    full: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.full

    def dense(self) -> Tensor:
        out = torch.zeros(math.prod(self.full), dtype=wide(self.values).dtype, device=self.values.device)
        return out.index_put((self.indices,), wide(self.values)).reshape(self.full)

    def apply(self, x: Tensor, site: Any) -> Tensor:
        if site.kind == "linear":
            y: Tensor = _SparseLinear.apply(x, self.indices, self.values, self.full)  # type: ignore[no-untyped-call]
            return y
        if site.kind == "embedding":
            return self._looked_up(x)
        m = site.module
        padding = m.padding
        if m.padding_mode != "zeros" or isinstance(padding, str):  # pad first, so that numbers say it all
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=mode), [0] * (len(self.full) - 2)
        geometry = (list(m.stride), list(padding), list(m.dilation), m.groups)
        y = _SparseConv.apply(x, self.indices, self.values, self.full, geometry)  # type: ignore[no-untyped-call]
        return y

    def _looked_up(self, x: Tensor) -> Tensor:
        """Rows x [...] of the change, [..., dim]; only rows that occur in x are formed, with no table in either pass."""
        dim = math.prod(self.full[1:])
        used, at = torch.unique(x, return_inverse=True)
        if not len(used) or not len(self.indices):
            return torch.zeros(*x.shape, dim, dtype=wide(self.values).dtype, device=x.device)
        row = torch.searchsorted(used, self.indices // dim).clamp_max(len(used) - 1)  # [k]
        hit = used[row] == self.indices // dim
        rows = torch.zeros(len(used) * dim, dtype=wide(self.values).dtype, device=x.device)
        rows = rows.index_put(((row * dim + self.indices % dim)[hit],), wide(self.values)[hit])
        return F.embedding(at, rows.reshape(-1, dim))

    def scaled(self, s: float | Tensor) -> Sparse:
        return Sparse(self.indices, self.values * s, self.full)


class _SparseLinear(torch.autograd.Function):
    """x D^T with D [out, in] sparse; D is formed for the product and not kept, its dense gradient only gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, values: Tensor, full: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, indices, values)
        ctx.full = full
        return F.linear(x, _scattered(indices, values, full, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, indices, values = ctx.saved_tensors
        gx = gv = None
        if ctx.needs_input_grad[0]:
            gx = (grad @ _scattered(indices, values, ctx.full, grad.dtype)).to(x.dtype)
        if ctx.needs_input_grad[2]:  # under autocast the gradient comes in half precision, x in full
            dense = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)  # [out, in]
            gv = dense.reshape(-1)[indices].to(values.dtype)
        return gx, None, gv, None


class _SparseConv(torch.autograd.Function):
    """As `_SparseLinear`, for a convolution of x with a sparse kernel; `geometry` is stride, padding, dilation, groups."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, indices: Tensor, values: Tensor, full: tuple[int, ...], geometry: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, indices, values)
        ctx.full, ctx.geometry = full, geometry
        conv = F.conv1d if len(full) == 3 else F.conv2d
        return conv(x, _scattered(indices, values, full, x.dtype), None, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        x, indices, values = ctx.saved_tensors
        *where, groups = ctx.geometry
        kernel = _scattered(indices, values, ctx.full, grad.dtype)
        asked = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], False]
        gx, dense, _ = torch.ops.aten.convolution_backward(
            grad, x.to(grad.dtype), kernel, None, *where, False, [0] * (len(ctx.full) - 2), groups, asked
        )
        gv = dense.reshape(-1)[indices].to(values.dtype) if asked[1] else None
        return gx.to(x.dtype) if asked[0] else None, None, gv, None, None


def _scattered(indices: Tensor, values: Tensor, full: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    out = torch.zeros(math.prod(full), dtype=dtype, device=values.device)
    out[indices] = values.to(dtype)
    return out.reshape(full)


@dataclass(frozen=True)
class Kronecker:
    """`scale * L (x) R` reshaped to `full`."""

    L: Tensor
    R: Tensor
    scale: float | Tensor = 1.0
    full: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.full or (self.L.shape[0] * self.R.shape[0], self.L.shape[1] * self.R.shape[1])

    def dense(self) -> Tensor:
        return (self.scale * torch.kron(wide(self.L), wide(self.R))).reshape(self.shape)

    def apply(self, x: Tensor, site: Any) -> Tensor:
        if site.kind != "linear" or self.full is not None:
            return apply_dense(self.dense(), x, site)
        # (L (x) R) vec(X) = vec(L X R^T) with X [in_L, in_R]
        X = x.reshape(*x.shape[:-1], self.L.shape[1], self.R.shape[1])
        y = self.L.to(x.dtype) @ X @ self.R.to(x.dtype).T
        return y.flatten(-2) * self.scale

    def scaled(self, s: float | Tensor) -> Kronecker:
        return Kronecker(self.L, self.R, self.scale * s, self.full)


@dataclass(frozen=True)
class MaskedRows:
    """Outer product of a row mask [out] and one vector [in]: every chosen row moves by the same vector."""

    mask: Tensor
    vector: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.mask.shape[0], self.vector.shape[0])

    def dense(self) -> Tensor:
        return torch.outer(wide(self.mask), wide(self.vector))

    def apply(self, x: Tensor, site: Any) -> Tensor:
        if site.kind == "embedding":
            return F.embedding(x, self.mask[:, None]) * self.vector
        return (x @ self.vector.to(x.dtype))[..., None] * self.mask.to(x.dtype)

    def scaled(self, s: float | Tensor) -> MaskedRows:
        return MaskedRows(self.mask, self.vector * s)


@dataclass(frozen=True)
class Rows:
    """`values` [n, in] in the rows `indices` [n] (int64, rising) of a matrix of shape `full` [out, in]."""

    indices: Tensor
    values: Tensor
    full: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.full

    def dense(self) -> Tensor:
        out = torch.zeros(self.full, dtype=wide(self.values).dtype, device=self.values.device)
        return out.index_copy(0, self.indices, wide(self.values))

    def apply(self, x: Tensor, site: Any) -> Tensor:
        if site.kind == "embedding":
            at = torch.searchsorted(self.indices, x.contiguous()).clamp_max(len(self.indices) - 1)
            return self.values[at] * (self.indices[at] == x)[..., None]
        if site.kind == "linear":
            some = F.linear(x, self.values.to(x.dtype))  # [..., n]
            out = torch.zeros(*x.shape[:-1], self.full[0], dtype=some.dtype, device=x.device)
            return out.index_copy(-1, self.indices, some)
        return apply_dense(self.dense(), x, site)

    def scaled(self, s: float | Tensor) -> Rows:
        return Rows(self.indices, self.values * s, self.full)


@dataclass(frozen=True)
class Sum:
    """A sum of updates of one shape."""

    terms: tuple[Update, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    def dense(self) -> Tensor:
        total = self.terms[0].dense()
        for u in self.terms[1:]:
            total = total + u.dense()
        return total

    def apply(self, x: Tensor, site: Any) -> Tensor:
        total = self.terms[0].apply(x, site)
        for u in self.terms[1:]:
            total = total + u.apply(x, site)
        return total

    def scaled(self, s: float | Tensor) -> Sum:
        return Sum(tuple(u.scaled(s) for u in self.terms))


def inner(u: Update, v: Update) -> Tensor:
    """Frobenius inner product <u, v>, through the factors when both are low-rank."""
    if isinstance(u, LowRank) and isinstance(v, LowRank):
        left = wide(u.B).T @ wide(v.B)  # [ru, rv]
        right = wide(u.A) @ wide(v.A).T  # [ru, rv]
        return u.scale * v.scale * (left * right).sum()
    if isinstance(u, Sum):
        return torch.stack([inner(t, v) for t in u.terms]).sum()
    if isinstance(v, Sum):
        return inner(v, u)
    if isinstance(u, Sparse):
        return (wide(u.values) * v.dense().flatten()[u.indices]).sum()
    if isinstance(v, Sparse):
        return inner(v, u)
    return (u.dense() * v.dense()).sum()


def norm(u: Update) -> Tensor:
    """Frobenius norm, through the factors where the form allows."""
    if isinstance(u, Kronecker):
        return abs(u.scale) * wide(u.L).norm() * wide(u.R).norm()
    return inner(u, u).clamp_min(0).sqrt()
