# SPDX-License-Identifier: Apache-2.0
"""PELA's factorised base: each linear layer becomes two thin ones, from its truncated singular value decomposition.

    W [out, in] = U S V^T ~ R L,  L = sqrt(S_k) V_k^T [k, in],  R = U_k sqrt(S_k) [out, k],  k = floor(in out / (c (in + out)))

Parameters of a layer: k (in + out) + out with the bias, which is kept; c is the ratio by which the matrix shrinks.

Defaults: c 2 on every linear layer but the output head; convolutions, embeddings and norms are no linear layers. A layer
with fewer than 10 outputs is left alone, and so is one that would not shrink (k (in + out) >= in out, as for c near 1).
`ratio_pattern` gives single layers their own c: at c 2 a square layer keeps a quarter of its rank, and attention
suffers most.
Use when: the model itself must be smaller and faster, and there is data to repair it with (`repair`).
Avoid when: weights are close to full rank and cannot be trained again.
Cost: one decomposition of each layer; two thin products in place of one.

A delta sees a factored layer as one linear layer; its two halves are sites `first` and `second` of their own, so that
`ts.Full(targets="first,second")` trains the factors as PELA's fine-tuning does, and `dense_delta` carries such a delta
back to the base the factors came from.

Guo et al. 2023, arXiv 2310.10700.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.derive import Made, derive, recipe, records, require_parent
from tunesmith.core.derived_store import form
from tunesmith.core.errors import UsageError
from tunesmith.core.held import dense_layer
from tunesmith.core.method import option
from tunesmith.core.patterns import pick, require_used
from tunesmith.core.sample import Sample
from tunesmith.core.sites import Site
from tunesmith.core.spectrum import flat, randomised
from tunesmith.derive.targets import chosen, lora_at

SMALLEST = 10  # layers with fewer outputs are not factorised (the released code)


@form("factored")
class FactoredLinear(nn.Module):
    """x -> R (L x) + bias: `first` holds L [k, in], `second` R [out, k]."""

    def __init__(self, L: Tensor, R: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = int(L.shape[1]), int(R.shape[0]), int(L.shape[0])
        self.first, self.second = dense_layer(L, None), dense_layer(R, None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads it."""
        return self.dense_weight()

    def dense_weight(self) -> Tensor:
        """R L [out, in], in the dtype of the factors."""
        return self.second.weight @ self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    def describe(self) -> dict[str, Any]:
        dtype = str(self.first.weight.dtype).removeprefix("torch.")
        sizes = {"in": self.in_features, "out": self.out_features, "rank": self.rank}
        return {**sizes, "bias": self.bias is not None, "dtype": dtype}

    @classmethod
    def blank(cls, entry: Mapping[str, Any]) -> FactoredLinear:
        dtype, k = getattr(torch, entry["dtype"]), int(entry["rank"])
        L, R = torch.zeros(k, int(entry["in"]), dtype=dtype), torch.zeros(int(entry["out"]), k, dtype=dtype)
        return cls(L, R, torch.zeros(int(entry["out"]), dtype=dtype) if entry["bias"] else None)


@recipe("factorise", paper="2310.10700")
class Factorise:
    """Replace linear layers by two thin ones from their truncated SVD."""

    ratio: float = option(2.0, "c: how many times fewer numbers a matrix keeps", low=0.01, high=1e6)
    targets: str = option("all-linear", "which linear layers")
    ratio_pattern: dict[str, float] = option({}, "glob or last path part -> ratio of those layers")
    smallest: int = option(SMALLEST, "layers with fewer outputs are left alone", low=1, high=1 << 31)
    exact: bool = option(True, "a full decomposition; false finds the leading part only, which is quicker")

    def make(self, base: Base, sample: Sample | None) -> Made:
        """Factored layers by path; `facts` says which targets were left alone and why."""
        sites = chosen(base, self.targets)
        require_used("factorise.ratio_pattern", self.ratio_pattern, sites)
        modules: dict[str, nn.Module] = {}
        skipped: dict[str, str] = {}
        for s in sites:
            why, k = self._rank(s, float(pick(self.ratio_pattern, s.path, self.ratio)))
            if why:
                skipped[s.path] = why
            else:
                modules[s.path] = factored(s, k, exact=self.exact)
        if not modules:
            raise UsageError("no target would shrink", where="factorise", hint="a larger ratio")
        return Made(modules, {"skipped": skipped})

    def _rank(self, s: Site, ratio: float) -> tuple[str, int]:
        out, inside = s.shape
        k = rank_at(inside, out, ratio)
        if out < self.smallest:
            return f"{out} outputs, fewer than {self.smallest}", k
        if k < 1:
            return "no rank is left at this ratio", k
        if k * (inside + out) >= inside * out:
            return f"rank {k} would not make it smaller", k
        return "", k


def rank_at(inside: int, out: int, ratio: float) -> int:
    """k = floor(in out / (c (in + out))), at most min(in, out)."""
    return min(math.floor(inside * out / (ratio * (inside + out))), inside, out)


@torch.no_grad()
def factored(site: Site, rank: int, *, exact: bool = True) -> FactoredLinear:
    """The layer at `site` as two thin ones of `rank`, in its dtype."""
    params = site.params()
    W = flat(site)
    if exact or rank >= min(W.shape):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    else:
        found = randomised(W, rank)
        U, S, Vh = found.U, found.S, found.Vh
    root, dtype = S.sqrt(), params["weight"].dtype
    L, R = (root[:, None] * Vh).to(dtype).contiguous(), (U * root).to(dtype).contiguous()
    return FactoredLinear(L, R, None if "bias" not in params else params["bias"].clone())


def factorise(base: Base, ratio: float = 2.0, **options: Any) -> Base:
    """`derive(base, Factorise(ratio=...))`."""
    return derive(base, Factorise(ratio=ratio, **options))


@torch.no_grad()
def dense_delta(delta: Delta, base: Base, parent: Base) -> Delta:
    """A delta of factors carried back: a LoRA of rank 2k on `parent` with dW = R' L' - R L at each factored layer.

    `delta` acts on `first` and `second` of factored layers of `base`, through weights alone, and `parent` is the base that
    was factorised. The change is exact; on `parent` it acts on W where it was trained on R L ~ W.
    Raises UsageError for a delta that changes anything else, BaseMismatch for another parent.
    """
    steps = records(base)
    step = next((s for s in reversed(steps) if s["recipe"] == "factorise"), None)
    if step is None:
        raise UsageError("it was not factorised", where=base.name)
    require_parent(parent, step)
    paths = {p for part in delta.parts for p in part.paths}
    odd = sorted(p for p in paths if not isinstance(base.modules.get(p.rpartition(".")[0]), FactoredLinear))
    if odd:
        hint = 'such as ts.Full(targets="first,second")'
        raise UsageError("only a delta on the factors of factored layers can be carried back", where=odd[0], hint=hint)
    moved = base.merged(delta)
    layers = sorted({p.rpartition(".")[0] for p in paths})
    first: Any = {p: base.modules[p] for p in layers}
    then: Any = {p: moved.modules[p] for p in layers}
    out = Delta.create(parent, lora_at({p: 2 * first[p].rank for p in layers}), name=f"{delta.name}-dense")
    for p in layers:
        a, b = first[p], then[p]
        out.parts[0].parameter(p, "A").copy_(torch.cat([b.first.weight, a.first.weight]))
        out.parts[0].parameter(p, "B").copy_(torch.cat([b.second.weight, -a.second.weight], 1))
    out.provenance["untrained"] = False
    return out
