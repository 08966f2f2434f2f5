# SPDX-License-Identifier: Apache-2.0
"""Pivotal parameters tuning trains the weights that a trial mask, learnt on the data, moved most.

    trial: W_eff = D * W      D and W [out, in, *kernel]; D starts at 1 and trains, W is frozen
    run:   W' = W + phi       phi sparse, at the largest |D - 1| (or |D - 1| |W|) over all targets

The trial is thrown away, W is as it was, and the chosen entries train from zero change. Parts without a trial of their own
train in both phases and start anew: give `trainable-tokens` beside it and the identifiers of a concept are learnt while the
mask is, so that the mask is not blind to the concept. Merges exactly.

The paper trains the identifier tokens and the mask on a few clips of one concept; length of the trial, rates, score and
share are choices of this library, as no text of the method was at hand. |D - 1| depends on scale: Adam moves every D at
one speed at first, so give the trial enough steps or take `score="change"`.
A granted US patent (12118976) claims selecting pivotal parameters in self-attention together with concept tokens for
text-to-music models; have that looked at before this is used there.

Defaults: 10 % of the attention weights, a trial of 0.2 of the run, the mask 100 times as fast as the entries.
Use when: a generator must learn a concept from a handful of examples. Avoid when: there is much data (try `lora`).
Cost: as many values as entries chosen; the trial needs a mask of the size of the weights.

Chen et al. 2024, arXiv 2406.12292.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tunesmith.core.algebra import Sparse
from tunesmith.core.base import Base
from tunesmith.core.method import MethodInfo, option, register
from tunesmith.core.sample import Sample
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.sparse import change, entries, top_of_all
from tunesmith.deltas.weight.trial import budget, exactly, unlisted

KINDS = ("linear", "conv1d", "conv2d")


@register("ppt", carrier="weight", paper="2406.12292", kinds=KINDS)
class PivotalTuning:
    """Train the entries that a trial mask on the weights moved most."""

    density: float = option(0.1, "share of the targets' entries that train", low=0.0, high=1.0)
    entries: int = option(0, "number of entries that train; 0 goes by density", low=0, high=2**60)
    trial: float = option(0.2, "length of the trial of the mask as a share of the run", low=1e-6, high=100.0)
    score: str = option("mask", "|D - 1|, or |D - 1| |W| for change", choices=("mask", "change"))
    lr_ratio: float = option(100.0, "learning rate of the mask over that of the entries", low=1e-3, high=1e6)
    targets: str = option("attention", "which layers the entries are chosen from")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """`indices` int64 and `values` fp32, empty until `calibrate`."""
        return entries(torch.empty(0, dtype=torch.int64))

    def calibrate(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        """The places found [k], with zero values."""
        return entries(seen)

    def update(self, site: Site, t: dict[str, Tensor]) -> Sparse:
        """phi."""
        return change(site, t)

    def observe(self, base: Base, sites: list[Site], sample: Sample) -> dict[str, Tensor]:
        """The places by site, from a trial of the mask."""
        part = sample.trained(base, [MaskProbe(exactly(sites), self.lr_ratio)], self.trial).parts[0]
        scores = {}
        for s in sites:
            moved = (part.parameter(s.path, "D").detach() - 1).abs()
            scores[s.path] = (moved * s.params()["weight"].abs() if self.score == "change" else moved).cpu()
        total = sum(math.prod(s.shape) for s in sites)
        return top_of_all(scores, budget(self.entries, self.density, total, "ppt"))

    def recipe(self) -> dict[str, float]:
        """The rate of the entries; the mask's is `lr_ratio` times it."""
        return {"lr": 1e-5}

    @classmethod
    def toy(cls) -> PivotalTuning:
        return cls(density=0.3, targets="all-weights")


@dataclass(frozen=True)
class MaskProbe:
    """The trial: a factor D for every entry of the weight, starting at 1."""

    info: ClassVar[MethodInfo] = unlisted("mask-probe", KINDS)
    targets: str
    ratio: float

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """D of the shape of W, ones, fp32."""
        return {"D": torch.ones(site.shape)}

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters with D * W for W, so that dL/dD = W * dL/dW_eff."""
        return {**params, "weight": t["D"] * params["weight"]}

    def learning_rates(self) -> dict[str, float]:
        return {"D": self.ratio}

    def weight_decays(self) -> dict[str, float]:
        """None: decay would pull every D to 0 and count as movement."""
        return {"D": 0.0}

    def recipe(self) -> dict[str, float]:
        return PivotalTuning().recipe()
