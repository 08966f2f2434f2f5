# SPDX-License-Identifier: Apache-2.0
"""A small network on small pictures, pruned by magnitude and retrained, and what is measured on pairs of study 061."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.inspect.regimes import between, cka, connectivity, magnitude_masks, recalibrated

State = dict[str, Tensor]


def seeded(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


@dataclass(frozen=True)
class Rows:
    """x [n, 3, side, side] fp32 and y [n] int64."""

    x: Tensor
    y: Tensor

    def first(self, n: int) -> Rows:
        return Rows(self.x[:n], self.y[:n])


def load(folder: Path, train: int, test: int, side: int) -> tuple[Rows, Rows]:
    """CIFAR-10 averaged down to `side` pixels, in a fixed random order (the file is sorted by class)."""
    with np.load(folder / "cifar10.npz") as file:
        x, y, x_test, y_test = (file[k] for k in ("X_train", "y_train", "X_test", "y_test"))

    def rows(x: Any, y: Any, n: int) -> Rows:
        keep = np.random.RandomState(0).permutation(len(y))[:n]
        pictures = torch.from_numpy(x[keep]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return Rows(F.adaptive_avg_pool2d(pictures, side), torch.from_numpy(y[keep]).long())

    return rows(x, y, train), rows(x_test, y_test, test)


def toy(train: int, test: int, side: int) -> tuple[Rows, Rows]:
    """Noise around a colour for each class, for a smoke run."""
    colours = torch.randn(10, 3, 1, 1, generator=seeded("colours"))

    def rows(n: int, word: str) -> Rows:
        y = torch.arange(n) % 10
        return Rows(colours[y] + 0.3 * torch.randn(n, 3, side, side, generator=seeded(word)), y)

    return rows(train, "train"), rows(test, "test")


def network(widths: Sequence[int], seed: int) -> nn.Module:
    """Three blocks of a 3 x 3 convolution, batch norm, ReLU and pooling, then a linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for n, width in zip((3, *widths[:-1]), widths, strict=True):
            layers += [nn.Conv2d(n, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def train(
    model: nn.Module, rows: Rows, epochs: Sequence[int], lr: float, seed: int, masks: State | None = None
) -> list[State]:
    """SGD with momentum 0.9, batch 64, weight decay 1e-4 and a constant rate; the states after each of `epochs`."""
    named = dict(model.named_parameters())
    optimiser = torch.optim.SGD(named.values(), lr=lr, momentum=0.9, weight_decay=1e-4)
    g, kept = seeded("order", seed), []
    for epoch in range(1, max(epochs) + 1):
        model.train()
        for some in torch.randperm(len(rows.y), generator=g).split(64):
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(model(rows.x[some]), rows.y[some]).backward()
            optimiser.step()
            if masks is not None:
                with torch.no_grad():
                    for name, mask in masks.items():
                        named[name].mul_(mask)
        if epoch in epochs:
            kept.append(copy.deepcopy(model.state_dict()))
    return kept


def prunable(state: State) -> State:
    """Convolutions and the linear layer, without norms and biases."""
    return {k: v for k, v in state.items() if k.endswith("weight") and v.dim() > 1}


def pruned(model: nn.Module, dense: State, density: float) -> State:
    """Put the dense state, pruned by magnitude layer by layer, into the model; the masks."""
    masks = {k: m.float() for k, m in magnitude_masks(prunable(dense), density).items()}
    model.load_state_dict({k: v * masks[k] if k in masks else v for k, v in dense.items()})
    return masks


@torch.no_grad()
def outputs(model: nn.Module, rows: Rows) -> Tensor:
    model.eval()
    return torch.cat([model(x) for x in rows.x.split(250)])


def error(model: nn.Module, state: State, rows: Rows) -> float:
    """Percent of the rows that are wrong."""
    model.load_state_dict(state)
    return 100 * float((outputs(model, rows).argmax(1) != rows.y).double().mean())


def measured(model: nn.Module, a: State, b: State, learn: Rows, held: Rows) -> dict[str, Any]:
    """LMC of the training error (percent, batch norms measured anew at each of 11 points) and CKA of outputs on `held`."""

    def at(t: float) -> float:
        model.load_state_dict(between(a, b, t))
        with recalibrated(model, lambda: [model(x) for x in learn.x.split(250)]):
            return 100 * float((outputs(model, learn).argmax(1) != learn.y).double().mean())

    path = connectivity(at)
    found = []
    for state in (a, b):
        model.load_state_dict(state)
        found.append(outputs(model, held))
    return {"lmc": path.lmc, "path": path.losses, "cka": cka(*found)}
