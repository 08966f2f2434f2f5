# SPDX-License-Identifier: Apache-2.0
"""LQ-LoRA and LoftQ: a quantised base together with a LoRA that starts at the quantisation error.

    W ~ Q + L1 L2        Q in few bits, frozen; L1 [out, k], L2 [k, in] become LoRA's B A with scale 1

Unlike an ordinary LoRA this one starts away from the identity: base and delta together are the model that was
quantised. Q is not the public checkpoint, so the delta is bound to the derived base; keep both (`save_derived`), or the
recipe where neither data nor training went into it.

Defaults (`lq_lora`): rank 64, formats of 2, 3, 4 and 8 bits in blocks of 16, 32 and 64 with 8-bit scales, at most 100
rounds; each matrix's format is chosen under `budget` bits a weight, which the low-rank part comes on top of. With `fisher`
(batches of one example) errors are weighted by the summed squared gradients. `loftq` has PEFT's definition: NF4 in blocks
of 64, or 8 bits a row, with fp32 scales, one round.
Use when: fewer than 4 bits a weight, where a LoRA from zero cannot make up for the rounding.
Avoid when: the tuned model must be served merged: a merged layer is dense.
Cost: about one (randomised) decomposition of rank k and one rounding for each round, matrix and format.

Guo et al. 2023, arXiv 2311.12023; LoftQ: Li et al. 2023, arXiv 2310.08659.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.derive import Made, derive_with, recipe, step
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option
from tunesmith.core.sample import Sample, gradients
from tunesmith.core.sites import Site
from tunesmith.derive.decompose import Decomposition, Weights, lq
from tunesmith.derive.decompose import loftq as loftq_of
from tunesmith.derive.nf import Format
from tunesmith.derive.quantise import W_of, assigned, formats, packed, several, usage
from tunesmith.derive.targets import chosen, lora_at

Factors = dict[str, tuple[Tensor, Tensor]]
Table = dict[str, dict[Format, float]]


@recipe("lq-lora", paper="2311.12023")
class LQ:
    """Split linear layers into a part in few bits and a low-rank part; the base holds the first."""

    rank: int = option(64, "rank k of the low-rank part", low=1, high=65536)
    bits: tuple[int, ...] = option((2, 3, 4, 8), "bits b of a weight: 2, 3, 4 or 8")
    block: tuple[int, ...] = option((16, 32, 64), "weights B0 of a block")
    scale_bits: tuple[int, ...] = option((8,), "bits b0 of a block's scale; the paper also tries 2, 3 and 4")
    scale_block: tuple[int, ...] = option((256,), "scales B1 of a block of scales; the paper also tries 16 and 64")
    scale_format: tuple[str, ...] = option(("fp32",), "format b1 of what scales the scales: fp32, fp16 or bf16")
    code: str = option("nf", "code values", choices=("nf", "int"))
    budget: float = option(
        2.75, "bits a weight on average, without the low-rank part; 0 for no limit", low=0.0, high=32.0
    )
    rounds: int = option(100, "most rounds for each matrix", low=1, high=10000)
    trial_rounds: int = option(3, "most rounds when formats are compared", low=1, high=10000)
    exact: bool = option(False, "full decompositions instead of randomised ones")
    fisher: bool = option(False, "in tune: weight errors by squared gradients on the training data, row by row")
    targets: str = option("all-linear", "which linear layers")

    def observes(self) -> bool:
        """Whether data goes into it."""
        return self.fisher

    def trains(self, base: Base, extra: Any) -> list[Any]:
        """The LoRA that starts at (L1, L2)."""
        return [lora_at(_ranks(extra))]

    def begin(self, delta: Delta, extra: Any) -> None:
        """Put (L1, L2) into it."""
        put(delta, extra)

    def make(self, base: Base, sample: Sample | None) -> Made:
        """Packed layers by path; `extra` holds (L1, L2) of each. With a sample, errors are weighted by `fisher_weights`."""
        sites = chosen(base, self.targets)
        return self.split(sites, None if sample is None else fisher_weights(base, sites, sample))

    def split(self, sites: Sequence[Site], F: Mapping[str, Tensor] | None, table: Table | None = None) -> Made:
        """The same from weights of the entries by path, and from errors that were measured before."""
        choices = formats(self)
        known = table if table is not None else {}
        alone = len(choices) == 1

        def error(s: Site, f: Format) -> float:
            at = known.setdefault(s.path, {})
            if f not in at:
                at[f] = self.trial(s, f, F)
            return at[f] ** 2

        form_of = assigned(sites, choices, self.budget, (lambda s, f: 0.0) if alone else error)
        modules: dict[str, nn.Module] = {}
        factors: Factors = {}
        before = after = 0.0
        for s in sites:
            found = self._split(s, form_of[s.path], F, self.rounds)
            before, after = before + found.errors[0] ** 2, after + found.error**2
            modules[s.path] = packed(s, found.residual, form_of[s.path])
            factors[s.path] = (found.L1, found.L2)
        facts = {**usage(sites, form_of), "error_after_one_round": math.sqrt(before), "error": math.sqrt(after)}
        return Made(modules, facts, factors, "data went into it" if F is not None else None)

    def trial(self, s: Site, f: Format, F: Mapping[str, Tensor] | None = None) -> float:
        """The error of one layer in one format after `trial_rounds`: an entry of a `Table`."""
        return self._split(s, f, F, self.trial_rounds).error

    def _split(self, s: Site, f: Format, F: Mapping[str, Tensor] | None, rounds: int) -> Decomposition:
        weights = None if F is None else Weights.of(F[s.path])
        return lq(W_of(s), f, min(self.rank, *s.shape), weights=weights, rounds=rounds, exact=self.exact)


@recipe("loftq", paper="2310.08659")
class LoftQ:
    """LoftQ as PEFT defines it: quantise, fit the rest by a low-rank part, in turns."""

    rank: int = option(16, "rank of the low-rank part", low=1, high=65536)
    bits: int = option(4, "4: NF4 in blocks of 64; 8: evenly spaced, one block a row; 2, 3: as 4", choices=(2, 3, 4, 8))
    block: int = option(64, "weights of a block below 8 bits", low=1, high=1 << 31)
    scale_bits: int = option(
        0, "bits of a block's scale below 8 bits; PEFT does not quantise scales", choices=(0, 2, 3, 4, 8)
    )
    scale_format: str = option("fp32", "format of scales, or of what scales them", choices=("fp32", "fp16", "bf16"))
    rounds: int = option(1, "rounds (PEFT's loftq_iter)", low=1, high=10000)
    exact: bool = option(True, "full decompositions, as PEFT; false is quicker")
    targets: str = option("all-linear", "which linear layers")

    def trains(self, base: Base, extra: Any) -> list[Any]:
        """The LoRA that starts at (L1, L2)."""
        return [lora_at(_ranks(extra))]

    def begin(self, delta: Delta, extra: Any) -> None:
        """Put (L1, L2) into it."""
        put(delta, extra)

    def make(self, base: Base, sample: Sample | None) -> Made:
        """Packed layers by path; `extra` holds (L1, L2) of each."""
        layout = Format(self.bits, self.block, self.scale_bits, 256, self.scale_format)
        if self.bits == 8:
            layout = Format(8, 0, 0, 256, "fp32", "int")
        sites = chosen(base, self.targets)
        modules: dict[str, nn.Module] = {}
        factors: Factors = {}
        after = 0.0
        for s in sites:
            found = loftq_of(W_of(s), layout, min(self.rank, *s.shape), rounds=self.rounds, exact=self.exact)
            modules[s.path] = packed(s, found.residual, layout)
            factors[s.path], after = (found.L1, found.L2), after + found.error**2
        return Made(modules, {**usage(sites, {s.path: layout for s in sites}), "error": math.sqrt(after)}, factors)


def fisher_weights(base: Base, sites: Sequence[Site], sample: Sample) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information: summed squared gradients [out, in] fp32 of each site's weight.

    Give batches of one example: of a larger batch the gradient of the sum is squared. Sites that no example reached get
    zeros. Raises UsageError for a sample without batches.
    """
    out = {s.path: torch.zeros(s.shape, device=base.device) for s in sites}
    seen = 0
    for found in gradients(base, list(sites), sample):
        seen += 1
        for path, g in found.items():
            out[path] += g.square()
    if not seen:
        raise UsageError("the sample gives no batch to take gradients of", where="fisher_weights")
    return out


def lq_lora(
    base: Base,
    rank: int = 64,
    budget: float = 2.75,
    fisher: Sample | Mapping[str, Tensor] | None = None,
    *,
    alpha: float | None = None,
    name: str = "lq-lora",
    table: Table | None = None,
    **options: Any,
) -> tuple[Base, Delta]:
    """A quantised base and the LoRA that starts at what quantisation took away.

    Args:
        budget: bits a weight of the quantised part, on average.
        fisher: data (batches of one example), or the weights of the entries by path as `fisher_weights` gives them.
        alpha: LoRA's alpha; the factors are divided so that base and delta are the same model for any (default: scale 1).
        table: errors by path and format, filled in and read: for several budgets on one base, rank and `fisher`.
        options: other fields of `LQ`.
    Raises UsageError for a budget that the formats cannot meet.
    """
    how = LQ(**several(rank=rank, budget=budget, **options))
    sites = chosen(base, how.targets)
    F = fisher_weights(base, sites, fisher) if isinstance(fisher, Sample) else fisher
    made = how.split(sites, F, table)
    derived = step(base, made, "lq-lora", asdict(how), "2311.12023")
    return derived, started_at(derived, made.extra, alpha, name)


def loftq(
    base: Base, rank: int = 16, *, alpha: float | None = None, name: str = "loftq", **options: Any
) -> tuple[Base, Delta]:
    """A quantised base and its LoRA by LoftQ; options are the fields of `LoftQ`."""
    derived, factors = derive_with(base, LoftQ(rank=rank, **options))
    return derived, started_at(derived, factors, alpha, name)


def started_at(base: Base, factors: Factors, alpha: float | None = None, name: str = "delta") -> Delta:
    """A LoRA on `base` with s B A = L1 L2 at each path, whatever alpha makes s."""
    delta = Delta.create(base, lora_at(_ranks(factors), alpha), name=name)
    put(delta, factors, alpha)
    return delta


@torch.no_grad()
def put(delta: Delta, factors: Factors, alpha: float | None = None) -> None:
    """Set the first part's s B A to L1 L2 at each path; s is 1 without an alpha."""
    for p, (L1, L2) in factors.items():
        root = 1.0 if alpha is None else math.sqrt(alpha / L2.shape[0])
        delta.parts[0].parameter(p, "A").copy_(L2 / root)
        delta.parts[0].parameter(p, "B").copy_(L1 / root)


def _ranks(factors: Factors) -> dict[str, int]:
    return {p: int(L2.shape[0]) for p, (_, L2) in factors.items()}
