# SPDX-License-Identifier: Apache-2.0
"""SPDF's sparse base: a fixed random mask over each weight, trained under, then dropped for dense fine-tuning.

    W = M * theta      M [out, in] with exactly round((1 - s) out in) ones, drawn from a seed and the layer's path

A mask is a number: `RandomMask(share, seed)` draws it again wherever it is needed. The base holds plain dense layers with
zeros, so every delta attaches as to any other; `keeping` keeps the zeros exact while the base's own weights train, and
`densify` drops the mask, which changes no number.

Defaults: s 0.75 on the query, key, value, output, up, gate and down layers; embeddings, head, norms and biases stay dense.
Use when: a model is trained from the start and each step should cost less (where sparse products are quick; here they
are counted by `flops`, not gained).
Avoid when: the weights are trained already: zeroing three quarters of them at random destroys the model.
Cost: nothing to hold; the zeros are stored. A LoRA or full delta merged into the base fills them.

Thangarasa et al. 2023, arXiv 2303.10464.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core import apply
from tunesmith.core.base import Base
from tunesmith.core.carriers import folded
from tunesmith.core.delta import Delta, View, as_view, site_seed
from tunesmith.core.derive import Made, derive, recipe, records
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option
from tunesmith.core.sample import Sample
from tunesmith.derive.targets import chosen

TARGETS = "attention,mlp"


@dataclass(frozen=True)
class RandomMask:
    """Masks with a share of zeros, drawn from `seed` and the path of the layer."""

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(f"the share of zeros must lie in 0..1, below 1, got {self.share}", where="share")

    def of(self, path: str, shape: tuple[int, ...]) -> Tensor:
        """The mask of one weight, bool, True where the weight is kept."""
        n = int(torch.Size(shape).numel())
        generator = torch.Generator().manual_seed(site_seed(self.seed, path))
        out = torch.zeros(n, dtype=torch.bool)
        out[torch.randperm(n, generator=generator)[: round((1 - self.share) * n)]] = True
        return out.reshape(shape)


@recipe("sparsify", paper="2303.10464")
class Sparsify:
    """Set a random share of each weight to zero, by a mask that a seed gives."""

    share: float = option(0.75, "s: share of each weight that is set to zero", low=0.0, high=0.9999)
    seed: int = option(0, "which masks are drawn", low=0, high=2**63 - 1)
    targets: str = option(TARGETS, "which linear layers")
    rescale: bool = option(False, "multiply what is kept by 1 / sqrt(1 - s), to keep the spread of outputs")

    def make(self, base: Base, sample: Sample | None) -> Made:
        """The same layers with masked weights of their own."""
        mask = RandomMask(self.share, self.seed)
        modules: dict[str, nn.Module] = {}
        for s in chosen(base, self.targets):
            if s.held:
                raise UsageError("its weight is held in another form", where=s.path, hint="sparsify first")
            W = s.params()["weight"].detach()
            kept = torch.where(mask.of(s.path, s.shape).to(W.device), W, torch.zeros_like(W))
            if self.rescale:
                kept = kept / (1 - self.share) ** 0.5
            layer = apply.sharing_copy(s.module)
            held = kept.T.contiguous() if s.transposed else kept
            layer._parameters["weight"] = nn.Parameter(held, requires_grad=False)
            modules[s.path] = layer
        return Made(modules)


@recipe("densify", paper="2303.10464")
class Densify:
    """Drop the mask of a sparse base: no number changes, and its zeros may be trained from now on."""

    def make(self, base: Base, sample: Sample | None) -> Made:
        if mask_of(base) is None:
            raise UsageError("it has no mask to drop", where=base.name, hint="sparsify it first")
        return Made({})


def sparsify(base: Base, share: float = 0.75, **options: Any) -> Base:
    """`derive(base, Sparsify(share=...))`."""
    return derive(base, Sparsify(share=share, **options))


def densify(base: Base) -> Base:
    """`derive(base, Densify())`: a base with the same tensors and no mask. Its fingerprint is that of the sparse one."""
    return derive(base, Densify())


def mask_of(base: Base) -> RandomMask | None:
    """The mask that the base's weights are under, from its records; None where there is none or it was dropped."""
    for step in reversed(records(base)):
        if step["recipe"] == "densify":
            return None
        if step["recipe"] == "sparsify":
            return RandomMask(step["options"]["share"], step["options"]["seed"])
    return None


def masks(base: Base) -> dict[str, Tensor]:
    """The masks of a sparse base by path, bool [out, in]; empty for any other."""
    mask = mask_of(base)
    if mask is None:
        return {}
    step = next(s for s in reversed(records(base)) if s["recipe"] == "sparsify")
    return {p: mask.of(p, base.sites.of(p, "linear").shape) for p in step["paths"]}


@contextmanager
def keeping(base: Base) -> Iterator[None]:
    """Within the block, gradients of the base's own masked weights are zero where the mask is.

    An entry that starts at zero then stays at exactly zero under any optimiser whose step is made of the gradient and the
    weight: momentum, decay and clipping included. A base without a mask is left as it is.
    """
    handles = []
    for path, mask in masks(base).items():
        site = base.sites.of(path, "linear")
        weight: Any = site.module._parameters["weight"]
        m = (mask.T if site.transposed else mask).to(weight.device)
        if weight.requires_grad:
            handles.append(weight.register_hook(lambda g, m=m: torch.where(m, g, torch.zeros_like(g))))
    try:
        yield
    finally:
        for h in handles:
            h.remove()


@dataclass(frozen=True)
class Energy:
    """Squared Frobenius norms of a change: on the kept entries, and on the entries that were zero."""

    on: float
    off: float

    @property
    def revived(self) -> float:
        """The share of the change that lies on entries that were zero; 0 for no change."""
        return self.off / (self.on + self.off) if self.on + self.off else 0.0


@torch.no_grad()
def split(base: Base, delta: Delta | View, of: Mapping[str, Tensor] | None = None) -> dict[str, Energy]:
    """The change that a delta makes of each masked weight, split into what lies on the mask and off it.

    `base` is what the delta is for, sparse or densified; `of` gives the masks by path where `base` has none any more.
    Layers the delta leaves alone are left out.
    """
    found = dict(of) if of is not None else masks(base)
    if not found:
        raise UsageError("there is no mask to split by", where=base.name, hint="split(base, delta, of=masks(sparse))")
    out: dict[str, Energy] = {}
    for path, actions in apply.Application(base, (as_view(delta),)).plan.items():
        weights = [a for a in actions if a.carrier == "weight"]
        if path in found and weights:
            old = weights[0].site.params()
            change = (folded(weights, old)["weight"].float() - old["weight"].float()).square()
            m = found[path].to(change.device)
            out[path] = Energy(float(change[m].sum()), float(change[~m].sum()))
    return out


@dataclass(frozen=True)
class Flops:
    """Multiplications and additions of one forward pass for each token, by where they are made."""

    masked: float
    dense: float
    scores: float

    @property
    def total(self) -> float:
        return self.masked + self.dense + self.scores


def flops(base: Base, length: int, share: float | None = None) -> Flops:
    """Forward FLOPs a token of a language model on `length` tokens, masked products counted at their kept share.

    A linear layer costs 2 in out, times 1 - s where it is masked; attention costs 2 length heads (key + value width),
    without a discount for causal masks (as the paper counts). Layers that do not reach the output cost nothing. Training
    costs three times as much. `share` counts the default targets of `Sparsify` at that s, whatever the base holds.
    """
    mask = mask_of(base)
    s = (0.0 if mask is None else mask.share) if share is None else share
    under = set(masks(base)) if share is None else {x.path for x in chosen(base, TARGETS)}
    aside = base.sites.trace.aside if base.sites.trace is not None else frozenset()
    masked = dense = scores = 0.0
    for site in base.sites.all():
        if site.kind == "linear" and not site.inside and site.path not in aside:
            cost = 2.0 * site.shape[0] * site.shape[1]
            if site.path in under:
                masked += (1 - s) * cost
            else:
                dense += cost
        elif site.kind == "attention" and site.heads is not None:
            heads, _, keys, widths = site.heads
            scores += 2.0 * length * heads * (keys + widths)
    return Flops(masked, dense, scores)
