# SPDX-License-Identifier: Apache-2.0
"""LoKr adds a Kronecker product of two small matrices to a frozen weight.

    W' = W + s C (x) D      C [a, c], D [b, d * kernel], out = a b, in = c d, s = alpha / r

D is low-rank, D = D_1 D_2 with D_1 [b, r] and D_2 [r, d * kernel], unless r is at least half its larger side; C is full,
or low-rank likewise with `both`. C (or its first factor) starts at zero and the rest Kaiming uniform (a = sqrt 5), so a
fresh delta is the identity bit for bit. W is frozen. With `tucker` the low-rank D of a convolution keeps its kernel
axes: T [r, r, *kernel]. Merges exactly.

Defaults: r 8, alpha 8, each side split as near to its square root as its divisors allow (`factor` -1), as in PEFT.
Use when: a delta of very few parameters should still have full rank.
Avoid when: sides are prime numbers (then one factor is the whole matrix).
Cost: a c + r (b + d * kernel) parameters; two small products per layer while not merged.

Yeh et al. 2023 (LyCORIS), arXiv 2309.14859; Edalati et al. 2022 (KronA), arXiv 2212.10650.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.core.algebra import Kronecker
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.loha import product
from tunesmith.deltas.weight.lowrank import check_patterns, kaiming, rank_at, scale_at


@register("lokr", carrier="weight", paper="2309.14859", kinds=("linear", "conv1d", "conv2d"))
class LoKr:
    """Add a Kronecker product of two small matrices to frozen weights."""

    rank: int = option(8, "rank r of the second matrix", low=1, high=65536)
    alpha: float = option(8.0, "the product is scaled by alpha / r", low=1e-6, high=1e6)
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers")
    alpha_pattern: dict[str, float] = option({}, "glob or last path part -> alpha of those layers")
    factor: int = option(-1, "a and c: largest divisor up to this; -1 is near the square root", low=-1, high=65536)
    both: bool = option(False, "the first matrix is low-rank too")
    tucker: bool = option(False, "keep the kernel axes of convolutions wider than 1")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """C or (C_1, C_2), and D or (D_1, D_2[, T]), fp32."""
        r, kernel = rank_at(self, site), site.shape[2:]
        (a, b), (c, d) = (split(n, self.factor) for n in site.shape[:2])
        t: dict[str, Tensor] = {}
        if self.both and r < max(a, c) / 2:
            t |= {"C_1": torch.zeros(a, r), "C_2": kaiming((r, c), generator)}
        else:
            t["C"] = torch.zeros(a, c)
        if r >= max(b, d) / 2:
            t["D"] = kaiming((b, d * math.prod(kernel)), generator)
        elif self.tucker and math.prod(kernel) > 1:
            t |= {"D_1": kaiming((b, r), generator), "D_2": kaiming((r, d), generator)}
            t["T"] = kaiming((r, r, *kernel), generator)
        else:
            t |= {"D_1": kaiming((b, r), generator), "D_2": kaiming((r, d * math.prod(kernel)), generator)}
        return t

    def update(self, site: Site, t: dict[str, Tensor]) -> Kronecker:
        """s C (x) D; the columns of D run over its inputs and then the kernel, as those of the flattened weight."""
        C = t["C"] if "C" in t else t["C_1"] @ t["C_2"]
        D = t["D"] if "D" in t else product(t["D_1"], t["D_2"], t.get("T")).flatten(1)
        return Kronecker(C, D, scale_at(self, site), site.shape if len(site.shape) > 2 else None)

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank or alpha."""
        check_patterns("lokr", self, sites)

    def recipe(self) -> dict[str, float]:
        """As LoHa."""
        return {"lr": 2e-3}

    @classmethod
    def toy(cls) -> LoKr:
        return cls(rank=1)


def split(n: int, factor: int = -1) -> tuple[int, int]:
    """n = small * large: `small` is `factor` where that divides n, else the largest divisor up to it (or sqrt n)."""
    most = factor if factor > 0 else n
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    small = max(m for m in range(1, math.isqrt(n) + 1) if n % m == 0 and m <= most)
    return small, n // small
