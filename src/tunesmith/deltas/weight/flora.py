# SPDX-License-Identifier: Apache-2.0
"""FLoRA adds a Tucker product with as many axes as the weight: a small core and one factor for each axis.

    W' = W + s G x_1 U_1 x_2 U_2 ... x_N U_N      G [r_1, ..., r_N], U_k [d_k, r_k], W [d_1, ..., d_N]

Axes are (out, in, *kernel), so a kernel is not flattened. G and all U_k train; W is frozen. U_k is Kaiming normal with
a = sqrt 3 (its standard deviation is sqrt(0.5 / r_k)) and G zero, so a fresh delta is the identity bit for bit. On a
linear layer it is LoRA with a full r x r matrix in the middle. A rank is never above the length of its axis. Merges
exactly. Live, the core is folded with all factors but the first: one convolution to r_1 channels and one to out.

Defaults: r 8, kernel axes at full rank, s 1 (the authors tune s between 0.04 and 4).
Use when: convolutions with real kernels must change; for linear layers it stands beside LoRA.
Avoid when: the convolutions are 1 x 1 or depthwise: there is no structure to keep.
Cost: prod r_k + sum d_k r_k parameters per layer.

Si et al. 2024, arXiv 2405.14739. The released code sizes the input factor by in_channels; here it is in / groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.method import option, register
from tunesmith.core.patterns import pick
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lowrank import KINDS, check_ranks


@register("flora", carrier="weight", paper="2405.14739", kinds=KINDS)
class FLoRA:
    """Add a Tucker product that keeps the axes of the weight."""

    rank: int = option(8, "rank of the output and input axes", low=1, high=65536)
    kernel_rank: int = option(0, "rank of each kernel axis; 0 is its length", low=0, high=4096)
    scale: float = option(1.0, "factor s on the change", low=1e-6, high=1e6)
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers")

    def ranks(self, site: Site) -> tuple[int, ...]:
        """r_1 .. r_N at the site."""
        r = int(pick(self.rank_pattern, site.path, self.rank))
        kernel = self.kernel_rank or max(site.shape)
        return tuple(min(d, r if axis < 2 else kernel) for axis, d in enumerate(site.shape))

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """The core G and the factors U_1 .. U_N, fp32."""
        ranks = self.ranks(site)
        t = {"G": torch.zeros(ranks)}
        for axis, (d, r) in enumerate(zip(site.shape, ranks, strict=True), 1):
            t[f"U_{axis}"] = torch.randn(d, r, generator=generator) * math.sqrt(0.5 / r)
        return t

    def update(self, site: Site, t: dict[str, Tensor]) -> LowRank:
        """s G x_1 U_1 ... x_N U_N as s U_1 times the core with its other axes opened, [r_1, in * kernel]."""
        core = t["G"]
        for axis in range(1, len(site.shape)):
            core = torch.tensordot(core, t[f"U_{axis + 1}"], dims=([1], [1]))  # the opened axis goes last: order kept
        return LowRank(t["U_1"], core.flatten(1), self.scale, site.shape)

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank."""
        check_ranks("flora", self.rank_pattern, sites)

    def recipe(self) -> dict[str, float]:
        """The gradient of G scales with the product of the factors; the middle of the study's grid."""
        return {"lr": 3e-3}

    @classmethod
    def toy(cls) -> FLoRA:
        return cls(rank=2)
