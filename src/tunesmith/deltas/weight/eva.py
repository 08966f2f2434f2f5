# SPDX-License-Identifier: Apache-2.0
"""EVA is LoRA whose A starts from the directions in which a layer's inputs vary most, with ranks shared out by how much.

    W' = W + s B A        W [out, in * kernel], B [out, k], A [k, in * kernel], s = alpha / r, k the rank the layer got
    A <- the k leading right singular vectors of the layer's inputs on the training data, B <- 0

A and B train; W is frozen. An incremental singular value decomposition (with the mean taken off, as in the released
code) takes in batch after batch with round(rho r) components. Component i has converged when its cosine with the one
before the batch is at least tau; batches go round until all that are needed have, or `limit` batches were seen. Layers
that get the same input share one decomposition. The sum of all ranks r then goes to the components that explain the
largest share of their layer's variance, at most round(rho r) to a layer. A layer that gets none is left out. alpha grows
with the rank, so that s is the same everywhere (`adjust=False`: alpha / k). A fresh delta is the identity bit for bit. It
is stored as a plain LoRA with a rank of its own at every layer, and merges exactly.

Defaults: r 16, alpha 16, rho 2 (1 leaves the ranks alone), tau 0.99, on every linear layer but the output head.
`labelled` looks at positions with a label only. Batches of fewer rows than components are put together.
Use when: LoRA should converge sooner and a minute of forward passes over the data is cheap.
Avoid when: layers are convolutions in groups or embeddings (try `lora`), or data come in a few dozen rows.
Cost: LoRA's, about the same number of parameters; at the start, forward passes and thin decompositions.

Paischer et al. 2024, arXiv 2410.07170; incremental decomposition: Ross et al. 2008, DOI 10.1007/s11263-007-0075-7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.base import Base
from tunesmith.core.method import option, register
from tunesmith.core.patterns import pick
from tunesmith.core.sample import Sample
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.explained import Found, explained
from tunesmith.deltas.weight.gated import as_lora
from tunesmith.deltas.weight.lora import LoRA
from tunesmith.deltas.weight.lowrank import check_patterns, columns, rank_at


@register("eva", carrier="weight", paper="2410.07170", kinds=("linear", "conv1d", "conv2d"))
class EVA:
    """Add low-rank matrices that start from the main directions of each layer's inputs, with ranks to match."""

    rank: int = option(16, "average rank r of a layer", low=1, high=65536)
    alpha: float = option(16.0, "the added matrix is scaled by alpha / r", low=1e-6, high=1e6)
    rho: float = option(2.0, "a layer gets at most rho times its rank; 1 leaves ranks alone", low=1.0, high=1000.0)
    tau: float = option(0.99, "cosine at which a component counts as converged", low=0.0, high=1.0)
    whiten: bool = option(False, "divide each row of A by the root of its singular value")
    adjust: bool = option(True, "keep alpha / r where ranks change")
    labelled: bool = option(True, "look only at positions that have a label")
    limit: int = option(256, "batches looked at, at most", low=1, high=1_000_000)
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option(
        {}, "glob or last path part -> rank of those layers before they are shared out"
    )
    alpha_pattern: dict[str, float] = option({}, "glob or last path part -> alpha of those layers")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A [r, in * kernel] and B [out, r], zero; `calibrate` knows the rank and the directions."""
        r = rank_at(self, site)
        return {"A": torch.zeros(r, columns(site)), "B": torch.zeros(site.shape[0], r)}

    def observe(self, base: Base, sites: list[Site], sample: Sample) -> dict[str, dict[str, Tensor]]:
        """A [k, in * kernel] of every site that got a rank k above 0."""
        rank = {s.path: rank_at(self, s) for s in sites}
        most = {s.path: min(round(rank[s.path] * self.rho), columns(s)) for s in sites}
        found = self.directions(base, sites, sample, rank, most)
        return {path: {"A": f.rows(self.whiten)} for path, f in found.items() if f.rank}

    def directions(
        self, base: Base, sites: list[Site], sample: Sample, rank: Mapping[str, int], most: Mapping[str, int]
    ) -> dict[str, Found]:
        """The components of every site that ran, and how many of them it gets."""
        return explained(base, sites, sample, rank, most, tau=self.tau, limit=self.limit, supervised=self.labelled)

    def calibrate(
        self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor], seen: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The directions found, and B zero in their rank."""
        A = seen["A"]
        return {"A": A, "B": torch.zeros(site.shape[0], len(A))}

    def update(self, site: Site, t: dict[str, Tensor]) -> LowRank:
        """s B A in the shape of the weight."""
        return LowRank(t["B"], t["A"], self._scale(site.path, len(t["A"])), site.shape)

    def fits(self, site: Site) -> str | None:
        """The inputs of a grouped convolution are not those of its whole kernel."""
        grouped = site.kind != "linear" and site.module.groups > 1  # type: ignore[operator]
        return "it is a grouped convolution" if grouped else None

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank or alpha."""
        check_patterns("eva", self, sites)

    def bake(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """The factors as they are."""
        return {"A": t["A"], "B": t["B"]}

    def baked_as(self, found: Mapping[str, dict[str, Tensor]]) -> LoRA:
        """LoRA with the rank each layer got and the same scale."""
        kept = {path: len(t["A"]) for path, t in found.items()}
        same = all(k == pick(self.rank_pattern, path, self.rank) for path, k in kept.items())
        return as_lora(self.targets if same else ",".join(kept), found, self._scale)

    def _scale(self, path: str, k: int) -> float:
        alpha = float(pick(self.alpha_pattern, path, self.alpha))
        return alpha / (pick(self.rank_pattern, path, self.rank) if self.adjust else k)

    def recipe(self) -> dict[str, float]:
        """The authors' rate."""
        return {"lr": 5e-4}

    @classmethod
    def toy(cls) -> EVA:
        return cls(rank=2, alpha=4.0)
