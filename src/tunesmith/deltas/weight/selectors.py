# SPDX-License-Identifier: Apache-2.0
"""The scores by which entries of a weight are chosen to train, in one table; the largest scores win.

A score is a function of `Look`, the weight as a matrix [out, in * kernel] and what was asked for; it gives one of the same
shape. To add a selector, add a line to `SELECTORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import site_seed
from tunesmith.core.sample import Sample, gradients
from tunesmith.core.sites import Site
from tunesmith.core.spectrum import flat, randomised
from tunesmith.deltas.weight.sparse import change, reselect, top

BLOCK = 4
MOMENTUM = 0.9


@dataclass(frozen=True)
class Look:
    """What a score is made from: W and G [out, in * kernel] fp32, G being a statistic of gradients where one is asked for."""

    W: Tensor
    filter_rank: int = 32
    exact: bool = True
    seed: int = 0
    G: Tensor | None = None


@dataclass(frozen=True)
class Selector:
    """`gradient` names the statistic of the gradients of some batches that the score needs, "" for none."""

    score: Callable[[Look], Tensor]
    help: str
    gradient: str = ""


def rank_reduced(W: Tensor, rank: int, *, exact: bool = True, seed: int = 0) -> Tensor:
    """The best approximation of W [m, n] of this rank, U[:, :r] S[:r] Vh[:r]; W itself where its rank cannot be larger.

    `exact=False` takes a randomised range finder of twice the rank, as fast as r m n; the same seed gives the same.
    """
    if rank >= min(W.shape):
        return W
    if not exact:
        return randomised(W, rank, oversampling=rank, seed=seed).matrix()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def _principal(look: Look) -> Tensor:
    return rank_reduced(look.W, look.filter_rank, exact=look.exact, seed=look.seed).abs()


def _blocks(look: Look) -> Tensor:
    """The mean of each block of 4 x 4 principal weights, given to all its entries: blocks are chosen whole but the last."""
    scores = _principal(look)
    m, n = scores.shape
    means = F.avg_pool2d(scores[None], BLOCK, ceil_mode=True)[0]
    return means.repeat_interleave(BLOCK, 0)[:m].repeat_interleave(BLOCK, 1)[:, :n].contiguous()


def _random(look: Look) -> Tensor:
    generator = torch.Generator().manual_seed(look.seed)
    return torch.rand(look.W.shape, generator=generator).to(look.W.device)


def _gradient(look: Look) -> Tensor:
    assert look.G is not None
    return look.G.abs()


def _movement(look: Look) -> Tensor:
    assert look.G is not None
    return -look.W * look.G


SELECTORS: dict[str, Selector] = {
    "random": Selector(_random, "entries drawn at random"),
    "magnitude": Selector(lambda look: look.W.abs(), "the largest |W|"),
    "smallest": Selector(lambda look: -look.W.abs(), "the smallest |W|"),
    "principal": Selector(_principal, "the largest |W_r|, W_r being W reduced to rank r"),
    "block": Selector(_blocks, "4 x 4 blocks with the largest mean |W_r|"),
    "gradient": Selector(_gradient, "the largest |mean gradient|", "mean"),
    "momentum": Selector(_gradient, "the largest |running mean of the gradient| (0.9)", "running"),
    "fisher": Selector(_gradient, "the largest mean squared gradient", "square"),
    "movement": Selector(_movement, "the largest - W dL/dW: weights that grow in size", "mean"),
}


def chosen(select: str, look: Look, k: int) -> Tensor:
    """The k entries with the largest scores, flat indices, rising."""
    return top(SELECTORS[select].score(look), k)


def seen_gradients(base: Base, sites: list[Site], sample: Sample, statistic: str) -> dict[str, Tensor]:
    """The mean, mean square or running mean of each weight's gradient over the batches, [out, in * kernel] by path.

    A weight that no batch reaches is left out.
    """
    total: dict[str, Tensor] = {}
    n = 0
    for found in gradients(base, sites, sample):
        n += 1
        for path, g in found.items():
            g = g.flatten(1).square() if statistic == "square" else g.flatten(1)
            old = total.get(path, torch.zeros_like(g))
            total[path] = MOMENTUM * old + (1 - MOMENTUM) * g if statistic == "running" else old + g
    return total if statistic == "running" else {path: g / n for path, g in total.items()}


@torch.no_grad()
def refresh(part: Any, now: Any, every: int, on: str, score: Callable[[Look], Tensor], **options: Any) -> None:
    """Every `every` steps but the last, choose anew at every site, as many entries as there are.

    `on` says which weight is looked at: "current" (the base's with the part's change) or "base". `options` go to `Look`.
    """
    if not every or now.step % every or now.step >= now.total:
        return
    for path in part.kind_of:
        site, t = now.sites.of(path, part.kind_of[path]), part.tensors(path)
        W, k = flat(site), len(t["indices"])
        if not 0 < k < W.numel():
            continue
        if on == "current":
            W = W + change(site, t).dense().flatten(1)
        reselect(part, now, path, top(score(Look(W, seed=site_seed(now.step, path), **options)), k))
