# SPDX-License-Identifier: Apache-2.0
"""LT-SFT trains the entries that move most when everything is trained, and leaves all others as they are.

    W' = W + phi, b' = b + phi_b     phi sparse; its K places are the largest |theta1 - theta0| over all weights and biases
    loss + l1 * sum |phi| / N        in both phases; N entries in all

theta1 comes from a dense trial, which is thrown away: its places are kept, every value starts again at zero, and the
values at those places train with a fresh optimiser. Norms are frozen; entries outside the K places do not exist, so no
decay or momentum can move them. Ties go to the earlier layer and the lower index. Heads of the run train in the trial too
and start anew. With `iterations` n each of n trials, begun where the last sparse phase ended, adds K / n places. Merges
exactly. `bake` drops entries of 1e-7 or less.

Compose by stacking: `base.using(language, task)` is W + phi_language + phi_task in either order. Train the task delta with
the source language's delta in use; for another language put its delta there and pass `check=False`. `headless` leaves out
the head of a language delta. For language deltas train with `tied="untie"`, so that the output embedding stays.

Defaults: 1 % of the entries of every linear, convolution and embedding but the output head, a trial of 0.3 of the run (3
and 10 epochs in the released NER recipe; the language recipe has 1.0), one iteration, no L1 (languages: 0.1).
`select="random"` skips the trial: the control.
Use when: deltas for tasks, languages or domains are to be added up. Avoid when: time is short (there are two runs) or the
dense trial does not fit in memory.
Cost: K values, each with its place; the trial needs the memory of full fine-tuning.

Ansell et al. 2022, arXiv 2110.07560.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tunesmith.core.algebra import Update
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, site_seed
from tunesmith.core.errors import UsageError
from tunesmith.core.method import MethodInfo, option, register
from tunesmith.core.sample import Sample
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.full import Full
from tunesmith.deltas.weight.sparse import BIAS, beside, change, changed, differences, entries, survivors
from tunesmith.deltas.weight.trial import best_free, budget, exactly, unlisted

KINDS = ("linear", "embedding", "conv1d", "conv2d")
STORES = {"weight": "", "bias": BIAS}
TINY = 1e-7
Found = dict[str, dict[str, Tensor]]
Place = tuple[str, str]  # path and parameter


class _Sparse:
    """Sparse differences of a weight and a bias; a site may have either."""

    l1: float

    def rewrite(self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters plus phi."""
        return changed(site, t, params)

    def differences(self, site: Site, t: dict[str, Tensor]) -> dict[str, Update]:
        """phi, by parameter."""
        return differences(site, t)

    def forward(self, site: Site, t: dict[str, Tensor], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """The site's output plus that of phi."""
        return beside(site, t, x, call)

    def penalty(self, site: Site, t: dict[str, Tensor]) -> Tensor:
        """The site's part of l1 * sum |phi| / N."""
        if not self.l1:
            return t["total"].new_zeros((), dtype=torch.float32)
        moved = torch.stack([t[f"{s}values"].abs().sum() for s in STORES.values() if f"{s}values" in t]).sum()
        return self.l1 * moved / t["total"]

    def touches(self) -> tuple[str, ...]:
        return ("weight", "bias")


@register("lt-sft", carrier="weight", paper="2110.07560", kinds=KINDS)
class LTSFT(_Sparse):
    """Train the entries that move most in a trial of full fine-tuning."""

    density: float = option(0.01, "share of all entries that train", low=0.0, high=1.0)
    entries: int = option(0, "number of entries that train; 0 goes by density", low=0, high=2**60)
    trial: float = option(0.3, "length of the dense trial as a share of the run", low=1e-6, high=100.0)
    iterations: int = option(1, "trials, each adding an equal part of the entries", low=1, high=100)
    l1: float = option(0.0, "weight of the mean absolute change in the loss", low=0.0, high=1e6)
    bias: bool = option(True, "entries of biases may be chosen too")
    select: str = option("lottery", "how entries are chosen", choices=("lottery", "random"))
    targets: str = option("all-weights", "which layers the entries are chosen from")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """The names of all tensors, `indices` int64 and `values` fp32 (of the bias too); `calibrate` has the values."""
        stores = STORES.values() if site.has_bias and self.bias else [""]
        none = entries(torch.empty(0))
        return {**{store + name: t for store in stores for name, t in none.items()}, "total": torch.tensor(0)}

    def calibrate(
        self, site: Site, t: dict[str, Tensor], params: dict[str, Tensor], seen: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What was found at the site: rising places [k], their values [k] (zero after one iteration), and N as `total`."""
        return dict(seen)

    def observe(self, base: Base, sites: list[Site], sample: Sample) -> Found:
        """The places by site, from `iterations` trials."""
        N = sum(p.numel() for s in sites for p in self._maskable(s).values())
        K, rounds = budget(self.entries, self.density, N, "lt-sft"), self.iterations
        found: Found = {}
        for i in range(rounds):
            scores = self._scores(base, sites, sample, found, N)
            taken = {
                (p, n): t[f"{s}indices"] for p, t in found.items() for n, s in STORES.items() if f"{s}indices" in t
            }
            found = _with(found, best_free(scores, K * (i + 1) // rounds - K * i // rounds, taken), N)
            if i + 1 < rounds:
                held = _Held(found, exactly(s for s in sites if s.path in found), self.l1)
                part = sample.trained(base, [held], 1.0).parts[0]
                found = {p: {name: t.detach().cpu() for name, t in part.tensors(p).items()} for p in found}
        return found

    def _scores(self, base: Base, sites: list[Site], sample: Sample, found: Found, N: int) -> dict[Place, Tensor]:
        """|theta1 - theta0| by path and parameter, or random numbers for the control."""
        places = [(s.path, name, p.shape) for s in sites for name, p in self._maskable(s).items()]
        if self.select == "random":
            draw = {s.path: torch.Generator().manual_seed(site_seed(sample.seed, s.path)) for s in sites}
            return {(path, name): torch.rand(shape, generator=draw[path]) for path, name, shape in places}
        start = {
            s.path: {n: change(s, found[s.path], p).dense() for n, p in STORES.items() if f"{p}values" in found[s.path]}
            for s in sites if s.path in found
        }  # fmt: skip
        method = _Trial(targets=exactly(sites), bias=self.bias, start=start, pull=self.l1 / N)
        part = sample.trained(base, [method], self.trial).parts[0]
        return {(path, name): part.parameter(path, name).detach().abs().cpu() for path, name, _ in places}

    def _maskable(self, site: Site) -> dict[str, Tensor]:
        return {n: p for n, p in site.params().items() if n == "weight" or (n == "bias" and self.bias)}

    def bake(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """The entries above 1e-7; one at least, so that the site stays."""
        out = {"total": t["total"]}
        for store in (s for s in STORES.values() if f"{s}values" in t):
            kept = t[f"{store}values"].abs() > TINY
            kept[0] |= not bool(kept.any())
            out.update({store + name: t[store + name][kept].detach() for name in ("indices", "values")})
        return out

    def baked(self) -> LTSFT:
        return self

    def recipe(self) -> dict[str, float]:
        """As released."""
        return {"lr": 5e-5}

    @classmethod
    def toy(cls) -> LTSFT:
        return cls(density=0.3, l1=0.1)


@dataclass(frozen=True)
class _Trial(Full):
    """Full fine-tuning from given differences, pulled to the base."""

    start: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    pull: float = 0.0

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """As `full`, or the differences it starts from."""
        return {**super().init(site, generator), **self.start.get(site.path, {})}

    def penalty(self, site: Site, t: dict[str, Tensor]) -> Tensor:
        """pull * sum |D|."""
        if not self.pull:
            return t["weight"].new_zeros(())
        return self.pull * torch.stack([d.abs().sum() for d in t.values()]).sum()

    def recipe(self) -> dict[str, float]:
        """As the run."""
        return LTSFT().recipe()


@dataclass(frozen=True)
class _Held(_Sparse):
    """The sparse phase between two iterations, on the places found so far."""

    info: ClassVar[MethodInfo] = unlisted("lt-sft-held", KINDS)
    found: Found
    targets: str
    l1: float

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Places and values as they were."""
        return dict(self.found[site.path])

    def recipe(self) -> dict[str, float]:
        """As the run."""
        return LTSFT().recipe()


def _with(found: Found, places: Mapping[Place, Tensor], N: int) -> Found:
    """Places and values by site; a place that was there keeps its value, a new one starts at zero."""
    out: Found = {}
    for (path, name), indices in places.items():
        at, values = f"{STORES[name]}indices", f"{STORES[name]}values"
        old = found.get(path, {})
        before = survivors(old.get(at, indices[:0]), indices)
        kept = old[values][before.clamp_min(0)] if values in old else torch.zeros(len(indices))
        here = {at: indices, values: torch.where(before < 0, torch.zeros(()), kept)}
        out[path] = {**out.get(path, {}), **here, "total": torch.tensor(N)}
    return out


def headless(delta: Delta) -> Delta:
    """The delta without its heads, sharing its tensors: what a language delta is for a task model.

    Raises UsageError for a delta of heads alone.
    """
    kept = [p for p in delta.parts if p.info.carrier != "output"]
    if not kept:
        raise UsageError(f"delta {delta.name!r} is nothing but a head", hint="give the delta of a language")
    return Delta(delta.name, kept, provenance=delta.provenance)
