# SPDX-License-Identifier: Apache-2.0
"""Pictures of study 046: grey 28x28 CIFAR-10 to pre-train on, MNIST and Omniglot to fine-tune on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.study.fair import assert_disjoint, support_query

SIDE = 28


@dataclass(frozen=True)
class Labelled:
    """Pictures [n, 1, 28, 28] (or larger, to be cropped) in about -2..2, and classes [n]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Sequence[int]) -> Labelled:
        index = torch.as_tensor(list(rows))
        return Labelled(self.x[index], self.y[index])


@dataclass(frozen=True)
class Task:
    """A downstream task of one seed; no picture is in two splits."""

    name: str
    classes: int
    train: Labelled
    dev: Labelled
    test: Labelled


def normal(pixels: np.ndarray[Any, Any]) -> Tensor:
    """uint8 [n, H, W] to [n, 1, H, W], mean and spread of grey photographs taken off."""
    return (torch.from_numpy(pixels).float()[:, None] / 255 - 0.47) / 0.24


def general(folder: Path | None, classes: int) -> Labelled:
    """Grey 32x32 pictures of the first `classes` classes of CIFAR-10's training file, or toys."""
    if folder is None:
        return _toy(classes, 8, 32, 0)
    with np.load(folder / "cifar10.npz") as file:
        x, y = file["X_train"], file["y_train"]
    keep = y < classes
    grey = x[keep].astype(np.float32).mean(-1).round().astype(np.uint8)
    return Labelled(normal(grey), torch.from_numpy(y[keep]).long())


def mnist(folder: Path | None, train: int, dev: int, test: int, seed: int) -> Task:
    """`train` and `dev` pictures of each digit, drawn by the seed; the first `test` of a fixed shuffle of the test file."""
    if folder is None:
        pool, held = _toy(10, train + dev, SIDE, seed), _toy(10, 3, SIDE, 99)
    else:
        with np.load(folder / "mnist_10k.npz") as file:
            pool = Labelled(normal(file["X_train"]), torch.from_numpy(file["y_train"]).long())
            held = Labelled(normal(file["X_test"]), torch.from_numpy(file["y_test"]).long())
        held = held.take(np.random.RandomState(0).permutation(len(held))[:test].tolist())
    rows = support_query(pool.y.tolist(), train, dev, seed)
    assert_disjoint(train=rows.support, dev=rows.val)
    return Task("mnist", 10, pool.take(rows.support), pool.take(rows.val), held)


def omniglot(folder: Path | None, ways: int, train: int, dev: int, seed: int) -> Task:
    """`ways` characters drawn by the seed; of the 20 drawings of each, `train` and `dev` drawn, the rest are the test."""
    if folder is None:
        pool, chosen = _toy(ways, 20, SIDE, seed), list(range(ways))
    else:
        with np.load(folder / "omniglot_28.npz") as file:
            pool = Labelled(normal(file["X"]), torch.from_numpy(file["y"]).long())
        chosen = random.Random(f"characters:{seed}").sample(sorted(set(pool.y.tolist())), ways)
    names = {c: i for i, c in enumerate(chosen)}
    rows = [i for i, c in enumerate(pool.y.tolist()) if c in names]
    some = pool.take(rows)
    some = Labelled(some.x, torch.tensor([names[c] for c in some.y.tolist()]))
    split = support_query(some.y.tolist(), train, dev, seed)
    assert_disjoint(train=split.support, dev=split.val, test=split.rest)
    return Task("omniglot", ways, some.take(split.support), some.take(split.val), some.take(split.rest))


def _toy(classes: int, each: int, side: int, seed: int) -> Labelled:
    """A pattern for each class with noise."""
    base = torch.randn(classes, 1, side, side, generator=torch.Generator().manual_seed(5))
    y = torch.arange(classes * each) % classes
    noise = torch.randn(len(y), 1, side, side, generator=torch.Generator().manual_seed(seed))
    return Labelled(base[y] + 0.3 * noise, y)


def batches(data: Labelled, batch: int, seed: int, *, augment: bool = False) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batch i of an endless run in a new order each epoch; larger pictures are cropped to 28x28, at random and flipped with
    `augment`, in the middle without."""
    per = max(1, len(data) // batch)

    def at(i: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed * 1_000_003 + i // per)
        rows = torch.randperm(len(data), generator=g)[(i % per) * batch : (i % per + 1) * batch]
        x = data.x[rows]
        if not augment:
            return crop(x), data.y[rows]
        g = torch.Generator().manual_seed(seed * 7_000_003 + i)
        room = x.shape[-1] - SIDE
        at_, flip = torch.randint(0, room + 1, (len(rows), 2), generator=g), torch.rand(len(rows), generator=g) < 0.5
        cut = [p[:, a : a + SIDE, b : b + SIDE] for p, (a, b) in zip(x, at_.tolist(), strict=True)]
        return torch.stack([p.flip(-1) if f else p for p, f in zip(cut, flip.tolist(), strict=True)]), data.y[rows]

    return at


def crop(x: Tensor) -> Tensor:
    """The middle 28x28."""
    room = (x.shape[-1] - SIDE) // 2
    return x[..., room : room + SIDE, room : room + SIDE]
