# SPDX-License-Identifier: Apache-2.0
"""LoRA whose factors are balanced every so many steps, with the optimiser's momentum forgotten at the same time.

    W' = W + s B A        W [out, in * kernel], B [out, r], A [r, in * kernel], s = alpha / r  (rsLoRA: alpha / sqrt r)
    every K steps: U S V^T = B A,  B <- U sqrt(S),  A <- sqrt(S) V^T,  moments of A and B <- 0

A and B train as in LoRA; W is frozen. Balancing leaves B A as it is, so it changes only where training goes on from. With
`reset` Adam begins anew, and over the next `recovery` steps the learning rate climbs back: its first steps would be full
size otherwise. Starts and merges as LoRA, and is stored as LoRA.

Defaults: LoRA's, with K 200 and a recovery of 10 steps; no refactorisation in the last step.
Use when: factors train for long, above all at large ranks or rates, and have grown unequal.
Avoid when: runs have fewer than some hundred steps (use `lora`).
Cost: LoRA's; at every K-th step QR of both factors and a decomposition of an r x r core per layer.

Yang et al. 2025, arXiv 2505.22922, which uses it to train factorised weights without a frozen W.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tunesmith.core.method import config, option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lora import LoRA
from tunesmith.deltas.weight.lowrank import KINDS
from tunesmith.deltas.weight.refactor import refactor, reset_momentum


@register("lora-refactor", carrier="weight", paper="2505.22922", kinds=KINDS)
class LoRARefactor(LoRA):
    """LoRA with factors balanced, and momentum reset, every so many steps."""

    every: int = option(200, "steps K between two refactorisations", low=1, high=1_000_000)
    balance: bool = option(True, "balance the factors at those steps")
    reset: bool = option(True, "forget the optimiser's moments at those steps")
    recovery: int = option(10, "steps over which the learning rate climbs back after a reset", low=0, high=1_000_000)

    def before_step(self, part: Any, now: Any) -> None:
        """Slow the first steps after a reset."""
        since = (now.step - 1) % self.every + 1  # 1 is the first step after a reset
        if self.reset and now.step > self.every and since <= self.recovery:
            now.slow(since / (self.recovery + 1))

    def after_step(self, part: Any, now: Any) -> None:
        """Refactor and reset when it is time."""
        if now.step % self.every or now.step == now.total:
            return
        if self.balance:
            refactor(part, seed=now.step)
        if self.reset:
            reset_momentum(part, now)

    def bake(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """The factors as they are."""
        return {"A": t["A"], "B": t["B"]}

    def baked(self) -> LoRA:
        """Plain LoRA: the factors need nothing of this any more."""
        own = ("every", "balance", "reset", "recovery")
        return LoRA(**{k: v for k, v in config(self).items() if k not in own})

    @classmethod
    def toy(cls) -> LoRARefactor:
        return cls(rank=2, alpha=4.0, every=2)
