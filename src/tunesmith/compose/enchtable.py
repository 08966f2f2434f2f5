# SPDX-License-Identifier: Apache-2.0
"""EnchTable: a stored safety change added to a fine-tuned model, scaled by norm and by how much it disturbs the task's.

    D_s = theta_aligned - theta_harmful, D_t = theta_task - theta_base           the base of both being one model
    a = beta ||D_t|| / ||D_s||                       global norms over the tensors that both change
    D_t = U1 S1 V1, a D_s = U2 S2 V2                 per matrix, the leading share gamma of directions of each
    U = [U1 | U2], s = [S1, S2], V = [V1; V2]
    I = || (U^T U - 1) diag(s) (V V^T - 1) ||_1 / k^2 * factor                     k directions in all
    theta = theta_base + D_t + exp(-I) a D_s         vectors: weight 1; tensors that one of them leaves alone: D_t

Only cross-talk between directions of the two enters I, for within each the products are the identity. I grows with the sizes
of the changes and with the number of directions, so it compares neither models nor matrices of other sizes, and it is no
measure of overlap: two random changes have a larger I than two equal ones. `interference` therefore reports the overlap of
the subspaces beside it. `linearised` is training to first order in the change of the whole network, which is what the paper
describes; the released code linearises each projection by itself, and a linear layer is linear in its weight already.

Wu et al. 2025, arXiv 2511.09880. Kernels with more than two dimensions are taken as matrices [out, in * kernel] (added here).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.core.algebra import Dense, Sum, Update, norm
from tunesmith.core.combine import Changes, Now, Place, combiner
from tunesmith.core.errors import UsageError
from tunesmith.core.registry import option
from tunesmith.core.trace import primary

if TYPE_CHECKING:
    from tunesmith.core.base import Base

FACTOR = 200.0


@dataclass(frozen=True)
class Interference:
    """How two changes of one matrix disturb each other.

    `value` is I, `weight` exp(-I), `directions` k. `overlap` in 0..1 is the share of the first's leading row and column
    spaces that the second's lie in: mean squared cosine, averaged over both sides.
    """

    value: float
    weight: float
    directions: int
    overlap: float


def interference(task: Tensor, safety: Tensor, *, keep: float = 0.5, factor: float = FACTOR) -> Interference:
    """I of two changes [out, in, *kernel] of one weight, in fp32 (fp64 where they are).

    Args:
        keep: the share gamma of the singular directions of each that enters, at least one.
        factor: what the mean is multiplied by; 200 in the released code.
    Directions of singular value zero are arbitrary and left out, so low-rank changes have few (added here). A change of
    zero disturbs nothing. Raises UsageError for shapes that differ or have fewer than 2 dimensions.
    """
    if task.shape != safety.shape or task.dim() < 2:
        raise UsageError(f"two matrices of one shape are needed, got {tuple(task.shape)} and {tuple(safety.shape)}")
    if not bool(task.any()) or not bool(safety.any()):
        return Interference(0.0, 1.0, 0, 0.0)
    parts = []
    for D in (task, safety):
        U, S, Vh = torch.linalg.svd(_matrix(D), full_matrices=False)
        rank = int((S[0] * max(D.shape) * torch.finfo(S.dtype).eps < S).sum())
        k = max(1, min(int(keep * len(S)), rank))
        parts.append((U[:, :k], S[:k], Vh[:k]))
    (U1, S1, V1), (U2, S2, V2) = parts
    uu, vv = U1.T @ U2, V1 @ V2.T  # [k1, k2]: the blocks of U^T U - 1 and V V^T - 1 that are not zero
    total = _cross(uu, S2, vv) + _cross(uu.T, S1, vv.T)
    k = len(S1) + len(S2)
    value = float(total) / k**2 * factor
    shared = min(len(S1), len(S2))
    overlap = float((uu.square().sum() + vv.square().sum()) / (2 * shared))
    return Interference(value, math.exp(-value), k, overlap)


def _matrix(D: Tensor) -> Tensor:
    return (D if D.dtype == torch.float64 else D.float()).flatten(1)


def _cross(uu: Tensor, S: Tensor, vv: Tensor) -> Tensor:
    """sum |uu diag(S) vv^T|: one diagonal block of the product, [k1, k1]."""
    return ((uu * S) @ vv.T).abs().sum()


@combiner(
    "enchtable", paper="2511.09880", whole={}, most=2,
    expected={"linear": "the scale depends on the norms", "order": "the first source is the task, the second the safety change"},
)  # fmt: skip
class EnchTable:
    """Add a safety change to a task's, scaled by norm and per matrix by interference. Sources: task, then safety."""

    beta: float = option(0.1, "norm of the safety change as a share of the task's", low=0.0, high=100.0)
    keep: float = option(0.5, "share of the singular directions of each that enter the interference", low=0.0, high=1.0)
    factor: float = option(FACTOR, "what the interference is multiplied by", low=0.0, high=1e9)
    weighing: str = option(
        "formula", "weight of the safety change in a matrix: exp(-I), learned by descent on I, or 1",
        choices=("formula", "learned", "none"),
    )  # fmt: skip

    def survey(self, changes: Changes, weights: Sequence[float], now: Now) -> float:
        """a: what the safety change is multiplied by; 0 without one."""
        if len(changes.names) != 2:
            return 0.0
        task, safety = 0.0, 0.0
        for place in changes.places():
            t, s = changes.at(place)
            if t is not None and s is not None:
                task += float(norm(t)) ** 2 * weights[0] ** 2
                safety += float(norm(s)) ** 2 * weights[1] ** 2
        return self.beta * math.sqrt(task) / math.sqrt(safety) if safety else 0.0

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """D_t + w a D_s."""
        t, s = (*changes, None)[:2]
        t = t if t is None or weights[0] == 1 else t.scaled(weights[0])
        if t is None or s is None or not now.surveyed:
            return t
        D = s.scaled(weights[1] * now.surveyed)
        if len(at.shape) >= 2 and self.weighing != "none":
            D = D.scaled(self.weight(t.dense(), D.dense()))
        return Sum((t, Dense(D.dense())))

    def weight(self, task: Tensor, safety: Tensor) -> float:
        """w of one matrix, for changes that have their final scale."""
        found = interference(task, safety, keep=self.keep, factor=self.factor)
        return found.weight if self.weighing == "formula" else _descended(task, safety, self.keep, self.factor)


def _descended(task: Tensor, safety: Tensor, keep: float, factor: float, steps: int = 40, lr: float = 1e3) -> float:
    """w in 0..1 by plain descent on I(w), the interference with w D_s, from 0.5; 40 steps of rate 1e3.

    I is linear in w where its cross-talk is fixed: I(w) = I_t + w I_s, so the descent runs to 0 unless I_s is tiny.
    """
    if not bool(task.any()) or not bool(safety.any()):
        return 1.0
    whole = interference(task, safety, keep=keep, factor=factor).value
    slope = whole - interference(task, safety * 1e-12, keep=keep, factor=factor).value
    return min(max(0.5 - steps * lr * slope, 0.0), 1.0)


@contextmanager
def _math_attention() -> Iterator[None]:
    """Attention by its plain formula: the fused kernels have no forward derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def linearised(base: Base, change: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
    """The primary output to first order in a change: f(x; theta_0) + J f(x; theta_0) (theta - theta_0).

    Args:
        change: theta - theta_0 by parameter name of `base.model`, in the shape the model holds; gradients flow into it.
        inputs: keyword arguments of the model.
    The whole network is linearised, by one forward-mode pass; attention is computed by its plain formula for that. Train
    `change` on a loss of this output for a safety change that adds up with others. Raises UsageError for a name or shape
    that is no parameter's.
    """
    params = {n: p.detach() for n, p in base.model.named_parameters()}
    for name, value in change.items():
        if name not in params or params[name].shape != value.shape:
            raise UsageError("the change fits no parameter of the model", where=name)
    fixed = {n: p for n, p in params.items() if n not in change}
    fixed.update({n: b.detach() for n, b in base.model.named_buffers()})
    at = {n: params[n] for n in change}

    def f(moving: dict[str, Tensor]) -> Tensor:
        out = primary(torch.func.functional_call(base.model, {**fixed, **moving}, kwargs=dict(inputs)))
        if out is None:
            raise UsageError("the model's output holds no tensor", where=base.name)
        return out

    with base.evaluating(), _math_attention():
        value, slope = torch.func.jvp(f, (at,), (dict(change),))
    return value + slope
