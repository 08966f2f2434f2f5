# SPDX-License-Identifier: Apache-2.0
"""SoRA is LoRA with a gate on every component, pruned in training by soft thresholding.

    W' = W + s B diag(g) A        B [out, r], g [r], A [r, in * kernel], s = alpha / r
    g <- sign(g) max(|g| - xi, 0)        after every optimiser step

A, B and g train; W is frozen. A is Kaiming uniform, B zero and g from N(0, 1), so a fresh delta is the identity bit for
bit. The loss gains eta times the mean |g| over all gates. A gate at zero still gets a gradient and can open again. After
training the components with g = 0 are dropped: what is stored is a plain LoRA with diag(g) A for A, the same s and a rank
of its own at every layer. Merges exactly.

Defaults: r 8, alpha 16, eta 10 and xi 3e-4 as in the released scripts, on every linear layer but the output head. Gates
have no weight decay. An Adam step moves a gate by about the learning rate and the threshold takes xi off, so xi over the
learning rate decides how much is pruned; `xi_schedule="rate"` lets xi follow the schedule. `prox="released"` is the
published code's operator, which also closes gates between xi and 2 xi.
Use when: the rank each layer needs is not known and the stored delta should be small.
Avoid when: the rank is given (use `lora`), or runs are too short for gates to reach zero.
Cost: LoRA's parameters plus r per layer in training; kept * (in * kernel + out) per layer afterwards.

Ding et al. 2023, arXiv 2311.11696.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.method import option, register
from tunesmith.core.patterns import pick
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.gated import as_lora, gated, open_components
from tunesmith.deltas.weight.lora import LoRA
from tunesmith.deltas.weight.lowrank import KINDS, check_patterns, factors, rank_at, scale_at


@register("sora", carrier="weight", paper="2311.11696", kinds=KINDS)
class SoRA:
    """Add a low-rank matrix whose components are pruned in training by soft-thresholded gates."""

    rank: int = option(8, "rank r of the added matrix before pruning", low=1, high=65536)
    alpha: float = option(16.0, "the added matrix is scaled by alpha / r", low=1e-6, high=1e6)
    xi: float = option(3e-4, "taken off every gate after each step", low=0.0, high=10.0)
    eta: float = option(10.0, "weight of the mean absolute gate in the loss", low=0.0, high=1e6)
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers before pruning")
    alpha_pattern: dict[str, float] = option({}, "glob or last path part -> alpha of those layers")
    gate_lr: float = option(1.0, "learning rate of the gates over that of A and B", low=1e-3, high=1e4)
    xi_schedule: str = option("constant", "xi as it is, or times lr / peak lr", choices=("constant", "rate"))
    prox: str = option("exact", "the operator, or the published code's", choices=("exact", "released"))

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A [r, in * kernel], B [out, r] and g [r], fp32."""
        r = rank_at(self, site)
        t = factors(site, r, "kaiming", generator)
        return {**t, "g": torch.randn(r, generator=generator)}

    def shared(self, sites: list[Site], generator: torch.Generator) -> dict[str, Tensor]:
        """The number of gates, over which the penalty is a mean."""
        return {"gates": torch.tensor(float(sum(rank_at(self, s) for s in sites)))}

    def frozen(self) -> tuple[str, ...]:
        return ("gates",)

    def update(self, site: Site, t: dict[str, Tensor]) -> LowRank:
        """s B diag(g) A in the shape of the weight."""
        return gated(site, t["B"], t["g"], t["A"], scale_at(self, site))

    def penalty(self, site: Site, t: dict[str, Tensor]) -> Tensor:
        """This site's share of eta times the mean absolute gate."""
        return self.eta * t["g"].abs().sum() / t["gates"]

    def after_step(self, part: Any, now: Any) -> None:
        """Shrink every gate."""
        xi = self.xi * (now.rate if self.xi_schedule == "rate" else 1.0)
        shrink = soft_threshold if self.prox == "exact" else released_threshold
        for path in part.kind_of:
            g = part.parameter(path, "g")
            g.copy_(shrink(g, xi))

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank or alpha."""
        check_patterns("sora", self, sites)

    def bake(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """diag(g) A and B of the components that are open."""
        return open_components(t["B"], t["g"], t["A"])

    def baked_as(self, found: Mapping[str, dict[str, Tensor]]) -> LoRA:
        """LoRA with the rank that is left at each site and the scale alpha / r of before."""

        def scale(path: str, kept: int) -> float:
            r = pick(self.rank_pattern, path, self.rank)
            return float(pick(self.alpha_pattern, path, self.alpha)) / r

        return as_lora(self.targets, found, scale)

    def learning_rates(self) -> dict[str, float]:
        """Learning rates by tensor name, over the run's own."""
        return {"g": self.gate_lr}

    def weight_decays(self) -> dict[str, float]:
        """None for the gates: what closes them is the threshold."""
        return {"g": 0.0}

    def recipe(self) -> dict[str, float]:
        """The published rate for STS-B."""
        return {"lr": 8e-4}

    @classmethod
    def toy(cls) -> SoRA:
        return cls(rank=3, alpha=6.0)


def soft_threshold(g: Tensor, xi: float) -> Tensor:
    """sign(g) max(|g| - xi, 0): the minimiser over z of (z - g)^2 / 2 + xi |z|."""
    return g.sign() * (g.abs() - xi).clamp_min(0)


def released_threshold(g: Tensor, xi: float) -> Tensor:
    """As the published code computes it, in three passes: also what lies between xi and 2 xi becomes zero."""
    g = torch.where(g > xi, g - xi, g)
    g = torch.where(g < -xi, g + xi, g)
    return torch.where(g.abs() < xi, torch.zeros_like(g), g)
