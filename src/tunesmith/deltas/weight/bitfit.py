# SPDX-License-Identifier: Apache-2.0
"""BitFit trains the biases and nothing else.

    b' = b + d      b, d [out]

d trains and starts at zero, so a fresh delta is the identity bit for bit; all weights are frozen. Merges exactly.

Defaults: every layer with a bias but the output head, norms included, as in the paper (which also trains a task head:
add `head`). A model without biases is refused.
Use when: there is little data and the model has biases (BERT and ViT families).
Avoid when: the model has none (Llama and most of its kin), or the task is far from what the model knows.
Cost: one number per output channel; no extra work when merged.

Ben Zaken et al. 2021, arXiv 2106.10199.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.algebra import Dense, Update
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.difference import added, zeros_like_params


@register("bitfit", carrier="weight", paper="2106.10199", kinds=("linear", "conv1d", "conv2d", "norm"))
class BitFit:
    """Train the biases and nothing else."""

    targets: str = option("biases", "which layers' biases to train")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """`bias` [out], fp32 zeros."""
        return zeros_like_params(site, ("bias",))

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The bias plus its difference."""
        return added(params, t)

    def differences(self, site: Site, t: dict[str, Tensor]) -> dict[str, Update]:
        """What is added, by parameter."""
        return {n: Dense(d) for n, d in t.items()}

    def touches(self) -> tuple[str, ...]:
        return ("bias",)

    def fits(self, site: Site) -> str | None:
        """Why the site cannot be used, if so."""
        return None if site.has_bias else "it has no bias"

    def recipe(self) -> dict[str, float]:
        """The authors search 1e-4 to 1e-3; few parameters want the larger."""
        return {"lr": 1e-3}

    @classmethod
    def toy(cls) -> BitFit:
        return cls()
