# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of several models added up at every token: a behaviour tuned into a small one steers a large one.

    s = log p_N + sum over i of w_i (log p_ft_i - log p_ref_i),      p = softmax(s)

Emulated fine-tuning: N is large, ft and ref are small, tuned and untuned; w = 1 needs no choice. With ref = N it is
interpolation (w < 1), extrapolation (w > 1) or reversal (w < 0) of a tuning in log space; several terms trade behaviours
off when writing. Contrastive decoding is N less w of a weaker model, over tokens that N finds plausible.

`top_p` changes nothing but the fewest tokens that hold this much of p_N: inside that set the mass of p_N is shared out by
softmax(s), outside p_N stays as it is. `plausible` drops tokens below this share of p_N's largest. The published text
does not say which distribution defines the set (from memory: the unadjusted one).

Mitchell et al. 2023, arXiv 2310.12962; contrastive decoding: Li et al. 2022, arXiv 2210.15097; proxy tuning: Liu et al.
2024, arXiv 2401.08565. Per-token normalisation is the paper's approximation of the sequence-level optimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.decoding import Member, decoder, vocabulary
from tunesmith.core.errors import UsageError


@dataclass(frozen=True)
class Combination:
    """Models with their coefficients; the first is N, the one that `top_p` and `plausible` ask. Made by `combine`."""

    members: tuple[Member, ...]
    coefficients: tuple[float, ...]
    size: int
    top_p: float = 1.0
    plausible: float = 0.0

    @property
    def caches(self) -> tuple[int, ...]:
        return tuple(range(len(self.members)))

    def needs(self, step: int) -> tuple[int, ...]:
        """Those that count; N too where it bounds what may change."""
        bounded = self.top_p < 1 or self.plausible > 0
        return tuple(i for i, c in enumerate(self.coefficients) if c or (not i and bounded))

    def step(self, logits: Mapping[int, Tensor], step: int, rows: int) -> Tensor:
        """log p [rows, V] of logits [rows, at least V] of the members needed."""
        logp = {i: torch.log_softmax(z[:, : self.size].float(), -1) for i, z in logits.items()}
        s = sum((c * logp[i] for i, c in enumerate(self.coefficients) if c), torch.zeros(rows, self.size))
        return combined(s, logp.get(0), self.top_p, self.plausible)


@decoder("combine")
def combine(
    base: Any,
    deltas: Sequence[tuple[Any, ...]] = (),
    *,
    top_p: float = 1.0,
    plausible: float = 0.0,
) -> Combination:
    """N with the differences of other models.

    Args:
        base: N: a base, or (base, delta).
        deltas: `(w, ft)` or `(w, ft, ref)`. Each model is a base, a delta of N's base or (base, delta); ref is N's base
            by default, and None leaves it out: `(-1, weak, None)` is contrastive decoding.
        top_p, plausible: see the module.
    Models that occur twice are read once, and those that cancel not at all. Raises UsageError for vocabularies that
    differ or numbers out of range.
    """
    first = Member.of(base)
    total: dict[tuple[Any, ...], float] = {first.key: 1.0}
    members = {first.key: first}

    def add(what: Any, weight: float) -> None:
        m = Member.of(what, first.base)
        members.setdefault(m.key, m)
        total[m.key] = total.get(m.key, 0.0) + weight

    for term in deltas:
        if len(term) not in (2, 3):
            raise UsageError(
                f"a term is (weight, tuned) or (weight, tuned, reference), got {len(term)}", where="deltas"
            )
        w, ft, ref = term if len(term) == 3 else (*term, first.base)
        if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w):
            raise UsageError(f"a weight must be a finite number, got {w!r}", where="deltas")
        add(ft, w)
        if ref is not None:
            add(ref, -w)
    if not 0 < top_p <= 1 or not 0 <= plausible <= 1:
        raise UsageError(f"top_p={top_p} and plausible={plausible} must lie in 0 .. 1", where="combine")
    kept = [k for k in members if total[k] or k == first.key]
    chosen = tuple(members[k] for k in kept)
    return Combination(chosen, tuple(total[k] for k in kept), vocabulary(chosen), top_p, plausible)


@decoder("contrastive")
def contrastive(expert: Any, amateur: Any, *, weight: float = 1.0, plausible: float = 0.1) -> Combination:
    """What the expert finds likely and the amateur does not: log p_expert - w log p_amateur over plausible tokens."""
    return combine(expert, [(-weight, amateur, None)], plausible=plausible)


def combined(s: Tensor, logp: Tensor | None, top_p: float = 1.0, plausible: float = 0.0) -> Tensor:
    """Normalised log-probabilities of scores s [..., V]; `logp` are N's, where the adjustment is bounded by them."""
    if logp is not None and plausible > 0:
        s = s.masked_fill(logp < logp.max(-1, keepdim=True).values + math.log(plausible), -math.inf)
    if logp is None or top_p >= 1:
        return torch.log_softmax(s, -1)
    falling, at = logp.sort(-1, descending=True)
    before = falling.exp().cumsum(-1) - falling.exp()  # held by what is more likely
    inside = torch.zeros_like(s, dtype=torch.bool).scatter(-1, at, before < top_p)
    inner = torch.log_softmax(s.masked_fill(~inside, -math.inf), -1)
    mass = logp.masked_fill(~inside, -math.inf).logsumexp(-1, keepdim=True)
    outer = logp if plausible <= 0 else logp.masked_fill(torch.isneginf(s), -math.inf)
    return torch.log_softmax(torch.where(inside, inner + mass, outer), -1)
