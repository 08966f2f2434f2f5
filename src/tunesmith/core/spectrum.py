# SPDX-License-Identifier: Apache-2.0
"""Singular value decompositions of frozen weights, each computed once for as long as its module lives.

Many methods start from the singular vectors of a weight, and inspection reads the same ones. `svd` keeps what it
computed, in fp32, until the weight changes or the module goes; `forget` frees it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

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


_KEPT: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], SVD]] = WeakKeyDictionary()
_LOCK = threading.Lock()


@torch.no_grad()
def svd(site: Site, rank: int | None = None, *, exact: bool = True, rounds: int = 4, seed: int = 0) -> SVD:
    """The decomposition of the site's frozen weight, or its `rank` leading components.

    `exact=False` computes only the leading ones, by a randomised range finder (see `randomised`), and keeps nothing.
    """
    W = flat(site)
    if not exact and rank is not None and rank < min(W.shape):
        return randomised(W, rank, rounds=rounds, seed=seed)
    weight = site.module._parameters.get("weight")
    key = (-1, -1) if weight is None else (weight.data_ptr(), weight._version)
    with _LOCK:
        kept = _KEPT.get(site.module)
    if kept is None or kept[0] != key:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        kept = (key, SVD(U, S, Vh))
        if weight is not None:
            with _LOCK:
                _KEPT[site.module] = kept
    return kept[1] if rank is None else kept[1].leading(rank)


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
