# SPDX-License-Identifier: Apache-2.0
"""Grafting: the few entries of a change that carry its skill, found by an optimised mask.

    theta(gamma) = theta_0 + gamma * Delta          gamma in {0, 1}, one for each entry of Delta
    gamma(S) = g + (1 - 2 g) * sigmoid(S - b)       g the mask the search starts from, S in [0, 1] at first, b = 10
    min_S L(theta(gamma(S)))                        dL/dS = (1 - 2 g) * dL/dtheta * Delta * sigmoid'(S - b)

S moves by plain gradient descent with a rate of 1e7, which makes up for sigmoid'(-10) = 4.5e-5: Adam would lose the scale
and flip everything. After each step gamma is rounded and scored, and the best mask is kept. `localize` gives it as a sparse
change with a report; the combiner `graft` is the start of the search by itself, the entries that moved most.

Panigrahi et al. 2023, arXiv 2302.06600. The gradient is of the mean loss over the batches given. Where rounding leaves more
entries than the budget, those with the largest gamma stay and the report says so (added here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.compose.working import dense_changes, dense_delta, gradients, write
from tunesmith.core.algebra import Dense, Sparse, Sum, Update
from tunesmith.core.combine import Changes, Now, Place, combiner
from tunesmith.core.delta import site_seed
from tunesmith.core.errors import UsageError
from tunesmith.core.registry import option

if TYPE_CHECKING:
    from tunesmith.core.base import Base

Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Graft:
    """A localised change.

    `changes` are the entries kept, sparse; `masks` the same as flat int64 places by key of the tensor; `entries` how many,
    `total` of how many; `by_tensor` and `by_depth` count them; `curve` has for every step the score, the entries after
    rounding and whether they exceeded the budget.
    """

    changes: list[tuple[Place, Update]] = field(repr=False)
    masks: Masks = field(repr=False)
    entries: int
    total: int
    score: float
    by_tensor: dict[str, int] = field(repr=False)
    by_depth: dict[int, int]
    curve: list[dict[str, Any]] = field(repr=False)

    @property
    def share(self) -> float:
        return self.entries / self.total


def localize(
    base: Base,
    changes: Changes,
    batches: Callable[[], Iterable[Any]],
    loss: Callable[[Base, Any], tuple[Tensor, int]],
    *,
    budget: float = 1e-4,
    start: float = 1e-7,
    steps: int = 20,
    lr: float = 1e7,
    bias: float = 10.0,
    seed: int = 0,
    score: Callable[[Base], float] | None = None,
    leave: Callable[[Place], bool] = lambda place: place.kind == "embedding",
    given: Mapping[str, Tensor] | None = None,
) -> Graft:
    """The entries of the first source's change that carry what it learnt.

    Args:
        batches: training batches, anew at each call; one step looks at all of them.
        loss: the summed loss of a batch and the number of rows or tokens it sums, from the base as it stands.
        budget: largest share of the entries to keep; at least one entry.
        start: share of the entries in the first mask, the int(share * total) that moved most.
        steps, lr, bias: of the search; 10 to 100 steps in the paper.
        score: higher is better, called with the rounded graft in use, on training and validation data; by default minus
            the loss on the batches.
        leave: places that take no part and stay as the base (embeddings; give the head's too where there is one).
        given: a first mask instead of `start`: flat places by key, as in `Graft.masks`.
    Raises UsageError for options out of range, or a change with nothing to search.
    """
    for name, value, good in (
        ("budget", budget, 0 < budget <= 1), ("start", start, 0 <= start <= 1), ("steps", steps, steps >= 1),
        ("lr", lr, lr > 0),
    ):  # fmt: skip
        if not good:
            raise UsageError(f"{value!r} is out of range", where=name)
    places = {p.key: p for p in changes.places() if not leave(p)}
    deltas = {k: d for k, d in dense_changes(changes).items() if k in places}
    if not deltas:
        raise UsageError("there is no change to look into", hint="every changed tensor is left out")
    total = sum(d.numel() for d in deltas.values())
    most = max(1, int(budget * total))
    g = _masks(given, deltas) if given is not None else _as_bool(largest(deltas, min(int(start * total), most)), deltas)
    S = {
        k: torch.rand(d.shape, generator=torch.Generator().manual_seed(site_seed(seed, k)), dtype=d.dtype).to(d.device)
        for k, d in deltas.items()
    }
    pairs: list[tuple[Place, Update]] = [(places[k], Dense(d)) for k, d in deltas.items()]
    delta = dense_delta(base, pairs, "graft")
    curve: list[dict[str, Any]] = []
    best: tuple[float, dict[str, Tensor]] | None = None
    for step in range(steps + 1):
        gamma = {k: relaxed(S[k], g[k], bias) for k in deltas}
        kept, over = _rounded(gamma, most)
        write(delta, {k: torch.where(kept[k], d, torch.zeros_like(d)) for k, d in deltas.items()})
        found = _score(base, delta, score, batches, loss)
        count = sum(int(m.sum()) for m in kept.values())
        curve.append({"step": step, "score": found, "entries": count, "over": over})
        if best is None or found > best[0]:
            best = (found, kept)
        if step == steps:
            break
        write(delta, {k: gamma[k] * d for k, d in deltas.items()})
        G = _mean_gradient(base, delta, batches, loss)
        for k, d in deltas.items():
            S[k] -= lr * step_of(G[k], d, S[k], g[k], bias)
    assert best is not None
    masks = {k: m.flatten().nonzero().flatten() for k, m in best[1].items() if bool(m.any())}
    by_depth: dict[int, int] = {}
    for k, at in masks.items():
        by_depth[places[k].depth or 0] = by_depth.get(places[k].depth or 0, 0) + len(at)
    return Graft(
        [(places[k], Sparse(at, deltas[k].flatten()[at], tuple(deltas[k].shape))) for k, at in masks.items()], masks,
        sum(len(at) for at in masks.values()), total, best[0], {k: len(at) for k, at in masks.items()},
        dict(sorted(by_depth.items())), curve,
    )  # fmt: skip


def relaxed(S: Tensor, g: Tensor, bias: float = 10.0) -> Tensor:
    """gamma(S) = g + (1 - 2 g) sigmoid(S - b), of the shape of S."""
    g = g.to(S.dtype)
    return g + (1 - 2 * g) * torch.sigmoid(S - bias)


def step_of(G: Tensor, delta: Tensor, S: Tensor, g: Tensor, bias: float = 10.0) -> Tensor:
    """dL/dS from the gradient G of the parameters, all of one shape."""
    sigma = torch.sigmoid(S - bias)
    return (1 - 2 * g.to(S.dtype)) * G * delta * sigma * (1 - sigma)


def largest(values: Mapping[str, Tensor], count: int) -> Masks:
    """Flat places of the `count` entries with the largest magnitude over all tensors, by key, rising.

    Ties go to the earlier tensor and the lower place.
    """
    keys = list(values)
    flat = torch.cat([values[k].abs().flatten() for k in keys])
    order = torch.sort(flat, descending=True, stable=True).indices[:count].sort().values
    out, begin = {}, 0
    for k in keys:
        end = begin + values[k].numel()
        out[k] = order[(order >= begin) & (order < end)] - begin
        begin = end
    return out


def overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """|a & b| / |b| of two masks given as flat places by key: the share of b that a has too.

    Raises UsageError for an empty b.
    """
    size = sum(len(at) for at in b.values())
    if not size:
        raise UsageError("the overlap with an empty mask is not defined")
    both = sum(int(torch.isin(at, a[k]).sum()) for k, at in b.items() if k in a)
    return both / size


def overlaps(masks: Sequence[Mapping[str, Tensor]]) -> list[list[float]]:
    """Row i, column j: the share of mask j that mask i has too."""
    return [[overlap(a, b) for b in masks] for a in masks]


def _as_bool(masks: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for k, d in like.items():
        m = torch.zeros(d.numel(), dtype=torch.bool, device=d.device)
        if k in masks:
            m[masks[k].to(d.device)] = True
        out[k] = m.reshape(d.shape)
    return out


def _masks(given: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for k, at in given.items():
        if k not in deltas:
            raise UsageError("the mask names a tensor that does not change", where=k)
        if at.dtype != torch.int64 or (len(at) and not 0 <= int(at.min()) <= int(at.max()) < deltas[k].numel()):
            raise UsageError(f"places must be int64 in 0..{deltas[k].numel() - 1}", where=k)
    return _as_bool(given, deltas)


def _rounded(gamma: Mapping[str, Tensor], most: int) -> tuple[dict[str, Tensor], bool]:
    """gamma >= 1/2, at most `most` entries: those with the largest gamma where there are more."""
    kept = {k: x >= 0.5 for k, x in gamma.items()}
    if sum(int(m.sum()) for m in kept.values()) <= most:
        return kept, False
    return _as_bool(largest(gamma, most), gamma), True


def _mean_gradient(base: Base, delta: Any, batches: Any, loss: Any) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    count = 0
    for batch in batches():
        seen: list[int] = []

        def run(batch: Any = batch, seen: list[int] = seen) -> Tensor:
            value, n = loss(base, batch)
            seen.append(int(n))
            return value

        for k, G in gradients(base, delta, run).items():
            total[k] = total[k] + G if k in total else G
        count += seen[0]
    if not count:
        raise UsageError("the search saw no data", where="batches")
    return {k: G / count for k, G in total.items()}


@torch.no_grad()
def _score(base: Base, delta: Any, score: Any, batches: Any, loss: Any) -> float:
    with base.evaluating(), base.using(delta, check=False):
        if score is not None:
            return float(score(base))
        found = [loss(base, batch) for batch in batches()]
    return -sum(float(v) for v, _ in found) / max(1, sum(int(n) for _, n in found))


@combiner("graft", paper="2302.06600", whole={"share": 1.0}, expected={"linear": "what is kept depends on the values"})
class MovementGraft:
    """Keep only the entries that moved most, over all tensors: the start of skill localisation, without its search."""

    share: float = option(0.01, "share of all entries to keep in each source", low=0.0, high=1.0)

    def survey(self, changes: Changes, weights: Sequence[float], now: Now) -> list[Masks]:
        """Flat places of the kept entries of each source, by key."""
        found = []
        for i in range(len(changes.names)):
            deltas = dense_changes(changes, i)
            count = int(self.share * sum(d.numel() for d in deltas.values()))
            found.append(largest(deltas, count) if count else {})
        return found

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """The weighted sum of what is kept of each source."""
        terms: list[Update] = []
        for change, w, masks in zip(changes, weights, now.surveyed, strict=True):
            places = masks.get(at.key)
            if change is not None and places is not None and len(places):
                terms.append(Sparse(places, change.dense().flatten()[places] * w, at.shape))
        return None if not terms else terms[0] if len(terms) == 1 else Sum(tuple(terms))
