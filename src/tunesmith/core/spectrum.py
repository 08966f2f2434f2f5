# SPDX-License-Identifier: Apache-2.0
"""Singular value decompositions of frozen weights, each computed once for as long as its module lives.

Many methods start from the singular vectors of a weight, and inspection reads the same ones. `svd` keeps as many
components as were asked for, in fp32, until the weight is replaced, changed in place or goes with its module; `forget`
frees them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from tunesmith.core.sites import Site


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


def forget() -> None:
    """Free every kept decomposition."""
    with _LOCK:
        _KEPT.clear()
