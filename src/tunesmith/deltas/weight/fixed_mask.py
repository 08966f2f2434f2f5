# SPDX-License-Identifier: Apache-2.0
"""Fixed mask switches a given set of weights off.

    W' = M * W      W [out, in, *kernel], M in {0, 1} of its shape, stored as bits [ceil(n / 8)] uint8

Nothing trains. It is what a trained `mask` is saved as, what `prune` makes from the scores of a delta, and a pruned
base for other deltas when it comes first in the stack. By itself it masks `share` of each weight, the smallest entries
or random ones; with `share` 0 a fresh one is the identity. Merges exactly; the zeroed values stay in the base, so undo
brings them back.

Defaults: every linear layer but the output head, a share of 0.2 of each, by size.
Use when: a base must be pruned reversibly, as a control for a trained mask, or under a delta that is tuned on it.
Avoid when: the layers must get smaller: zeros take as long as other numbers; masks of whole heads or neurons can be cut.
Cost: one bit for each weight, nothing to train.

Pruning by size: Han et al. 2015, arXiv 1506.02626.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.bits import pack, unpack
from tunesmith.deltas.weight.sparse import drawn, top

KINDS = ("linear", "conv1d", "conv2d", "embedding")


@register(
    "fixed-mask", carrier="weight", paper="1506.02626", kinds=KINDS, strength="blend", identity_at_init=False,
    expected={"only_declared_trains": "nothing in it trains"},
)  # fmt: skip
class FixedMask:
    """Switch a given set of weights off."""

    targets: str = option("all-linear", "which layers to mask")
    share: float = option(0.2, "share of each weight that a fresh mask switches off", low=0.0, high=1.0)
    by: str = option("size", "which entries go first: the smallest, or random ones", choices=("size", "random"))

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """bits of a random mask, or (for `calibrate`) of one that keeps all."""
        M = torch.ones(math.prod(site.shape), dtype=torch.bool)
        if self.by == "random" and self._off(site):
            M[drawn(site, self._off(site), generator)] = False
        return {"bits": pack(M)}

    def calibrate(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """bits that switch the smallest weights off."""
        if self.by == "random" or not self._off(site):
            return t
        W = params["weight"].detach()
        M = torch.ones(W.numel(), dtype=torch.bool, device=W.device)
        M[top(-W.abs(), self._off(site))] = False
        return {"bits": pack(M)}

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters with M * W for W."""
        W = params["weight"]
        return {**params, "weight": torch.where(unpack(t["bits"], W.shape), W, torch.zeros_like(W))}

    def _off(self, site: Site) -> int:
        return round(self.share * math.prod(site.shape))

    def recipe(self) -> dict[str, float]:
        """Nothing trains; the rate is that of a run whose other parts name none."""
        return {"lr": 1e-3}

    @classmethod
    def toy(cls) -> FixedMask:
        return cls(targets="all-weights", share=0.3, by="random")
