# SPDX-License-Identifier: Apache-2.0
"""Split a weight into a low-rank matrix and a simple one by turns: W ~ U V + S.

    U = orth((W - S) V^T),  V = U^T (W - S),  S = simple(W - U V)     W [m, n], U [m, r], V [r, n], S [m, n]

`simple` says what S may be: a few large entries (`spikes`), or a code of few bits. Each half-step is the best answer to
the other half, so that ||W - U V - S|| plus what `simple` minimises beside it cannot grow. `grebsmo` grows the rank
while S is sparse, as in Zhou and Tao 2013 (greedy bilateral smoothing) and DSEE, arXiv 2111.00160.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tunesmith.core.sites import Site
from tunesmith.core.spectrum import flat
from tunesmith.deltas.weight.sparse import top

FULL = 500 / 768  # where 100 rounds of 5 stop on a weight of BERT-base, as a share of full rank


@dataclass(frozen=True)
class Split:
    """W ~ U V + S: U [m, r] with orthonormal columns, V [r, n], S [m, n]; `errors` are ||W - U V - S|| by round."""

    U: Tensor
    V: Tensor
    S: Tensor
    errors: tuple[float, ...] = ()

    @property
    def rank(self) -> int:
        return int(self.U.shape[1])


def spikes(threshold: float) -> Callable[[Tensor], Tensor]:
    """Keeps entries of size `threshold` or more: the S that minimises ||R - S||^2 + threshold^2 ||S||_0."""
    return lambda R: torch.where(R.abs() < threshold, torch.zeros_like(R), R)


@torch.no_grad()
def alternate(
    W: Tensor, V: Tensor, simple: Callable[[Tensor], Tensor], *, rounds: int = 2, S: Tensor | None = None
) -> Split:
    """`rounds` rounds from the row space V [r, n] and S (default zero), in the dtype of W (fp32 or wider)."""
    S = torch.zeros_like(W) if S is None else S
    U, errors = W.new_zeros(len(W), len(V)), []
    for _ in range(rounds):
        X = W - S
        U = torch.linalg.qr(X @ V.T).Q  # one round of subspace iteration: V is never far from the last one
        V = U.T @ X
        R = W - U @ V
        S = simple(R)
        errors.append(float((R - S).norm()))
    return Split(U, V, S, tuple(errors))


@torch.no_grad()
def grebsmo(
    W: Tensor,
    *,
    threshold: float = 0.01,
    step: int = 5,
    rounds: int = 2,
    growth: int = 100,
    least: int = 0,
    seed: int = 0,
) -> Split:
    """The split of W [m, n] with S sparse, its rank grown by `step` up to `growth` times.

    New rows of V are the first rows of R in the QR decomposition of what is left, W - U V - S. A low-rank part that is
    large enough explains outliers too, so growth also ends at the rank `FULL` of the smaller side, when nothing is
    left, or when S would keep fewer than `least` entries; the last split before that is given.
    """
    W = W if W.dtype == torch.float64 else W.float()
    limit = max(1, round(FULL * min(W.shape)))
    draw = torch.randn(min(step, limit), W.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    V, simple = draw.to(W), spikes(threshold)
    best: Split | None = None
    for _ in range(max(1, growth)):
        found = alternate(W, V, simple, rounds=rounds)  # S starts anew: entries wait to be explained by the new rank
        if best is not None and int(torch.count_nonzero(found.S)) < least:
            break
        best = found
        more = min(step, limit - found.rank)
        E = W - found.U @ found.V - found.S
        if not more or found.errors[-1] <= 1e-6 * float(W.norm()):
            break
        Q = torch.linalg.qr(E[:, :more]).Q  # the first rows of R need the first columns alone
        V = torch.cat([found.V, Q.T @ E])
    assert best is not None
    return best


_KEPT: WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def outliers(site: Site, k: int, *, threshold: float = 0.01, growth: int = 100) -> Tensor:
    """Flat places [k] int64, rising, of the largest entries of S in the split of the site's frozen weight.

    Kept until the weight changes or its module goes: every seed and rate of a comparison starts from the same places.
    """
    weight = site.module._parameters.get("weight")
    at = (None, None) if weight is None else (weight.data_ptr(), weight._version)
    key = (*at, k, threshold, growth)
    with _LOCK:
        kept = _KEPT.get(site.module)
    if kept is None or kept[0] != key:
        kept = (key, top(grebsmo(flat(site), threshold=threshold, growth=growth, least=k).S.abs(), k))
        with _LOCK:
            _KEPT[site.module] = kept
    return kept[1].clone()
