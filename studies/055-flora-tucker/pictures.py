# SPDX-License-Identifier: Apache-2.0
"""Grey pictures, the plain network and its pre-training, arms, and truncation errors of study 055."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.data import plan_epoch
from tunesmith.objectives.supervised import Classification
from tunesmith.study.fair import assert_disjoint, support_query
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit

LAYERS = ("c2", "c3", "c4", "c5", "c6")
SIDE = 28


def seeded(*words: object) -> torch.Generator:
    """A generator that depends on the words alone."""
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


class Plain(nn.Module):
    """Grey pictures [B, 1, 28, 28] to logits: six 3 x 3 convolutions with batch norm, three of them with stride 2."""

    def __init__(self, classes: int, widths: Sequence[int] = (64, 64, 96, 96, 128, 128)) -> None:
        super().__init__()
        self.names = [f"c{i}" for i in range(1, 7)]
        n = 1
        for i, (name, width) in enumerate(zip(self.names, widths, strict=True)):
            self.add_module(name, nn.Conv2d(n, width, 3, stride=2 - i % 2, padding=1, bias=False))
            self.add_module(f"n{name}", nn.BatchNorm2d(width))
            n = width
        self.head = nn.Linear(n, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values
        for name in self.names:
            x = F.relu(getattr(self, f"n{name}")(getattr(self, name)(x)))
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Labelled:
    """x [n, 1, 28, 28] fp32 in -1..1 and y [n] int64."""

    x: Tensor
    y: Tensor

    def take(self, rows: Sequence[int] | Tensor) -> Labelled:
        rows = torch.as_tensor(rows, dtype=torch.int64)
        return Labelled(self.x[rows], self.y[rows])

    def only(self, low: int, high: int) -> Labelled:
        """Classes low .. high - 1, counted from 0."""
        rows = ((self.y >= low) & (self.y < high)).nonzero().flatten()
        return Labelled(self.x[rows], self.y[rows] - low)


@dataclass
class Pictures:
    """What is learnt before (`source`, 15 classes), and per target `train` and `test` rows."""

    source: Labelled
    train: dict[str, Labelled]
    test: dict[str, Labelled]


def load(cifar: Path, mnist: Path, omniglot: Path) -> Pictures:
    """CIFAR-10 classes 0-4 and MNIST before, CIFAR-10 classes 5-9 and 20 Omniglot characters after."""
    with np.load(cifar / "cifar10.npz") as file:
        c = {k: file[k] for k in ("X_train", "y_train", "X_test", "y_test")}
    with np.load(mnist / "mnist_10k.npz") as file:
        digits = Labelled(pixels(file["X_train"]), torch.from_numpy(file["y_train"]).long())
    with np.load(omniglot / "omniglot_28.npz") as file:
        signs = Labelled(pixels(file["X"]), torch.from_numpy(file["y"]).long())
    objects = Labelled(pixels(grey(c["X_train"])), torch.from_numpy(c["y_train"]).long())
    held = Labelled(pixels(grey(c["X_test"])), torch.from_numpy(c["y_test"]).long())
    first = objects.only(0, 5)
    source = Labelled(torch.cat([first.x, digits.x]), torch.cat([first.y, digits.y + 5]))
    few = signs.only(0, 20)
    rows = support_query(few.y.tolist(), 10, 0, 0)  # 10 drawings of each character are never trained on
    return Pictures(
        source,
        {"cifar10 5-9": objects.only(5, 10), "omniglot": few.take(rows.support)},
        {"cifar10 5-9": held.only(5, 10), "omniglot": few.take(rows.rest)},
    )


def toy() -> Pictures:
    """Noise around a stripe pattern for each class, for a smoke run."""

    def some(n: int, classes: int, seed: int) -> Labelled:
        g = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % classes
        wave = torch.sin(torch.arange(SIDE)[None] * (0.2 + 0.1 * y[:, None]))
        x = wave[:, None, :, None] * wave[:, None, None, :] + 0.3 * torch.randn(n, 1, SIDE, SIDE, generator=g)
        return Labelled(x, y)

    names = {"cifar10 5-9": 5, "omniglot": 20}
    return Pictures(
        some(60, 15, 0),
        {name: some(6 * k, k, 1) for name, k in names.items()},
        {name: some(2 * k, k, 2) for name, k in names.items()},
    )


def grey(pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[n, 32, 32, 3] uint8 to the luminance of the middle 28 x 28, [n, 28, 28]."""
    middle = pictures[:, 2:30, 2:30].astype(np.float32)
    return middle @ np.array([0.299, 0.587, 0.114], np.float32)


def pixels(pictures: np.ndarray[Any, Any]) -> Tensor:
    """[n, 28, 28] of 0..255 to [n, 1, 28, 28] fp32 in -1..1."""
    return torch.from_numpy(pictures.astype(np.float32))[:, None] / 127.5 - 1


def pretrained(source: Labelled, steps: int, widths: Sequence[int]) -> tuple[Base, float]:
    """The network trained on the source with AdamW and a cosine rate, and its accuracy on the last batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Plain(15, widths)
    g = seeded("source")
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    right: list[float] = []
    for _ in range(steps):
        rows = torch.randint(len(source.y), (64,), generator=g)
        logits = model.train()(source.x[rows])
        right.append(float((logits.argmax(-1) == source.y[rows]).float().mean()))
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(logits, source.y[rows]).backward()
        optimiser.step()
        schedule.step()
    for p in model.requires_grad_(False).eval().parameters():
        p.grad = None
    last = right[-max(1, steps // 10) :]
    return Base(model, example=(source.x[:4].clone(),), name="plain-cnn"), sum(last) / len(last)


@dataclass
class PictureTask:
    """Ready pictures with labels, shuffled anew every epoch."""

    rows: Labelled
    objective: Classification = field(default_factory=Classification)

    def __len__(self) -> int:
        return len(self.rows.y)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch([1] * len(self), batch_size, seed=seed, epoch=epoch)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        some = self.rows.take(list(indices))
        return {"pixel_values": some.x, "labels": some.y}

    def tokens(self, indices: Sequence[int]) -> int:
        return len(indices)


def method(arm: str, scale: float, ranks: dict[str, int]) -> Any:
    """The method of an arm, its change multiplied by `scale`."""
    r, targets = ranks.get(arm, 1), ",".join(LAYERS)
    return {
        "flora": lambda: ts.FLoRA(rank=r, scale=scale, targets=targets),
        "lora": lambda: ts.LoRA(rank=r, alpha=scale * r, targets=targets),
        "loha": lambda: ts.LoHa(rank=r, alpha=scale * r, targets=targets),
        "loha-tucker": lambda: ts.LoHa(rank=r, alpha=scale * r, targets=targets, tucker=True),
        "full": lambda: ts.Full(targets=targets),
    }[arm]()


def split(rows: Labelled, train: int, dev: int, seed: int) -> tuple[Labelled, Labelled]:
    """`train` and `dev` rows of each class, drawn by the seed."""
    found = support_query(rows.y.tolist(), train, dev, seed)
    assert_disjoint(train=found.support, dev=found.val)
    return rows.take(found.support), rows.take(found.val)


def train(base: Base, how: Any, rows: Labelled, *, lr: float, steps: int, seed: int) -> Delta:
    """`steps` of 32 rows of a method with a fresh head; batch norm uses the base's statistics throughout."""
    delta = Delta.create(base, how, ts.Head(classes=int(rows.y.max()) + 1), name="arm", seed=seed)
    config = TrainConfig(steps=steps, batch_size=32, lr=lr, warmup=0.1, precision="fp32", seed=seed)
    fit(base, delta, PictureTask(rows), config, progress=False)
    return delta


@torch.no_grad()
def accuracy(base: Base, delta: Delta, rows: Labelled) -> float:
    """Percent of the rows whose class is found."""
    with base.using(delta, check=False), base.evaluating():
        right = [(base.model(x).argmax(-1) == y) for x, y in zip(rows.x.split(100), rows.y.split(100), strict=True)]
    return 100 * float(torch.cat(right).double().mean())


def numbers(delta: Delta) -> int:
    """Numbers trained outside the head."""
    return sum(t.numel() for p in delta.parts if p.info.name != "head" for _, _, t in p.items())


def tucker_count(shape: Sequence[int], r: int) -> int:
    """prod r_k + sum d_k r_k with r on the first two axes and the kernel axes whole."""
    ranks = [min(d, r) if i < 2 else d for i, d in enumerate(shape)]
    return int(np.prod(ranks)) + sum(d * k for d, k in zip(shape, ranks, strict=True))


def tucker_error(W: Tensor, r: int) -> float:
    """Relative Frobenius error of W [out, in, *kernel] cut to rank r on its first two axes by HOSVD.

    The kernel axes stay whole, so projecting on the leading singular vectors of the two unfoldings is all there is.
    """
    W = W.double()
    out = torch.linalg.svd(W.flatten(1), full_matrices=False).U[:, :r]
    into = torch.linalg.svd(W.transpose(0, 1).flatten(1), full_matrices=False).U[:, :r]
    P = torch.einsum("oa,pa,ib,jb,pj...->oi...", out, out, into, into, W)
    return float((W - P).norm() / W.norm())


def svd_error(W: Tensor, r: int) -> float:
    """Relative Frobenius error of W [out, in, *kernel] cut to rank r as a matrix [out, in * kernel]."""
    S = torch.linalg.svdvals(W.double().flatten(1))
    return float((S[r:].square().sum() / S.square().sum()).sqrt())


def truncations(delta: Delta, rank: int) -> list[dict[str, Any]]:
    """For every layer of a full change, both errors where the Tucker form has at most as many numbers as the matrix."""
    part = next(p for p in delta.parts if p.info.name == "full")
    found = []
    for path in part.paths:
        (W,) = (t.detach() for name, t in part.tensors(path).items() if t.dim() == 4)
        budget = rank * (W.shape[0] + W[0].numel())
        r = max(k for k in range(1, min(W.shape[:2]) + 1) if k == 1 or tucker_count(W.shape, k) <= budget)
        found.append({"layer": path, "tucker": tucker_error(W, r), "matrix": svd_error(W, rank), "rank": r})
    return found
