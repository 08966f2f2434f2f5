# SPDX-License-Identifier: Apache-2.0
"""The stand-in for CLIP: a small picture model matched to sentence vectors of class names, and its few-shot targets."""

from __future__ import annotations

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
from tunesmith.data import plan_epoch
from tunesmith.objectives.supervised import Classification
from tunesmith.study.fair import assert_disjoint, support_query
from tunesmith.study.worlds.vit import TinyViT
from tunesmith.study.worlds.world import Score
from tunesmith.train.attention import BlockAttention
from tunesmith.train.modes import measuring

SCALE = 20.0  # of cosines, in the logits
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = tuple(f"the digit {word}" for word in WORDS)
Images = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shape:
    """The picture model and its pre-training."""

    dim: int
    depth: int
    heads: int
    text: int
    epochs: int
    batch: int


REAL = Shape(192, 6, 3, 384, 12, 64)
TOY = Shape(16, 2, 2, 8, 1, 16)


class Matcher(nn.Module):
    """Grey pictures [B, 1, 28, 28] in 0..1 to logits [B, classes]: scaled cosines with the vectors of class names.

    The vectors are no part of the module's state: one encoder serves every list of names.
    """

    def __init__(self, vit: TinyViT, names: Tensor) -> None:
        super().__init__()
        self.vit = vit
        self.names = F.normalize(names, dim=-1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.vit((pixel_values - 0.5) / 0.25)
        return SCALE * F.normalize(x.float(), dim=-1) @ self.names.T


@dataclass
class PictureTask:
    """Pictures x [n, 1, 28, 28] with classes y [n]."""

    x: Tensor
    y: Tensor
    objective: Classification = field(default_factory=Classification)

    def __len__(self) -> int:
        return len(self.y)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch([1] * len(self.y), batch_size, seed=seed, epoch=epoch)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        rows = torch.as_tensor(list(indices))
        return {"pixel_values": self.x[rows], "labels": self.y[rows]}

    def tokens(self, indices: Sequence[int]) -> int:
        return len(indices)


@dataclass
class PictureWorld:
    """A few pictures of each class to learn from; `metric` is accuracy."""

    name: str
    base: Base
    task: PictureTask
    held: dict[str, tuple[Tensor, Tensor]]
    batch: int
    precision: str
    companions: Sequence[Any] = ()
    higher_is_better: bool = True

    def score(self, split: str) -> Score:
        x, y = self.held[split]
        with measuring(self.base, self.precision):
            found = torch.cat([self.base.model(part) for part in x.split(250)])
        right = (found.argmax(-1) == y).double()
        return Score(float(right.mean()), right.tolist(), [1] * len(y))

    def retention(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Target:
    """Pictures to draw shots from and to test on, uint8 [n, 28, 28] with classes, and a base that knows the names."""

    name: str
    base: Base
    pool: tuple[Images, Tensor]
    test: tuple[Images, Tensor]

    def few(self, shots: int, seed: int, held: int, batch: int, precision: str) -> PictureWorld:
        """`shots` pictures of each class drawn by `seed`, and up to `held` others of each for choosing a rate."""
        x, y = self.pool
        each = int(torch.bincount(y).min())
        rows = support_query(y.tolist(), shots, min(held, each - shots), seed)
        assert_disjoint(shots=rows.support, held=rows.val)
        task = PictureTask(pixels(x[rows.support]), y[rows.support])
        dev, test = (pixels(x[rows.val]), y[rows.val]), (pixels(self.test[0]), self.test[1])
        return PictureWorld(self.name, self.base, task, {"dev": dev, "test": test}, min(batch, len(task)), precision)


def pixels(images: Images) -> Tensor:
    """uint8 [n, 28, 28] to fp32 [n, 1, 28, 28] in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).unsqueeze(1).float() / 255


def grey(images: Images) -> Images:
    """Colour pictures [n, 32, 32, 3] as grey ones, cut to their middle 28 x 28."""
    light = images[:, 2:30, 2:30].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return light.round().astype(np.uint8)


def letters(file: dict[str, Images], classes: int) -> tuple[tuple[Images, Tensor], tuple[Images, Tensor], list[str]]:
    """`classes` characters drawn by a fixed seed: drawers 1 to 10 to learn from, 11 to 20 to test on, and their names."""
    chosen = np.random.RandomState(0).permutation(np.unique(file["y"]))[:classes]
    at = {int(c): i for i, c in enumerate(chosen)}
    mine = np.isin(file["y"], chosen)
    y = torch.tensor([at[int(c)] for c in file["y"][mine]])
    x, early = file["X"][mine], file["drawer"][mine] <= 10
    names = [str(file["characters"][int(c)]).replace("/", " ").replace("_", " ") for c in chosen]
    return (x[early], y[torch.from_numpy(early)]), (x[~early], y[torch.from_numpy(~early)]), names


@torch.no_grad()
def name_vectors(base: Base, names: Sequence[str]) -> Tensor:
    """MiniLM's sentence vectors of "a picture of ...", [names, 384]."""
    batch = base.tokenizer([f"a picture of {n}" for n in names], padding=True, return_tensors="pt")
    h = base.model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return (h * mask).sum(1) / mask.sum(1)


def align(model: Matcher, x: Images, y: Tensor, shape: Shape, precision: str) -> None:
    """Train the picture model from scratch to match the frozen name vectors: AdamW, one cycle, flips and shifts."""
    steps = shape.epochs * (len(y) // shape.batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=max(2, steps), pct_start=0.1)
    half = precision != "fp32"
    for _ in range(shape.epochs):
        order = torch.randperm(len(y))
        for rows in order.split(shape.batch)[: len(y) // shape.batch]:
            batch = F.pad(pixels(x[rows.numpy()]), (3, 3, 3, 3))
            dx, dy = torch.randint(0, 7, (2,)).tolist()
            batch = batch[:, :, dy : dy + 28, dx : dx + 28]
            batch = batch.flip(-1) if torch.rand(()) < 0.5 else batch
            with BlockAttention(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = F.cross_entropy(model(batch), y[rows])
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            plan.step()
    model.eval().requires_grad_(False)


def build(data: dict[str, Path | None], encoder: Base | None, precision: str, test: int) -> list[Target]:
    """The model aligned on CIFAR-10, with digits and letters as targets; toy pictures where there is no data."""
    if encoder is None or None in data.values():
        shape = TOY
        x, y = _toy(60, 1)
        names, of_digits, of_letters = torch.randn(3, 10, shape.text, generator=torch.Generator().manual_seed(0))
        digits, letters_ = (_toy(200, 2), _toy(test, 3)), (_toy(100, 4), _toy(test, 5))
    else:
        shape = REAL
        files = {}
        for name, stem in (("cifar10", "cifar10"), ("mnist_10k", "mnist_10k"), ("omniglot", "omniglot_28")):
            with np.load(data[name] / f"{stem}.npz") as file:  # type: ignore[operator]
                files[name] = {k: file[k] for k in file.files}
        cifar, mnist = files["cifar10"], files["mnist_10k"]
        x, y = grey(cifar["X_train"]), torch.from_numpy(cifar["y_train"]).long()
        digits = (
            (mnist["X_train"], torch.from_numpy(mnist["y_train"]).long()),
            (mnist["X_test"][:test], torch.from_numpy(mnist["y_test"]).long()[:test]),
        )
        *letters_, characters = letters(files["omniglot"], 20)
        names = name_vectors(encoder, [f"a {c}" for c in cifar["classes"]])
        of_digits, of_letters = name_vectors(encoder, DIGITS), name_vectors(encoder, characters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = TinyViT(28, 7, shape.dim, shape.depth, shape.heads, 1, shape.text)
        align(Matcher(vit, names), x, y, shape, precision)

    def target(name: str, vectors: Tensor, pool: tuple[Images, Tensor], tested: tuple[Images, Tensor]) -> Target:
        base = Base(Matcher(vit, vectors).eval(), example=(pixels(pool[0][:2]),), name="aligned-vit", family="vision")
        return Target(name, base, pool, tested)

    return [target("digits", of_digits, *digits), target("letters", of_letters, *letters_)]


def _toy(n: int, seed: int) -> tuple[Images, Tensor]:
    """Noise around a brightness for each of ten classes."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 10
    x = 25 * y[:, None, None] + rng.integers(0, 25, size=(n, 28, 28))
    return x.astype(np.uint8), torch.from_numpy(y).long()


def sentences() -> Base:
    """The frozen sentence encoder."""
    return ts.load("minilm-l6", dtype="fp32", device="cpu")
