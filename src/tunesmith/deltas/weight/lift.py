# SPDX-License-Identifier: Apache-2.0
"""LIFT trains the entries of a weight that are largest once its small singular values are taken away.

    W_r = U[:, :r] diag(S[:r]) V[:, :r]^T,  mask = top k of |W_r|,  k = min(R (out + in), out in)      W' = W + S

S is zero outside the masks; its k values train from zero, so a fresh delta is the identity bit for bit. Every T steps the
mask is taken anew from the current weight W + S (or from W: `on="base"`). An entry in both masks keeps its value and
Adam's moments, a newcomer starts without moments, and one that leaves keeps what it learnt: S is supported on the union of
all masks. The step count of Adam goes on, so a newcomer's first steps are smaller than at the start of a run. Merges
exactly. In bf16 models the values stay fp32 and act beside the frozen product.

Defaults: the authors' R 128, r 128 and T 400 on every linear layer but the output head. They search r in 32..128 and T in
10..400. `exact=False` reduces by a randomised decomposition with fixed seeds: take it where T is small.
Use when: a model must learn to reason from worked answers and forget little. Avoid when: the run is shorter than T and the
layers small: r near their size makes this plain magnitude.
Cost: k values, k int64 places per layer and those of entries that left; a full SVD of every target at each refresh.

Liu et al. 2025, arXiv 2506.00772.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.algebra import Sparse
from tunesmith.core.delta import site_seed
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.core.spectrum import flat
from tunesmith.deltas.weight import selectors, sparse
from tunesmith.deltas.weight.lowrank import KINDS, check_ranks, rank_at
from tunesmith.deltas.weight.selectors import SELECTORS, Look


@register("lift", carrier="weight", paper="2506.00772", kinds=KINDS)
class LIFT:
    """Train the entries that are largest after rank reduction, chosen anew as training goes."""

    rank: int = option(128, "R: as many entries as a LoRA of this rank has numbers", low=1, high=65536)
    filter_rank: int = option(128, "r: rank the weight is reduced to before entries are chosen", low=1, high=65536)
    refresh: int = option(400, "T: steps after which the mask is taken anew; 0 never", low=0, high=10**9)
    on: str = option("current", "which weight a refresh looks at", choices=("current", "base"))
    exact: bool = option(True, "reduce by a full decomposition; else by a randomised one, much faster")
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> R of those layers")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """`indices` [k] int64, `values` [k] fp32 zeros and the empty settled store; `calibrate` puts the mask in."""
        return sparse.settling(torch.arange(sparse.lora_equivalent(site, rank_at(self, site))))

    def calibrate(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mask of the base's weight."""
        look = Look(flat(site), self.filter_rank, self.exact, site_seed(0, site.path))
        return sparse.settling(selectors.chosen("principal", look, len(t["indices"])))

    def update(self, site: Site, t: dict[str, Tensor]) -> Sparse:
        """S."""
        return sparse.change(site, t)

    def after_step(self, part: object, now: object) -> None:
        """Take the mask anew where a refresh is due."""
        score = SELECTORS["principal"].score
        selectors.refresh(part, now, self.refresh, self.on, score, filter_rank=self.filter_rank, exact=self.exact)

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank."""
        check_ranks("lift", self.rank_pattern, sites)

    def books(self) -> tuple[str, ...]:
        return sparse.BOOKS

    def recipe(self) -> dict[str, float]:
        """As released for arithmetic data."""
        return {"lr": 2e-4}

    @classmethod
    def toy(cls) -> LIFT:
        return cls(rank=2, filter_rank=3, refresh=2, targets="all-weights")
