# SPDX-License-Identifier: Apache-2.0
"""A small convolutional net whose weights come from elsewhere: trained as they are, masked, or read from a shared vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.deltas.weight.hash_shared import gamma
from tunesmith.deltas.weight.hashing import Fold, P, draw_numbers, signs

WIDTHS = (16, 32, 64, 128)
CLASSES = 10


@dataclass(frozen=True)
class Shape:
    """Four 3x3 convolutions of stride 2 with these channels, and a linear layer on their mean over positions."""

    widths: tuple[int, int, int, int] = WIDTHS

    @property
    def weights(self) -> list[tuple[int, ...]]:
        before = (1, *self.widths[:-1])
        return [(c, b, 3, 3) for b, c in zip(before, self.widths, strict=True)] + [(CLASSES, self.widths[-1])]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(s) for s in self.weights]

    @property
    def total(self) -> int:
        """The weights that a budget is a share of; biases are apart in every arm."""
        return sum(self.sizes)


def forward(weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor) -> Tensor:
    """Images [B, 1, 28, 28] to logits [B, 10]."""
    for W, b in zip(weights[:-1], biases[:-1], strict=True):
        x = F.relu(F.conv2d(x, W, b, stride=2, padding=1))
    return F.linear(x.mean((2, 3)), weights[-1], biases[-1])


def spread(shape: tuple[int, ...]) -> float:
    """Standard deviation of He's first values, sqrt(2 / fan_in), for every layer."""
    return math.sqrt(2 / math.prod(shape[1:]))


def first_values(shape: Shape, seed: int) -> list[Tensor]:
    """The ordinary start: normal with that spread."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g) * spread(s) for s in shape.weights]


class Source(Protocol):
    """Where weights come from, what trains, and what is done to gradients before the optimiser sees them."""

    def parameters(self) -> list[Tensor]: ...

    def weights(self) -> list[Tensor]: ...

    def scale(self) -> None: ...


@dataclass
class Plain:
    """Weights that train as they are, with a mask if given."""

    values: list[Tensor]
    masks: list[Tensor] | None = None

    def __post_init__(self) -> None:
        self.values = [v.detach().clone().requires_grad_(True) for v in self.values]

    def parameters(self) -> list[Tensor]:
        return self.values

    def weights(self) -> list[Tensor]:
        return self.values if self.masks is None else [v * m for v, m in zip(self.values, self.masks, strict=True)]

    def scale(self) -> None:
        """Nothing: a masked weight has no gradient."""


@dataclass
class Shared:
    """W_i = lambda g(i) psi[h(i)] with psi [m] from N(0, init_std^2) and lambda = the layer's spread / init_std.

    `fold` is the map of STABLE-RPS with gradients divided by 1e-6 + Gamma; without it the weights are read in square
    tiles from hashed starts and gradients stay as they are (ROAST). With `start`, psi is set so that the weights are
    those (for m = n).
    """

    shape: Shape
    m: int
    seed: int
    init_std: float = 0.04
    fold: bool = True
    start: Sequence[Tensor] | None = None
    tile: int = 16
    psi: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.numbers = draw_numbers(g)
        self.psi = torch.randn(self.m, generator=g) * self.init_std
        self.spreads = [spread(s) / self.init_std for s in self.shape.weights]
        self.map = Fold(self.shape.total, self.m, self.numbers)
        offsets = [sum(self.shape.sizes[:i]) for i in range(len(self.shape.sizes))]
        self.g = [signs(o, n, self.numbers[3:]).float() for o, n in zip(offsets, self.shape.sizes, strict=True)]
        self.offsets = offsets
        self.tiles = None if self.fold else tiles(self.shape, self.m, self.numbers, self.tile)
        count, total, squares = (torch.zeros(self.m) for _ in range(3))
        for at, lam in zip(self.cells(), self.spreads, strict=True):
            n = torch.bincount(at, minlength=self.m).float()
            count, total, squares = count + n, total + n * lam, squares + n * lam**2
        self.gamma = gamma("mean-move", count, total, squares)
        if self.start is not None:
            for at, signed, lam, W in zip(self.cells(), self.g, self.spreads, self.start, strict=True):
                self.psi[at] = W.flatten() * signed / lam
        self.psi.requires_grad_(True)

    def cells(self) -> list[Tensor]:
        """The cell of every weight, layer by layer."""
        if self.tiles is not None:
            return self.tiles
        return [self.map.cells(torch.arange(o, o + n)) for o, n in zip(self.offsets, self.shape.sizes, strict=True)]

    def parameters(self) -> list[Tensor]:
        return [self.psi]

    def weights(self) -> list[Tensor]:
        out = []
        for i, s in enumerate(self.shape.weights):
            if self.tiles is not None:
                flat = self.psi[self.tiles[i]]
            else:
                flat = self.map.gather(self.psi, self.offsets[i], self.shape.sizes[i])
            out.append((self.spreads[i] * self.g[i] * flat).reshape(s))
        return out

    def scale(self) -> None:
        if self.fold and self.psi.grad is not None:
            self.psi.grad /= 1e-6 + self.gamma


def tiles(shape: Shape, m: int, numbers: Tensor, side: int) -> list[Tensor]:
    """ROAST's cells: the weight as a matrix in square tiles, each from a hashed start in [0, m - side^2)."""
    room = m - side * side
    if room < 1:
        raise ValueError(f"tiles of {side * side} need more than {m} cells")
    a, out, tile = [int(v) for v in numbers[:3]], [], 0
    inside = torch.arange(side * side).reshape(side, side)
    for s in shape.weights:
        rows, columns = s[0], math.prod(s[1:])
        high, wide = -(-rows // side), -(-columns // side)
        starts = [(a[0] * k + a[1] * k * k + a[2]) % P % room for k in range(tile, tile + high * wide)]
        tile += high * wide
        at = torch.tensor(starts).reshape(high, 1, wide, 1) + inside.reshape(1, side, 1, side)
        out.append(at.reshape(high * side, wide * side)[:rows, :columns].reshape(-1))
    return out


# Masks at the start


def narrower(budget: int) -> Shape:
    """The net of the same form, its widths scaled, whose weights are nearest to `budget`."""
    factors = [10 ** (k / 60 - 3) for k in range(181)]
    shapes = {Shape(tuple(max(1, round(f * w)) for w in WIDTHS)) for f in factors}  # type: ignore[arg-type]
    return min(shapes, key=lambda s: (abs(s.total - budget), s.total))


def keep_largest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """1 at the k largest scores over all layers together, ties to the earlier one, else 0."""
    from tunesmith.deltas.weight.sparse import top_of_all

    chosen = top_of_all({str(i): s for i, s in enumerate(scores)}, k)
    out = []
    for i, s in enumerate(scores):
        mask = torch.zeros(s.numel())
        mask[chosen.get(str(i), torch.empty(0, dtype=torch.int64))] = 1
        out.append(mask.reshape(s.shape))
    return out


def random_masks(shape: Shape, k: int, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed + 1000)
    return keep_largest([torch.rand(s, generator=g) for s in shape.weights], k)


def snip(values: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor, y: Tensor, k: int) -> list[Tensor]:
    """|dL/dW * W| on some training images (Lee et al. 2019)."""
    W = [v.detach().clone().requires_grad_(True) for v in values]
    grads = torch.autograd.grad(F.cross_entropy(forward(W, biases, x), y), W)
    return keep_largest([(g * w).abs().detach() for g, w in zip(grads, W, strict=True)], k)


def synflow(values: Sequence[Tensor], k: int, rounds: int = 100) -> list[Tensor]:
    """R = dR/d|W| * |W| with R the output on ones and weights |W|, pruned geometrically in rounds (Tanaka et al. 2020)."""
    n = sum(v.numel() for v in values)
    masks = [torch.ones_like(v) for v in values]
    none = [torch.zeros(v.shape[0]) for v in values]
    for r in range(1, rounds + 1):
        W = [(v.abs() * m).double().requires_grad_(True) for v, m in zip(values, masks, strict=True)]
        out = forward(W, [b.double() for b in none], torch.ones(1, 1, 28, 28, dtype=torch.float64))
        grads = torch.autograd.grad(out.sum(), W)
        scores = [(g * w).detach() for g, w in zip(grads, W, strict=True)]
        top = max(float(s.max()) for s in scores) or 1.0  # ranks alone count; fp32 would lose the small ones
        left = round(n * (k / n) ** (r / rounds))
        masks = keep_largest(
            [(s / top).clamp_min(1e-300).log() - 1e6 * (m == 0) for s, m in zip(scores, masks, strict=True)], left
        )
    return masks


# Training


@dataclass(frozen=True)
class Data:
    """Images [n, 1, 28, 28] around 0 and labels [n]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


def fit(
    source: Source,
    data: Data,
    *,
    lr: float,
    epochs: int,
    batch: int,
    seed: int,
    on_epoch: Callable[[int, list[Tensor], list[Tensor]], None] | None = None,
    biases: list[Tensor] | None = None,
) -> list[Tensor]:
    """SGD with momentum 0.9 and a rate that falls tenfold at 1/2 and 3/4; gives the trained biases.

    `on_epoch(epoch, weights, biases)` is called after every epoch, from 1.
    """
    out = [W.shape[0] for W in source.weights()]
    biases = biases or [torch.zeros(n) for n in out]
    biases = [b.detach().clone().requires_grad_(True) for b in biases]
    optimiser = torch.optim.SGD([*source.parameters(), *biases], lr=lr, momentum=0.9)
    steps = epochs * -(-len(data) // batch)
    plan = torch.optim.lr_scheduler.MultiStepLR(optimiser, [max(1, steps // 2), max(2, 3 * steps // 4)])
    g = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for rows in torch.randperm(len(data), generator=g).split(batch):
            loss = F.cross_entropy(forward(source.weights(), biases, data.x[rows]), data.y[rows])
            loss.backward()
            source.scale()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            plan.step()
        if on_epoch is not None:
            on_epoch(epoch + 1, [W.detach().clone() for W in source.weights()], [b.detach().clone() for b in biases])
    return biases


@torch.no_grad()
def accuracy(source: Source, biases: Sequence[Tensor], data: Data) -> float:
    """Percent correct; logits that are not finite count as wrong."""
    logits = torch.cat([forward(source.weights(), biases, x) for x in data.x.split(1000)])
    right = (logits.argmax(-1) == data.y) & torch.isfinite(logits).all(-1)
    return 100 * float(right.double().mean())
