# SPDX-License-Identifier: Apache-2.0
"""In-context linear regression of study 036: data, the optimal estimators, training, and excess risks."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.inspect.forgetting import Ability, Transform
from tunesmith.study.worlds.gpt import TinyGPT


def seeded(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


@dataclass(frozen=True)
class World:
    """x ~ N(0, I_d), y = <w, x> + sigma N(0, 1); w is one of `tasks` fixed vectors or N(0, tau^2 I)."""

    d: int
    pairs: int
    tasks: int
    dim: int
    depth: int
    batch: int
    sigma: float = 1.0
    tau: float = 1.0

    def vectors(self) -> Tensor:
        """The fixed vectors [tasks, d]."""
        return self.tau * torch.randn(self.tasks, self.d, generator=seeded("tasks"))

    def rows(self, n: int, share: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """X [n, pairs, d] and y [n, pairs]; a share of rows has one of the fixed vectors."""
        w = self.tau * torch.randn(n, self.d, generator=g)
        fixed = self.vectors()[torch.randint(self.tasks, (n,), generator=g)]
        w = torch.where((torch.rand(n, 1, generator=g) < share), fixed, w)
        X = torch.randn(n, self.pairs, self.d, generator=g)
        y = torch.einsum("npd,nd->np", X, w) + self.sigma * torch.randn(n, self.pairs, generator=g)
        return X, y


def tokens(X: Tensor, y: Tensor) -> Tensor:
    """x_1, y_1, x_2, y_2, ... as vectors [n, 2 pairs, d + 1]: x with a zero behind, y alone in the last place."""
    n, p, d = X.shape
    out = X.new_zeros(n, p, 2, d + 1)
    out[:, :, 0, :d], out[:, :, 1, d] = X, y
    return out.view(n, 2 * p, d + 1)


def predicted(base: Base, given: Tensor) -> Tensor:
    """What the model says of y at every x, [n, pairs]."""
    return base.model(given)[:, ::2, 0]


def ridge(world: World, X: Tensor, y: Tensor) -> Tensor:
    """The Bayes prediction of y_k from the k pairs before, for w ~ N(0, tau^2 I), [n, pairs]."""
    X, y = X.double(), y.double()
    _, p, d = X.shape
    lam = world.sigma**2 / world.tau**2 * torch.eye(d, dtype=torch.float64)
    out = []
    for k in range(p):
        A, b = X[:, :k], y[:, :k]
        w = torch.linalg.solve(A.transpose(1, 2) @ A + lam, (A.transpose(1, 2) @ b[..., None]))[..., 0]
        out.append((X[:, k] * w).sum(1))
    return torch.stack(out, 1)


def discrete(world: World, X: Tensor, y: Tensor) -> Tensor:
    """The Bayes prediction for w among the fixed vectors: their mean by posterior weight, [n, pairs]."""
    each, log = _fixed(world, X, y)
    return (each * log.softmax(-1)).sum(-1)


def _fixed(world: World, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions of every fixed vector, and the log likelihood of the pairs before, both [n, pairs, tasks]."""
    each = X.double() @ world.vectors().double().T
    fit = -((y.double()[..., None] - each) ** 2) / (2 * world.sigma**2)
    return each, fit.cumsum(1) - fit


def mixture(world: World, X: Tensor, y: Tensor, share: float) -> Tensor:
    """The Bayes prediction where a share of rows has a fixed vector, [n, pairs]."""
    _, log = _fixed(world, X, y)
    X, y = X.double(), y.double()
    evidence = []
    for k in range(X.shape[1]):  # log N(y_1..k; 0, tau^2 X X^T + sigma^2 I) and the same for the fixed ones
        A, b = X[:, :k], y[:, :k, None]
        S = world.tau**2 * A @ A.transpose(1, 2) + world.sigma**2 * torch.eye(k, dtype=torch.float64)
        fit = (
            (b.transpose(1, 2) @ torch.linalg.solve(S, b)).flatten() if k else torch.zeros(len(X), dtype=torch.float64)
        )
        log_det = torch.linalg.slogdet(S).logabsdet if k else torch.zeros(len(X), dtype=torch.float64)
        evidence.append(-0.5 * (fit + log_det))
    steps = torch.arange(X.shape[1], dtype=torch.float64)
    of_fixed = (
        log.logsumexp(-1) - torch.log(torch.tensor(float(world.tasks))) - steps * torch.log(torch.tensor(world.sigma))
    )
    odds = torch.logit(torch.tensor(share, dtype=torch.float64)) + of_fixed - torch.stack(evidence, 1)
    weight = torch.sigmoid(odds)
    return weight * discrete(world, X, y) + (1 - weight) * ridge(world, X, y)


def _loop(base: Base, parameters: Sequence[Tensor], world: World, share: float, steps: int, lr: float, g: Any) -> None:
    optimiser = torch.optim.Adam(parameters, lr=lr)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / warm) * max(0.05, 1 - s / steps)
    )
    for _ in range(steps):
        X, y = world.rows(world.batch, share, g)
        optimiser.zero_grad(set_to_none=True)
        (predicted(base, tokens(X, y)) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()


def pretrained(world: World, seed: int, steps: int, lr: float) -> Base:
    """A transformer trained on the half-and-half mixture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyGPT(1, read=world.d + 1, dim=world.dim, depth=world.depth, length=2 * world.pairs)
    base = Base(model, example=(tokens(*world.rows(4, 0.5, seeded("example"))),), name="regressor")
    _loop(base, list(model.parameters()), world, 0.5, steps, lr, seeded("pretrain", seed))
    for p in model.requires_grad_(False).eval().parameters():
        p.grad = None
    return base


def tuned(world: World, base: Base, seed: int, steps: int, lr: float) -> Delta:
    """Full fine-tuning on the fixed vectors only."""
    delta = Delta.create(base, ts.Full(targets="everything"), seed=seed)
    with base.frozen(), base.using(delta):
        _loop(base, [t for _, t in delta.items()], world, 1.0, steps, lr, seeded("tune", seed))
    return delta


def scaled(by: float) -> Transform:
    """Labels times `by` in the prompt, predictions divided by it."""

    def encode(prompt: Tensor) -> Tensor:
        out = prompt.clone()
        out[1::2, -1] *= by
        return out

    return Transform(f"labels times {by:g}", encode, lambda said: said / by)


def ability(world: World, share: float, n: int, low: int, *words: object) -> Ability:
    """Items of n rows: minus the excess squared error over the optimum, mean over `low` examples and more.

    The first half of the rows is for choosing a transform, see `forgetting`.
    """
    X, y = world.rows(n, share, seeded(*words))
    best = (ridge if share == 0 else discrete)(world, X, y)
    risk = (best - y).square()[:, low:].mean(1)

    def answer(base: Base, prompts: Sequence[Any]) -> list[Tensor]:
        given = torch.stack(list(prompts))
        return [row for part in given.split(256) for row in predicted(base, part)]

    def score(said: Tensor, reference: tuple[Tensor, Tensor]) -> float:
        return float(reference[1] - (said.double() - reference[0].double()).square()[low:].mean())

    name = "continuous" if share == 0 else "discrete"
    return Ability(name, list(tokens(X, y)), list(zip(y, risk, strict=True)), answer, score)


@torch.no_grad()
def curve(world: World, base: Base, delta: Any, transform: Transform, n: int, *words: object) -> list[float]:
    """Mean excess squared error over ridge at every number of examples, on rows with w ~ N(0, tau^2 I)."""
    X, y = world.rows(n, 0.0, seeded(*words))
    given = torch.stack([transform.encode(p) for p in tokens(X, y)])
    with base.using(delta):
        said = torch.cat([transform.decode(predicted(base, part)) for part in given.split(256)])
    excess = (said.double() - y.double()).square() - (ridge(world, X, y) - y).square()
    return [round(float(v), 6) for v in excess.mean(0)]
