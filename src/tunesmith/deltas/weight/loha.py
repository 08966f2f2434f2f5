# SPDX-License-Identifier: Apache-2.0
"""LoHa adds the element-wise product of two low-rank matrices to a frozen weight.

    W' = W + s (B_1 A_1) * (B_2 A_2)      B_i [out, r], A_i [r, in * kernel], * element-wise, s = alpha / r

All four factors train; W is frozen. All are Kaiming uniform (a = sqrt 5) but A_2, which is zero, so a fresh delta is the
identity bit for bit. The rank of the change can reach r^2. With `tucker` a convolution keeps its kernel axes: each
product becomes T_i x_1 B_i x_2 A_i with T_i [r, r, *kernel] and A_i [r, in]. Merges exactly.

Defaults: r 8 and alpha 8 on every linear layer but the output head, as in PEFT.
Use when: a change of high rank is wanted from few parameters (styles and subjects in image models).
Avoid when: the delta must stay live beside a large batch of others: its matrix is formed at every pass.
Cost: twice LoRA's parameters at the same r; two dense products of r columns per layer and pass.

Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098; as released in LyCORIS and PEFT.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.core.algebra import Dense
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lowrank import check_patterns, columns, kaiming, rank_at, scale_at


@register("loha", carrier="weight", paper="2108.06098", kinds=("linear", "conv1d", "conv2d"))
class LoHa:
    """Add the element-wise product of two low-rank matrices to frozen weights."""

    rank: int = option(8, "rank r of each of the two matrices", low=1, high=65536)
    alpha: float = option(8.0, "the product is scaled by alpha / r", low=1e-6, high=1e6)
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers")
    alpha_pattern: dict[str, float] = option({}, "glob or last path part -> alpha of those layers")
    tucker: bool = option(False, "keep the kernel axes of convolutions wider than 1")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """B_1, A_1, B_2, A_2 and, in the Tucker form, T_1 and T_2, fp32."""
        r, kernel = rank_at(self, site), self._kernel(site)
        width = site.shape[1] if kernel else columns(site)
        t = {
            "B_1": kaiming((site.shape[0], r), generator),
            "A_1": kaiming((r, width), generator),
            "B_2": kaiming((site.shape[0], r), generator),
            "A_2": torch.zeros(r, width),
        }
        if kernel:
            t |= {"T_1": kaiming((r, r, *kernel), generator), "T_2": kaiming((r, r, *kernel), generator)}
        return t

    def update(self, site: Site, t: dict[str, Tensor]) -> Dense:
        """s (B_1 A_1) * (B_2 A_2) in the shape of the weight."""
        one, two = (product(t[f"B_{i}"], t[f"A_{i}"], t.get(f"T_{i}")) for i in (1, 2))
        return Dense((scale_at(self, site) * one * two).reshape(site.shape))

    def _kernel(self, site: Site) -> tuple[int, ...]:
        kernel = site.shape[2:]
        return kernel if self.tucker and math.prod(kernel) > 1 else ()

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank or alpha."""
        check_patterns("loha", self, sites)

    def recipe(self) -> dict[str, float]:
        """As LoRA; the product of two factors moves more slowly at the start."""
        return {"lr": 2e-3}

    @classmethod
    def toy(cls) -> LoHa:
        return cls(rank=2)


def product(B: Tensor, A: Tensor, T: Tensor | None) -> Tensor:
    """B A [out, in * kernel], or T [r, r, *kernel] with B [out, r] and A [r, in] on its first axes."""
    if T is None:
        return B @ A
    return torch.einsum("ij...,oi,jn->on...", T, B, A)
