# SPDX-License-Identifier: Apache-2.0
"""PiSSA is LoRA that starts from the largest singular components of the weight.

    W' = W + s (B A - B0 A0)        W [out, in * kernel], B [out, r], A [r, in * kernel], s = alpha / r
    U S V^T = W,  B0 = U_r sqrt(S_r / s),  A0 = sqrt(S_r / s) V_r^T        (rsLoRA: s = alpha / sqrt r)

A and B train from A0 and B0, which stay frozen in the delta; W is frozen. The published form trains s B A beside the
residual W - s B0 A0; this is the same function on the unchanged W, so a fresh delta is the identity bit for bit and
deltas of one base add up. `start="smallest"` takes the smallest components instead (MiLoRA). Merges exactly.

Defaults: r 16 and alpha 16 (s = 1, as its authors) on every linear layer but the output head. `rounds` above 0 finds
the components by that many power rounds, much quicker on large weights.
Use when: LoRA is slow to take off; A and B move the weight's main directions from the first step.
Avoid when: the base must be kept close to (largest components carry what it knows; try `corda` or `start="smallest"`).
Cost: trains as LoRA; stores and computes rank 2r; one decomposition per layer at the start.

Meng et al. 2024, arXiv 2404.02948; MiLoRA: Wang et al. 2024, arXiv 2406.09044.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.core.spectrum import svd
from tunesmith.deltas.weight.lowrank import (
    KINDS,
    START,
    begun,
    check_patterns,
    rank_at,
    relative,
    scale_at,
    too_wide,
    unbegun,
)


@register("pissa", carrier="weight", paper="2404.02948", kinds=KINDS)
class PiSSA:
    """Train the largest singular components of frozen weights."""

    rank: int = option(16, "components r that train", low=1, high=65536)
    alpha: float = option(16.0, "B A is scaled by alpha / r", low=1e-6, high=1e6)
    rslora: bool = option(False, "scale by alpha / sqrt(r), stable at high ranks")
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers")
    alpha_pattern: dict[str, float] = option({}, "glob or last path part -> alpha of those layers")
    start: str = option("largest", "components that A and B start from", choices=("largest", "smallest"))
    rounds: int = option(0, "power rounds of a quick decomposition; 0 is an exact one", low=0, high=100)

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A and A0 [r, in * kernel], B and B0 [out, r], fp32; `calibrate` fills them."""
        return unbegun(site, rank_at(self, site))

    def calibrate(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The components of W, their size shared by A and B."""
        r = rank_at(self, site)
        if self.start == "smallest":
            W = svd(site)
            U, S, Vh = W.U[:, -r:], W.S[-r:], W.Vh[-r:]
        else:
            W = svd(site, r, exact=not self.rounds, rounds=self.rounds)
            U, S, Vh = W.U, W.S, W.Vh
        root = (S / scale_at(self, site)).sqrt()
        return begun(U * root, root[:, None] * Vh)

    def update(self, site: Site, t: dict[str, Tensor]) -> LowRank:
        """s (B A - B0 A0) in the shape of the weight."""
        return relative(t, scale_at(self, site), site.shape)

    def fits(self, site: Site) -> str | None:
        """A weight has no more components than its smaller side."""
        return too_wide(self, site)

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target, a value that is no rank or alpha, or options at odds."""
        check_patterns("pissa", self, sites)
        if self.rounds and self.start == "smallest":
            raise UsageError("power rounds find the largest components only", where="pissa.rounds", hint="rounds=0")

    def frozen(self) -> tuple[str, ...]:
        return START

    def recipe(self) -> dict[str, float]:
        """Ten times what its authors use on models of 7B; it needs less than LoRA, whose B starts at zero."""
        return {"lr": 2e-4}

    @classmethod
    def toy(cls) -> PiSSA:
        return cls(rank=2, alpha=4.0)
