# SPDX-License-Identifier: Apache-2.0
"""HUT multiplies every entry of a frozen weight by one plus an entry of a trained low-rank matrix.

    W' = W * (1 + s B A)        W [out, in * kernel], B [out, r], A [r, in * kernel], * entry by entry, s = alpha / r or 1
    W' = W * (B A)              with `no_residual`; B A starts as all ones

A and B train; W and biases are frozen. A starts random (Kaiming uniform or Gaussian) and B at zero; without the
residual the first column of B and the first row of A are ones. Either way a fresh delta is the identity. Every new
entry stays tied to the old one: a zero stays zero, and the change can have a rank far above r. Merges exactly. A second
such part multiplies what the first left, so two of them give W * (1 + d1) * (1 + d2).

Defaults: r 8, s = 1 (alpha 0) on queries and values, as in the paper. The paper's text was not at hand: the form of the
residual and the first values are a reading of its abstract, and equal PEFT's HiRA (see `hira`).
Use when: many tokens pass each step (building W' does not depend on them), or a pruned base must keep its zeros.
Avoid when: entries that are near zero must grow, or the learning rate cannot be raised: the change is scaled by W, so
LoRA's rate is ten to twenty times too small.
Cost: r (in * kernel + out) parameters; out * in * (r + 1) multiply-adds per pass while not merged, cheaper than LoRA's
from T > out * in / (out + in) tokens on; memory of a dense gradient per layer.

arXiv 2409.13501 (HUT); the same form as HiRA in PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.core.method import option, register
from tunesmith.core.patterns import pick
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lowrank import KINDS, check_patterns, factors, rank_at
from tunesmith.deltas.weight.multiplicative import hadamard


@register("hut", carrier="weight", paper="2409.13501", kinds=KINDS)
class HUT:
    """Multiply every entry of a weight by one plus an entry of a trained low-rank matrix."""

    rank: int = option(8, "rank r of the matrix of factors", low=1, high=65536)
    alpha: float = option(0.0, "the matrix is scaled by s = alpha / r; 0 for s = 1", low=0.0, high=1e6)
    no_residual: bool = option(False, "W * (B A) instead of W * (1 + s B A)")
    targets: str = option("q,v", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers")
    alpha_pattern: dict[str, float] = option({}, "glob or last path part -> alpha of those layers")
    start: str = option("kaiming", "first values of A", choices=("kaiming", "gaussian"))

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A [r, in * kernel] and B [out, r], fp32."""
        t = factors(site, rank_at(self, site), self.start, generator)
        if self.no_residual:
            t["A"][0], t["B"][:, 0] = 1.0, 1.0
        return t

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """W' in the dtype of `params["weight"]` or wider."""
        W = hadamard(params["weight"], t["B"], t["A"], self.scale(site), residual=not self.no_residual)
        return {**params, "weight": W}

    def scale(self, site: Site) -> float:
        """s at the site."""
        alpha = float(pick(self.alpha_pattern, site.path, self.alpha))
        return alpha / rank_at(self, site) if alpha else 1.0

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a bad value, or a scale without the residual."""
        check_patterns("hut", self, sites)
        if self.no_residual and (self.alpha or self.alpha_pattern):
            raise UsageError(
                "W * (B A) has no scale: it starts at all ones", where="hut.alpha", hint="leave alpha at 0"
            )

    def recipe(self) -> dict[str, float]:
        """Ten times LoRA's, because the change is scaled by the entries of W."""
        return {"lr": 1e-2}

    @classmethod
    def toy(cls) -> HUT:
        return cls(rank=2, targets="everything")
