# SPDX-License-Identifier: Apache-2.0
"""BOFT turns the input of a layer by a product of sparse rotations, and scales its output.

    W' = diag(s) W R^T,  R = R_(b-1) ... R_0      W [out, n], n = in * kernel, s [out]
    R_i = P_i diag(C(Q_i1), ..., C(Q_im)) P_i^T,  C(Q) = (I - Q) (I + Q)^-1,  Q_ij = (D_ij - D_ij^T) / 2 [k, k], m k = n

P_i is a butterfly: factor i mixes channels from two halves of groups of 2^i blocks, so b factors of small blocks act
like one block of 2^(b-1) k. D [b, m, k, k] trains and starts at zero, s trains and starts at one, so a fresh delta is the
identity. W and biases are frozen; s does not touch the bias. Live, the input of a linear layer is rotated and its output
scaled. Merges exactly; strength blends W and W'.

Defaults: blocks of 4 and one factor on every linear layer but the output head, as in PEFT, whose tensors these are. PEFT
falls back to one factor where its CUDA extension is missing; here every number of factors works everywhere.
Use when: OFT's blocks must be large, yet few numbers may train.
Avoid when: n has few factors of two (k 2^(b-1) must divide it).
Cost: b n k + out parameters (half of D acts); b k multiply-adds per input channel and token while not merged.

Liu et al. 2023, arXiv 2311.06243; BOFT of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lowrank import columns
from tunesmith.deltas.weight.multiplicative import butterfly, cayley


@register("boft", carrier="weight", paper="2311.06243", kinds=("linear", "conv1d", "conv2d"), strength="blend")
class BOFT:
    """Rotate a layer's input channels by butterfly factors and scale its outputs."""

    block: int = option(4, "side k of a block; it must divide the number of inputs", low=2, high=65536)
    factors: int = option(1, "butterfly factors b; k 2^(b - 1) must divide the number of inputs", low=1, high=32)
    targets: str = option("all-linear", "which layers to change")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """D [b, m, k, k] zeros and s [out] ones, fp32."""
        k = self.block
        return {"D": torch.zeros(self.factors, columns(site) // k, k, k), "s": torch.ones(site.shape[0])}

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """W' in the dtype of `params["weight"]` or wider."""
        W = params["weight"]
        R = self._rotations(t)
        turned = W.flatten(1)
        for level in range(self.factors):  # R^T = R_0^T R_1^T ...
            turned = butterfly(turned, R[level].mT, level)
        return {**params, "weight": (t["s"][:, None] * turned).reshape(W.shape)}

    def forward(self, site: Site, t: dict[str, Tensor], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's output for the rotated input, scaled round its bias."""
        R = self._rotations(t)
        nothing = torch.zeros_like(x[..., :1, :] if x.dim() > 1 else x)
        for level in reversed(range(self.factors)):
            x = butterfly(x, R[level], level)
        y, bias = call(x), call(nothing)
        return y + (t["s"] - 1).to(y.dtype) * (y - bias)

    def live_kinds(self) -> tuple[str, ...]:
        """Where `forward` works; a convolution's patches overlap, so its kernel is rotated instead."""
        return ("linear",)

    def _rotations(self, t: dict[str, Tensor]) -> Tensor:
        """The blocks of every factor, [b, m, k, k]."""
        return cayley(0.5 * (t["D"] - t["D"].mT))

    def fits(self, site: Site) -> str | None:
        """Why the site cannot be used, if so."""
        n, span = columns(site), self.block * 2 ** (self.factors - 1)
        if n % span:
            return f"block {self.block} with {self.factors} factors spans {span}, which does not divide its {n} inputs"
        return "several factors need an even block" if self.factors > 1 and self.block % 2 else None

    def recipe(self) -> dict[str, float]:
        """As OFT."""
        return {"lr": 1e-3}

    @classmethod
    def toy(cls) -> BOFT:
        return cls(block=2, factors=2, targets=r"re:^(?!stem|depthwise|head)")
