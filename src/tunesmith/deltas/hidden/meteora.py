# SPDX-License-Identifier: Apache-2.0
"""MeteoRA holds many low-rank deltas at a layer and lets a small gate choose among them, token by token.

    g = G x,  S = the k largest of g,  w = softmax(g_S / T)           (w = 1 for k = 1)
    y = W x + sum over i in S of w_i B_i A_i x

x [..., in], G [n, in], A_i [r_i, in] and B_i [out, r_i] with the scale alpha_i / r_i folded in. All A_i are held as one
matrix A [R, in], all B_i as B [out, R], R = sum r_i, and `of` [R] says which delta a row of A belongs to, so ranks may
differ and a delta may have none at a layer. G alone trains; W, A, B are frozen. It depends on the input, so it does not
merge. `tunesmith.compose.route` makes one of given deltas, and `tunesmith.train.router` trains its gates.

Defaults: k 2, T 1, every linear layer but the head. A fresh part by itself adds nothing: there is nothing to route
between until deltas are put in (`fill="random"` is for tests). First gates have variance 1 / in ("scaled"), so that
their logits are of the size of the input's; the paper draws them from N(0, 1), which routes at random and hard at
first. With several tasks in one prompt the paper raises T to 15-30, so that both chosen deltas count about alike. There
is no dropout.
Use when: several deltas exist and one text needs more than one of them, or nobody says which.
Avoid when: the request names its delta (serve that), or weights must be merged (`ts.merge`).
Cost: n * in trained numbers a layer; per token the thin products of all n deltas, whose rows that were not chosen are
multiplied by 0.

Xu et al. 2024, arXiv 2405.13053.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.core.gates import tell
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lowrank import kaiming


@register(
    "meteora", carrier="hidden", paper="2405.13053", kinds=("linear",), merge="its gates depend on the input",
    identity_at_init=False, strength="blend",
)  # fmt: skip
class MeteoRA:
    """Mix several frozen low-rank deltas by a trained gate at every layer, token by token."""

    experts: int = option(8, "number n of deltas", low=1, high=65536)
    top_k: int = option(2, "how many act on a token", low=1, high=65536)
    temperature: float = option(1.0, "T of the softmax over those chosen", low=1e-6, high=1e9)
    rank: int = option(8, "rank of each delta in a fresh part; composed ones bring their own", low=1, high=65536)
    targets: str = option("all-linear", "which layers are gated")
    start: str = option("scaled", "first gates: N(0, 1 / in), or N(0, 1)", choices=("scaled", "normal"))
    fill: str = option("zero", "what the deltas of a fresh part add", choices=("zero", "random"))

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """G [n, in] random, A [R, in] and B [out, R] fp32, `of` [R] int64."""
        out, n_in = site.shape
        R = self.experts * self.rank
        G = torch.randn(self.experts, n_in, generator=generator)
        A, B = kaiming((R, n_in), generator), torch.zeros(out, R)
        if self.fill == "random":
            B.normal_(generator=generator)
        of = torch.arange(self.experts).repeat_interleave(self.rank)
        return {"G": G * n_in**-0.5 if self.start == "scaled" else G, "A": A, "B": B, "of": of}

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError where more deltas would act than there are."""
        if self.top_k > self.experts:
            raise UsageError(f"{self.top_k} of {self.experts} deltas cannot act", where="meteora.top_k")

    def weights(self, g: Tensor) -> Tensor:
        """w [..., n] of gate logits g: positive at the k chosen and summing to 1 there, 0 elsewhere."""
        top = torch.topk(g, self.top_k, dim=-1)
        return torch.zeros_like(g).scatter(-1, top.indices, torch.softmax(top.values / self.temperature, -1))

    def forward(self, site: Site, t: dict[str, Tensor], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """x [..., in] -> y [..., out] in the dtype of the layer; gates in fp32 or wider."""
        y = call(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        g = F.linear(x.to(wide), t["G"].to(wide))
        tell(site.path, g)
        h = F.linear(x, t["A"].to(x.dtype)) * self.weights(g)[..., t["of"]].to(x.dtype)  # [..., R]
        return y + F.linear(h, t["B"].to(x.dtype)).to(y.dtype)

    def frozen(self) -> tuple[str, ...]:
        """The deltas and whose row is whose."""
        return ("A", "B", "of")

    def recipe(self) -> dict[str, float]:
        """The rate of the paper."""
        return {"lr": 5e-4}

    @classmethod
    def toy(cls) -> MeteoRA:
        return cls(experts=3, rank=2, fill="random")
