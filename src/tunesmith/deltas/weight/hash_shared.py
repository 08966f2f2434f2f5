# SPDX-License-Identifier: Apache-2.0
"""HashShared reads a change of every weight from one short trained vector, through a fixed hash.

    dW_i = scale * g(i) psi[h(i)]      psi [m], one for all layers; i counts the weights of all layers through

h folds the n positions onto the m cells with loads that differ by at most one, and g is a random sign (see `hashing`:
integer arithmetic on six stored numbers). psi trains and starts at zero, so a fresh delta is the identity; W is frozen.
Merges exactly. With m = n it is full fine-tuning of the weights.

Gradients of psi are divided by 1e-6 + Gamma_j before the step, with k_j the weights that share a cell: by default
Gamma_j = (sum of scale)^2 / (k_j + 1e-3), so that under SGD each weight moves by the mean gradient of its group and
`scale` cancels. Adam is scale-free, so with it the division matters only for the clipping of gradients.

Defaults: 1 % of the weights of every linear layer but the output head, scale 1.
Use when: a change of all layers must fit in a few thousand numbers, or any size of delta must be hit exactly.
Avoid when: speed counts while it is not merged (a dense matrix is formed for every layer and pass).
Cost: m numbers and six of the hash; one dense product per layer and pass while not merged.

STABLE-RPS as a delta: Desai and Shrivastava 2024 (ICLR), arXiv 2310.11611.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import Dense
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.hashing import Fold, P, draw_numbers
from tunesmith.deltas.weight.lowrank import KINDS

MODES = ("mean-move", "sum", "mean", "root", "square", "none")


@register("hash-shared", carrier="weight", paper="2310.11611", kinds=KINDS)
class HashShared:
    """Read a change of every weight from one short trained vector."""

    budget: float = option(0.01, "numbers to train: up to 1 a share of the weights, above 1 how many", low=0, high=2e9)
    scale: float = option(1.0, "factor on every cell", low=1e-9, high=1e9)
    targets: str = option("all-linear", "which layers to change")
    gradient_scaling: str = option("mean-move", "Gamma, by which gradients are divided", choices=MODES)

    def shared(self, sites: list[Site], generator: torch.Generator) -> dict[str, Tensor]:
        """psi [m] zeros, fp32, and the numbers of the hash [6], int64."""
        n = sum(math.prod(s.shape) for s in sites)
        m = max(1, math.floor(self.budget * n)) if self.budget <= 1 else int(self.budget)
        if m >= P:
            raise UsageError(f"the hash has room for {P - 1} cells, not {m}", where="hash-shared.budget")
        return {"psi": torch.zeros(m), "numbers": draw_numbers(generator)}

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """at [2], int64: the position of the site's first weight, and how many weights there are in all; see `place`."""
        return {"at": torch.zeros(2, dtype=torch.int64)}

    def place(self, sites: list[Site]) -> dict[str, dict[str, Tensor]]:
        """The positions of all sites, one after the other."""
        out, start, n = {}, 0, sum(math.prod(s.shape) for s in sites)
        for s in sites:
            out[s.path] = {"at": torch.tensor([start, n])}
            start += math.prod(s.shape)
        return out

    def update(self, site: Site, t: dict[str, Tensor]) -> Dense:
        """scale g psi[h] in the shape of the weight."""
        start, n = t["at"].tolist()
        fold = Fold(n, len(t["psi"]), t["numbers"])
        return Dense(self.scale * fold.signed(t["psi"], start, math.prod(site.shape)).reshape(site.shape))

    def before_step(self, part: Any, now: Any) -> None:
        """Divide the gradient of psi by 1e-6 + Gamma."""
        psi = part.parameter("", "psi")
        if self.gradient_scaling == "none" or psi.grad is None:
            return
        n = int(part.parameter(next(iter(part.kind_of)), "at")[1])
        count = Fold(n, len(psi), part.parameter("", "numbers")).load().to(psi)
        psi.grad /= 1e-6 + gamma(self.gradient_scaling, count, self.scale * count, self.scale**2 * count)

    def frozen(self) -> tuple[str, ...]:
        """The specification of the map."""
        return ("numbers", "at")

    def recipe(self) -> dict[str, float]:
        """As LoRA: every weight moves by about this much a step."""
        return {"lr": 1e-3}

    @classmethod
    def toy(cls) -> HashShared:
        return cls(budget=0.1)


def gamma(mode: str, count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """Gamma_j from the k_j weights of a cell, the sum of their lambda, and of its squares (v1 to v5 of the authors)."""
    return {
        "mean-move": lambda: total.square() / (count + 1e-3), "sum": lambda: total,
        "mean": lambda: total / count.clamp_min(1), "root": squares.sqrt, "square": lambda: squares,
    }[mode]()  # fmt: skip
