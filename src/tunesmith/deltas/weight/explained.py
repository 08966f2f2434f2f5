# SPDX-License-Identifier: Apache-2.0
"""The directions in which the inputs of each layer vary most, found batch by batch, and ranks shared out by them.

Ross et al. 2008 (DOI 10.1007/s11263-007-0075-7) for the incremental decomposition; Paischer et al. 2024 (arXiv
2410.07170) for the test of convergence and the sharing out.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import tensor_bytes
from tunesmith.core.sample import Sample, look
from tunesmith.core.sites import Site
from tunesmith.core.spectrum import randomised


@dataclass
class Components:
    """The `n` leading principal components of all rows taken in: `Vh` [n, d] orthonormal, `S` [n], fp32.

    Rows are centred by their mean so far. `ratio` [n] is each component's share of all variance, `converged` [n] whether
    its cosine with the component before the last rows is at least `tau`.
    """

    n: int
    tau: float
    count: int = 0
    Vh: Tensor | None = None
    S: Tensor | None = None
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(()))
    converged: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    waiting: list[Tensor] = field(default_factory=list)

    @property
    def ratio(self) -> Tensor:
        assert self.S is not None
        return self.S.double().square() / self.scatter.clamp_min(1e-30)

    def take(self, rows: Tensor, *, last: bool = False) -> None:
        """Take in rows [m, d]; fewer than n wait for the next ones, unless these are the `last`."""
        self.waiting.append(rows)
        m = sum(len(w) for w in self.waiting)
        if m and (m >= self.n or last):
            X, self.waiting = torch.cat(self.waiting), []
            self._update(X)

    def _update(self, X: Tensor) -> None:
        m, mean = len(X), X.double().mean(0)
        X = X - mean.to(X)
        spread = X.double().square().sum()
        stack = X
        if self.Vh is not None and self.S is not None:
            shift = (self.mean - mean) * (self.count * m / (self.count + m)) ** 0.5
            spread = spread + shift.square().sum()
            stack = torch.cat([self.S[:, None] * self.Vh, X, shift.to(X)[None]])
        found = randomised(stack, self.n, oversampling=self.n)
        if self.Vh is None:
            self.converged = torch.zeros(self.n, dtype=torch.bool)
        else:
            same = F.cosine_similarity(found.Vh[: len(self.Vh)], self.Vh[: len(found.Vh)]).abs() >= self.tau
            self.converged = F.pad(same.cpu(), (0, self.n - len(same)))
        self.mean = mean if self.Vh is None else (self.count * self.mean + m * mean) / (self.count + m)
        self.scatter, self.count = self.scatter.to(spread) + spread, self.count + m
        self.Vh, self.S = found.Vh, found.S


@dataclass(frozen=True)
class Found:
    """The components of one layer's inputs and how many of them it gets."""

    Vh: Tensor
    S: Tensor
    ratio: Tensor
    rank: int

    def rows(self, whiten: bool = False) -> Tensor:
        """The first `rank` components [rank, d], each divided by the root of its singular value if `whiten`."""
        A = self.Vh[: self.rank]
        return A / self.S[: self.rank, None].clamp_min(1e-12).sqrt() if whiten else A.clone()


@torch.no_grad()
def explained(
    base: Base,
    sites: list[Site],
    sample: Sample,
    rank: Mapping[str, int],
    most: Mapping[str, int],
    *,
    tau: float,
    limit: int,
    supervised: bool,
) -> dict[str, Found]:
    """The leading components of every site's inputs, with sum(rank) shared out among them, at most `most` to a site.

    Batches go round until every component that is handed out has converged, or `limit` were seen. Sites that do not run
    on the first batch are left out.
    """
    leader = same_inputs(base, sites, sample, supervised=supervised)
    if not leader:
        return {}
    sites = [s for s in sites if s.path in leader]
    n = {first: max(most[p] for p in leader if leader[p] == first) for first in set(leader.values())}
    parts = {s.path: Components(n[s.path], tau) for s in sites if leader[s.path] == s.path}
    total = sum(rank[s.path] for s in sites)
    given = {s.path: most[s.path] for s in sites}

    def see(site: Site, rows: Tensor, sizes: list[int]) -> None:
        parts[site.path].take(rows)

    for batch in _repeated(sample, limit):
        needed = {f: max(given[p] for p in leader if leader[p] == f) for f in parts}
        open_ = [s for s in sites if s.path in parts and not _settled(parts[s.path], needed[s.path])]
        if not open_:
            break
        look(base, open_, sample, batch, see, supervised=supervised)
        if all(c.Vh is not None for c in parts.values()):
            given = shared_out({s.path: parts[leader[s.path]].ratio for s in sites}, most, total)
    for c in parts.values():
        if c.Vh is None:
            c.take(c.waiting.pop() if c.waiting else torch.zeros(0, 1), last=True)
    known = {s.path: parts[leader[s.path]] for s in sites if parts[leader[s.path]].Vh is not None}
    given = shared_out({path: c.ratio for path, c in known.items()}, most, total)
    return {path: Found(c.Vh, c.S, c.ratio, given[path]) for path, c in known.items()}  # type: ignore[arg-type]


def _settled(c: Components, needed: int) -> bool:
    return c.Vh is not None and bool(c.converged[:needed].all())


def _repeated(sample: Sample, limit: int) -> Iterator[Any]:
    """The batches again and again, `limit` at most."""
    return itertools.islice(itertools.chain.from_iterable(iter(sample.batches, None)), limit)


def same_inputs(base: Base, sites: list[Site], sample: Sample, *, supervised: bool) -> dict[str, str]:
    """For every site that runs on the first batch, the first site that got the same input there, by path."""
    first: dict[str, str] = {}
    leader: dict[str, str] = {}

    def see(site: Site, rows: Tensor, sizes: list[int]) -> None:
        key = f"{tuple(rows.shape)}:{hashlib.sha256(tensor_bytes(rows)).hexdigest()}"
        leader.setdefault(site.path, first.setdefault(key, site.path))

    for batch in itertools.islice(sample.batches(), 1):
        look(base, sites, sample, batch, see, supervised=supervised)
    return leader


def shared_out(ratio: Mapping[str, Tensor], most: Mapping[str, int], total: int) -> dict[str, int]:
    """How many components each layer gets: the `total` largest shares of variance over all layers.

    At most `most` go to a layer. Among equal shares the earlier layer comes first.
    """
    pairs = [(-float(v), i, path) for path, r in ratio.items() for i, v in enumerate(r[: most[path]].tolist())]
    taken = [path for _, _, path in sorted(pairs, key=lambda p: p[0])[:total]]
    return {path: taken.count(path) for path in ratio}
