# SPDX-License-Identifier: Apache-2.0
"""Norm tuning trains the scales and shifts of the normalisation layers.

    g' = g + d_g,  c' = c + d_c      g, c [channels]: scale and shift of a layer, group, batch or RMS norm

d_g and d_c train and start at zero, so a fresh delta is the identity bit for bit; an RMS norm has no shift. All other
weights and the running statistics of batch norm are frozen. Merges exactly.

Defaults: every norm that has parameters.
Use when: little data, a change of domain or style, vision models with batch norm, multi-modal language models.
Avoid when: the task asks for new knowledge.
Cost: two numbers per channel and norm; nothing extra when merged.

Zhao et al. 2023 (LayerNorm tuning), arXiv 2312.11420; Frankle et al. 2020 (batch norm), arXiv 2003.00152.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.algebra import Dense, Update
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.difference import added, zeros_like_params


@register("norm-tuning", carrier="weight", paper="2312.11420", kinds=("norm",))
class NormTuning:
    """Train the scales and shifts of normalisation layers."""

    targets: str = option("norms", "which norms to train")
    shift: bool = option(True, "train the shifts too, where a norm has one")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """`weight` [channels] and, where there is one, `bias` [channels], fp32 zeros."""
        return zeros_like_params(site, self.touches())

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scale and shift plus their differences."""
        return added(params, t)

    def differences(self, site: Site, t: dict[str, Tensor]) -> dict[str, Update]:
        """What is added, by parameter."""
        return {n: Dense(d) for n, d in t.items()}

    def touches(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.shift else ("weight",)

    def fits(self, site: Site) -> str | None:
        """Why the site cannot be used, if so."""
        return None if "weight" in site.params() else "it has no scale (use ssf there)"

    def recipe(self) -> dict[str, float]:
        """As for biases: few parameters want large steps."""
        return {"lr": 1e-3}

    @classmethod
    def toy(cls) -> NormTuning:
        return cls()
