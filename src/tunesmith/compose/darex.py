# SPDX-License-Identifier: Apache-2.0
"""DAREx: extreme random pruning of a change, with a rescale 1/q that is chosen instead of 1/(1-p).

    theta = theta_0 + (m * Delta) / q        m ~ Bernoulli(1 - p) for each entry; DARE has q = 1 - p

A larger q trades a bias of (1 - (1-p)/q) for a variance that falls with 1/q^2. q is one number for all tensors, searched on
labelled data (`global_q` with a validation score) or on unlabelled data (with minus an output change), or one for each
tensor, from a bound (`analytic_q`) or by gradient on the output change (`learned_q`). `AdamR` trains with a pull to the base,
so that plain DARE works.

    |h_diff,i| <= Psi(p) / (1-p) * sqrt(sum_j c_ij^2) * sqrt(log(2/g)),  Psi^2 = Phi(p) = (1-2p) / log((1-p)/p)

with c_ij = Delta_ij x_j. Heads are not pruned. Deng et al. 2025, arXiv 2410.09344; DARE: Yu et al. 2024, arXiv 2311.03099.
The objective of `analytic_q` and the rule that stops its grid are those of the released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.compose.search import Axis, Found, search
from tunesmith.compose.working import dense_delta, gradients, write
from tunesmith.core.algebra import Dense, Sparse, Update
from tunesmith.core.combine import Changes, Now, Place
from tunesmith.core.errors import UsageError
from tunesmith.core.pull import FORMS, mean_second_moment, pull
from tunesmith.core.sample import Sample, inputs

if TYPE_CHECKING:
    from tunesmith.core.base import Base
    from tunesmith.core.sites import Site

Leave = Callable[[Place], bool]


def phi(p: float) -> float:
    """Phi(p) = (1 - 2p) / log((1-p)/p), symmetric about 1/2 with Phi(1/2) = 1/2. Raises UsageError outside 0 < p < 1."""
    if not 0 < p < 1:
        raise UsageError(f"must lie between 0 and 1, got {p}", where="p")
    d = 1 - 2 * p
    if abs(d) < 1e-4:  # log((1+d)/(1-d)) = 2 (d + d^3/3 + ...)
        return 0.5 / (1 + d * d / 3)
    return d / math.log((1 - p) / p)


def keeps(place: Place, p: float, seed: int, source: int = 0) -> Tensor:
    """Flat int64 places of the entries that survive, each with probability 1 - p; the same for a seed and a place."""
    g = Now(seed).generator(place, source)
    kept = torch.rand(math.prod(place.shape), generator=g, dtype=torch.float64) >= p
    return kept.nonzero().flatten()


def prune(
    changes: Changes,
    p: float,
    q: float | Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    source: int = 0,
    leave: Leave = lambda place: False,
) -> Iterator[tuple[Place, Update]]:
    """One source's change with each entry dropped with probability `p` and the rest divided by `q`, sparse.

    Args:
        q: one number, one for each tensor by key (anything missing takes their mean), or None for DARE's 1 - p.
        seed: of the mask; to be kept with the result.
        leave: places that are not pruned and not rescaled (heads, embeddings).
    fp32; fp64 is kept. Raises UsageError for p outside 0 <= p < 1, or a q that is not above 0.
    """
    _check(p)
    mean = sum(q.values()) / len(q) if isinstance(q, Mapping) and q else 1 - p
    for place in changes.places():
        change = changes.at(place)[source]
        if change is None:
            continue
        if leave(place):
            yield place, change
            continue
        scale = q.get(place.key, mean) if isinstance(q, Mapping) else 1 - p if q is None else q
        if not scale > 0:
            raise UsageError(f"q must be above 0, got {scale}", where=place.key)
        flat = change.dense().flatten()
        at = keeps(place, p, seed, source).to(flat.device)
        yield place, Sparse(at, flat[at] / scale, place.shape)


def _check(p: float) -> None:
    if not 0 <= p < 1:
        raise UsageError(f"must be at least 0 and below 1, got {p}", where="p")


def global_q(
    score: Callable[[float], float],
    p: float,
    *,
    step: float = 0.05,
    held_out: Callable[[float], float] | None = None,
    maximise: bool = True,
) -> Found:
    """The q of a grid from 1 - p to 1 with the best score; `values["q"]` of what is found.

    Args:
        score: of the change pruned with q: accuracy on validation data, or with `maximise=False` an output change between
            the fine-tuned and the pruned model on a few unlabelled batches (`state_change`, `top_logit_change`).
        step: of the grid; 0.05 or finer in the paper. 1 - p itself is always tried.
        held_out: the same on other data, for the winner and for DARE's q only.
    """
    _check(p)
    if not 0 < step <= 1:
        raise UsageError(f"must lie above 0 and be at most 1, got {step}", where="step")
    low = 1 - p
    if low >= 1:
        raise UsageError("with p=0 nothing is dropped and there is no q to choose", where="p")
    points = tuple(dict.fromkeys([low, *(low + i * step for i in range(1, math.ceil(p / step - 1e-9))), 1.0]))
    other = None if held_out is None else (lambda v: held_out(v["q"]))
    axis = Axis(low, 1.0, start=low, points=points)
    return search(lambda v: score(v["q"]), {"q": axis}, held_out=other, budget=len(points), maximise=maximise)


def state_change(pruned: Tensor, tuned: Tensor) -> Tensor:
    """Mean absolute difference of last hidden states, the output change for encoders."""
    return (pruned - tuned).abs().mean()


def top_logit_change(pruned: Tensor, tuned: Tensor, top: int = 5) -> Tensor:
    """Mean squared difference of the `top` logits that are largest for the fine-tuned model, for decoders."""
    at = tuned.topk(min(top, tuned.shape[-1]), dim=-1).indices
    return (pruned.gather(-1, at) - tuned.gather(-1, at)).square().mean()


def mean_inputs(base: Base, sites: Sequence[Site], sample: Sample) -> dict[str, Tensor]:
    """Mean input row [in * kernel], fp32, of each site that ran, by path; of the base as it stands."""
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}
    for seen in inputs(base, list(sites), sample):
        for path, X in seen.items():
            total[path] = total[path] + X.sum(0) if path in total else X.sum(0)
            count[path] = count.get(path, 0) + len(X)
    return {path: s / count[path] for path, s in total.items() if count[path]}


def rows_q(c: Tensor, p: float, eta: float, *, gamma: float = 0.95, step: float = 1e-3, share: float = 0.8) -> Tensor:
    """q of each row of contributions c [rows, n], [rows]: where the bound is smallest on a grid in [1-p, 0.999).

    | eta (1 - (1-p)/q) sum_j c_ij + eta^2 Phi(p) sum_j c_ij^2 / (4 q^2) + log(2 / (1 - gamma)) |

    The grid is walked upwards and stops once `share` of the rows are past their smallest value; the others have what they
    had by then (a guard against outliers).
    """
    _check(p)
    if not 0 < gamma < 1:
        raise UsageError(f"must lie between 0 and 1, got {gamma}", where="gamma")
    c = c.double()
    a, b = c.sum(-1)[:, None], c.square().sum(-1)[:, None]  # [rows, 1]
    count = max(1, math.ceil((0.999 - (1 - p)) / step - 1e-9))
    grid = (1 - p) + step * torch.arange(count, dtype=torch.float64, device=c.device)  # [G]
    bound = (eta * (1 - (1 - p) / grid) * a + eta**2 * phi(p) * b / (4 * grid**2) + math.log(2 / (1 - gamma))).abs()
    least = bound.cummin(1).values
    rises = torch.nn.functional.pad(bound[:, 1:] > least[:, :-1], (1, 0))
    first = torch.where(rises.any(1), rises.int().argmax(1), count)  # [rows], where a row is past its smallest value
    wanted = math.ceil(share * len(first))
    stop = int(first.sort().values[wanted - 1]) if 0 < wanted <= len(first) else count
    last = torch.minimum(first - 1, torch.as_tensor(stop)).clamp(0, count - 1)
    return grid[(bound == least.gather(1, last[:, None])).int().argmax(1)]


@dataclass(frozen=True)
class LayerQ:
    """q for each tensor by key, with what it rests on: eta, or the output change over steps."""

    q: dict[str, float]
    p: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """What anything else takes."""
        return sum(self.q.values()) / len(self.q)


def analytic_q(
    changes: Changes,
    means: Mapping[str, Tensor],
    p: float,
    eta: float,
    *,
    gamma: float = 0.95,
    source: int = 0,
    leave: Leave = lambda place: False,
) -> LayerQ:
    """q for each weight from the bound, the mean over its rows; its bias takes the same.

    Args:
        means: mean input rows by path, of the fine-tuned model (`mean_inputs`). A weight without one is left to the mean.
        eta: one number for all layers, tuned on validation data or by output change; .1 to .7 in the paper, best values
            reported .37 (CoLA), 1.01 (SST-2), .27 (MRPC), .36 (STS-B).
    Raises UsageError where no weight has inputs.
    """
    weights: dict[str, Tensor] = {}
    biases: dict[str, tuple[str, Tensor]] = {}
    for place in changes.places():
        change = changes.at(place)[source]
        if change is None or leave(place):
            continue
        if place.name == "weight" and place.path in means and len(place.shape) > 1 and place.kind != "embedding":
            weights[place.path] = change.dense().flatten(1)
        elif place.name == "bias":
            biases[place.path] = (place.key, change.dense())
    if not weights:
        raise UsageError("no pruned weight has a mean input", hint="means=mean_inputs(base, sites, sample)")
    q: dict[str, float] = {}
    for path, D in weights.items():
        c = D * means[path].to(D)  # [out, in]
        if path in biases:
            c = torch.cat([c, biases[path][1][:, None]], 1)
        found = float(rows_q(c, p, eta, gamma=gamma).mean())
        q[f"{path}.weight" if path else "weight"] = found
        if path in biases:
            q[biases[path][0]] = found
    return LayerQ(q, p, {"eta": eta, "gamma": gamma, "weights": len(weights)})


def learned_q(
    base: Base,
    changes: Changes,
    batches: Callable[[], Iterable[Any]],
    run: Callable[[Base, Any], Tensor],
    p: float,
    *,
    change: Callable[[Tensor, Tensor], Tensor] = state_change,
    seed: int = 0,
    source: int = 0,
    lr: float = 1e-2,
    steps: int = 50,
    patience: int = 5,
    leave: Leave = lambda place: False,
) -> LayerQ:
    """q for each tensor by gradient on the output change, under one mask; no labels are needed.

    Args:
        run: the outputs to be kept (hidden states, logits) for one batch, from the base as it stands.
        lr, steps, patience: Adam with a cosine schedule, stopped after `patience` passes without a smaller change; the
            best q are kept.
    q stays within [1-p, 1]. `facts["changes"]` has the output change of every pass, the first being DARE's.
    """
    _check(p)
    places = {pl.key: pl for pl in changes.places() if changes.at(pl)[source] is not None and not leave(pl)}
    masked = {
        pl.key: u.dense() for pl, u in prune(changes, p, 1.0, seed=seed, source=source, leave=leave) if pl.key in places
    }
    if not masked:
        raise UsageError("there is nothing to prune", hint="every changed tensor is left out")
    whole = [(pl, u) for pl, u in ((pl, changes.at(pl)[source]) for pl in changes.places()) if u is not None]
    tuned = dense_delta(base, whole, "tuned")
    given = list(batches())
    with torch.no_grad(), base.evaluating(), base.using(tuned, check=False):
        wanted = [run(base, b).detach().clone() for b in given]
    kept: list[tuple[Place, Update]] = [(pl, u) for pl, u in whole if pl.key not in masked]
    delta = dense_delta(base, [*kept, *((places[k], Dense(d)) for k, d in masked.items())], "pruned")
    keys = list(masked)
    q = torch.full((len(keys),), 1 - p, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([q], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    best: tuple[float, Tensor] = (math.inf, q.detach().clone())
    seen: list[float] = []
    waited = 0
    for _ in range(steps):
        write(delta, {k: d / float(q.detach()[i]) for i, (k, d) in enumerate(masked.items())})
        total = 0.0
        slope = torch.zeros_like(q)
        for b, h in zip(given, wanted, strict=True):
            value: list[float] = []

            def loss(b: Any = b, h: Tensor = h, value: list[float] = value) -> Tensor:
                found = change(run(base, b), h)
                value.append(float(found.detach()))
                return found

            G = gradients(base, delta, loss)
            total += value[0] / len(given)
            for i, (k, d) in enumerate(masked.items()):  # d(d/q)/dq = -d/q^2
                slope[i] -= (G[k].double() * d.double()).sum().cpu() / (q[i].detach() ** 2 * len(given))
        seen.append(total)
        if total < best[0]:
            best, waited = (total, q.detach().clone()), 0
        else:
            waited += 1
            if waited >= patience:
                break
        q.grad = slope.detach()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            q.clamp_(1 - p, 1.0)
    found = dict(zip(keys, best[1].tolist(), strict=True))
    return LayerQ(found, p, {"changes": seen, "seed": seed, "steps": len(seen)})


class AdamR(torch.optim.Adam):
    """Adam with a pull of the parameters to their start, so that deltas stay small enough to be pruned (see `core.pull`).

    The loop has the same pull as an option of full fine-tuning, `full:pull=1e-4`.

        theta <- theta - wd * lr / sqrt(mean v_hat) * (theta - theta_0)      before each Adam step

    v_hat is Adam's bias-corrected second moment, the present gradient included, and its mean is over all parameters. The
    `l1` form pulls by sign(theta - theta_0). The pull never goes past theta_0.

    Args:
        pull: wd; 1e-4 is the released code's (the paper's values were not verified). 0 is Adam.
        anchors: theta_0, tensor by tensor; the parameters as they are when None, zeros for tensors that are differences.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        pull: float = 1e-4,
        form: str = "l2",
        anchors: Sequence[Tensor] | None = None,
    ) -> None:
        if form not in FORMS:
            raise UsageError(f"unknown form {form!r}", where="AdamR.form", hint="choices: l1, l2")
        if not 0 <= pull < math.inf:
            raise UsageError(f"must be a finite number of 0 or more, got {pull}", where="AdamR.pull")
        listed = list(params)
        if anchors is not None and [a.shape for a in anchors] != [t.shape for t in listed]:
            raise UsageError("anchors must be one tensor of the same shape for each parameter", where="AdamR.anchors")
        super().__init__(listed, lr=lr, betas=betas, eps=eps)
        self.pull, self.form = pull, form
        self._anchors = [t.detach().clone() for t in (listed if anchors is None else anchors)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; the closure is called once, before the pull."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.pull:
            self._pull()
        super().step()
        return loss

    def _pull(self) -> None:
        group = self.param_groups[0]
        moving = [(t, a) for t, a in zip(group["params"], self._anchors, strict=True) if t.grad is not None]
        mean = mean_second_moment(((t.grad, self.state.get(t, {})) for t, _ in moving), group["betas"][1])
        for t, a in moving:
            pull(t, a, self.pull, group["lr"], mean, self.form)
