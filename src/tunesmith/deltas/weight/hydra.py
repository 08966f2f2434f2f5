# SPDX-License-Identifier: Apache-2.0
"""Hydra puts two trained low-rank branches round a frozen layer: one reads its input, the other its output.

    y0 = W x + b
    y  = y0 + s (B_p (A_p x + c_p) + d_p) + s (B_s (A_s y0 + c_s) + d_s)
    W' = W + s (B_p A_p + B_s A_s W)
    b' = b + s (B_p c_p + d_p + B_s A_s b + B_s c_s + d_s)

W [out, in * kernel], A_p [r_p, in * kernel], B_p [out, r_p], A_s [r_s, out], B_s [out, r_s], c [r], d [out]; c and d
only with `bias`. All of these train; W and b are frozen. B, c and d start at zero, so a fresh delta is the identity
bit for bit; A starts random. The parallel branch is LoRA; the sequential one mixes features the base already has. It
sees the bias and whatever earlier parts made of y0, so order matters. Merges exactly, bias included.

Defaults: r_p = r_s = 2 and s = 1 on attention outputs and the second layer of the MLP, A Xavier uniform, no biases in
the branches: the authors' places for vision, their text code has no such biases and theirs for vision has.
Use when: tasks are near what the base knows and its features should be recombined as well as extended.
Avoid when: one branch is enough (try `lora`), or a grouped convolution must be changed by its output.
Cost: r_p (in * kernel + out) + 2 r_s out parameters (and r_p + r_s + 2 out with biases); four thin products per layer.

Kim et al. 2023, arXiv 2309.06922.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.hidden.affine import channel_shaped
from tunesmith.deltas.weight.lowrank import columns
from tunesmith.deltas.weight.multiplicative import from_left


@register("hydra", carrier="weight", paper="2309.06922", kinds=("linear", "conv1d", "conv2d"))
class Hydra:
    """Two low-rank branches round a layer, one on its input and one on its output."""

    rank: int = option(2, "rank r_p of the branch on the input; 0 leaves it out", low=0, high=65536)
    output_rank: int = option(2, "rank r_s of the branch on the output; 0 leaves it out", low=0, high=65536)
    scale: float = option(1.0, "both branches are scaled by s", low=1e-6, high=1e6)
    bias: bool = option(False, "trained biases inside and after each branch")
    targets: str = option("o,down", "which layers to change")
    start: str = option("xavier", "first values of A", choices=("xavier", "normal", "kaiming"))

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A_p, B_p (and c_p, d_p) where r_p > 0; A_s, B_s (and c_s, d_s) where r_s > 0; fp32."""
        t: dict[str, Tensor] = {}
        for name, r, n in (("p", self.rank, columns(site)), ("s", self.output_rank, site.shape[0])):
            if r:
                t[f"A_{name}"], t[f"B_{name}"] = self._random(r, n, generator), torch.zeros(site.shape[0], r)
            if r and self.bias:
                t[f"c_{name}"], t[f"d_{name}"] = torch.zeros(r), torch.zeros(site.shape[0])
        return t

    def _random(self, r: int, n: int, generator: torch.Generator) -> Tensor:
        if self.start == "normal":
            return torch.empty(r, n).normal_(std=0.02, generator=generator)
        bound = (6 / (r + n)) ** 0.5 if self.start == "xavier" else n**-0.5
        return torch.empty(r, n).uniform_(-bound, bound, generator=generator)

    def forward(self, site: Site, t: dict[str, Tensor], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """x -> y beside the frozen layer, in its dtype."""
        y0 = y = call(x)
        if "A_p" in t:
            y = y + LowRank(t["B_p"], t["A_p"], self.scale, site.shape).apply(x, site).to(y0.dtype)
        if "A_s" in t:
            channels = {"conv1d": -2, "conv2d": -3}.get(site.kind, -1)
            h = y0.movedim(channels, -1) @ t["A_s"].to(y0.dtype).T
            y = y + self.scale * (h @ t["B_s"].to(y0.dtype).T).movedim(-1, channels)
        return y + channel_shaped(self.scale * self._shift(t), y0, site) if self.bias else y

    def live_kinds(self) -> tuple[str, ...]:
        """Where `forward` works: not at an embedding that shares the weight of a target."""
        return ("linear", "conv1d", "conv2d")

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """W' and b'; a layer without bias gets one only with `bias`."""
        W, b, s = params["weight"], params.get("bias"), self.scale
        out = dict(params)
        if "A_p" in t:
            out["weight"] = W + s * (t["B_p"].to(W.dtype) @ t["A_p"].to(W.dtype)).reshape(W.shape)
        if "A_s" in t:
            out["weight"] = out["weight"] + s * from_left(W, t["B_s"], t["A_s"])
            if b is not None:
                out["bias"] = b + s * from_left(b, t["B_s"], t["A_s"])
        if self.bias and site.kind != "embedding":
            out["bias"] = out.get("bias", 0) + s * self._shift(t)
        return out

    def _shift(self, t: dict[str, Tensor]) -> Tensor:
        """B c + d summed over the branches, [out]."""
        return torch.stack([t[f"B_{n}"] @ t[f"c_{n}"] + t[f"d_{n}"] for n in "ps" if f"c_{n}" in t]).sum(0)

    def touches(self) -> tuple[str, ...]:
        return ("weight", "bias")

    def fits(self, site: Site) -> str | None:
        """Why the site cannot be used, if so."""
        grouped = getattr(site.module, "groups", 1) > 1 and self.output_rank
        return "its groups cannot be mixed: use output_rank=0" if grouped else None

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError when both branches are left out."""
        if not self.rank and not self.output_rank:
            raise UsageError("rank and output_rank are both 0, so nothing would train", where="hydra.rank")

    def recipe(self) -> dict[str, float]:
        """As LoRA."""
        return {"lr": 1e-3}

    @classmethod
    def toy(cls) -> Hydra:
        return cls(bias=True, targets=r"re:^(?!depthwise)")
