# SPDX-License-Identifier: Apache-2.0
"""Digits and letters, a U-Net trained on the digits, and what is measured of it: the world of study 038."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.data import plan_epoch
from tunesmith.study.fair import assert_disjoint
from tunesmith.study.worlds.world import Score

from .unet import STEPS, UNet, noised, sample

DIGITS = 8
LETTER = 8  # the new class; its row of the table is as it was drawn until a delta trains it
TIMES = 4


@dataclass(frozen=True)
class Sizes:
    """The model, steps and batch of pre-training and adaptation, and numbers of pictures."""

    widths: tuple[int, int, int]
    emb: int
    pretrain: int
    steps: int
    batch: int
    learn: int
    held: int
    drawn: int
    ddim: int


FULL = Sizes((16, 40, 128), 128, 1800, 250, 16, 200, 500, 300, 10)
SMOKE = Sizes((8, 8, 16), 16, 3, 2, 4, 8, 8, 16, 2)


@dataclass(frozen=True)
class Pictures:
    """Pictures [n, 1, 28, 28] in -1..1: digits 0-7 with labels, and letters with their drawers 1-20."""

    digits: Tensor
    labels: Tensor
    held_digits: Tensor
    held_labels: Tensor
    letters: Tensor
    drawers: Tensor


def load(mnist: Path | None, omniglot: Path | None) -> Pictures:
    """The real pictures, or toy ones (bars of other angles) where a folder is None."""
    if mnist is None or omniglot is None:
        return _toy()
    with np.load(mnist / "mnist_10k.npz") as file:
        x, y, x_held, y_held = (file[k] for k in ("X_train", "y_train", "X_test", "y_test"))
    with np.load(omniglot / "omniglot_28.npz") as file:
        letters, drawers = file["X"], file["drawer"]
    return Pictures(
        _scaled(x[y < DIGITS]), torch.from_numpy(y[y < DIGITS]).long(),
        _scaled(x_held[y_held < DIGITS]), torch.from_numpy(y_held[y_held < DIGITS]).long(),
        _scaled(letters), torch.from_numpy(np.asarray(drawers)).long(),
    )  # fmt: skip


def _scaled(x: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(x.astype(np.float32) / 127.5 - 1)[:, None]


def _toy() -> Pictures:
    g = torch.Generator().manual_seed(0)

    def some(n: int, slant: float) -> Tensor:
        at = torch.linspace(-1, 1, 28)
        angle = slant + 0.1 * torch.randn(n, 1, 1, generator=g)
        return torch.tanh(4 - 20 * (at[None, :, None] - angle * at[None, None, :]).abs())[:, None]

    y = torch.arange(48) % DIGITS
    return Pictures(some(48, 0.3), y, some(24, 0.3), y[:24], some(200, -0.8), torch.arange(200) % 20 + 1)


def pretrained(pictures: Pictures, sizes: Sizes) -> Base:
    """A U-Net trained on the digits with their labels; the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(sizes.widths, sizes.emb)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
        for step in range(sizes.pretrain):
            rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / sizes.pretrain))
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * rate
            rows = torch.randint(len(pictures.digits), (2 * sizes.batch,))
            _loss(model, pictures.digits[rows], pictures.labels[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    for p in model.parameters():
        p.requires_grad_(False)
    example = {"x": pictures.digits[:2], "t": torch.tensor([10, 500]), "y": torch.tensor([0, 1])}
    return Base(model.eval(), example=example, name="tiny U-Net")


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    t, noise = torch.randint(STEPS, (len(x),)), torch.randn(x.shape)
    return F.mse_loss(model(x=noised(x, t, noise), t=t, y=y), noise)


@dataclass(frozen=True)
class Denoising:
    """Squared error of the predicted noise, per picture; times and noise come from the step's own random state."""

    unit = "examples"

    def count(self, batch: Mapping[str, Any]) -> int:
        return len(batch["x"])

    def loss(self, base: Base, batch: Mapping[str, Any]) -> Tensor:
        return _loss(base.model, batch["x"], batch["y"]) * len(batch["x"])


@dataclass
class PictureTask:
    """Pictures x [n, 1, 28, 28] of the new class, shuffled anew every epoch."""

    x: Tensor
    objective: Denoising = field(default_factory=Denoising)

    def __len__(self) -> int:
        return len(self.x)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch([1] * len(self.x), batch_size, seed=seed, epoch=epoch)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        rows = torch.as_tensor(list(indices))
        return {"x": self.x[rows], "y": torch.full((len(rows),), LETTER)}

    def tokens(self, indices: Sequence[int]) -> int:
        return len(indices)


@torch.no_grad()
def denoising(base: Base, x: Tensor, y: Tensor, seed: int = 0) -> list[float]:
    """The squared error of each picture, mean over 4 times, one from each quarter; the same times and noise for a seed."""
    g = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(x))
    with base.evaluating():
        for quarter in range(TIMES):
            t = torch.randint(STEPS // TIMES, (len(x),), generator=g) + quarter * STEPS // TIMES
            noise = torch.randn(x.shape, generator=g)
            for rows in torch.arange(len(x)).split(100):
                out = base.model(x=noised(x[rows], t[rows], noise[rows]), t=t[rows], y=y[rows])
                total[rows] += (out - noise[rows]).square().mean((1, 2, 3))
    return [float(v) / TIMES for v in total]


class Critic(nn.Module):
    """A small classifier of digits and letters, whose last features [n, 32] Frechet distances are measured in."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2), nn.ReLU(), nn.Conv2d(12, 24, 5, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(24 * 16, 32), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(32, DIGITS + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def critic(pictures: Pictures, letters: Tensor, steps: int) -> Critic:
    """Trained to tell the digits and "a letter" apart; the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = Critic()
        x = torch.cat([pictures.digits, letters])
        y = torch.cat([pictures.labels, torch.full((len(letters),), LETTER)])
        optimiser = torch.optim.Adam(made.parameters(), lr=1e-3)
        for _ in range(steps):
            rows = torch.randint(len(x), (64,))
            F.cross_entropy(made(x[rows]), y[rows]).backward()
            optimiser.step()
            optimiser.zero_grad()
    return made.eval()


def frechet(a: Tensor, b: Tensor) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of features [n, d] and [m, d]."""
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


@dataclass
class LetterWorld:
    """The U-Net with 200 letters to learn; `metric` is the denoising loss, lower is better."""

    base: Base
    task: PictureTask
    held: dict[str, Tensor]
    digits: tuple[Tensor, Tensor]
    critic: Critic
    sizes: Sizes
    companions: Sequence[Any]
    name: str = "letters"
    precision: str = "fp32"
    higher_is_better: bool = False

    @property
    def batch(self) -> int:
        return self.sizes.batch

    def score(self, split: str) -> Score:
        """The denoising loss of "dev" or "test" letters under the new class."""
        x = self.held[split]
        rows = denoising(self.base, x, torch.full((len(x),), LETTER))
        return Score(sum(rows) / len(rows), rows, [1] * len(rows), {"loss": sum(rows) / len(rows)})

    def retention(self) -> dict[str, float]:
        """`loss`: the denoising loss of held-out digits with their own labels. `frechet`: drawn letters against test ones."""
        rows = denoising(self.base, *self.digits)
        g = torch.Generator().manual_seed(7)
        with self.base.evaluating(), torch.no_grad():
            drawn = sample(self.base.model, torch.full((self.sizes.drawn,), LETTER), self.sizes.ddim, g)
            distance = frechet(self.critic.body(drawn), self.critic.body(self.held["test"]))
        return {"loss": sum(rows) / len(rows), "frechet": distance}


def world(base: Base, pictures: Pictures, judge: Critic, sizes: Sizes, seed: int) -> LetterWorld:
    """Training letters by drawers 1-10, drawn by the seed; dev and test ones by drawers 11-13 and 14-20, always the same."""
    from tunesmith.deltas import TrainableTokens

    order = np.random.default_rng(seed).permutation(len(pictures.letters))
    fixed = np.random.default_rng(100).permutation(len(pictures.letters))
    drawer = pictures.drawers.numpy()
    learn = [int(i) for i in order if drawer[i] <= 10][: sizes.learn]
    dev = [int(i) for i in fixed if 11 <= drawer[i] <= 13][: sizes.held // 2]
    test = [int(i) for i in fixed if drawer[i] >= 14][: sizes.held]
    assert_disjoint(train=learn, dev=dev, test=test)
    held = {"dev": pictures.letters[dev], "test": pictures.letters[test]}
    digits = (pictures.held_digits[: sizes.held], pictures.held_labels[: sizes.held])
    token = TrainableTokens(tokens=[LETTER], targets="classes")
    return LetterWorld(base, PictureTask(pictures.letters[learn]), held, digits, judge, sizes, (token,))
