# SPDX-License-Identifier: Apache-2.0
"""Block-LoRA is LoRA cut into n blocks along the rank, which share one A.

    W' = W + s (B_1 + ... + B_n) A        W [out, in * kernel], B_i [out, r/n], A [r/n, in * kernel], s = alpha / sqrt r

A and all B_i train; W is frozen. A starts Kaiming uniform and every B_i at zero, so a fresh delta is the identity bit for
bit. As all B_i start equal they get the same gradient and stay equal, so this is LoRA of rank r/n with the nominal r in
its scale, whose B has n times the learning rate. In that form, B = sum of B_i, it is stored. Merges exactly.

Gradient clipping by the norm of all gradients counts that of B n times. AdamW's decay shrinks the sum as it would B at
the plain learning rate.

Defaults: r 8 in 4 blocks on every linear layer but the output head, with alpha 1 and its scale by sqrt r of CLIP-LoRA, the
recipe it extends (r 2 on "q,k,v" there). r must be a multiple of n.
Use when: LoRA of a small rank should learn as fast as one of a larger rank with fewer trained numbers.
Avoid when: the change needs rank r: its rank is r/n (use `lora` with `lr_ratio`).
Cost: (in * kernel + n out) r/n parameters in training, (in * kernel + out) r/n stored.

Zhou et al. 2025, arXiv 2501.16720; CLIP-LoRA: Zanella and Ben Ayed 2024, arXiv 2405.18541.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option, register
from tunesmith.core.patterns import pick
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.gated import as_lora
from tunesmith.deltas.weight.lora import LoRA
from tunesmith.deltas.weight.lowrank import KINDS, check_patterns, factors, rank_at, scale_at


@register("block-lora", carrier="weight", paper="2501.16720", kinds=KINDS)
class BlockLoRA:
    """Add a low-rank matrix made of blocks that share their down-projection."""

    rank: int = option(8, "nominal rank r; the change has rank r / blocks", low=1, high=65536)
    blocks: int = option(4, "blocks n that share A", low=1, high=65536)
    alpha: float = option(1.0, "the added matrix is scaled by alpha / sqrt(r)", low=1e-6, high=1e6)
    rslora: bool = option(True, "scale by alpha / sqrt(r); else by alpha / r")
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> nominal rank of those layers")
    alpha_pattern: dict[str, float] = option({}, "glob or last path part -> alpha of those layers")
    start: str = option("kaiming", "first values of A", choices=("kaiming", "gaussian"))

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A [r/n, in * kernel] and B [n, out, r/n], fp32."""
        t = factors(site, rank_at(self, site) // self.blocks, self.start, generator)
        return {"A": t["A"], "B": t["B"].repeat(self.blocks, 1, 1)}

    def update(self, site: Site, t: dict[str, Tensor]) -> LowRank:
        """s (sum of B_i) A in the shape of the weight: the blocks are summed before the one product."""
        return LowRank(t["B"].sum(0), t["A"], scale_at(self, site), site.shape)

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern without effect, or a rank that the blocks do not divide."""
        check_patterns("block-lora", self, sites)
        for s in sites:
            r = rank_at(self, s)
            if r % self.blocks:
                hint = f"rank {max(1, round(r / self.blocks)) * self.blocks}"
                raise UsageError(
                    f"{self.blocks} blocks do not divide rank {r}", where=f"block-lora at {s.path}", hint=hint
                )

    def bake(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """A and the sum of the blocks."""
        return {"A": t["A"], "B": t["B"].sum(0)}

    def baked_as(self, found: Mapping[str, dict[str, Tensor]]) -> LoRA:
        """LoRA of rank r/n with the scale of the nominal rank."""

        def scale(path: str, k: int) -> float:
            r, alpha = k * self.blocks, float(pick(self.alpha_pattern, path, self.alpha))
            return alpha / r**0.5 if self.rslora else alpha / r

        return as_lora(self.targets, found, scale)

    def recipe(self) -> dict[str, float]:
        """The rate of CLIP-LoRA."""
        return {"lr": 2e-4}

    @classmethod
    def toy(cls) -> BlockLoRA:
        return cls(rank=4, blocks=2, alpha=4.0)
