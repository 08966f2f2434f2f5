# SPDX-License-Identifier: Apache-2.0
"""IA3 rescales keys, values and the inner activations of the MLP, channel by channel.

    k' = l_k * k,  v' = l_v * v      on the outputs of the key and value projections, l [out]
    y  = W_down (l_ff * a)           on the input of the down projection, l_ff [in]

The vectors train and start at one, so a fresh delta is the identity bit for bit; the rest is frozen. Merges exactly:
rows of W_k, W_v and their biases are scaled, and columns of W_down.

Defaults: targets k, v and down, as in the paper. On a fused query-key-value projection one vector covers all of its
outputs. `inputs` says at which targets the input is scaled rather than the output; its patterns may be roles or paths.
Use when: few examples, many tasks on one base, or the smallest delta is wanted.
Avoid when: LoRA's size is no problem and quality matters most.
Cost: out(k) + out(v) + in(down) parameters per block; nothing extra when merged.

Liu et al. 2022 (T-Few), arXiv 2205.05638.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tunesmith.core.method import option, register
from tunesmith.core.patterns import matches
from tunesmith.core.sites import Site


@register("ia3", carrier="hidden", paper="2205.05638", kinds=("linear",), strength="blend")
class IA3:
    """Rescale keys, values and inner MLP activations by trained vectors."""

    targets: str = option("k,v,down", "which layers to rescale")
    inputs: str = option("down", "comma list of roles or paths at which the input is scaled, not the output")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """l [in] at the sites of `inputs`, else [out], fp32 ones."""
        return {"l": torch.ones(site.shape[1] if self.on_input(site) else site.shape[0])}

    def on_input(self, site: Site) -> bool:
        """Whether the input of the site is what is scaled."""
        names = [n.strip() for n in self.inputs.split(",") if n.strip()]
        return any(site.role == n or matches(n, site.path) for n in names)

    def forward(self, site: Site, t: dict[str, Tensor], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """x [..., in] -> y [..., out] in the dtype of the layer."""
        if self.on_input(site):
            return call(x * t["l"].to(x.dtype))
        y = call(x)
        return y * t["l"].to(y.dtype)

    def merge(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scaled columns, or scaled rows and bias."""
        W, l = params["weight"], t["l"]
        if self.on_input(site):
            return {**params, "weight": W * l}
        bias = {"bias": params["bias"] * l} if "bias" in params else {}
        return {**params, "weight": l[:, None] * W, **bias}

    def recipe(self) -> dict[str, float]:
        """The rate of the authors."""
        return {"lr": 3e-3}

    @classmethod
    def toy(cls) -> IA3:
        return cls()
