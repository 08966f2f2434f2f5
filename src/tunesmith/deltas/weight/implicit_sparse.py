# SPDX-License-Identifier: Apache-2.0
"""Implicit sparse holds the smallest weights of a model by value alone: their places are found on the base again.

    M = (|theta0| < t),  p = theta'[M]      theta' = theta0 with its entries M replaced by p

A delta holds p and a sha256 of the places, `mask`, and no index: M is a function of the base and of t (or of `share`, the
smallest entries of each tensor), which is how SaRA exports its result. It is what a trained `sara` is saved as. By itself
p starts at theta0[M], so a fresh delta is the identity bit for bit, and trains as SaRA's one phase without penalty does.
Merges exactly.

A base in another number format has other small entries. Places are looked for in the weights as they are and as they would
be in bf16 and fp16, so a delta made on a rounded base works on the exact one; the other way round it is refused, never
applied to wrong places.

Defaults: t 2e-3 for all tensors, weights and biases of every layer, as `sara`.
Use when: many sparse changes of one base are kept: 4 bytes an entry instead of 16. Avoid when: one file must serve the base in
exact and rounded form (train `sara` with `implicit=false`), or its base is packed: M is then looked for in the packed values.
Cost: one look through a weight to find its places, which are kept while its module lives.

Hu et al. 2024, arXiv 2409.06633 (the export of the released code).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from tunesmith.core.algebra import Update
from tunesmith.core.delta import tensor_bytes
from tunesmith.core.errors import BaseMismatch
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight import sparse

KINDS = ("linear", "conv1d", "conv2d", "embedding", "norm")
STORES = {"weight": "", "bias": sparse.BIAS}
ROUNDED = (torch.bfloat16, torch.float16)


@register("implicit-sparse", carrier="weight", paper="2409.06633", kinds=KINDS)
class ImplicitSparse:
    """Replace the smallest weights, found on the base again instead of stored."""

    threshold: float = option(2e-3, "t: entries below it in size", low=0.0, high=1e6)
    share: float = option(0.0, "share of each tensor, its smallest entries, instead of t", low=0.0, high=1.0)
    bias: bool = option(True, "small biases and shifts of norms too")
    targets: str = option("everything", "which layers to change")

    def among(self, sites: list[Site]) -> list[Site]:
        """The targets that have entries in M."""
        return [s for s in sites if any(len(self.smallest(p)) for p in self.flat(s).values())]

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """`values` [k] = theta0[M] fp32 and `mask` int64 [4], the digest of the places; `bias_...` as well."""
        out = {}
        for name, p in self.flat(site).items():
            places = self.smallest(p)
            if len(places):
                out.update({STORES[name] + "values": p[places].clone(), STORES[name] + "mask": digest(places)})
        return out

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters with p in their places."""
        return sparse.changed(site, self.placed(site, t), params)

    def differences(self, site: Site, t: dict[str, Tensor]) -> dict[str, Update]:
        """p - theta0[M], by parameter."""
        return sparse.differences(site, self.placed(site, t))

    def forward(self, site: Site, t: dict[str, Tensor], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """The site's output plus that of p - theta0[M]."""
        return sparse.beside(site, self.placed(site, t), x, call)

    def live_kinds(self) -> tuple[str, ...]:
        return ("linear", "conv1d", "conv2d", "embedding")

    def touches(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.bias else ("weight",)

    def recipe(self) -> dict[str, float]:
        """As `sara` at its default t."""
        return {"lr": 5e-4}

    def placed(self, site: Site, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The store with `indices` and `origin` found on the base. Raises BaseMismatch where they are not the same."""
        out = dict(t)
        for name, prefix in STORES.items():
            if prefix + "values" in t:
                places, start = self._found(site, name, t[prefix + "mask"])
                out.update({prefix + "indices": places, prefix + "origin": start})
        return out

    def flat(self, site: Site) -> dict[str, Tensor]:
        """Weight and bias of the base, flat and in fp32."""
        own = site.params()
        return {n: own[n].detach().reshape(-1).float() for n in self.touches() if own.get(n) is not None}

    def smallest(self, p: Tensor) -> Tensor:
        """The places M of a flat tensor [n], int64, rising; with `share` ties go to the lower index."""
        if not self.share:
            return torch.nonzero(p.abs() < self.threshold).squeeze(1)
        k = round(self.share * len(p))
        return sparse.top(-p.abs(), k) if k else torch.empty(0, dtype=torch.int64, device=p.device)

    def _found(self, site: Site, name: str, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Places [k] and the base's entries there, fp32; kept while the module lives and its tensor is the same one."""
        own = site.module._parameters.get(name)
        key = (name, self.threshold, self.share, tuple(mask.tolist()))
        with _LOCK:
            kept = _KEPT.setdefault(site.module, {}).get(key)
        if kept is not None and own is not None and kept[0]() is own and kept[1] == own._version:
            return kept[2], kept[3]
        p = self.flat(site)[name]
        for q in (p, *(p.to(dtype).float() for dtype in ROUNDED)):
            places = self.smallest(q)
            if torch.equal(digest(places), mask.cpu()):
                break
        else:
            hint = "load the base in the number format it was trained in; 'sara:implicit=false' stores the places"
            raise BaseMismatch(
                "its small entries are not those the delta was made on", where=f"{site.path}.{name}", hint=hint
            )
        found = places, p[places].clone()
        if own is not None:
            with _LOCK:
                _KEPT[site.module][key] = (ref(own), own._version, *found)
        return found

    @classmethod
    def toy(cls) -> ImplicitSparse:
        return cls(share=0.3)


_KEPT: WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, int, Tensor, Tensor]]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def digest(places: Tensor) -> Tensor:
    """sha256 of the places as int64 [4]."""
    return torch.frombuffer(bytearray(hashlib.sha256(tensor_bytes(places)).digest()), dtype=torch.int64)
