# SPDX-License-Identifier: Apache-2.0
"""CorDA is LoRA that starts from the components of the weight that matter most, or least, for the inputs it sees.

    W' = W + s (B A - B0 A0)        W [out, in * kernel], B [out, r], A [r, in * kernel], s = alpha / r
    C = mean over examples of X^T X,  X divided by its largest |entry|,  then C / mean(diag C)
    U S V^T = W (C + d I),  Z = V^T (C + d I)^-1,  so W = U S Z
    B0 = U_I sqrt(S_I / s),  A0 = sqrt(S_I / s) Z_I        I: r components, the last ("knowledge") or the first

A and B train from A0 and B0, which stay frozen in the delta; W is frozen. The published form trains s B A beside the
residual W - s B0 A0; this is the same function on the unchanged W, so a fresh delta is the identity bit for bit and
deltas of one base add up. The damping d starts at 0.01 and doubles until the inverse is accurate. C has mean diagonal 1:
its scale leaves B0 A0 as it is but would move size between B0 and A0. Merges exactly.

`mode="instruction"` trains the r components that say most on the training data. `mode="knowledge"` trains the r that say
least on `context`, data of what must be kept (questions and answers, plain text), and so leaves the others alone. The
delta's provenance names that data with its digest.

Defaults: r 16 and alpha 16 (s = 1) on every linear layer but the output head, 64 batches; the authors use r 128 and 256
examples of 2,048 tokens. In knowledge mode B0 and A0 are small, so it takes a larger learning rate.
Use when: a fine-tuned model forgets what its base knew (knowledge), or LoRA is slow to take off (instruction).
Avoid when: no data of what must be kept is at hand, or there is room for neither the C of every layer nor rank 2r.
Cost: trains as LoRA; stores and computes rank 2r; (in * kernel)^2 numbers and one decomposition per layer at the start.

Yang et al. 2024, arXiv 2406.05223.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.base import Base
from tunesmith.core.errors import TrainingError
from tunesmith.core.method import option, register
from tunesmith.core.sample import Sample, second_moments
from tunesmith.core.sites import Site
from tunesmith.core.spectrum import SVD, flat
from tunesmith.deltas.weight.lowrank import (
    START,
    begun,
    check_patterns,
    rank_at,
    relative,
    scale_at,
    too_wide,
    unbegun,
)

DAMPING = 0.01
ACCURATE = 0.05


@register("corda", carrier="weight", paper="2406.05223", kinds=("linear", "conv1d", "conv2d"))
class CorDA:
    """Train the components of frozen weights that their inputs use most, or least."""

    rank: int = option(16, "components r that train", low=1, high=65536)
    alpha: float = option(16.0, "B A is scaled by alpha / r", low=1e-6, high=1e6)
    mode: str = option(
        "instruction", "train what the data uses most, or least (knowledge)", choices=("instruction", "knowledge")
    )
    context: str = option("", "data to measure on, such as what must be kept; the training data if empty")
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> rank of those layers")
    alpha_pattern: dict[str, float] = option({}, "glob or last path part -> alpha of those layers")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """A and A0 [r, in * kernel], B and B0 [out, r], fp32; `calibrate` fills them."""
        return unbegun(site, rank_at(self, site))

    def observe(self, base: Base, sites: list[Site], sample: Sample) -> dict[str, dict[str, Tensor]]:
        """C [in * kernel, in * kernel] of every site that runs."""
        sample = sample.of(base, self.context) if self.context else sample
        return {path: {"C": C} for path, C in second_moments(base, sites, sample).items()}

    def calibrate(
        self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor], seen: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The first or last components of W seen through C."""
        W = oriented(flat(site), seen["C"])
        r = rank_at(self, site)
        some = slice(None, r) if self.mode == "instruction" else slice(len(W.S) - r, None)
        root = (W.S[some] / scale_at(self, site)).sqrt()
        return begun(W.U[:, some] * root, root[:, None] * W.Vh[some])

    def update(self, site: Site, t: dict[str, Tensor]) -> LowRank:
        """s (B A - B0 A0) in the shape of the weight."""
        return relative(t, scale_at(self, site), site.shape)

    def fits(self, site: Site) -> str | None:
        """The inputs of a grouped convolution are not those of its whole kernel."""
        if site.kind != "linear" and site.module.groups > 1:  # type: ignore[operator]
            return "it is a grouped convolution"
        return too_wide(self, site)

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank or alpha."""
        check_patterns("corda", self, sites)

    def frozen(self) -> tuple[str, ...]:
        return START

    def recipe(self) -> dict[str, float]:
        """As PiSSA: B does not start at zero; components that say little are small and take more."""
        return {"lr": 2e-4 if self.mode == "instruction" else 5e-4}

    @classmethod
    def toy(cls) -> CorDA:
        return cls(rank=2, alpha=4.0)


@torch.no_grad()
def oriented(W: Tensor, C: Tensor) -> SVD:
    """U [out, k], S [k] falling and Z [k, n] with W = U diag(S) Z, from W [out, n] and second moments C [n, n].

    U and S are those of W C~, with C~ the damped C scaled to mean diagonal 1. Rows of Z are orthonormal only for C = I,
    which also stands in for inputs that are all zero. Raises TrainingError for a C that is not finite.
    """
    if not C.isfinite().all():
        raise TrainingError("the inputs of a layer are not finite", hint="load the base in fp32 or bf16")
    eye = torch.eye(len(C), dtype=W.dtype, device=W.device)
    size = C.diagonal().mean().to(W)
    C = C.to(W) / size if size > 0 else eye
    damping = DAMPING
    while True:
        damped = C + damping * C.diagonal().mean() * eye
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < ACCURATE:
            break
        damping *= 2
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    return SVD(U, S, Vh @ inverse)
