# SPDX-License-Identifier: Apache-2.0
"""Means on the sphere: SLERP and NuSLERP between two sources, the Karcher mean of any number.

    slerp    W = (sin((1-t) a) W_1 + sin(t a) W_2) / sin a      a the angle between W_1 and W_2, t = w_2 / (w_1 + w_2)
    nuslerp  the same on the changes: D from D_1 and D_2
    karcher  W = (sum_i s_i |W_i|) u, u the weighted Karcher mean of W_i / |W_i|, s_i = w_i / sum w

with W_i = W + D_i the whole weights of one tensor, flattened; what comes out is again a change, W_merged - W. Nearly
parallel weights are interpolated linearly (slerp: |cos| above 0.9995, which fine-tuned weights of one base mostly are).
The results are dense. With one source that source comes back.

Deviations from mergekit 0.1.5: its slerp takes the base model as one of the two ends and t as an option, here both ends are
sources and t comes from the weights; nuslerp is its form with a base model; karcher has weights (mergekit: equal ones).
Computed in fp64.

Shoemake 1985 (slerp); mergekit: Goddard et al. 2024, arXiv 2403.13257.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.compose.linear import shares
from tunesmith.core.algebra import Dense, Update
from tunesmith.core.combine import Now, Place, combiner, dense
from tunesmith.core.method import option

PARALLEL = 0.9995
CURVED = {"linear": "a mean on the sphere is not linear in the changes"}


def _dense(at: Place, changes: Sequence[Update | None]) -> list[Tensor]:
    return [d.double() for d in dense(at, changes)]


def _like(found: Tensor, changes: Sequence[Update | None]) -> Dense:
    """A change in fp32, or in fp64 where a source is."""
    wide = any(u is not None and u.dense().dtype == torch.float64 for u in changes)
    return Dense(found if wide else found.float())


@combiner("slerp", paper="2403.13257", whole={}, most=2, expected=CURVED)
class Slerp:
    """Interpolate whole weights of two sources along the great circle."""

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """The change of one tensor."""
        if len(changes) == 1:
            return changes[0]
        W = at.base().double()
        D = _dense(at, changes)
        a, b = (_unit(W + d) for d in D)
        cos = float((a * b).sum().clamp(-1, 1))
        t = shares(weights)[1]
        first, second = (1 - t, t) if abs(cos) > PARALLEL else _arc(torch.tensor(cos, dtype=torch.float64), t)
        return _like((first + second - 1) * W + first * D[0] + second * D[1], changes)


@combiner("nuslerp", paper="2403.13257", whole={}, most=2, expected=CURVED)
class NuSlerp:
    """Interpolate the changes of two sources along the great circle."""

    flatten: bool = option(True, "one angle for the tensor; else one for each row or column")
    row_wise: bool = option(False, "without flatten: angles along the first axis instead of the last")

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """The change of one tensor."""
        if len(changes) == 1:
            return changes[0]
        t = shares(weights)[1]
        a, b = _dense(at, changes)
        if self.flatten:
            a, b = a.reshape(-1), b.reshape(-1)
        elif self.row_wise:
            a, b = a.transpose(0, -1), b.transpose(0, -1)
        cos = (_unit(a, -1) * _unit(b, -1)).sum(-1, keepdim=True).clamp(-1, 1)
        parallel = 1 - cos.square() <= 1e-16
        first, second = _arc(torch.where(parallel, 0.0, cos), t)
        found = torch.where(parallel, (1 - t) * a + t * b, first * a + second * b)
        if self.row_wise and not self.flatten:
            found = found.transpose(0, -1)
        return _like(found.reshape(at.shape), changes)


@combiner("karcher", paper="2403.13257", whole={}, expected=CURVED)
class Karcher:
    """The mean of whole weights on the sphere, by gradient steps on it."""

    max_iter: int = option(10, "steps at most", low=0, high=10000)
    tol: float = option(1e-5, "stop once a step is shorter", low=0.0, high=1.0)

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """The change of one tensor."""
        if len(changes) == 1:
            return changes[0]
        W, share = at.base().double(), shares(weights)
        whole = [(s, W + d) for s, d in zip(share, _dense(at, changes), strict=True)]
        scale = sum(s * float(x.norm()) for s, x in whole)
        units = [(s, _unit(x)) for s, x in whole if float(x.norm()) > self.tol]
        if not units:
            return None
        total = sum(s for s, _ in units)
        mean = _unit(sum((s / total * u for s, u in units), torch.zeros_like(W)))
        mean = mean if float(mean.norm()) > 0.5 else units[0][1]  # they cancel: start at one of them
        for _ in range(self.max_iter):
            step = torch.zeros_like(mean)
            for s, u in units:
                dot = (mean * u).sum().clamp(-1, 1)
                angle = torch.arccos(dot)
                if float(angle) >= self.tol:
                    step += s / total * (angle / torch.sin(angle)) * (u - dot * mean)
            length = step.norm()
            if float(length) < self.tol:
                break
            mean = _unit(torch.cos(length) * mean + torch.sin(length) * step / length)
        return _like(scale * mean - W, changes)


def _unit(x: Tensor, dim: int | None = None) -> Tensor:
    """x over its norm, 0 for 0."""
    size = x.norm() if dim is None else x.norm(dim=dim, keepdim=True)
    return x / torch.where(size > 1e-30, size, 1.0) if float(size.max()) > 0 else x


def _arc(cos: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """sin((1-t) a) / sin a and sin(t a) / sin a."""
    angle = torch.acos(cos)
    return torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle)
