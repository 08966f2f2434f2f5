# SPDX-License-Identifier: Apache-2.0
"""Model soups: averages of models fine-tuned from one start, chosen greedily or weighted by what is learnt on held-out data.

    uniform   theta = theta_0 + 1/k sum_i tau_i                           tau_i = theta_i - theta_0
    greedy    best first; a model stays in the average if held-out accuracy does not fall
    learned   theta = theta_0 + sum_i softmax(a)_i tau_i                  a [k], or one row for each tensor

`greedy` is the selection loop by itself and goes around any merge. `path` looks at the straight line between two models:
where the score dips on it, they share no basin and averaging them fails. `batch_norm_statistics` measures running means and
variances anew, which no average of models gives.

Wortsman et al. 2022, arXiv 2203.05482. Its models have no batch norm: measuring the statistics again is added here. The
formula of `soup_minus_ensemble` was not checked against the paper's text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.compose.working import dense_delta, differences, gradients
from tunesmith.core.algebra import Dense, Update
from tunesmith.core.apply import sharing_copy
from tunesmith.core.combine import Changes, Place
from tunesmith.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from tunesmith.core.base import Base

T = TypeVar("T")
ROWS = ("model", "tensor")
_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Soup:
    """What greedy selection found.

    `ingredients` are the sources taken, in the order they were; `score` that of their merge; `singles` the score of each
    source alone; `trail` every candidate: the source tried, the score with it, whether it stayed.
    """

    ingredients: list[int]
    score: float
    singles: list[float]
    trail: list[dict[str, Any]] = field(repr=False)


def greedy(
    count: int,
    merge: Callable[[list[int]], T],
    score: Callable[[T], float],
    *,
    strict: bool = False,
    singles: Sequence[float] | None = None,
) -> Soup:
    """Sources best first, each kept if the merge with it scores at least as well as without.

    Args:
        count: number of sources.
        merge: the merge of some sources, given as indices in the order they were taken.
        score: higher is better; on data held out for this choice, which must not be the test data.
        strict: keep only what scores strictly better, as the released code does; the paper keeps equal scores.
        singles: the score of each source alone, where known.
    By construction the score is at least that of the best source. Of equal sources the earlier goes first.
    Raises UsageError for no sources, or a score that is not finite.
    """
    if count < 1:
        raise UsageError("a soup needs at least one ingredient")
    alone = [float(score(merge([i]))) for i in range(count)] if singles is None else [float(s) for s in singles]
    if len(alone) != count:
        raise UsageError(f"{len(alone)} scores were given for {count} sources", where="singles")
    odd = [i for i, s in enumerate(alone) if not math.isfinite(s)]
    if odd:
        raise UsageError(f"the score of source {odd[0]} is not finite", hint="leave that model out")
    order = sorted(range(count), key=lambda i: -alone[i])
    taken, best, trail = [order[0]], alone[order[0]], []
    for i in order[1:]:
        found = float(score(merge([*taken, i])))
        stays = found > best if strict else found >= best
        trail.append({"source": i, "score": found, "kept": stays})
        if stays:
            taken, best = [*taken, i], found
    return Soup(taken, best, alone, trail)


def average(changes: Changes, which: Sequence[int] | None = None) -> Iterator[tuple[Place, Update]]:
    """The mean change of some sources (all by default), tensor by tensor; one that leaves a tensor alone counts as zero.

    A running mean, n/(n+1) soup + 1/(n+1) tau: no more than two tensors are held at a time. fp32; fp64 is kept.
    """
    chosen = list(range(len(changes.names))) if which is None else list(which)
    if not chosen:
        raise UsageError("a soup needs at least one ingredient")
    for place in changes.places():
        given = changes.at(place)
        soup: Tensor | None = None
        for n, i in enumerate(chosen):
            change = given[i]
            tau = change.dense() if change is not None else None
            if soup is None:
                soup = None if tau is None else tau.clone() if n == 0 else tau / (n + 1)
            else:
                # soup + (tau - soup) / (n + 1): copies of one model leave it as it is, to the bit
                soup = soup + ((soup.new_zeros(()) if tau is None else tau) - soup) / (n + 1)
        if soup is not None:
            yield place, Dense(soup)


def mixed(changes: Changes, weights: dict[str, list[float]]) -> Iterator[tuple[Place, Update]]:
    """sum_i w_i tau_i with a row of weights for each tensor, by the key of its place ("" is every other tensor)."""
    for place in changes.places():
        row = weights.get(place.key, weights.get(""))
        if row is None or len(row) != len(changes.names):
            raise UsageError(f"no row of {len(changes.names)} weights is given", where=place.key)
        terms = [w * c.dense() for w, c in zip(row, changes.at(place), strict=True) if c is not None]
        if terms:
            yield place, Dense(torch.stack(terms).sum(0))


@dataclass(frozen=True)
class Learned:
    """What a learned soup found: rows of weights by key of a tensor ("" for all), the temperature of logits, and the
    mean loss of each pass."""

    weights: dict[str, list[float]]
    temperature: float
    losses: list[float]


def learned(
    base: Base,
    changes: Changes,
    batches: Callable[[], Iterable[Any]],
    run: Callable[[Base, Any], tuple[Tensor, Tensor]],
    *,
    rows: str = "model",
    lr: float = 0.05,
    epochs: int = 5,
    temperature: float = 1.0,
) -> Learned:
    """Mixing weights and a temperature of logits, trained by gradient on held-out cross-entropy.

    Args:
        batches: held-out batches, anew at each call.
        run: logits [n, C] and labels [n] (-100 is left out) of one batch, from the base as it stands.
        rows: one softmax over sources for the whole "model", or one for each "tensor".
        lr, epochs: of AdamW without decay; 0.05 and 5 are the released code's.
        temperature: the first beta in softmax(beta logits).
    Weights start equal; without epochs the soup is the uniform one. All k changes are held in memory.
    Raises UsageError for an unknown `rows`, no labelled example, or a loss that is not finite.
    """
    if rows not in ROWS:
        raise UsageError(f"unknown rows {rows!r}", hint=nearest(rows, ROWS))
    k = len(changes.names)
    places = list(changes.places())
    taus: dict[str, list[Tensor | None]] = {
        p.key: [None if c is None else c.dense().to(base.device) for c in changes.at(p)] for p in places
    }
    keys = [p.key for p in places] if rows == "tensor" else [""]
    a = torch.zeros(len(keys), k, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(float(temperature), requires_grad=True)
    delta = dense_delta(base, average(changes), "soup")
    held = differences(delta)
    optimiser = torch.optim.AdamW([a, beta], lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(epochs):
        total, count = 0.0, 0
        for batch in batches():
            optimiser.zero_grad()
            w = a.softmax(-1)  # [rows, k]
            with torch.no_grad():
                for i, key in enumerate(taus):
                    held[key].copy_(_mix(w[i if rows == "tensor" else 0], taus[key]))
            seen: dict[str, Any] = {}
            G = gradients(base, delta, lambda batch=batch, seen=seen: _loss(run(base, batch), beta, seen))
            beta.grad = seen["dbeta"]
            dw = torch.zeros_like(w)  # dL/dw_i = <dL/dtheta, tau_i>
            for i, key in enumerate(taus):
                for j, tau in enumerate(taus[key]):
                    if tau is not None:
                        dw[i if rows == "tensor" else 0, j] += (G[key].double() * tau.double()).sum().cpu()
            w.backward(dw)
            optimiser.step()
            total, count = total + seen["loss"] * seen["n"], count + seen["n"]
        if not count:
            raise UsageError("a learned soup needs labelled examples", where="batches")
        losses.append(total / count)
    found = a.detach().softmax(-1).tolist()
    return Learned(dict(zip(keys, found, strict=True)), float(beta.detach()), losses)


def _mix(w: Tensor, taus: Sequence[Tensor | None]) -> Tensor:
    some = [float(x) * tau for x, tau in zip(w, taus, strict=True) if tau is not None]
    return torch.stack(some).sum(0)


def _loss(found: tuple[Tensor, Tensor], beta: Tensor, seen: dict[str, Any]) -> Tensor:
    """Mean cross-entropy of softmax(beta f); its value and its derivative by beta go into `seen`."""
    logits, labels = found
    loss = F.cross_entropy(beta.detach() * logits.float(), labels)
    n = int((labels != -100).sum())
    if n == 0 or not torch.isfinite(loss):
        raise UsageError(
            "the held-out loss is not finite", hint="look at the models' logits, and that labels are there"
        )
    with torch.enable_grad():
        b = beta.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(b * logits.detach().float(), labels), b)
    seen.update(n=n, loss=float(loss.detach()), dbeta=slope)
    return loss


@dataclass(frozen=True)
class Path:
    """Scores on the straight line from one model to another.

    `barrier` is the largest amount by which a score lies under the line between the scores of the two ends; above
    `tolerance` the two are `apart`: no common basin, and averages of them are poor.
    """

    points: list[float]
    scores: list[float]
    barrier: float
    apart: bool


def path(
    a: Sequence[tuple[Place, Update]],
    b: Sequence[tuple[Place, Update]],
    score: Callable[[list[tuple[Place, Update]]], float],
    *,
    points: int = 5,
    tolerance: float = 0.02,
) -> Path:
    """Scores (higher is better) of (1 - t) tau_a + t tau_b for evenly spaced t in 0..1.

    Raises UsageError for fewer than 3 points.
    """
    if points < 3:
        raise UsageError(f"a path needs 3 points or more, got {points}", where="points")
    at = [i / (points - 1) for i in range(points)]
    scores = [float(score(_between(a, b, t))) for t in at]
    line = [(1 - t) * scores[0] + t * scores[-1] for t in at]
    barrier = max(expected - found for expected, found in zip(line, scores, strict=True))
    return Path(at, scores, barrier, barrier > tolerance)


def _between(
    a: Sequence[tuple[Place, Update]], b: Sequence[tuple[Place, Update]], t: float
) -> list[tuple[Place, Update]]:
    places = {p.key: p for p, _ in (*a, *b)}
    total: dict[str, Tensor] = {}
    for side, w in ((a, 1 - t), (b, t)):
        for p, change in side:
            term = w * change.dense()
            total[p.key] = total[p.key] + term if p.key in total else term
    return [(p, Dense(total[key])) for key, p in places.items()]


def soup_minus_ensemble(
    alpha: float, curvature: float, probabilities: Tensor, difference: Tensor, beta: float = 1.0
) -> float:
    """The expected L(soup) - L(ensemble) of two models, to second order.

    alpha (1 - alpha) / 2 * (-d2L/dalpha2 + beta^2 E_x Var_{y ~ p}[f_y(x; theta_1) - f_y(x; theta_0)])

    with p = softmax(beta f(x; theta_alpha)) [n, C], `difference` the logits of model 1 minus those of model 0 [n, C], and
    `curvature` the second derivative of the loss along the segment at alpha.
    """
    p, d = probabilities.double(), difference.double()
    variance = (p * d.square()).sum(-1) - (p * d).sum(-1).square()  # [n]
    return float(alpha * (1 - alpha) / 2 * (-curvature + beta**2 * variance.mean()))


@torch.no_grad()
def batch_norm_statistics(
    base: Base, batches: Iterable[Any], run: Callable[[Base, Any], Any]
) -> dict[str, dict[str, Tensor]]:
    """`running_mean` and `running_var` [C] of every batch norm for the model as it stands (deltas in use), by path.

    One pass in eval mode would measure layers behind others with stale statistics; here each norm uses those of the batch,
    as in training, and the averages over batches are weighted by the values seen. Variances are unbiased, as torch keeps
    them. The base's own buffers are not touched. Raises UsageError where the model has no batch norm, or no batch came.
    """
    norms = {p: m for p, m in base.modules.items() if isinstance(m, _NORMS) and m.track_running_stats}
    if not norms:
        raise UsageError("the model has no batch norm with running statistics", where=base.name)
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def hook_for(p: str) -> Any:
        def hook(m: Any, args: tuple[Any, ...]) -> None:
            x = args[0].transpose(0, 1).flatten(1).double()  # [C, n]
            n, mean, var = sums.get(p, (0, x.new_zeros(len(x)), x.new_zeros(len(x))))
            new = (n + x.shape[1], mean + x.sum(1), var + x.shape[1] * x.var(1, unbiased=x.shape[1] > 1))
            sums[p] = new

        return hook

    handles = [m.register_forward_pre_hook(hook_for(p)) for p, m in norms.items()]
    kept = {p: (m.training, m.running_mean, m.running_var, m.num_batches_tracked) for p, m in norms.items()}
    try:
        with base.evaluating():
            for m in norms.values():
                m.running_mean, m.running_var, m.num_batches_tracked = None, None, None
            for batch in batches:
                run(base, batch)
    finally:
        for p, m in norms.items():
            m.training, m.running_mean, m.running_var, m.num_batches_tracked = kept[p]
        for h in handles:
            h.remove()
    if not sums:
        raise UsageError("no batch ran through a batch norm", where="batches")
    dtypes = {p: m.running_mean.dtype for p, m in norms.items() if m.running_mean is not None}
    return {
        p: {"running_mean": (mean / n).to(dtypes[p]), "running_var": (var / n).to(dtypes[p])}
        for p, (n, mean, var) in sums.items()
    }


def with_statistics(merged: Base, statistics: dict[str, dict[str, Tensor]]) -> Base:
    """A base with these batch-norm statistics and all other tensors shared with `merged`, which stays as it was.

    Raises UsageError for a path that is no batch norm.
    """
    from tunesmith.core.base import Base

    model = sharing_copy(merged.model)
    modules = dict(model.named_modules())
    for p, values in statistics.items():
        m = modules.get(p)
        if not isinstance(m, _NORMS):
            raise UsageError("it is no batch norm", where=p, hint=nearest(p, modules))
        for key, value in values.items():
            m._buffers[key] = value.clone()
    return Base(
        model, tokenizer=merged.tokenizer, example=merged._example, name=merged.name, family=merged.family,
        source=merged.source,
    )  # fmt: skip
