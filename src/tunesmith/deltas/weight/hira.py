# SPDX-License-Identifier: Apache-2.0
"""HiRA adds to a frozen weight its entry-by-entry product with a trained low-rank matrix.

    W' = W + W * (B A)        W [out, in * kernel], B [out, r], A [r, in * kernel], * entry by entry

A and B train; W and biases are frozen. A starts random (Kaiming uniform or Gaussian) and B at zero, so a fresh delta is
the identity bit for bit. Merges exactly. It is `hut` with a residual and no scale, at the defaults of HiRA in PEFT,
whose tensors it can take over as they are (those of an embedding turned).

Defaults: r 32 on every linear layer but the output head, as in PEFT.
Use when: LoRA's rank is too low for what must be learnt and its size must not grow.
Avoid when: memory is short (a dense gradient per layer while training) or LoRA's learning rate must be kept.
Cost: r (in * kernel + out) parameters; W' is built in every pass while not merged.

Defined by HiRA of PEFT 0.21; the same form as HUT, arXiv 2409.13501.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lowrank import KINDS, check_ranks, factors, rank_at
from tunesmith.deltas.weight.multiplicative import hadamard


@register("hira", carrier="weight", kinds=KINDS)
class HiRA:
    """Add to a weight its entry-by-entry product with a trained low-rank matrix."""

    rank: int = option(32, "rank r of the matrix of factors", low=1, high=65536)
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers")
    start: str = option("kaiming", "first values of A", choices=("kaiming", "gaussian"))

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A [r, in * kernel] and B [out, r], fp32."""
        return factors(site, rank_at(self, site), self.start, generator)

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """W' in the dtype of `params["weight"]` or wider."""
        return {**params, "weight": hadamard(params["weight"], t["B"], t["A"])}

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank."""
        check_ranks("hira", self.rank_pattern, sites)

    def recipe(self) -> dict[str, float]:
        """As HUT."""
        return {"lr": 1e-2}

    @classmethod
    def toy(cls) -> HiRA:
        return cls(rank=2, targets="all-weights")
