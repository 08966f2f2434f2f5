# SPDX-License-Identifier: Apache-2.0
"""FourierFT trains a few entries of the two-dimensional spectrum of a weight change.

    W' = W + s Re(ifft2(F)),  F[u_j, v_j] = c_j, 0 elsewhere      F, W [out, in * kernel], c [n]

c trains; the n places (u_j, v_j) are drawn at random, stored and frozen, and W is frozen. The seed `places` draws them,
the same for all layers of one shape, as in PEFT. c starts at zero, so a fresh delta is the identity bit for bit;
`start="normal"` draws it from N(0, 1) as the paper does (not the identity). Merges exactly.

Defaults: n 1000 and s 150 on every linear layer but the output head, as in PEFT.
Use when: the delta must be tiny and the change is spread over the whole matrix.
Avoid when: layers are small (n must not exceed their entries) or the delta must stay live: ifft2 runs at every pass.
Cost: n trained numbers and n stored places per layer; one inverse transform per layer and pass.

Gao et al. 2024, arXiv 2405.03003.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.core.algebra import Dense
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lowrank import columns


@register("fourierft", carrier="weight", paper="2405.03003", kinds=("linear", "conv1d", "conv2d"))
class FourierFT:
    """Train a few entries of the spectrum of a weight change."""

    n: int = option(1000, "trained entries of the spectrum per layer", low=1, high=100_000_000)
    scale: float = option(150.0, "factor s on the change", low=1e-6, high=1e6)
    start: str = option("zero", "first values of the entries", choices=("zero", "normal"))
    places: int = option(777, "seed of the places", low=0, high=2**62)
    targets: str = option("all-linear", "which layers to change")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """c [n] fp32, and the flat places `at` [n] int64."""
        c = torch.zeros(self.n) if self.start == "zero" else torch.randn(self.n, generator=generator)
        return {"c": c, "at": self.drawn_places(site)}

    def drawn_places(self, site: Site) -> Tensor:
        """The flat places [n] int64 that the seed draws at the site."""
        return torch.randperm(math.prod(site.shape), generator=torch.Generator().manual_seed(self.places))[: self.n]

    def update(self, site: Site, t: dict[str, Tensor]) -> Dense:
        """s Re(ifft2(F)) in the shape of the weight, fp32."""
        F = torch.zeros(math.prod(site.shape), device=t["c"].device)
        F = F.index_put((t["at"],), t["c"].float()).reshape(site.shape[0], columns(site))
        return Dense((self.scale * torch.fft.ifft2(F).real).reshape(site.shape))

    def frozen(self) -> tuple[str, ...]:
        return ("at",)

    def fits(self, site: Site) -> str | None:
        """Why the site cannot be used, if so."""
        size = math.prod(site.shape)
        return f"it has {size} entries, fewer than n = {self.n}" if size < self.n else None

    def recipe(self) -> dict[str, float]:
        """The paper's rates for language models lie between 1e-3 and 1e-1, for s between 100 and 300."""
        return {"lr": 1e-2}

    @classmethod
    def toy(cls) -> FourierFT:
        return cls(n=6, scale=10.0)
