# SPDX-License-Identifier: Apache-2.0
"""VeRA scales one random low-rank pair, shared by all layers, by two trained vectors per layer.

    W' = W + diag(b) B diag(d) A      A [r, in_max * kernel], B [out_max, r]: the leading columns and rows are used

b [out] and d [r] train; A, B and W are frozen. A and B are Kaiming uniform with gain sqrt 2, drawn once for the largest
layer; b starts at zero and d at 0.1, so a fresh delta is the identity bit for bit. A and B are stored with the delta, so
that it does not depend on a generator's version. Merges exactly.

Defaults: r 256 and d 0.1 on every linear layer but the output head, as in the paper and PEFT.
Use when: many deltas of one base are kept and the trained numbers of each must be very few.
Avoid when: only one delta is stored: A and B are as large as a LoRA.
Cost: out + r trained parameters per layer; two products of r columns per layer while not merged.

Kopiczko et al. 2023, arXiv 2310.11454.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lowrank import columns


@register("vera", carrier="weight", paper="2310.11454", kinds=("linear", "conv1d", "conv2d"))
class VeRA:
    """Scale one shared random low-rank pair by two trained vectors per layer."""

    rank: int = option(256, "rank r of the shared pair", low=1, high=65536)
    d_initial: float = option(0.1, "first value of d", low=-10.0, high=10.0)
    targets: str = option("all-linear", "which layers to change")

    def shared(self, sites: list[Site], generator: torch.Generator) -> dict[str, Tensor]:
        """A [r, in_max * kernel] and B [out_max, r], fp32."""
        n, m = max(columns(s) for s in sites), max(s.shape[0] for s in sites)
        A, B = torch.empty(self.rank, n), torch.empty(m, self.rank)
        for M in (A, B):
            bound = (6 / M.shape[1]) ** 0.5
            M.uniform_(-bound, bound, generator=generator)
        return {"A": A, "B": B}

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """b [out] zeros and d [r], fp32."""
        return {"b": torch.zeros(site.shape[0]), "d": torch.full((self.rank,), self.d_initial)}

    def update(self, site: Site, t: dict[str, Tensor]) -> LowRank:
        """diag(b) B diag(d) A in the shape of the weight."""
        B, A = t["B"][: site.shape[0]], t["A"][:, : columns(site)]
        return LowRank(t["b"][:, None] * B, t["d"][:, None] * A, 1.0, site.shape)

    def frozen(self) -> tuple[str, ...]:
        return ("A", "B")

    def recipe(self) -> dict[str, float]:
        """The paper uses 4e-3 for instruction tuning and about ten times LoRA's rate on GLUE."""
        return {"lr": 4e-3}

    @classmethod
    def toy(cls) -> VeRA:
        return cls(rank=3)
