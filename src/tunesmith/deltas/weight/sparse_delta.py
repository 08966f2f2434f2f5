# SPDX-License-Identifier: Apache-2.0
"""Sparse trains a few entries of each weight, chosen by a score of your choice, and leaves all others as they are.

    W' = W + S      S of the shape of W, zero but for k entries; the k with the largest scores train

The k values train from zero, so a fresh delta is the identity bit for bit; optimiser state exists for them alone. Scores:
random, magnitude |W|, smallest -|W|, principal (|W| after rank reduction), block (4 x 4 blocks of it), and from a pass over
the data gradient, momentum, fisher and movement. With `refresh` T > 0 a score of the weight is taken anew every T steps;
entries that leave keep what they learnt, so S is supported on all entries that ever trained. Merges exactly.

Defaults: as many entries as a LoRA of rank 8 has numbers, by size after reduction to rank 32, of every linear layer but
the output head, never chosen anew. `share` or `count` say k otherwise; `count_pattern` for single layers.
Use when: methods of sparse training are compared, each choice being one option; `lift`, `sara`, `shira`, `lt-sft` are
choices that papers made. Avoid when: layers must stay fast while not merged: a dense product is formed beside the frozen one.
Cost: k values and k int64 places per layer; scores from data need one dense gradient of all targets at a time.

The scores are the ablations of Liu et al. 2025, arXiv 2506.00772.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.core.algebra import Sparse
from tunesmith.core.base import Base
from tunesmith.core.delta import site_seed
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option, register
from tunesmith.core.patterns import pick, require_used
from tunesmith.core.sample import Sample
from tunesmith.core.sites import Site
from tunesmith.core.spectrum import flat
from tunesmith.deltas.weight import selectors, sparse
from tunesmith.deltas.weight.lowrank import KINDS, check_ranks, rank_at
from tunesmith.deltas.weight.selectors import SELECTORS, Look


@register("sparse", carrier="weight", paper="2506.00772", kinds=KINDS)
class SparseDelta:
    """Train a few entries of each weight, chosen by a score."""

    select: str = option("principal", "how entries are chosen", choices=tuple(SELECTORS))
    rank: int = option(8, "as many entries as a LoRA of this rank has numbers", low=1, high=65536)
    share: float = option(0.0, "share of the entries of each weight, instead of rank", low=0.0, high=1.0)
    count: int = option(0, "entries of each weight, instead of rank and share", low=0, high=2**60)
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers")
    count_pattern: dict[str, int] = option({}, "glob or last path part -> entries of those layers")
    filter_rank: int = option(32, "rank r that principal and block reduce the weight to", low=1, high=65536)
    exact: bool = option(True, "reduce by a full decomposition; else by a randomised one, much faster")
    refresh: int = option(0, "steps after which entries are chosen anew; 0 never", low=0, high=10**9)
    on: str = option("current", "which weight a refresh looks at", choices=("current", "base"))

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """`indices` [k] int64, `values` [k] fp32 zeros and the empty settled store; `calibrate` puts the places in."""
        k = self.size(site)
        random = self.select == "random"
        return sparse.settling(sparse.drawn(site, k, generator) if random else torch.arange(k))

    def calibrate(
        self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor], seen: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The places with the largest scores."""
        if self.select == "random":
            return t
        if seen is None:
            look = Look(flat(site), self.filter_rank, self.exact, site_seed(0, site.path))
            seen = selectors.chosen(self.select, look, self.size(site))
        return sparse.settling(seen)

    def observe(self, base: Base, sites: list[Site], sample: Sample) -> dict[str, Tensor]:
        """The places by site, for scores that gradients enter."""
        found = selectors.seen_gradients(base, sites, sample, SELECTORS[self.select].gradient)
        return {
            s.path: selectors.chosen(self.select, Look(flat(s), G=found[s.path]), self.size(s))
            for s in sites
            if s.path in found
        }

    def observes(self) -> bool:
        """Whether the score is made from data."""
        return bool(SELECTORS[self.select].gradient)

    def update(self, site: Site, t: dict[str, Tensor]) -> Sparse:
        """S."""
        return sparse.change(site, t)

    def after_step(self, part: object, now: object) -> None:
        """Choose anew where a refresh is due."""
        score = SELECTORS[self.select].score
        selectors.refresh(part, now, self.refresh, self.on, score, filter_rank=self.filter_rank, exact=self.exact)

    def size(self, site: Site) -> int:
        """k at the site, at least 1 and at most all its entries."""
        total = math.prod(site.shape)
        count = int(pick(self.count_pattern, site.path, self.count))
        wanted = count or (max(1, round(self.share * total)) if self.share else 0)
        return min(wanted, total) or sparse.lora_equivalent(site, rank_at(self, site))

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target, a count that is none, or a refresh without data."""
        check_ranks("sparse", self.rank_pattern, sites)
        require_used("sparse.count_pattern", self.count_pattern, sites)
        for pattern, n in self.count_pattern.items():
            if type(n) is not int or n < 1:
                raise UsageError(
                    f"{pattern!r} must map to a whole number of 1 or more, got {n!r}", where="count_pattern"
                )
        if self.refresh and self.observes():
            hint = "refresh=0, or a score of the weight such as select='principal'"
            raise UsageError(f"{self.select!r} is a score of the data, which is seen at the start only", hint=hint)

    def books(self) -> tuple[str, ...]:
        return sparse.BOOKS

    def recipe(self) -> dict[str, float]:
        """As `lift`."""
        return {"lr": 2e-4}

    @classmethod
    def toy(cls) -> SparseDelta:
        return cls(rank=2, filter_rank=3, targets="all-weights")
