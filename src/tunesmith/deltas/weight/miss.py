# SPDX-License-Identifier: Apache-2.0
"""MiSS adds one trained slice to every slice of a weight along its input.

    W'[o, j r + a] = W[o, j r + a] + B[a, o]      W [out, in * kernel], B [r, out], for every slice j
    mini: B[a, o] = M[a, o mod m]                 M [r, m], m dividing out

B (or M) trains and starts at zero, so a fresh delta is the identity bit for bit; W and biases are frozen. It is LoRA
with A = [I I ... I] held fixed: the input is cut into slices of r, which are summed, and the sum is multiplied by B.
Where r does not divide in * kernel, the last slice uses the first rows of B. Merges exactly.

Defaults: r 64 and the full B on every linear layer but the output head, as in PEFT.
Use when: LoRA's quality is wanted with half its numbers and no random start.
Avoid when: neighbouring inputs r apart must be treated differently (try `lora`, or `bone` for a change that sees W).
Cost: r * out parameters (mini: r * m); one thin product and a sum per layer while not merged.

arXiv 2409.15371, later versions (DiSHA, MiSS); MiSS of PEFT 0.21.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lowrank import check_ranks, columns, rank_at


@dataclass(frozen=True)
class Slices(LowRank):
    """`LowRank` whose A is [I I ... I] cut to length: a linear layer sums the slices of x instead of multiplying."""

    def apply(self, x: Tensor, site: Any) -> Tensor:
        if site.kind != "linear":
            return super().apply(x, site)
        r = self.rank
        h = F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2)  # [.., r]
        return F.linear(h, (self.B * self.scale).to(x.dtype))

    def scaled(self, s: float | Tensor) -> Slices:
        return Slices(self.B, self.A, self.scale * s, self.full)


@register("miss", carrier="weight", paper="2409.15371", kinds=("linear", "conv1d", "conv2d"))
class MiSS:
    """Add one trained slice to every slice of a weight along its input."""

    rank: int = option(64, "length r of a slice, the largest rank of the change", low=1, high=65536)
    mode: str = option("tile", "tile: B for every output; mini: B repeated along the outputs", choices=("tile", "mini"))
    mini_rank: int = option(1, "outputs m after which mini repeats; it must divide out", low=1, high=65536)
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """B [r, out], or [r, m] in mini mode, fp32 zeros."""
        return {"B": torch.zeros(rank_at(self, site), self.mini_rank if self.mode == "mini" else site.shape[0])}

    def update(self, site: Site, t: dict[str, Tensor]) -> Slices:
        """B^T [I I ... I] in the shape of the weight."""
        B = t["B"].repeat(1, site.shape[0] // t["B"].shape[1])  # [r, out]
        r, n = B.shape[0], columns(site)
        A = torch.eye(r, dtype=B.dtype, device=B.device).repeat(1, -(-n // r))[:, :n]
        return Slices(B.T, A, 1.0, site.shape)

    def fits(self, site: Site) -> str | None:
        """Why the site cannot be used, if so."""
        r, n, out = rank_at(self, site), columns(site), site.shape[0]
        if r > n:
            return f"slices of {r} are longer than its {n} inputs"
        if self.mode == "mini" and out % self.mini_rank:
            return f"mini_rank {self.mini_rank} does not divide its {out} outputs"
        return None

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank."""
        check_ranks("miss", self.rank_pattern, sites)

    def recipe(self) -> dict[str, float]:
        """As Bone."""
        return {"lr": 3e-4}

    @classmethod
    def toy(cls) -> MiSS:
        return cls(rank=3, targets="all-weights")
