# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA shares a budget of ranks among layers by pruning the least important components of P diag(E) Q.

    W' = W + s B diag(E) A        B = P [out, r_0], E [r_0], A = Q [r_0, in * kernel], s = alpha / (r_0 + 1e-5)
    importance of an entry p = I U,  I <- b1 I + (1 - b1) |p dL/dp|,  U <- b2 U + (1 - b2) |(|p dL/dp|) - I|
    of component i = that of E_i + mean over A_i + mean over B_i

A, B and E train; W is frozen. A and B start from N(0, 0.02^2) and E at zero, so a fresh delta is the identity bit for
bit. Pruning sets E to zero where a component is not among the most important ones of all layers together; the budget
falls with a cube from r_0 to `rank` per layer on average, between the first `tinit` and the last `tfinal` of the run.
Until then a component can come back; from then on the pruned ones stay zero. The loss gains `orthogonal` times the mean of
||A A^T - I||_F and ||B^T B - I||_F over all factors. After training the components with E = 0 are dropped: what is stored
is a plain LoRA with a rank of its own at every layer. Merges exactly.

Defaults: from r_0 12 to 8 as in PEFT, alpha 16, b1 = b2 = 0.85, regulariser 0.5, on every linear layer but the output
head. PEFT takes steps where this takes shares of the run: a tenth before pruning and half of it after, near the paper's.
Use when: some layers need much more rank than others and it is not known which.
Avoid when: runs are so short that importance cannot settle.
Cost: LoRA's parameters at r_0 in training and two averages of the same size; kept * (in * kernel + out) afterwards.

Zhang et al. 2023, arXiv 2303.10512; schedule and scores as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.gated import as_lora, gated, normal, open_components, orthogonality
from tunesmith.deltas.weight.lora import LoRA
from tunesmith.deltas.weight.lowrank import KINDS
from tunesmith.deltas.weight.sparse import top_of_all

TRAINED = ("A", "E", "B")


@register("adalora", carrier="weight", paper="2303.10512", kinds=KINDS)
class AdaLoRA:
    """Add low-rank matrices and prune them to a common budget of ranks, the least important components first."""

    rank: int = option(8, "average rank of a layer at the end", low=1, high=65536)
    initial: int = option(12, "rank r_0 of every layer at the start", low=1, high=65536)
    alpha: float = option(16.0, "the added matrix is scaled by alpha / r_0", low=1e-6, high=1e6)
    targets: str = option("all-linear", "which layers to change")
    tinit: float = option(0.1, "share of the run before pruning begins", low=0.0, high=1.0)
    tfinal: float = option(0.5, "share of the run after the budget is reached", low=0.0, high=1.0)
    every: int = option(10, "steps between two allocations", low=1, high=1_000_000)
    beta1: float = option(0.85, "smoothing of the sensitivity", low=0.0, high=1.0)
    beta2: float = option(0.85, "smoothing of its uncertainty", low=0.0, high=1.0)
    orthogonal: float = option(0.5, "weight of the regulariser", low=0.0, high=1e6)

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A [r_0, in * kernel], B [out, r_0], E [r_0] and the two averages of each, fp32; `kept` [r_0], bool."""
        t = {**normal(site, self.initial, generator), "E": torch.zeros(self.initial)}
        books = {f"{kind}_{n}": torch.zeros_like(t[n]) for n in TRAINED for kind in ("sensitivity", "uncertainty")}
        return {**t, **books, "kept": torch.ones(self.initial, dtype=torch.bool)}

    def shared(self, sites: list[Site], generator: torch.Generator) -> dict[str, Tensor]:
        """The number of factors, over which the regulariser is a mean."""
        return {"factors": torch.tensor(2.0 * len(sites))}

    def frozen(self) -> tuple[str, ...]:
        return ("factors",)

    def books(self) -> tuple[str, ...]:
        return ("kept", *(f"{kind}_{n}" for n in TRAINED for kind in ("sensitivity", "uncertainty")))

    def update(self, site: Site, t: dict[str, Tensor]) -> LowRank:
        """s B diag(E) A in the shape of the weight."""
        return gated(site, t["B"], t["E"], t["A"], self._scale())

    def penalty(self, site: Site, t: dict[str, Tensor]) -> Tensor:
        """This site's share of the regulariser."""
        return self.orthogonal * orthogonality(t) / t["factors"]

    def after_step(self, part: Any, now: Any) -> None:
        """Score, and at the steps of the schedule prune to the budget."""
        start = round(self.tinit * now.total)
        end = max(start + 1, now.total - round(self.tfinal * now.total))
        if now.step < end:
            self._watch(part)
        if start < now.step <= end and (now.step % self.every == 0 or now.step == end):
            self._allocate(part, self.budget(len(part.kind_of), now.step, start, end))
        elif now.step > end:
            for path in part.kind_of:
                part.parameter(path, "E").mul_(part.parameter(path, "kept"))

    def budget(self, sites: int, step: int, start: int, end: int) -> int:
        """The components that may be open at `step`: the cube from sites * r_0 to sites * rank."""
        left = 1 - (step - start) / (end - start)
        return int((self.initial - self.rank) * sites * left**3 + self.rank * sites)

    def _watch(self, part: Any) -> None:
        for path in part.kind_of:
            for name in TRAINED:
                p = part.parameter(path, name)
                seen = (p * p.grad).abs() if p.grad is not None else torch.zeros_like(p)
                smooth, spread = (part.parameter(path, f"{kind}_{name}") for kind in ("sensitivity", "uncertainty"))
                smooth.lerp_(seen, 1 - self.beta1)
                spread.lerp_((seen - smooth).abs(), 1 - self.beta2)

    def _allocate(self, part: Any, budget: int) -> None:
        scores = {}
        for path in part.kind_of:
            t = part.tensors(path)
            A, E, B = (t[f"sensitivity_{n}"] * t[f"uncertainty_{n}"] for n in TRAINED)
            scores[path] = E + A.mean(1) + B.mean(0)
        chosen = top_of_all(scores, budget)
        for path in part.kind_of:
            kept = part.parameter(path, "kept").fill_(False)
            kept[chosen.get(path, [])] = True
            part.parameter(path, "E").mul_(kept)

    def _scale(self) -> float:
        return self.alpha / (self.initial + 1e-5)

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a budget above the start or a schedule without a time for pruning."""
        if self.rank > self.initial:
            what = f"the average rank at the end, {self.rank}, is above the {self.initial} of the start"
            raise UsageError(what, where="adalora.rank", hint=f"at most {self.initial}, or a larger initial")
        if self.tinit + self.tfinal >= 1:
            raise UsageError("tinit and tfinal leave no time for pruning", where="adalora", hint="a sum below 1")

    def bake(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """diag(E) A and B of the components that are left."""
        return open_components(t["B"], t["E"], t["A"])

    def baked_as(self, found: Mapping[str, dict[str, Tensor]]) -> LoRA:
        """LoRA with the rank that is left at each site and the scale of before."""
        return as_lora(self.targets, found, lambda path, kept: self._scale())

    def recipe(self) -> dict[str, float]:
        """Within the published range of 5e-4 to 2e-3."""
        return {"lr": 1e-3}

    @classmethod
    def toy(cls) -> AdaLoRA:
        return cls(rank=2, initial=3, alpha=6.0)
