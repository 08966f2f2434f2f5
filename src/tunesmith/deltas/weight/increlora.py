# SPDX-License-Identifier: Apache-2.0
"""IncreLoRA starts every layer at a small rank and lets the most important layers grow until a budget is spent.

    W' = W + s B diag(E) A      B [out, k + a], E [k + a], A [k + a, in * kernel], s = alpha / (k + 1e-5), k active rank
    score of a layer = sum |dW * G| / sqrt(numel),  G = dL/d(dW)
    I <- b1 I + (1 - b1) score,  U <- b2 U + (1 - b2) |score - I|,  importance = I U

A, B and the k active entries of E train; W is frozen. A and B start from N(0, 0.02^2), E at zero. The last a components
of a layer are its reserve: their gate is fixed at 1e-5, so that A and B get a gradient before they matter; outside
training the reserve is left out, so a fresh delta is the identity bit for bit. At every growth the `top` most important
layers take their reserve into use and get a new one. When the active ranks sum to `rank` per layer on average, all reserves
are dropped. The loss gains `orthogonal` times the mean of ||A A^T - I||_F and ||B^T B - I||_F over all factors. After
training a plain LoRA with a rank of its own at every layer is stored. Merges exactly.

As published, s shrinks when k grows and the function jumps with it; `continuous` scales E up by the same factor. E starts
its optimiser moments anew when it grows, A and B keep those of the rows they had.

Defaults: from rank 1 to 2 on average, top 3, alpha 32, b1 = b2 = 0.85, regulariser 0.1, as in the published CoLA script,
on every linear layer but the output head. The script grows every 100 steps after the first 100; `every=0` spreads growth
over the first half of the run instead, with more than `top` layers at a time if there are few steps.
Use when: the budget is small and it is not known which layers need it.
Avoid when: training runs on several processes (tensors change shape), or steps are few.
Cost: the gradient of the whole weight of every target while growing; kept * (in * kernel + out) per layer afterwards.

Zhang et al. 2023, arXiv 2308.12043.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.gated import as_lora, normal, orthogonality
from tunesmith.deltas.weight.lora import LoRA
from tunesmith.deltas.weight.lowrank import KINDS
from tunesmith.deltas.weight.whole_gradient import Watched, taken

RESERVE = 1e-5
STD = 0.02


@dataclass(frozen=True)
class Growth:
    """When layers grow: at steps `first`, `first + every`, ..., `rounds` times, `layers` at a time, by `add` each."""

    first: int
    every: int
    rounds: int
    layers: int
    add: int

    @property
    def last(self) -> int:
        return self.first + (self.rounds - 1) * self.every

    def due(self, step: int) -> bool:
        return self.first <= step and (step - self.first) % self.every == 0


@register("increlora", carrier="weight", paper="2308.12043", kinds=KINDS)
class IncreLoRA:
    """Add low-rank matrices that start small and grow where the loss is most sensitive to them."""

    rank: int = option(2, "average rank of a layer at the end", low=1, high=65536)
    initial: int = option(1, "rank of every layer at the start", low=1, high=65536)
    alpha: float = option(32.0, "the added matrix is scaled by alpha / active rank", low=1e-6, high=1e6)
    targets: str = option("all-linear", "which layers to change")
    top: int = option(3, "layers that grow at a time", low=1, high=65536)
    every: int = option(0, "steps between growths; 0 spreads them over half the run", low=0, high=1_000_000)
    warmup: int = option(0, "no growth up to this step; 0 is as many steps as `every`", low=0, high=1_000_000)
    add: int = option(0, "components a layer grows by; 0 is half of `rank`", low=0, high=65536)
    beta1: float = option(0.85, "smoothing of the score", low=0.0, high=1.0)
    beta2: float = option(0.85, "smoothing of its uncertainty", low=0.0, high=1.0)
    orthogonal: float = option(0.1, "weight of the regulariser", low=0.0, high=1e6)
    advance: bool = option(True, "train the reserve before it is used; else it waits untrained at gate 0")
    continuous: bool = option(False, "scale E up when the rank grows, so that the function does not jump")
    choice: str = option("importance", "which layers grow (random: a control)", choices=("importance", "random"))

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A [k + a, in * kernel], B [out, k + a], E [k], fp32, and the two averages of the layer's score."""
        reserve = self._add() if self.rank > self.initial else 0
        t = normal(site, self.initial + reserve, generator, STD)
        return {**t, "E": torch.zeros(self.initial), "sensitivity": torch.zeros(()), "uncertainty": torch.zeros(())}

    def shared(self, sites: list[Site], generator: torch.Generator) -> dict[str, Tensor]:
        """The number of factors, over which the regulariser is a mean."""
        return {"factors": torch.tensor(2.0 * len(sites))}

    def frozen(self) -> tuple[str, ...]:
        return ("factors",)

    def books(self) -> tuple[str, ...]:
        return ("sensitivity", "uncertainty")

    def update(self, site: Site, t: dict[str, Tensor]) -> LowRank:
        """s B diag(E) A in the shape of the weight, with the reserve only in training."""
        A, B, E = t["A"], t["B"], t["E"]
        k = len(E)
        if k == len(A) or not (site.module.training and torch.is_grad_enabled()):
            return LowRank(B[:, :k], E[:, None] * A[:k], self._scale(k), site.shape)
        return Watched(B, self._gates(A, E)[:, None] * A, self._scale(k), site.shape, key=E)

    def penalty(self, site: Site, t: dict[str, Tensor]) -> Tensor:
        """This site's share of the regulariser."""
        return self.orthogonal * orthogonality(t) / t["factors"]

    def before_step(self, part: Any, now: Any) -> None:
        """Score every layer by its change and the gradient of its change, as long as there is something to grow."""
        for path in part.kind_of:
            A, B, E = (part.parameter(path, n) for n in ("A", "B", "E"))
            G = taken(E)
            if len(A) == len(E):
                continue
            score = torch.zeros((), device=E.device)
            if G is not None:
                dW = self._scale(len(E)) * (B * self._gates(A, E)) @ A  # [out, in * kernel]
                score = (dW * G.flatten(1)).abs().sum() / (math.sqrt(dW.numel()) * now.scale)
            if bool(torch.isfinite(score)):  # such a step is not taken
                smooth, spread = part.parameter(path, "sensitivity"), part.parameter(path, "uncertainty")
                smooth.lerp_(score, 1 - self.beta1)
                spread.lerp_((score - smooth).abs(), 1 - self.beta2)

    def after_step(self, part: Any, now: Any) -> None:
        """Grow the chosen layers when it is time; drop the reserves when the budget is spent."""
        paths = list(part.kind_of)
        plan = self.growth(len(paths), now.total)
        if now.step == 1 and plan.rounds and plan.last >= now.total and (self.every or self.warmup):
            what = f"growth would end at step {plan.last}, the run has {now.total}"
            raise UsageError(what, where="increlora", hint="raise top, or lower every and warmup")
        left = self.rank * len(paths) - sum(len(part.parameter(path, "E")) for path in paths)
        if left <= 0 or not plan.due(now.step):
            return
        for path in self._chosen(part, paths)[: plan.layers]:
            grown = min(plan.add, left)
            left -= grown
            if grown:
                self._grow(part, now, path, grown)
        if not left:
            for path in paths:
                k = len(part.parameter(path, "E"))
                self._resize(part, now, path, k, 0)

    def growth(self, sites: int, total: int) -> Growth:
        """The growths of a run of `total` steps on this many sites."""
        missing, add = (self.rank - self.initial) * sites, self._add()
        rounds = math.ceil(missing / (self.top * add))
        if self.every or not rounds:
            every = max(1, self.every)
            return Growth(((self.warmup or every) // every + 1) * every, every, rounds, self.top, add)
        most = max(1, total // 2 - self.warmup - 1)
        layers = max(self.top, math.ceil(missing / (add * most)))
        rounds = math.ceil(missing / (layers * add))
        every = max(1, (total // 2 - self.warmup) // (rounds + 1))
        return Growth((self.warmup or every) + every, every, rounds, layers, add)

    def _chosen(self, part: Any, paths: list[str]) -> list[str]:
        """All paths, the one to grow first in front; ties keep the order of the model."""
        if self.choice == "random":  # the loop seeds every step, so a resumed run draws the same
            return [paths[i] for i in torch.randperm(len(paths)).tolist()]
        importance = {p: float(part.parameter(p, "sensitivity") * part.parameter(p, "uncertainty")) for p in paths}
        return sorted(paths, key=lambda p: -importance[p])

    def _grow(self, part: Any, now: Any, path: str, grown: int) -> None:
        E = part.parameter(path, "E")
        k = len(E)
        old = E * ((k + grown) / k) if self.continuous else E
        # Without its old moments: Adam counts steps for the whole tensor, and newcomers that share the count of old entries
        # would take steps several times too large.
        now.replace(path, "E", torch.cat([old, old.new_full((grown,), self._reserve())]))
        self._resize(part, now, path, k + grown, self._add())

    def _resize(self, part: Any, now: Any, path: str, active: int, reserve: int) -> None:
        """The first `active` components of A and B and a new reserve; what stays keeps its moments."""
        keep = torch.cat([torch.arange(active), torch.full((reserve,), -1)])
        for name, dim in (("A", 0), ("B", 1)):
            old = part.parameter(path, name)
            new = torch.randn(*(reserve if i == dim else n for i, n in enumerate(old.shape))) * STD
            now.replace(path, name, torch.cat([old.narrow(dim, 0, active), new.to(old)], dim), keep=keep, dim=dim)

    def _gates(self, A: Tensor, E: Tensor) -> Tensor:
        """E with the fixed gates of the reserve, [k + a]."""
        return torch.cat([E, E.new_full((len(A) - len(E),), self._reserve())])

    def _reserve(self) -> float:
        return RESERVE if self.advance else 0.0

    def _scale(self, k: int) -> float:
        return self.alpha / (k + 1e-5)

    def _add(self) -> int:
        return self.add or max(1, self.rank // 2)

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a budget below the start."""
        if self.rank < self.initial:
            what = f"the average rank at the end, {self.rank}, is below the {self.initial} of the start"
            raise UsageError(what, where="increlora.rank", hint=f"at least {self.initial}, or a smaller initial")

    def bake(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """diag(E) A and B of the active components."""
        k = len(t["E"])
        return {"A": (t["E"][:, None] * t["A"][:k]).detach(), "B": t["B"][:, :k].detach().contiguous()}

    def baked_as(self, found: Mapping[str, dict[str, Tensor]]) -> LoRA:
        """LoRA with the rank of each site and the scale of before."""
        return as_lora(self.targets, found, lambda path, kept: self._scale(kept))

    def recipe(self) -> dict[str, float]:
        """The published rate for CoLA."""
        return {"lr": 8e-4}

    @classmethod
    def toy(cls) -> IncreLoRA:
        return cls(rank=3, alpha=6.0)
