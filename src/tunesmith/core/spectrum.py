# SPDX-License-Identifier: Apache-2.0
"""Singular value decompositions of frozen weights, each computed once for as long as its module lives.

Many methods start from the singular vectors of a weight, and inspection reads the same ones. `svd` keeps as many
components as were asked for, in fp32, until the weight is replaced, changed in place or goes with its module; `forget`
frees them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from tunesmith.core.algebra import LowRank, MaskedRows, Rows, Sum, Update, wide
from tunesmith.core.sites import Site

if TYPE_CHECKING:
    from tunesmith.core.carriers import Action


@dataclass(frozen=True)
class SVD:
    """W = U diag(S) Vh with W [out, in * kernel]: U [out, k], S [k] falling, Vh [k, in * kernel], fp32."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def leading(self, rank: int) -> SVD:
        """The `rank` largest components."""
        return SVD(self.U[:, :rank], self.S[:rank], self.Vh[:rank])

    def matrix(self) -> Tensor:
        """U diag(S) Vh."""
        return (self.U * self.S) @ self.Vh


@dataclass(frozen=True)
class _Kept:
    """A decomposition with the very tensor it was made of: an address alone may be taken by another one later."""

    weight: ref[Tensor]
    version: tuple[int, int]
    found: SVD
    whole: bool

    def of(self, weight: Tensor, rank: int | None) -> bool:
        enough = self.whole or (rank is not None and rank <= len(self.found.S))
        return enough and self.weight() is weight and self.version == _version(weight)


_KEPT: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
_LOCK = threading.Lock()


@torch.no_grad()
def svd(site: Site, rank: int | None = None, *, exact: bool = True, rounds: int = 4, seed: int = 0) -> SVD:
    """The decomposition of the site's frozen weight, or its `rank` leading components.

    `exact=False` computes only the leading ones, by a randomised range finder (see `randomised`), and keeps nothing.
    A layer that holds its weight in another form than a dense tensor is decomposed anew at each call.
    """
    weight = site.module._parameters.get("weight")
    if not exact and rank is not None and rank < min(flat(site).shape):
        return randomised(flat(site), rank, rounds=rounds, seed=seed)
    with _LOCK:
        kept = _KEPT.get(site.module)
    if kept is not None and weight is not None and kept.of(weight, rank):
        return kept.found if rank is None else kept.found.leading(rank)
    found = SVD(*torch.linalg.svd(flat(site), full_matrices=False))
    whole = rank is None or rank >= len(found.S)
    if not whole:
        found = found.leading(rank)  # type: ignore[arg-type]
        found = SVD(found.U.clone(), found.S.clone(), found.Vh.clone())  # a view would hold all of them
    if weight is not None:
        with _LOCK:
            _KEPT[site.module] = _Kept(ref(weight), _version(weight), found, whole)
    return found if rank is None else found.leading(rank)


def _version(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


def flat(site: Site) -> Tensor:
    """The site's frozen weight as a matrix [out, in * kernel] in fp32 (an embedding: [rows, dim])."""
    return site.params()["weight"].detach().float().flatten(1)


@torch.no_grad()
def randomised(W: Tensor, rank: int, *, oversampling: int = 10, rounds: int = 4, seed: int = 0) -> SVD:
    """The `rank` leading components of W [m, n] by a random range finder with power rounds.

    Halko, Martinsson and Tropp 2011, arXiv 0909.4061. The same seed gives the same result on one machine.
    """
    g = torch.Generator().manual_seed(seed)
    k = min(rank + oversampling, *W.shape)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], k, generator=g).to(W)).Q  # [m, k]
    for _ in range(rounds):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return SVD(Q @ U, S, Vh).leading(rank)


@torch.no_grad()
def svd_of(update: Update, *, vectors: bool = True) -> SVD:
    """The decomposition of a change flattened to [out, in * kernel], through its factors where it has few.

    fp32, fp64 kept. A change held in factors of rank r < min(out, in * kernel) gives r components, the rest being zero;
    a dense or sparse one gives min(out, in * kernel). Without `vectors` only S is right and U and Vh are empty.
    """
    pair = factors(update)
    if pair is None:
        D = update.dense().flatten(1)
        if not vectors:
            return SVD(D[:, :0], torch.linalg.svdvals(D), D[:0])
        return SVD(*torch.linalg.svd(D, full_matrices=False))
    B, A = pair  # [out, r], [r, in * kernel]
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.T)
    core = Rb @ Ra.T  # [r, r]
    if not vectors:
        return SVD(B[:, :0], torch.linalg.svdvals(core), A[:0])
    U, S, Vh = torch.linalg.svd(core)
    return SVD(Qb @ U, S, Vh @ Qa.T)


def factors(update: Update) -> tuple[Tensor, Tensor] | None:
    """B [out, r] and A [r, in * kernel] with B A the change, where r is below both sides; None for other forms."""
    found = _factors(update)
    small = found is not None and found[0].shape[1] < min(found[0].shape[0], found[1].shape[1])
    return found if small else None


def low_rank(action: Action, *, full: bool = False) -> tuple[Tensor, Tensor] | None:
    """A [r, in * kernel] and B [out, r], strength and scale in B, of an action that only adds B A; else None.

    An r that is no smaller than both sides counts only with `full`.
    """
    if action.carrier != "weight" or not hasattr(action.part.method, "update") or isinstance(action.strength, Tensor):
        return None
    pair = (_factors if full else factors)(action.part.method.update(action.site, action.tensors))
    return None if pair is None else (pair[1].detach(), pair[0].detach() * action.strength)


def _factors(update: Update) -> tuple[Tensor, Tensor] | None:
    if isinstance(update, LowRank):
        return wide(update.B) * update.scale, wide(update.A)
    if isinstance(update, MaskedRows):
        return wide(update.mask)[:, None], wide(update.vector)[None]
    if isinstance(update, Rows):
        n = len(update.indices)
        B = torch.zeros(update.full[0], n, dtype=wide(update.values).dtype, device=update.values.device)
        return B.index_put((update.indices, torch.arange(n, device=B.device)), B.new_ones(n)), wide(update.values)
    if isinstance(update, Sum):
        pairs = [_factors(u) for u in update.terms]
        known = [p for p in pairs if p is not None]
        if len(known) == len(pairs):
            return torch.cat([B for B, _ in known], 1), torch.cat([A for _, A in known])
    return None


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of the singular values S [k] >= 0 over their sum: k where all are equal, 0 for none.

    Roy and Vetterli 2007, "The effective rank".
    """
    total = float(S.sum())
    if total <= 0:
        return 0.0
    p = S[S > 0].double() / S.sum().double()
    return float(torch.exp(-(p * p.log()).sum()))


def stable_rank(S: Tensor) -> float:
    """sum of S^2 over the largest: between 1 and the rank, 0 for no change."""
    top = float(S.max()) if len(S) else 0.0
    return float((S.double() / top).square().sum()) if top > 0 else 0.0


def forget() -> None:
    """Free every kept decomposition."""
    with _LOCK:
        _KEPT.clear()
