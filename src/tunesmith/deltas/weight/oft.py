# SPDX-License-Identifier: Apache-2.0
"""OFT turns the input of a layer by trained rotations of blocks of channels.

    W' = W diag(R_1, ..., R_m)^T,  R_i = (I - Q_i) (I + Q_i)^-1      W [out, n], n = in * kernel, R_i, Q_i [k, k], m k = n

Q_i is skew-symmetric; its upper triangle q_i [k (k - 1) / 2] trains and starts at zero, so a fresh delta is the
identity. W and biases are frozen. Rotations keep the lengths of the rows of W and the angles between them. Live, the
input of a linear layer (the output of an embedding) is rotated and W is not touched. Merges exactly; strength blends W
and W', so a strength between is no rotation.

Defaults: blocks of 32 on every linear layer but the output head, rotations of their own for each block
(`block_share=True`: one for all) and the exact Cayley map. Where 32 does not divide n, the nearest divisor is used, as in
PEFT. `neumann_terms` 5 is PEFT's default, a series without inverse that is nearly orthogonal; `coft` holds every q_i
within `eps` / sqrt(m) of the identity by projection. Tensors are PEFT's (those of an embedding negated).
Use when: what the base knows must be kept and features only be turned, as in personalising image models.
Avoid when: features must be scaled or created (try `boft` with its scale, or `lora`).
Cost: n (k - 1) / 2 parameters; k multiply-adds per input channel and token while not merged.

Qiu et al. 2023, arXiv 2306.07280; OFT of PEFT 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lowrank import KINDS, columns
from tunesmith.deltas.weight.multiplicative import cayley, near_divisor, rotate, skew


@register("oft", carrier="weight", paper="2306.07280", kinds=KINDS, strength="blend")
class OFT:
    """Rotate blocks of a layer's input channels."""

    block: int = option(32, "side k of a rotation; the nearest divisor of n is used", low=2, high=65536)
    block_share: bool = option(False, "one rotation for all blocks of a layer")
    coft: bool = option(False, "keep every rotation near the identity")
    eps: float = option(6e-5, "with coft: how far the blocks of a layer may go together", low=0.0, high=1e3)
    neumann_terms: int = option(0, "0: exact; 4 or more: terms of the series without inverse", low=0, high=64)
    targets: str = option("all-linear", "which layers to change")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """q [m, k (k - 1) / 2] fp32 zeros; m = 1 with `block_share`."""
        k = self._side(site)
        return {"q": torch.zeros(1 if self.block_share else columns(site) // k, k * (k - 1) // 2)}

    def rotations(self, site: Site, t: dict[str, Tensor]) -> Tensor:
        """R [m, k, k]."""
        q = t["q"]
        if self.coft:  # as if it had been projected before; the gradient passes
            q = q + (self._near(q) - q).detach()
        return cayley(skew(q, self._side(site)), self.neumann_terms)

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """W' in the dtype of `params["weight"]` or wider."""
        W = params["weight"]
        return {**params, "weight": rotate(W.flatten(1), self.rotations(site, t).mT).reshape(W.shape)}

    def forward(self, site: Site, t: dict[str, Tensor], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's output for the rotated input; an embedding's rows rotated the other way."""
        R = self.rotations(site, t)
        return rotate(call(x), R.mT) if site.kind == "embedding" else call(rotate(x, R))

    def live_kinds(self) -> tuple[str, ...]:
        """Where `forward` works; a convolution's patches overlap, so its kernel is rotated instead."""
        return ("linear", "embedding")

    def _side(self, site: Site) -> int:
        return near_divisor(columns(site), self.block)

    def _near(self, q: Tensor) -> Tensor:
        """q with every block's matrix within eps / sqrt(m) of zero in Frobenius norm."""
        norm = math.sqrt(2) * q.norm(dim=1, keepdim=True)  # each number stands twice in its matrix
        return q * (self.eps / math.sqrt(q.shape[0]) / norm.clamp_min(torch.finfo(q.dtype).tiny)).clamp_max(1)

    def after_step(self, part: Any, now: Any) -> None:
        """With `coft`, project what trains."""
        for _, _, q in part.items() if self.coft else ():
            q.copy_(self._near(q))

    def fits(self, site: Site) -> str | None:
        """Why the site cannot be used, if so."""
        n = columns(site)
        return f"no block near {self.block} divides its {n} inputs" if self._side(site) < 2 else None

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a series too short to be a rotation."""
        if 0 < self.neumann_terms < 4:
            raise UsageError("a series needs 4 terms or more", where="oft.neumann_terms", hint="0 for the exact map")

    def recipe(self) -> dict[str, float]:
        """As LoRA."""
        return {"lr": 1e-3}

    @classmethod
    def toy(cls) -> OFT:
        return cls(block=4, targets="all-weights")
