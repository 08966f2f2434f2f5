# SPDX-License-Identifier: Apache-2.0
"""A small picture model aligned with class names, its two target tasks, and the arms of study 064."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.deltas.weight.bits import count
from tunesmith.objectives.supervised import Classification
from tunesmith.study.fair import assert_disjoint, support_query
from tunesmith.study.worlds.vit import TinyViT
from tunesmith.train.attention import BlockAttention
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.modes import measuring
from tunesmith.train.tasks import RowTask

TEMPLATES = ("{}", "a photo of a {}", "a small picture of a {}", "an image that shows a {}")
DIGITS = tuple(f"digit {n}" for n in ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
SCALE = 20.0  # of cosines, in the logits
MASKED = "attention,patch"  # as released: attention projections and the patch convolution
Images = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sizes:
    """The model, its pre-training, and the lengths of one run of an arm."""

    patch: int
    dim: int
    depth: int
    heads: int
    text: int
    epochs_before: int
    batch_before: int
    novel: int
    shots: int
    held_out: int
    epochs: int
    batch: int
    test: int


FULL = Sizes(8, 128, 6, 4, 384, 30, 64, 60, 16, 30, 30, 32, 2000)
SMOKE = Sizes(8, 16, 2, 2, 8, 2, 16, 6, 2, 2, 2, 10, 20)


class Matcher(nn.Module):
    """Pictures [B, 3, 32, 32] in 0..1 to logits: scaled cosines with the vectors [classes, text] of class names.

    The vectors are no part of the module's state, so that one encoder and one delta serve every list of names.
    """

    def __init__(self, vit: TinyViT, names: Tensor) -> None:
        super().__init__()
        self.vit = vit
        self.names = F.normalize(names, dim=-1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.vit((pixel_values - 0.5) / 0.25)
        return SCALE * F.normalize(x.float(), dim=-1) @ self.names.T


@dataclass
class Target:
    """A task of its own: pool images to draw shots and held-out images from, test images, and the matching base."""

    name: str
    base: Base
    pool: tuple[Images, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass
class World:
    """The aligned encoder on its own classes, and its targets."""

    origin: Target
    targets: list[Target]
    sizes: Sizes
    precision: str


# Pictures


def turned(images: Images, degrees: float = 30.0) -> Images:
    """Inverted uint8 images [n, 32, 32, 3], rotated about their middle; what comes from outside is black."""
    angle = np.deg2rad(degrees)
    turn = torch.tensor([[np.cos(angle), -np.sin(angle), 0.0], [np.sin(angle), np.cos(angle), 0.0]]).float()
    x = pixels(255 - images)
    grid = F.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    out = F.grid_sample(x, grid, align_corners=False)
    return (out.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


def pixels(images: Images) -> Tensor:
    """uint8 [n, 32, 32, 3] to fp32 [n, 3, 32, 32] in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def coloured(digits: Images) -> Images:
    """Grey images [n, 28, 28] as [n, 32, 32, 3] with a black border."""
    return np.repeat(np.pad(digits, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=-1)


def read(folder: Path, name: str) -> dict[str, Images]:
    with np.load(folder / f"{name}.npz") as file:
        return {k: file[k] for k in file.files}


def toy_images(n: int, seed: int) -> tuple[Images, Tensor]:
    """Noise around a colour for each of ten classes, for a smoke run."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(seed // 10).integers(40, 216, size=(10, 1, 1, 3))
    y = np.arange(n) % 10
    x = (colours[y] + rng.integers(-30, 31, size=(n, 32, 32, 3))).clip(0, 255)
    return x.astype(np.uint8), torch.from_numpy(y).long()


# The aligned model


@torch.no_grad()
def name_vectors(names: Sequence[str]) -> Tensor:
    """The mean over templates of MiniLM's normalised sentence vectors, [names, 384]."""
    base = ts.load("minilm-l6", dtype="fp32", device="cpu")
    out = []
    for name in names:
        batch = base.tokenizer([t.format(name) for t in TEMPLATES], padding=True, return_tensors="pt")
        h = base.model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        out.append(F.normalize((h * mask).sum(1) / mask.sum(1), dim=-1).mean(0))
    return torch.stack(out)


def align(model: Matcher, x: Images, y: Tensor, sizes: Sizes, precision: str) -> None:
    """Train the encoder from scratch to match the frozen name vectors: AdamW, cosine, flips and shifts of up to 4."""
    torch.manual_seed(0)
    steps = sizes.epochs_before * (len(y) // sizes.batch_before)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=max(2, steps), pct_start=0.1)
    pictures, half = pixels(x), precision == "bf16"
    for _ in range(sizes.epochs_before):
        order = torch.randperm(len(y))
        for rows in order.split(sizes.batch_before)[: len(y) // sizes.batch_before]:
            batch = F.pad(pictures[rows], (4, 4, 4, 4))
            dx, dy = torch.randint(0, 9, (2,)).tolist()
            batch = batch[:, :, dy : dy + 32, dx : dx + 32]
            batch = batch.flip(-1) if torch.rand(()) < 0.5 else batch
            with BlockAttention(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = F.cross_entropy(model(batch), y[rows], label_smoothing=0.1)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            plan.step()
    for p in model.parameters():
        p.requires_grad_(False)
    model.eval()


def build(cifar: Path | None, mnist: Path | None, sizes: Sizes, precision: str) -> World:
    """The encoder, aligned on the CIFAR-10 images that no target uses, and both targets. Toy data where there is none."""
    if cifar is None or mnist is None:
        x, y = toy_images(200, 1)
        x_test, y_test = toy_images(sizes.test, 2)
        digits, digits_test = toy_images(200, 11), toy_images(sizes.test, 12)
        names, of_digits = torch.randn(2, 10, sizes.text, generator=torch.Generator().manual_seed(0))
    else:
        found, grey = read(cifar, "cifar10"), read(mnist, "mnist_10k")
        x, y = found["X_train"], torch.from_numpy(found["y_train"]).long()
        x_test, y_test = found["X_test"][: sizes.test], torch.from_numpy(found["y_test"]).long()[: sizes.test]
        digits = (coloured(grey["X_train"]), torch.from_numpy(grey["y_train"]).long())
        digits_test = (coloured(grey["X_test"])[: sizes.test], torch.from_numpy(grey["y_test"]).long()[: sizes.test])
        names, of_digits = name_vectors([str(c) for c in found["classes"]]), name_vectors(DIGITS)
    novel = support_query(y.tolist(), sizes.novel, 0, 0)
    known = torch.tensor(novel.rest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = TinyViT(32, sizes.patch, sizes.dim, sizes.depth, sizes.heads, 3, sizes.text)
        align(Matcher(vit, names), x[known.numpy()], y[known], sizes, precision)
    rest = torch.tensor(novel.support)
    pool = (turned(x[rest.numpy()]), y[rest])

    def target(name: str, vectors: Tensor, pool: tuple[Images, Tensor], test: tuple[Images, Tensor]) -> Target:
        base = Base(Matcher(vit, vectors).eval(), example=(pixels(test[0][:2]),), name="aligned-vit", family="vision")
        return Target(name, base, pool, (pixels(test[0]), test[1]))

    return World(
        target("cifar10", names, pool, (x_test, y_test)),
        [target("digits", of_digits, digits, digits_test), target("turned", names, pool, (turned(x_test), y_test))],
        sizes, precision,
    )  # fmt: skip


# Arms


def methods_of(arm: str) -> list[Any]:
    """The methods of a trained arm."""
    return {
        "lora": [ts.LoRA(rank=2, alpha=4.0, targets="attention")],
        "mask": [ts.Mask(targets=MASKED)],
        "mask + gdr": [ts.Mask(targets=MASKED)],
        "mask towards ones": [ts.Mask(targets=MASKED, pull="start")],
    }[arm]


def split(target: Target, sizes: Sizes, seed: int) -> tuple[list[int], list[int]]:
    """Rows of the pool: `shots` and `held_out` images of each class, none in both."""
    rows = support_query(target.pool[1].tolist(), sizes.shots, sizes.held_out, seed)
    assert_disjoint(shots=rows.support, held_out=rows.val)
    return rows.support, rows.val


def train(world: World, target: Target, arm: str, rows: Sequence[int], lr: float, seed: int) -> Delta:
    """One run of one arm on the shots."""
    x, y = target.pool
    task = RowTask([{"array": x[i], "label": int(y[i])} for i in rows], Classification())
    delta = Delta.create(target.base, *methods_of(arm), name=arm, seed=seed)
    config = TrainConfig(
        epochs=world.sizes.epochs, batch_size=world.sizes.batch, lr=lr, seed=seed, precision=world.precision,
        gradient_dropout=1.0 if arm == "mask + gdr" else 0.0,
    )  # fmt: skip
    fit(target.base, delta, task, config, progress=False)
    return delta


def accuracy(world: World, target: Target, delta: Delta | None, x: Tensor, y: Tensor) -> float:
    """Percent of images matched with their own name, with `delta` in use (made on any list of names)."""
    with target.base.using(*([delta] if delta else []), check=False), measuring(target.base, world.precision):
        found = torch.cat([target.base.model(part) for part in x.split(250)])
    return 100 * float((found.argmax(-1) == y).float().mean())


def masked_share(world: World, delta: Delta) -> dict[str, float]:
    """Percent switched off, of the encoder's numbers and of those that could be."""
    part = delta.parts[0]
    off = total = 0
    for path in part.kind_of:
        R = part.tensors(path)["R"]
        kept = count(part.method.bake(world.origin.base.sites[path], part.tensors(path))["bits"])
        off, total = off + R.numel() - kept, total + R.numel()
    encoder = sum(p.numel() for p in world.origin.base.model.parameters())
    return {"of_encoder": 100 * off / encoder, "of_maskable": 100 * off / total}


@torch.no_grad()
def features(world: World, target: Target, x: Tensor) -> Tensor:
    """The normed class token [n, dim] of the frozen encoder."""
    vit: Any = target.base.model.vit
    head, vit.head = vit.head, nn.Identity()
    try:
        with measuring(target.base, world.precision):
            return torch.cat([vit((part - 0.5) / 0.25).float() for part in x.split(250)])
    finally:
        vit.head = head


def probe(world: World, known: Tensor, y: Tensor, lr: float, seed: int) -> nn.Linear:
    """A linear layer on features [n, dim], from zero: AdamW and a cosine for as many epochs as the other arms."""
    layer = nn.Linear(known.shape[1], 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, world.sizes.epochs)
    g = torch.Generator().manual_seed(seed)
    for _ in range(world.sizes.epochs):
        for rows in torch.randperm(len(y), generator=g).split(world.sizes.batch):
            F.cross_entropy(layer(known[rows]), y[rows]).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        plan.step()
    return layer
