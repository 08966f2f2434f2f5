# SPDX-License-Identifier: Apache-2.0
"""R-AMT switches weights off: it trains a score for each and keeps those above a threshold.

    W' = M * W,  M = 1[R > threshold]      W [out, in, *kernel], R and M of its shape
    loss + l2 * sum over sites of ||R||_2

R trains through the step function as if it were the identity, dL/dR := dL/dW' * W (straight through), without weight
decay. It starts at `start` > threshold everywhere, so a fresh delta is the identity bit for bit. W and biases are
frozen. Merges exactly. `bake` keeps the mask alone, one bit for each weight (`fixed-mask`).

Defaults: attention projections, start 1e-2, threshold 5e-3 and l2 1e-4, as released; the release also masks the patch
convolution of its image encoder (add it to `targets`), and "attention,mlp" is its variant with the MLPs. Its rate is
8e-5, at which Adam needs about 60 steps of one mind to switch a weight off; `recipe` is for runs of a few hundred. The
penalty pulls every score down: at a large l2 it prunes with no help from the data; `pull="start"` pulls towards the
first values, that is towards keeping all, and stands beside the paper. `gradient_dropout=1.0` of the run is its GDR.
Use when: what is needed is in the base already, and the delta must be tiny or the model must not get larger weights.
Avoid when: new knowledge must go in: it can only take away.
Cost: while training as many scores as weights; one bit for each weight when saved.

Zheng et al. 2023, arXiv 2307.15049.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.bits import pack
from tunesmith.deltas.weight.fixed_mask import KINDS, FixedMask


@register("mask", carrier="weight", paper="2307.15049", kinds=KINDS, strength="blend")
class Mask:
    """Train which weights are switched off."""

    targets: str = option("attention", "which layers to mask")
    start: float = option(1e-2, "first value of every score", low=-1e3, high=1e3)
    threshold: float = option(5e-3, "weights with a score above this are kept", low=-1e3, high=1e3)
    l2: float = option(1e-4, "weight of the 2-norm of the scores in the loss", low=0.0, high=1e3)
    pull: str = option("zero", "where the 2-norm pulls the scores", choices=("zero", "start"))

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """R of the shape of W, constant, fp32."""
        return {"R": torch.full(site.shape, self.start)}

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters with M * W for W."""
        W, R = params["weight"], t["R"]
        M = (self.threshold < R).to(W.dtype) + (R - R.detach()).to(W.dtype)  # the second term is 0, its gradient 1
        return {**params, "weight": M * W}

    def penalty(self, site: Site, t: dict[str, Tensor]) -> Tensor:
        """l2 ||R||_2, or l2 ||R - start||_2."""
        return self.l2 * torch.linalg.vector_norm(t["R"] - (self.start if self.pull == "start" else 0.0))

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a start that masks everything."""
        if not self.start > self.threshold:
            raise UsageError("a fresh mask would switch every weight off", where="mask.start", hint="above threshold")

    def bake(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mask as bits, uint8 [ceil(n / 8)]."""
        return {"bits": pack(t["R"] > self.threshold)}

    def baked(self) -> FixedMask:
        """The method of a mask that no longer trains."""
        return FixedMask(targets=self.targets, share=0.0)

    def weight_decays(self) -> dict[str, float]:
        """None: decay would lower scores with no reason from the data."""
        return {"R": 0.0}

    def recipe(self) -> dict[str, float]:
        """A score can cross the threshold in some twenty steps."""
        return {"lr": 3e-4}

    @classmethod
    def toy(cls) -> Mask:
        return cls(targets="all-weights")
