# SPDX-License-Identifier: Apache-2.0
"""Bone cuts a weight into square blocks and gives each row of blocks one trained matrix, multiplied in and added.

    W'_ij = W_ij (I + M_i) + M_i      W_ij [r, r] a block of W [out, in * kernel], M [out / r, r, r]

M trains and starts at zero, so a fresh delta is the identity bit for bit; W and biases are frozen. M_i is shared by
all blocks j of row i and multiplies from the right. The change is affine in W and can have full rank. This is the
paper's first form, later called BAT; the additive form that replaced it is `miss`. Merges exactly, and undo keeps the
base's own bytes (PEFT takes it off by a matrix inverse, which loses digits). Parts on one weight act in order: each
multiplies what the one before left.

Defaults: r 64 on every linear layer but the output head. r must divide both sides of every weight.
Use when: a low rank holds LoRA back and both sides of the weights share a large divisor.
Avoid when: the delta must stay live with few tokens (W' is built in every pass), or shapes are odd.
Cost: out * r parameters; out * in * r multiply-adds per pass and a copy of the weight per layer while not merged.

arXiv 2409.15371; `bat` of MiSS in PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.multiplicative import block_affine, block_refusal


@register("bone", carrier="weight", paper="2409.15371", kinds=("linear", "conv1d", "conv2d"))
class Bone:
    """Multiply each block of a weight by a matrix its row of blocks shares, and add that matrix."""

    block: int = option(64, "side r of a block; it must divide both sides of each weight", low=1, high=65536)
    targets: str = option("all-linear", "which layers to change")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """M [out / r, r, r], fp32 zeros."""
        return {"M": torch.zeros(site.shape[0] // self.block, self.block, self.block)}

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """W' in the dtype of `params["weight"]` or wider."""
        return {**params, "weight": block_affine(params["weight"], t["M"])}

    def fits(self, site: Site) -> str | None:
        """Why the site cannot be used, if so."""
        return block_refusal(site, self.block)

    def recipe(self) -> dict[str, float]:
        """Between the authors' 2e-5 (a 7B model, much data) and what small models take."""
        return {"lr": 3e-4}

    @classmethod
    def toy(cls) -> Bone:
        return cls(block=2, targets=r"re:^(?!stem|depthwise|head)")
