# SPDX-License-Identifier: Apache-2.0
"""Graphs of six generators, a two-layer GIN that learns to tell removed edges from absent ones, and its fine-tuning.

A generator has a setting of its own for sources and two for its target, whose task is to tell which of the two made a graph.
Graphs have 30 to 60 nodes and no features: a node starts as a constant and the logarithm of its degree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

STEPS = (2, 3, 4)
Graph = NDArray[np.float64]
Made = Callable[..., Graph]


def _symmetric(p: Graph, rng: np.random.Generator) -> Graph:
    """A graph whose edges are drawn with the probabilities p [n, n]."""
    upper = np.triu(rng.random(p.shape) < p, 1).astype(float)
    return upper + upper.T


def random_graph(n: int, rng: np.random.Generator, p: float) -> Graph:
    return _symmetric(np.full((n, n), p), rng)


def blocks(n: int, rng: np.random.Generator, k: int, inside: float, across: float) -> Graph:
    """k equal blocks of nodes in random order."""
    of = rng.permutation(np.arange(n) % k)
    return _symmetric(np.where(of[:, None] == of[None], inside, across), rng)


def attachment(n: int, rng: np.random.Generator, m: int, power: float) -> Graph:
    """Every new node takes m different partners in proportion to a power of their degree."""
    A = np.zeros((n, n))
    A[: m + 1, : m + 1] = 1 - np.eye(m + 1)
    for i in range(m + 1, n):
        pull = A[:i].sum(1) ** power
        to = rng.choice(i, m, replace=False, p=pull / pull.sum())
        A[i, to] = A[to, i] = 1
    return A


def small_world(n: int, rng: np.random.Generator, k: int, rewired: float) -> Graph:
    """A ring with k neighbours on each side; every edge gets a new end with probability `rewired`."""
    A = np.zeros((n, n))
    edges = [(i, (i + d) % n) for d in range(1, k + 1) for i in range(n)]
    for i, j in edges:
        A[i, j] = A[j, i] = 1
    for i, j in edges:
        if rng.random() < rewired:
            free = np.flatnonzero(A[i] == 0)
            to = int(rng.choice(free[free != i]))
            A[i, j] = A[j, i] = 0
            A[i, to] = A[to, i] = 1
    return A


def geometric(n: int, rng: np.random.Generator, radius: float) -> Graph:
    """Points in the unit square; near ones are joined."""
    x = rng.random((n, 2))
    A = (((x[:, None] - x[None]) ** 2).sum(-1) < radius**2).astype(float)
    return A * (1 - np.eye(n))


@dataclass(frozen=True)
class Generator:
    """How a source is made (settings taken in turn), and the two settings its target tells apart."""

    make: Made
    source: tuple[dict[str, Any], ...]
    target: tuple[dict[str, Any], dict[str, Any]]


# The targets of blocks and small worlds have the same expected number of edges in both settings.
GENERATORS: dict[str, Generator] = {
    "er": Generator(random_graph, ({"p": 0.05}, {"p": 0.2}), ({"p": 0.1}, {"p": 0.12})),
    "sbm2": Generator(blocks, ({"k": 2, "inside": 0.25, "across": 0.03},),
                      ({"k": 2, "inside": 0.27, "across": 0.03}, {"k": 2, "inside": 0.2, "across": 0.1})),
    "sbm4": Generator(blocks, ({"k": 4, "inside": 0.4, "across": 0.04},),
                      ({"k": 4, "inside": 0.5, "across": 0.04}, {"k": 4, "inside": 0.26, "across": 0.12})),
    "pa": Generator(attachment, ({"m": 2, "power": 1.0},), ({"m": 2, "power": 0.7}, {"m": 2, "power": 1.0})),
    "ws": Generator(small_world, ({"k": 2, "rewired": 0.2},), ({"k": 2, "rewired": 0.1}, {"k": 2, "rewired": 0.3})),
    "geometric": Generator(geometric, ({"radius": 0.2},), ({"radius": 0.2}, {"radius": 0.22})),
}  # fmt: skip


def made(name: str, settings: Sequence[dict[str, Any]], count: int, seed: int) -> list[Graph]:
    """`count` graphs with the settings in turn, 30 to 60 nodes."""
    rng = np.random.default_rng([seed, sorted(GENERATORS).index(name)])
    make = GENERATORS[name].make
    return [make(int(rng.integers(30, 61)), rng, **settings[i % len(settings)]) for i in range(count)]


def source(name: str, count: int) -> list[Graph]:
    return made(name, GENERATORS[name].source, count, 1)


def target(name: str, count: int, seed: int) -> tuple[list[Graph], Tensor]:
    """Graphs of both settings in turn, and which one made each [count] int64."""
    return made(name, GENERATORS[name].target, count, seed), torch.arange(count) % 2


def batched(graphs: Sequence[Graph]) -> tuple[Tensor, Tensor]:
    """Adjacency [B, n, n] and which nodes there are [B, n], both fp32, padded to the largest graph."""
    n = max(len(A) for A in graphs)
    out, real = torch.zeros(len(graphs), n, n), torch.zeros(len(graphs), n)
    for i, A in enumerate(graphs):
        out[i, : len(A), : len(A)] = torch.from_numpy(A).float()
        real[i, : len(A)] = 1
    return out, real


INPUTS = 2 + len(STEPS)


def features(A: Tensor) -> Tensor:
    """What a node starts with [B, n, INPUTS]: a constant, the logarithm of its degree, and how often walks return."""
    degree = A.sum(-1)
    P = A / degree.clamp_min(1)[..., None]
    walks, out, at = P, [torch.ones_like(degree), degree.log1p()], 1
    for k in STEPS:
        while at < k:
            walks, at = walks @ P, at + 1
        out.append(4 * walks.diagonal(dim1=-2, dim2=-1))
    return torch.stack(out, -1)


class GIN(nn.Module):
    """Adjacency A [B, n, n] and real nodes [B, n] to states [B, n, dim]: h' = MLP((1 + eps) h + A h), twice."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(d, dim), nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim)) for d in (INPUTS, dim)
        )
        self.eps = nn.Parameter(torch.zeros(2))

    def forward(self, A: Tensor, real: Tensor) -> Tensor:
        h = features(A) * real[..., None]
        for i, mlp in enumerate(self.mlps):
            h = mlp((1 + self.eps[i]) * h + A @ h).relu() * real[..., None]
        return h


def pretrained(graphs: Sequence[Graph], dim: int, steps: int, batch: int, seed: int) -> tuple[GIN, dict[str, float]]:
    """A GIN that tells removed edges (15 %) from as many absent ones and the graph of a node from another.

    Beside it the accuracies in both on the last tenth of the steps. The two losses have equal weight.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, decoder, context = GIN(dim), nn.Bilinear(dim, dim, 1), nn.Bilinear(dim, dim, 1)
        trained = [p for m in (model, decoder, context) for p in m.parameters()]
        optimiser = torch.optim.Adam(trained, lr=3e-3)
        A, real = batched(graphs)
        right: dict[str, list[float]] = {"edges": [], "context": []}
        for step in range(steps):
            rows = torch.randint(0, len(A), (batch,))
            some, nodes = A[rows], real[rows]
            pair = torch.triu(nodes[:, :, None] * nodes[:, None], 1)
            draw = torch.rand_like(some)
            gone = (some * pair > 0) & (draw < 0.15)
            absent = (some == 0) & (pair > 0)
            share = gone.sum((1, 2)) / absent.sum((1, 2)).clamp_min(1)
            none = absent & (draw < share[:, None, None])
            hidden = gone.float()
            h = model(some - hidden - hidden.transpose(1, 2), nodes)
            found = []
            for mask in (gone, none):
                b, i, j = mask.nonzero(as_tuple=True)
                found.append(decoder(h[b, i], h[b, j])[:, 0] + decoder(h[b, j], h[b, i])[:, 0])
            whole = pooled(h, nodes)
            b, i = nodes.nonzero(as_tuple=True)
            of = [context(h[b, i], c[b])[:, 0] for c in (whole, whole.roll(1, 0))]
            loss = torch.zeros(())
            for name, (yes, no) in {"edges": found, "context": of}.items():
                loss = loss + F.softplus(-yes).mean() + F.softplus(no).mean()
                if step >= steps - max(1, steps // 10):
                    right[name].append(0.5 * float((yes > 0).float().mean() + (no <= 0).float().mean()))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return model, {name: sum(values) / len(values) for name, values in right.items()}


def pooled(h: Tensor, real: Tensor) -> Tensor:
    """The mean [B, dim] over the nodes there are, of states h [B, n, dim] that are zero elsewhere."""
    return h.sum(1) / real.sum(1, keepdim=True)


class Classifier(nn.Module):
    """A GIN with a linear head on the mean over nodes."""

    def __init__(self, body: GIN, dim: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(dim, 2)

    def forward(self, A: Tensor, real: Tensor) -> Tensor:
        return self.head(pooled(self.body(A, real), real))


def tuned(body: GIN, dim: int, learn: Any, y: Tensor, test: Any, y_test: Tensor, steps: int, seed: int) -> float:
    """Accuracy on test graphs after fine-tuning everything on a few labelled graphs, in whole batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(body, dim)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        F.cross_entropy(model(*learn), y).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        return float((model(*test).argmax(-1) == y_test).double().mean())
