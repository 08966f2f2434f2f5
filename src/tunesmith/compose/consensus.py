# SPDX-License-Identifier: Apache-2.0
"""Sparsify each change, then bring them together: TIES, DARE, DELLA and Breadcrumbs are presets of one engine.

    D_i' = sparsify(D_i)
    sum:   D = lam sum_i w_i D_i'                                        divided by sum_i w_i with `normalize`
    ties:  g = sign(sum_i w_i D_i'), D = lam sum_{i agrees} w_i D_i'     divided by the weights that agree, per entry

| preset | keeps | rescale | then |
| --- | --- | --- | --- |
| ties | the largest, per tensor, row or over the whole model | | ties, normalised |
| dare | random | 1/density, or 1/q | sum |
| dare-ties | random | 1/density, or 1/q | ties |
| della | random, more likely the larger | 1/probability | ties, normalised |
| della-linear | the same | 1/probability | sum |
| breadcrumbs | the largest without the very largest, per row or tensor | | sum |
| breadcrumbs-ties | the same | | ties |

Sums run in fp64, so that the elected sign does not depend on the order of the sources; where they cancel exactly, plus
wins. Random draws depend on the seed, the tensor and the source (its name and digest), not on the order; the seed is
stored with the result. Sparse results are stored sparse. No dense matrix is held beside one of each source.

Deviations from mergekit 0.1.5, all tested against it: (1) random sparsifiers rescale by 1/density, as the papers do;
mergekit matches the L1 norm, here `rescale=l1`. (2) Ties in magnitude go to the lower index; mergekit leaves them to its
sort. (3) DELLA ranks within rows [out, in * kernel]; mergekit within the second axis, which differs for kernels. (4)
Breadcrumbs works by row by default, as its authors' code; mergekit by tensor, here `per=tensor`. (5) A tensor that a
source leaves alone counts as a zero change of it in a normalised sum. (6) DARE does not prune output heads, as its
papers say; mergekit prunes all, here `exempt=none`. `exempt=outside` is their code for decoders: only matrices in blocks.

Yadav et al. 2023, arXiv 2306.01708 (TIES); Yu et al. 2023, arXiv 2311.03099 (DARE); Deng et al. 2024, arXiv 2410.09344
(DAREx, q); Deep et al. 2024, arXiv 2406.11617 (DELLA); Davari and Belilovsky 2023, arXiv 2312.06795 (Breadcrumbs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.compose import sparsify
from tunesmith.compose.ranking import order_statistics
from tunesmith.compose.sparsify import RESCALES
from tunesmith.core.algebra import Dense, Sparse, Update
from tunesmith.core.combine import Changes, Now, Place, combiner, dense
from tunesmith.core.method import option

PIECE = 1 << 18  # entries summed at once
ENTRY = 3  # numbers of fp32 that an entry with its place takes
EXEMPT = ("none", "heads", "outside")
DROPS = {"one is itself": "it drops entries", "linear": "what is dropped depends on the values"}


def lightest(D: Tensor, at: Place) -> Update:
    """The change as sparse entries where these take less room."""
    if at.name == "weight" and len(at.shape) > 1 and ENTRY * int(torch.count_nonzero(D)) < D.numel():
        places = torch.nonzero(D.reshape(-1)).squeeze(1)
        return Sparse(places, D.reshape(-1)[places], at.shape)
    return Dense(D)


def together(
    kept: Sequence[Tensor | None], weights: Sequence[float], *, elect: bool, normalize: bool, lam: float
) -> Tensor:
    """The sum, or the sum of what agrees with the elected sign, of changes of one tensor."""
    first = next(d for d in kept if d is not None)
    terms = [(w, d.reshape(-1)) for w, d in zip(weights, kept, strict=True) if d is not None]
    out = torch.empty(first.numel(), dtype=first.dtype, device=first.device)
    whole = sum(weights)
    for at in range(0, len(out), PIECE):  # fp64 copies of a whole table would be the largest thing in memory
        pulls = [(w, d[at : at + PIECE].double() * w) for w, d in terms]
        total = pulls[0][1].clone()
        for _, pull in pulls[1:]:
            total += pull
        if elect:
            sign = torch.copysign(torch.ones((), dtype=total.dtype, device=total.device), total)
            total.zero_()
            divisor = torch.zeros_like(total)
            for w, pull in pulls:
                pull *= sign
                total += pull.clamp_(min=0)  # what does not agree is 0 now
                divisor.add_(pull > 0, alpha=w)
            total *= sign
            if normalize:
                total /= divisor.add_(divisor == 0)  # nothing is divided there
        elif normalize:
            total /= whole if abs(whole) >= 1e-8 else 1.0
        out[at : at + PIECE] = total if lam == 1 else lam * total
    return out.reshape(first.shape)


def spared(at: Place, exempt: str) -> bool:
    """Whether a tensor is left whole: heads, or all that is no matrix of a repeated block."""
    if exempt == "outside":
        return at.depth is None or len(at.shape) < 2
    return exempt == "heads" and at.name == "weight" and at.head()


class _Engine:
    """What the presets share: `keep` is theirs, the rest is here."""

    elect = False
    exempt = "none"
    normalize: bool
    lam: float

    def keep(self, at: Place, D: Tensor, source: int, now: Now) -> Tensor:
        raise NotImplementedError

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """The combined change of one tensor."""
        whole = spared(at, self.exempt)
        kept = [
            None if u is None else u.dense() if whole else self.keep(at, u.dense(), i, now)
            for i, u in enumerate(changes)
        ]  # fmt: skip
        found = together(kept, weights, elect=self.elect, normalize=self.normalize, lam=self.lam)
        return Dense(found) if now.dense else lightest(found, at)


@combiner("ties", paper="2306.01708", whole={"density": 1.0}, expected=DROPS)
class Ties(_Engine):
    """Keep the largest entries, elect a sign for each entry, and average what agrees."""

    elect = True

    density: float = option(0.2, "share of the entries of each source that is kept", low=0.0, high=1.0)
    per: str = option("tensor", "where entries compete: in a tensor, a row, or the whole model", choices=("tensor", "row", "model"))  # fmt: skip
    lam: float = option(1.0, "lambda: the result is scaled by it", low=-1e6, high=1e6)
    normalize: bool = option(True, "divide by the weights that agree")

    def survey(self, changes: Changes, weights: Sequence[float], now: Now) -> Any:
        """The least magnitude of each source that is kept, where the whole model is ranked."""
        if self.per != "model" or self.density >= 1:
            return None
        total = sum(torch.Size(p.shape).numel() for p in changes.places())

        def stream() -> Iterator[list[Tensor]]:
            for place in changes.places():
                yield [d.abs() for d in dense(place, changes.at(place))]

        k = min(total, max(1, int(self.density * total)))
        return [least for (least,) in order_statistics(stream, [total - k])] if total else []

    def keep(self, at: Place, D: Tensor, source: int, now: Now) -> Tensor:
        """The entries of largest magnitude."""
        if now.surveyed is not None:
            return D * (D.abs().float() >= now.surveyed[source])
        return sparsify.magnitude(D, self.density, self.per)


class _Dare(_Engine):
    density: float
    rescale: str
    q: float

    def keep(self, at: Place, D: Tensor, source: int, now: Now) -> Tensor:
        """Entries drawn at random, the same draw for a seed, a tensor and a source."""
        return sparsify.random(D, self.density, now.generator(at, source), self.rescale, self.q)


@combiner("dare", paper="2410.09344", whole={"density": 1.0}, expected=DROPS)
class Dare(_Dare):
    """Drop entries at random and scale up the rest, then add (DARE; with q DAREx-q)."""

    density: float = option(0.1, "1 - p: chance of an entry to be kept", low=1e-6, high=1.0)
    rescale: str = option("inverse", "kept entries over their chance, scaled to the L1 norm of all, or as they are", choices=RESCALES)  # fmt: skip
    q: float = option(0.0, "kept entries are divided by q instead; 0 means the density", low=0.0, high=1.0)
    exempt: str = option("heads", "what is not pruned: output heads (a tied table too), or all but the matrices in blocks", choices=EXEMPT)  # fmt: skip
    lam: float = option(1.0, "lambda: the result is scaled by it", low=-1e6, high=1e6)
    normalize: bool = option(False, "divide the weights by their sum")


@combiner("dare-ties", paper="2311.03099", whole={"density": 1.0}, expected=DROPS)
class DareTies(_Dare):
    """Drop entries at random and scale up the rest, then elect a sign for each entry and add what agrees."""

    elect = True

    density: float = option(0.1, "1 - p: chance of an entry to be kept", low=1e-6, high=1.0)
    rescale: str = option("inverse", "kept entries over their chance, scaled to the L1 norm of all, or as they are", choices=RESCALES)  # fmt: skip
    q: float = option(0.0, "kept entries are divided by q instead; 0 means the density", low=0.0, high=1.0)
    exempt: str = option("heads", "what is not pruned: output heads (a tied table too), or all but the matrices in blocks", choices=EXEMPT)  # fmt: skip
    lam: float = option(1.0, "lambda: the result is scaled by it", low=-1e6, high=1e6)
    normalize: bool = option(False, "divide by the weights that agree")


class _Della(_Engine):
    density: float
    epsilon: float
    rescale: str

    def keep(self, at: Place, D: Tensor, source: int, now: Now) -> Tensor:
        """Entries drawn at random, larger ones with a larger chance."""
        return sparsify.della(D, self.density, self.epsilon, now.generator(at, source), self.rescale)


@combiner("della", paper="2406.11617", whole={"density": 1.0}, expected=DROPS)
class Della(_Della):
    """Drop entries at random, small ones rather, then elect a sign for each entry and average what agrees."""

    elect = True

    density: float = option(0.5, "mean chance of an entry to be kept", low=0.0, high=1.0)
    epsilon: float = option(0.15, "the chance runs from density - epsilon to density + epsilon in a row", low=0.0, high=0.5)  # fmt: skip
    rescale: str = option("inverse", "kept entries over their chance, scaled to the L1 norm of all, or as they are", choices=RESCALES)  # fmt: skip
    exempt: str = option("none", "what is not pruned: output heads (a tied table too), or all but the matrices in blocks", choices=EXEMPT)  # fmt: skip
    lam: float = option(1.0, "lambda: the result is scaled by it", low=-1e6, high=1e6)
    normalize: bool = option(True, "divide by the weights that agree")


@combiner("della-linear", paper="2406.11617", whole={"density": 1.0}, expected=DROPS)
class DellaLinear(_Della):
    """Drop entries at random, small ones rather, then add."""

    density: float = option(0.5, "mean chance of an entry to be kept", low=0.0, high=1.0)
    epsilon: float = option(0.15, "the chance runs from density - epsilon to density + epsilon in a row", low=0.0, high=0.5)  # fmt: skip
    rescale: str = option("inverse", "kept entries over their chance, scaled to the L1 norm of all, or as they are", choices=RESCALES)  # fmt: skip
    exempt: str = option("none", "what is not pruned: output heads (a tied table too), or all but the matrices in blocks", choices=EXEMPT)  # fmt: skip
    lam: float = option(1.0, "lambda: the result is scaled by it", low=-1e6, high=1e6)
    normalize: bool = option(False, "divide the weights by their sum")


class _Breadcrumbs(_Engine):
    density: float
    drop_top: float
    per: str
    rescale: str

    def keep(self, at: Place, D: Tensor, source: int, now: Now) -> Tensor:
        """The band of entries below the largest."""
        kept = sparsify.breadcrumbs(D, self.density, self.drop_top, self.per)
        return sparsify.rescaled(D, kept != 0, 1.0, self.rescale)


@combiner("breadcrumbs", paper="2312.06795", whole={"density": 1.0, "lam": 1.0}, expected=DROPS)
class Breadcrumbs(_Breadcrumbs):
    """Drop the very largest entries and all small ones, then add."""

    density: float = option(0.15, "beta: share of the entries that is kept", low=0.0, high=1.0)
    drop_top: float = option(0.006, "gamma: share of the largest entries that is dropped first", low=0.0, high=1.0)
    per: str = option("row", "where entries compete: in a row or a tensor", choices=("row", "tensor"))
    rescale: str = option("none", "scale the kept entries to the L1 norm of all, or leave them", choices=("none", "l1"))
    lam: float = option(0.2, "alpha: the sum is scaled by it", low=-1e6, high=1e6)
    normalize: bool = option(False, "divide the weights by their sum")


@combiner("breadcrumbs-ties", paper="2312.06795", whole={"density": 1.0, "lam": 1.0}, expected=DROPS)
class BreadcrumbsTies(_Breadcrumbs):
    """Drop the very largest entries and all small ones, then elect a sign for each entry and add what agrees."""

    elect = True

    density: float = option(0.15, "beta: share of the entries that is kept", low=0.0, high=1.0)
    drop_top: float = option(0.006, "gamma: share of the largest entries that is dropped first", low=0.0, high=1.0)
    per: str = option("row", "where entries compete: in a row or a tensor", choices=("row", "tensor"))
    rescale: str = option("none", "scale the kept entries to the L1 norm of all, or leave them", choices=("none", "l1"))
    lam: float = option(0.2, "alpha: the result is scaled by it", low=-1e6, high=1e6)
    normalize: bool = option(False, "divide by the weights that agree")
