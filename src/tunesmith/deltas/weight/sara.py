# SPDX-License-Identifier: Apache-2.0
"""SaRA trains the smallest weights of a model, which its base hardly uses.

    M = (|theta0| < t) for every weight and bias,  p = theta0[M],  theta' = theta0 with its entries M replaced by p

p trains and starts at theta0[M], so a fresh delta is the identity bit for bit; all entries outside M are frozen, and
gradients and optimiser state exist for p alone. Weight decay of the run pulls the entries themselves to 0, not to the
base (the paper has 0.01). At `progressive` of the run entries with |p| >= t are frozen as they are, and the others go
on with fresh moments. With `nuclear` lambda > 0 each step adds lambda ||W * M||_* for one random matrix of both sizes
above 64 and more than 100 entries in M; its gradient U V^T goes to p. Merges exactly. When training is over the delta is
kept as an `implicit-sparse` one: theta'[M], t and a digest of M, which is found on the base again. `implicit=false` stores
the places instead, which also serves a base that is loaded in a coarser number format than it was trained in.

Released code differs: it takes the absolute value of p at the start and at the switch, which loses the sign and the
identity, and in its memory-saving form the penalty does not reach p. Neither is copied.

Defaults: t 2e-3 for all tensors (that of Stable Diffusion 1.5), at half the run the second phase, no penalty (the example
has 5e-4). With `share` q each tensor has its own t: its q smallest entries train. Set one of the two for your model:
`share=0.05` suits any.
Use when: a generator must learn a style or concept and keep what it can do. Avoid when: the base's small weights matter.
Cost: count(|theta0| < t) values, in training as many starting values and int64 places too.

Hu et al. 2024, arXiv 2409.06633.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import Sparse, Update
from tunesmith.core.delta import site_seed
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight import sparse
from tunesmith.deltas.weight.implicit_sparse import KINDS, STORES, ImplicitSparse


@register("sara", carrier="weight", paper="2409.06633", kinds=KINDS)
class SaRA:
    """Train the smallest weights, which the base hardly uses."""

    threshold: float = option(2e-3, "t: entries below it in size train", low=0.0, high=1e6)
    share: float = option(
        0.0, "share of each tensor that trains, its smallest entries, instead of t", low=0.0, high=1.0
    )
    progressive: float = option(
        0.5, "share of the run after which grown entries are frozen; 1 never", low=0.0, high=1.0
    )
    nuclear: float = option(0.0, "lambda: weight of the nuclear norm of one matrix a step", low=0.0, high=1e6)
    smallest: int = option(64, "matrices with a side of this or less have no penalty", low=0, high=10**6)
    bias: bool = option(True, "small biases and shifts of norms train too")
    implicit: bool = option(True, "keep values and a digest of the mask when trained, not the places")
    targets: str = option("everything", "which layers to change")

    def among(self, sites: list[Site]) -> list[Site]:
        """The targets that have entries in M."""
        return self._kept().among(sites)

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """The places `indices` int64, `values` p and `origin` theta0[M] fp32, and the settled store; `bias_...` as well."""
        out, kept = {}, self._kept()
        for name, p in kept.flat(site).items():
            places = kept.smallest(p)
            if len(places):
                out.update(sparse.overwritten(p, places, STORES[name]))
        return out

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters with p in their places."""
        return sparse.changed(site, t, params)

    def differences(self, site: Site, t: dict[str, Tensor]) -> dict[str, Update]:
        """p - theta0[M], by parameter."""
        return sparse.differences(site, t)

    def forward(self, site: Site, t: dict[str, Tensor], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """The site's output plus that of p - theta0[M]."""
        return sparse.beside(site, t, x, call)

    def live_kinds(self) -> tuple[str, ...]:
        return ("linear", "conv1d", "conv2d", "embedding")

    def before_step(self, part: Any, now: Any) -> None:
        """Add the gradient of lambda ||W * M||_* of one random matrix to that of p."""
        kinds = {p: kind for p, kind in part.kind_of.items() if self.nuclear and kind in ("linear", "embedding")}
        shapes = {p: now.sites.of(p, kind).shape for p, kind in kinds.items()}
        fit = [p for p in shapes if min(shapes[p]) > self.smallest and _count(part, p) > 100]
        if fit:
            path = fit[site_seed(now.step, "nuclear") % len(fit)]
            t = part.tensors(path)
            G = nuclear_gradient(Sparse(t["indices"], t["values"].detach(), shapes[path]).dense())
            if t["values"].grad is not None:
                t["values"].grad += now.scale * self.nuclear * G.reshape(-1)[t["indices"]]

    def after_step(self, part: Any, now: Any) -> None:
        """Freeze the entries that have grown to t, once."""
        if self.progressive >= 1 or now.step != max(1, round(self.progressive * now.total)) or now.step >= now.total:
            return
        for path in part.kind_of:
            for prefix in STORES.values():
                t = part.tensors(path)
                if prefix + "values" in t:
                    p, start = t[prefix + "values"].abs(), t[prefix + "origin"].abs()
                    sparse.settle(part, now, path, p > start.max() if self.share else p >= self.threshold, prefix)
                    now.reset(path, prefix + "values")

    @torch.no_grad()
    def bake(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """theta'[M] and the digest of M."""
        if not self.implicit:
            return t
        kept = self._kept()
        out = kept.init(site, torch.Generator())
        for prefix in STORES.values():
            if prefix + "values" not in t:
                continue
            places, values = kept.placed(site, out)[prefix + "indices"], out[prefix + "values"]
            values[sparse.survivors(places, t[prefix + "indices"])] = t[prefix + "values"]
            values[sparse.survivors(places, t[prefix + "settled_indices"])] += t[prefix + "settled_values"]
        return out

    def baked(self) -> Any:
        """The method of a delta that is trained."""
        return self._kept() if self.implicit else self

    def touches(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.bias else ("weight",)

    def books(self) -> tuple[str, ...]:
        return (*sparse.BOOKS, *(sparse.BIAS + name for name in sparse.BOOKS))

    def recipe(self) -> dict[str, float]:
        """1e-3 exp(-350 t) as released; with `share`, what the default t gives."""
        return {"lr": 1e-3 * math.exp(-350 * (2e-3 if self.share else self.threshold))}

    def _kept(self) -> ImplicitSparse:
        return ImplicitSparse(threshold=self.threshold, share=self.share, bias=self.bias, targets=self.targets)

    @classmethod
    def toy(cls) -> SaRA:
        return cls(share=0.3, nuclear=1e-3, smallest=2)


def nuclear_gradient(W: Tensor) -> Tensor:
    """U V^T of W [m, n], the gradient of its nuclear norm; directions of singular value 0 are left out."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    used = S[0] * torch.finfo(S.dtype).eps * max(W.shape) < S
    return (U * used) @ Vh


def _count(part: Any, path: str) -> int:
    t = part.tensors(path)
    return len(t["values"]) if "values" in t else 0
