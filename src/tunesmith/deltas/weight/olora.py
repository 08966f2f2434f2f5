# SPDX-License-Identifier: Apache-2.0
"""OLoRA is LoRA that starts from the QR decomposition of the weight, with orthonormal columns in B.

    W' = W + s (B A - B0 A0)        W [out, in * kernel], B [out, r], A [r, in * kernel], s = alpha / r
    Q R = W,  B0 = Q[:, :r],  A0 = R[:r]        (rsLoRA: s = alpha / sqrt r)

A and B train from A0 and B0, which stay frozen in the delta; W is frozen. The published form trains s B A beside the
residual W - s B0 A0; this is the same function on the unchanged W, so a fresh delta is the identity bit for bit and
deltas of one base add up. Nothing keeps B orthonormal in training. Merges exactly.

Defaults: r 16 and alpha 16 (s = 1) on every linear layer but the output head.
Use when: LoRA is slow to take off and a singular value decomposition of every layer is too dear (else `pissa`).
Avoid when: the base must be kept close to; the first columns of Q span whatever the first columns of W are.
Cost: trains as LoRA; stores and computes rank 2r; one QR decomposition per layer at the start.

Buyukakyuz 2024, arXiv 2406.01775.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.core.spectrum import flat
from tunesmith.deltas.weight.lowrank import (
    KINDS,
    START,
    begun,
    check_patterns,
    rank_at,
    relative,
    scale_at,
    too_wide,
    unbegun,
)


@register("olora", carrier="weight", paper="2406.01775", kinds=KINDS)
class OLoRA:
    """Train the leading factors of a QR decomposition of frozen weights."""

    rank: int = option(16, "columns r of Q that train", low=1, high=65536)
    alpha: float = option(16.0, "B A is scaled by alpha / r", low=1e-6, high=1e6)
    rslora: bool = option(False, "scale by alpha / sqrt(r), stable at high ranks")
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers")
    alpha_pattern: dict[str, float] = option({}, "glob or last path part -> alpha of those layers")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A and A0 [r, in * kernel], B and B0 [out, r], fp32; `calibrate` fills them."""
        return unbegun(site, rank_at(self, site))

    def calibrate(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first columns of Q and rows of R. As published they are not divided by s."""
        Q, R = torch.linalg.qr(flat(site))
        r = rank_at(self, site)
        return begun(Q[:, :r], R[:r])

    def update(self, site: Site, t: dict[str, Tensor]) -> LowRank:
        """s (B A - B0 A0) in the shape of the weight."""
        return relative(t, scale_at(self, site), site.shape)

    def fits(self, site: Site) -> str | None:
        """Q has no more columns than the weight's smaller side."""
        return too_wide(self, site)

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank or alpha."""
        check_patterns("olora", self, sites)

    def frozen(self) -> tuple[str, ...]:
        return START

    def recipe(self) -> dict[str, float]:
        """As PiSSA: B does not start at zero, so it needs less than LoRA."""
        return {"lr": 2e-4}

    @classmethod
    def toy(cls) -> OLoRA:
        return cls(rank=2, alpha=4.0)
