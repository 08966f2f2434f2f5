# SPDX-License-Identifier: Apache-2.0
"""DSEE adds a low-rank matrix and a few sparse entries, placed where the frozen weight itself is not low-rank.

    W' = W + s (B A + S)     B [out, r], A [r, in * kernel], S of the shape of W with N entries on Omega, s = alpha / r

A, B and the N values train; W and Omega are frozen. A starts at N(0, std^2), B and S at zero, so a fresh delta is the
identity bit for bit. Omega holds the N largest entries of the sparse part of a robust decomposition W ~ U V + S
(`support="robust"`, GreBsmo), of W itself ("size"), or random ones ("random"); ties go to the lower index. Merges
exactly: W' is dense at B A.

The other half of the recipe prunes the base by what the delta has learnt, then tunes on: `prune` gives a mask delta, to
be stacked before this one, for M * W + s (B A + S).

Defaults: rank 16 and 16 entries on query and value projections, as released; alpha 16. Entries of the decomposition
below 0.01 are zero, which suits weights of a spread of about 0.04, and its rank ends at 65 % of full, where the paper's
ends on BERT-base.
Use when: as LoRA, where a few single weights should move on their own, or before pruning.
Avoid when: the weights are far from low-rank plus outliers, so that Omega means little; the decomposition takes minutes
on large models.
Cost: r (in * kernel + out) + N parameters per layer, and N indices.

Chen et al. 2023 (ACL), arXiv 2111.00160; GreBsmo: Zhou and Tao 2013.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank, Sparse, Sum, Update
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight import sparse
from tunesmith.deltas.weight.lowrank import KINDS, check_patterns, columns, rank_at, scale_at
from tunesmith.deltas.weight.robust import outliers


@register("dsee", carrier="weight", paper="2111.00160", kinds=KINDS)
class DSEE:
    """Add a low-rank matrix and a few sparse entries where the weight has outliers."""

    rank: int = option(16, "rank r of the added matrix", low=1, high=65536)
    alpha: float = option(16.0, "the change is scaled by alpha / r", low=1e-6, high=1e6)
    entries: int = option(16, "sparse entries N of each weight", low=0, high=2**31)
    support: str = option("robust", "how their places are chosen", choices=("robust", "size", "random"))
    threshold: float = option(0.01, "smallest entry of the sparse part, for robust", low=0.0, high=1e3)
    growth: int = option(100, "times the rank may grow by 5, for robust", low=1, high=10_000)
    targets: str = option("q,v", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers")
    alpha_pattern: dict[str, float] = option({}, "glob or last path part -> alpha of those layers")
    std: float = option(0.02, "spread of the first values of A", low=1e-6, high=10.0)
    rslora = False  # read by the scale that the low-rank methods share

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A [r, in * kernel], B [out, r], values [N], fp32; indices [N] int64, random until `calibrate`."""
        r = rank_at(self, site)
        A = torch.randn(r, columns(site), generator=generator) * self.std
        low_rank = {"A": A, "B": torch.zeros(site.shape[0], r)}
        return {**low_rank, **sparse.entries(sparse.drawn(site, self.entries, generator))} if self.entries else low_rank

    def calibrate(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The indices from W."""
        if not self.entries or self.support == "random":
            return t
        if self.support == "robust":
            chosen = outliers(site, self.entries, threshold=self.threshold, growth=self.growth)
        else:
            chosen = sparse.top(params["weight"].detach().abs(), self.entries)
        return {**t, **sparse.entries(chosen)}

    def update(self, site: Site, t: dict[str, Tensor]) -> Update:
        """s (B A + S) in the shape of the weight."""
        s = scale_at(self, site)
        low_rank = LowRank(t["B"], t["A"], s, site.shape)
        return Sum((low_rank, Sparse(t["indices"], t["values"] * s, site.shape))) if "values" in t else low_rank

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank or alpha."""
        check_patterns("dsee", self, sites)

    def fits(self, site: Site) -> str | None:
        """Why the site cannot be used, if so."""
        size = site.shape[0] * columns(site)
        return None if self.entries <= size else f"it has {size} weights, not {self.entries}"

    def recipe(self) -> dict[str, float]:
        """The paper's rate on RTE."""
        return {"lr": 5e-4}

    @classmethod
    def toy(cls) -> DSEE:
        return cls(rank=2, alpha=4.0, entries=3, targets="all-weights")
