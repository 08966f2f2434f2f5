# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning, held as the difference from the frozen weights.

    W' = W + D_W,  b' = b + D_b      D of the shape of each weight and bias

Every D trains and starts at zero, so a fresh delta is the identity bit for bit; the base stays frozen and undo is
exact. Merges exactly.

Defaults: every linear layer, convolution, embedding and norm that reaches the output, the output head included.
Parameters that belong to no such layer (a class token, a bare position table) stay as they are.
Use when: there is much data, or as the reference the light methods are measured against.
Avoid when: the delta must be small, or little data would be overfitted; it forgets more than the light methods.
Cost: as many parameters as the layers have, in fp32, and the optimiser's state for them.

With `pull` the differences are drawn back to zero before each step (AdamR, arXiv 2410.09344), which keeps them small
enough for extreme random pruning. The usual fine-tuning of all weights; Howard and Ruder 2018, arXiv 1801.06146.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import Dense, Update
from tunesmith.core.method import option, register
from tunesmith.core.pull import FORMS, mean_second_moment, pull
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.difference import added, zeros_like_params

STATISTICS = ("running_mean", "running_var")
KINDS = ("linear", "conv1d", "conv2d", "embedding", "norm")


@register("full", carrier="weight", paper="1801.06146", kinds=KINDS)
class Full:
    """Train every weight and bias, held as the difference from the base."""

    targets: str = option("everything", "which layers to train")
    bias: bool = option(True, "train biases and the shifts of norms too")
    statistics: bool = option(False, "hold differences of running means and variances too; they never train")
    pull: float = option(0.0, "pull to the base before each step, wd of AdamR; 1e-4 in its code", low=0.0, high=1e6)
    pull_form: str = option("l2", "what AdamR pulls by: the difference, or its sign", choices=FORMS)

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Zeros named after the site's parameters, in canonical orientation, fp32."""
        return zeros_like_params(site, self.touches())

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters plus their differences."""
        return added(params, t)

    def differences(self, site: Site, t: dict[str, Tensor]) -> dict[str, Update]:
        """What is added, by parameter."""
        return {n: Dense(d) for n, d in t.items()}

    def before_step(self, part: Any, now: Any) -> None:
        """AdamR's pull to the base, with the mean over this part; gradients are those before clipping."""
        if not self.pull:
            return
        moving = [(path, n, t) for path, n, t in part.items() if t.requires_grad and t.grad is not None]
        if not moving:
            return
        beta2 = float(now.optimiser.param_groups[0]["betas"][1])
        mean = mean_second_moment(((t.grad / now.scale, now.state(path, n)) for path, n, t in moving), beta2)
        for path, n, t in moving:
            pull(t, None, self.pull, now.learning_rate(path, n), mean, self.pull_form)

    def touches(self) -> tuple[str, ...]:
        return ("weight", *(("bias",) if self.bias else ()), *(STATISTICS if self.statistics else ()))

    def frozen(self) -> tuple[str, ...]:
        return STATISTICS

    def fits(self, site: Site) -> str | None:
        """Why the site cannot be used, if so."""
        return None if "weight" in site.params() else "it has no weight"

    def recipe(self) -> dict[str, float]:
        """Small steps, as for whole-model fine-tuning in arXiv 2411.02462; large ones destroy the base."""
        return {"lr": 2e-5}

    @classmethod
    def toy(cls) -> Full:
        return cls()
