# SPDX-License-Identifier: Apache-2.0
"""A tiny ViT pre-trained on digits and grey CIFAR, and many small picture tasks on it under fixed probe heads.

Pictures are grey, [n, 1, 28, 28] in 0..1. Tasks are `SOURCE-VARIANT`, with `digits` (MNIST, 10 classes) or `things`
(CIFAR-10 made grey, 10 classes) as the source and a deterministic change of every picture (`VARIANTS`); `alphabets`
(Omniglot, 8 alphabets; test drawers are others) and `glyphs` (8 rendered shapes). The base has seen the plain pictures of
both sources, with 20 classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError, nearest
from tunesmith.core.objective import Objective, get_objective
from tunesmith.data import plan_epoch
from tunesmith.study.fair import assert_disjoint
from tunesmith.study.spec import Context
from tunesmith.study.worlds.probed import ProbeWorld, fit_probe
from tunesmith.study.worlds.vit import TinyViT
from tunesmith.train.modes import measuring

SOURCES = ("digits", "things")
DATA = ("mnist_10k", "cifar10", "omniglot")
SHAPES = 8
Pool = tuple[Tensor, Tensor]


def _permuted(x: Tensor) -> Tensor:
    """The 16 patches of 7 x 7 in one fixed order of their own."""
    order = torch.from_numpy(np.random.RandomState(7).permutation(16))
    patches = F.unfold(x, 7, stride=7)[:, :, order]
    return F.fold(patches, 28, 7, stride=7)


VARIANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotated": lambda x: torch.rot90(x, 1, (2, 3)),
    "inverted": lambda x: 1 - x,
    "blurred": lambda x: F.avg_pool2d(x, 5, 1, 2, count_include_pad=False),
    "permuted": _permuted,
}
TASKS = (*(f"{s}-{v}" for v in VARIANTS for s in SOURCES), "alphabets", "glyphs")


@dataclass(frozen=True)
class Size:
    """The model, its pre-training and the rows of a task."""

    dim: int = 128
    depth: int = 4
    heads: int = 4
    epochs: int = 8
    batch: int = 32
    train: int = 2000
    dev: int = 500
    test: int = 1000


TOY = Size(16, 2, 2, 1, 16, 32, 20, 20)


class GreyViT(TinyViT):
    """A `TinyViT` that reads pictures in 0..1 and gives the mean over patches [B, dim]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.4) / 0.25)  # about mean and deviation of the sources


@dataclass
class PictureTask:
    """Pictures x [n, 1, 28, 28] with classes y [n], shuffled anew every epoch."""

    x: Tensor
    y: Tensor
    objective: Objective = field(default_factory=lambda: get_objective("classification")())

    def __len__(self) -> int:
        return len(self.y)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch([1] * len(self.y), batch_size, seed=seed, epoch=epoch)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        rows = torch.as_tensor(list(indices))
        return {"x": self.x[rows], "labels": self.y[rows]}

    def tokens(self, indices: Sequence[int]) -> int:
        return len(indices)


@dataclass
class Pictures:
    """The pre-trained base with the pools its tasks draw from; a task is made by `world`."""

    base: Base
    pools: dict[str, dict[str, Pool]]
    size: Size
    pretrained: float

    def world(self, name: str, seed: int) -> ProbeWorld:
        """A task with training and dev rows drawn by `seed`, the same test rows for every seed, and its fitted head.

        Raises UsageError for an unknown task.
        """
        if name not in TASKS:
            raise UsageError(f"there is no picture task {name!r}", hint=nearest(name, TASKS))
        source, _, variant = name.partition("-")
        change = VARIANTS[variant] if variant else (lambda x: x)
        (x, y), (tx, ty) = self.pools[source]["train"], self.pools[source]["test"]
        order = np.random.RandomState(seed).permutation(len(y))
        size = self.size
        dev, learn = order[: size.dev], order[size.dev : size.dev + size.train]
        assert_disjoint(train=learn.tolist(), dev=dev.tolist())
        few = np.random.RandomState(0).permutation(len(ty))[: size.test]
        held = {"dev": (change(x[dev]), y[dev]), "test": (change(tx[few]), ty[few])}
        task = PictureTask(change(x[learn]), y[learn])
        probe = fit_probe(self.features(task.x), task.y, int(y.max()) + 1, decay=1e-2)
        return ProbeWorld(name, self.base, task, held, self.features, probe, size.batch)

    def features(self, x: Tensor) -> Tensor:
        """The mean over patches [n, dim] of the base as it stands."""
        with measuring(self.base, "fp32"):
            return torch.cat([self.base.model(part) for part in x.split(250)])


def pictures(ctx: Context, names: Sequence[str], size: Size | None = None) -> Pictures:
    """The base and the pools that the tasks `names` need. A smoke run has a toy model and random pictures.

    Pre-training has one seed of its own, so that every study with one `Size` has one base. `pretrained` is its accuracy
    on test pictures of both sources, in 0..1.
    """
    size = TOY if ctx.smoke else size or Size()
    pools = {s: _pool(ctx, s, size) for s in dict.fromkeys([*SOURCES, *(n.partition("-")[0] for n in names)])}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GreyViT(28, 7, size.dim, size.depth, size.heads, channels=1, mean=True)
        accuracy = _pretrain(model, pools, size)
    model.eval().requires_grad_(False)
    base = Base(model, example=(pools["digits"]["train"][0][:4],), name="tiny-vit", family="vision")
    return Pictures(base, pools, size, accuracy)


def when_asked(ctx: Context, names: Sequence[str], size: Size) -> Callable[[str, int], ProbeWorld]:
    """`world(name, seed)` of `pictures`, whose base is pre-trained when the first world is asked for."""
    made: list[Pictures] = []

    def world(name: str, seed: int) -> ProbeWorld:
        if not made:
            made.append(pictures(ctx, names, size))
            ctx.log(f"base pre-trained, {100 * made[0].pretrained:.1f} % of both sources' test pictures")
        return made[0].world(name, seed)

    return world


def chosen_rate(
    ctx: Context, world: Callable[[str, int], ProbeWorld], names: Sequence[str], rates: Sequence[float], steps: int
) -> tuple[float, dict[str, list[float]]]:
    """The rate with the best sum of dev accuracies over tasks on the first seed, the smaller of equals; and all of them."""
    seed = ctx.seeds[0]

    def dev_after(lr: float) -> list[float]:
        out = []
        for name in names:
            w = world(name, seed)
            with w.base.using(w.tuned(lr, steps, seed)):
                out.append(w.score("dev").metric)
        return out

    found = {lr: ctx.cell({"rate": lr, "seed": seed}, lambda lr=lr: dev_after(lr)) for lr in rates}
    return max(rates, key=lambda lr: (sum(found[lr]), -lr)), {str(k): v for k, v in found.items()}


def _pretrain(model: TinyViT, pools: dict[str, dict[str, Pool]], size: Size) -> float:
    """Classify digits and things into 20 classes: AdamW, one cycle, shifts of up to 2 pixels, half of the things mirrored."""

    def both(split: str) -> Pool:
        (a, ya), (b, yb) = pools["digits"][split], pools["things"][split]
        return torch.cat([a, b]), torch.cat([ya, yb + 10])

    x, y = both("train")
    head = torch.nn.Linear(size.dim, 20)
    trained = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05)
    steps = size.epochs * (len(y) // size.batch)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=max(20, steps), pct_start=0.1)
    for _ in range(size.epochs):
        for rows in torch.randperm(len(y)).split(size.batch)[: len(y) // size.batch]:
            dx, dy = torch.randint(0, 5, (2,)).tolist()
            mirrored = (torch.rand(len(rows)) < 0.5) & (y[rows] >= 10)
            batch = torch.where(mirrored[:, None, None, None], x[rows].flip(3), x[rows])
            batch = F.pad(batch, (2, 2, 2, 2))[:, :, dy : dy + 28, dx : dx + 28]
            F.cross_entropy(head(model(batch)), y[rows]).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            plan.step()
    model.eval()
    tx, ty = both("test")
    with torch.no_grad():
        found = torch.cat([head(model(part)).argmax(-1) for part in tx.split(250)])
    return float((found == ty).double().mean())


def _pool(ctx: Context, source: str, size: Size) -> dict[str, Pool]:
    """Training and test pictures of a source, with classes from 0."""
    if source == "glyphs":
        n = 8 * SHAPES if ctx.smoke else size.train + size.dev + 100
        return {"train": glyphs(n, 1), "test": glyphs(n if ctx.smoke else size.test, 2)}
    name = {"digits": "mnist_10k", "things": "cifar10", "alphabets": "omniglot"}[source]
    folder = ctx.data_folder(name)
    if folder is None:
        classes = SHAPES if source == "alphabets" else 10
        return {"train": _toy(80, classes, 1), "test": _toy(40, classes, 2)}
    stem = "omniglot_28" if source == "alphabets" else name
    with np.load(folder / f"{stem}.npz") as file:
        if source == "alphabets":
            early = file["drawer"] <= 15
            x, y = pixels(file["X"]), torch.from_numpy(file["alphabet"].astype(np.int64))
            return {"train": (x[early], y[early]), "test": (x[~early], y[~early])}
        shape = grey if source == "things" else (lambda x: x)
        return {
            split: (pixels(shape(file[f"X_{split}"])), torch.from_numpy(file[f"y_{split}"]).long())
            for split in ("train", "test")
        }


def pixels(images: Any) -> Tensor:
    """uint8 [n, 28, 28] to fp32 [n, 1, 28, 28] in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).unsqueeze(1).float() / 255


def grey(images: Any) -> Any:
    """Colour pictures [n, 32, 32, 3] as grey ones, cut to their middle 28 x 28, uint8."""
    light = images[:, 2:30, 2:30].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return light.round().astype(np.uint8)


def glyphs(n: int, seed: int) -> Pool:
    """Rendered shapes of 8 classes at random places, sizes and tones over noise: fp32 [n, 1, 28, 28], classes [n]."""
    rng = np.random.RandomState(seed)
    v, u = np.mgrid[0:28, 0:28].astype(np.float32)
    y = np.arange(n) % SHAPES
    out = np.empty((n, 28, 28), np.float32)
    for i, kind in enumerate(y):
        r = rng.uniform(5, 9)
        a, b = (u - rng.uniform(r + 1, 26 - r)) / r, (v - rng.uniform(r + 1, 26 - r)) / r
        box, disc = np.maximum(abs(a), abs(b)), np.hypot(a, b)
        ink = (
            box < 1, (box < 1) & (box > 0.6), disc < 1, (disc < 1) & (disc > 0.6), (b > -1) & (b < 1) & (abs(a) < (b + 1) / 2),
            (np.minimum(abs(a), abs(b)) < 0.2) & (box < 1), (abs(abs(a) - abs(b)) < 0.28) & (box < 1),
            (abs(a) + abs(b) < 1.1) & (abs(a) + abs(b) > 0.7),
        )[kind]  # fmt: skip
        out[i] = rng.uniform(0.5, 1.0) * ink + rng.normal(0, 0.15, (28, 28))
    return torch.from_numpy(out.clip(0, 1)).unsqueeze(1), torch.from_numpy(y)


def _toy(n: int, classes: int, seed: int) -> Pool:
    """A bright spot whose place says the class, over noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = 0.3 * torch.rand(n, 1, 28, 28, generator=g)
    for i, c in enumerate(y.tolist()):
        x[i, 0, 2 + 5 * (c // 5) : 6 + 5 * (c // 5), 5 * (c % 5) : 5 * (c % 5) + 4] += 0.7
    return x, y
