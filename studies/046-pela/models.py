# SPDX-License-Identifier: Apache-2.0
"""Models of study 046: pre-training, repair, fine-tuning and measuring of small vision transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.derive import Schedule, factorise, repair, train_own
from tunesmith.derive.own import own_copy
from tunesmith.study.fair import match_rank
from tunesmith.study.worlds.vit import TinyViT
from tunesmith.train.attention import BlockAttention
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.tasks import LoaderTask

from .pictures import SIDE, Labelled, Task, batches, crop


@dataclass(frozen=True)
class Shape:
    """A vision transformer of `depth` blocks of width `dim`."""

    dim: int
    depth: int
    heads: int


@dataclass(frozen=True)
class Plan:
    """Lengths and rates: pre-training, repair, fine-tuning (`tuned` steps of `tuned_batch`)."""

    shape: Shape
    steps: int
    batch: int
    lr: float
    repaired: int
    repair_lr: float
    tuned: int
    tuned_batch: int
    precision: str


def vit(shape: Shape, out: int, seed: int) -> Base:
    """An untrained model of grey 28x28 pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyViT(SIDE, 4, shape.dim, shape.depth, shape.heads, channels=1, out=out).eval().requires_grad_(False)
    x = torch.randn(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return Base(model, example=(x,), name=f"vit-{shape.depth}x{shape.dim}", family="vision")


def run(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def task_loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output.float(), batch[1])


def loss(model: nn.Module, batch: Any) -> Tensor:
    return task_loss(run(model, batch), batch)


def pretrain(shape: Shape, data: Labelled, classes: int, plan: Plan, steps: int, seed: int) -> Base:
    """A model trained from scratch on the general pictures."""
    schedule = Schedule(steps, plan.lr, weight_decay=0.05, warmup=0.1, precision=plan.precision, seed=seed)
    with BlockAttention():
        return train_own(vit(shape, classes, seed), batches(data, plan.batch, seed, augment=True), loss, schedule).base


TERMS = {"task": (0.0, 0.0), "feature": (1.0, 0.0), "weight": (0.0, 1.0), "pela": (1.0, 1.0)}


def small(teacher: Base, ratio: float, repaired: str, data: Labelled, plan: Plan, seed: int) -> Base:
    """The teacher factorised at `ratio`; "svd" leaves it at that, the others repair it with the terms they name."""
    student = factorise(teacher, ratio)
    if repaired == "svd":
        return student
    feature, weight = TERMS[repaired]
    schedule = Schedule(
        plan.repaired, plan.repair_lr, weight_decay=0.05, warmup=0.1, precision=plan.precision, seed=seed
    )
    given = batches(data, plan.batch, seed + 500, augment=True)
    with BlockAttention():
        return repair(student, teacher, given, run, task_loss, schedule, feature=feature, weight=weight).base


def parameters(base: Base) -> int:
    """All numbers of the model, the head included."""
    return sum(p.numel() for p in base.model.parameters())


def of_size(shape: Shape, classes: int, target: int) -> Shape:
    """The width, in multiples of the heads, at which a dense model has nearest to `target` parameters."""

    def count(dim: int) -> int:
        return parameters(vit(Shape(dim, shape.depth, shape.heads), classes, 0))

    widths = range(shape.heads, shape.dim + 1, shape.heads)
    return Shape(match_rank(count, target, widths).rank, shape.depth, shape.heads)


def with_head(base: Base, classes: int, seed: int) -> Base:
    """The model with tensors of its own and a fresh last layer."""
    new = own_copy(base)
    model: Any = new.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(model.head.in_features, classes)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
    model.head = head.requires_grad_(False)
    return Base(model, example=base.probe(), name=base.name, family="vision")


def fine_tuned(base: Base, task: Task, lr: float, plan: Plan, seed: int) -> Callable[[Labelled], float]:
    """All weights and a fresh head trained on the task; gives the accuracy in percent on some pictures."""
    schedule = Schedule(plan.tuned, lr, weight_decay=0.05, warmup=0.1, precision=plan.precision, seed=seed)
    given = batches(task.train, plan.tuned_batch, seed)
    with BlockAttention():
        done = train_own(with_head(base, task.classes, seed), given, loss, schedule).base
    return lambda data: accuracy(done, data)


def lora_tuned(base: Base, task: Task, lr: float, plan: Plan, seed: int) -> Callable[[Labelled], float]:
    """A LoRA of rank 8 and a fresh head trained on the task, the rest frozen."""
    start = with_head(base, task.classes, seed)
    delta = Delta.create(start, ts.LoRA(rank=8), ts.Full(targets="head"), name="lora", seed=seed)
    given = batches(task.train, plan.tuned_batch, seed)
    task_ = LoaderTask([given(i) for i in range(plan.tuned)], task_loss)
    precision = "bf16" if plan.precision == "bf16" else "fp32"
    fit(start, delta, task_, TrainConfig(steps=plan.tuned, lr=lr, warmup=0.1, weight_decay=0.0, precision=precision,
                                         seed=seed), progress=False)  # fmt: skip

    def measured(data: Labelled) -> float:
        with start.using(delta):
            return accuracy(start, data)

    return measured


@torch.no_grad()
def accuracy(base: Base, data: Labelled, batch: int = 200) -> float:
    """In percent, in fp32."""
    right = 0
    with base.evaluating():
        for start in range(0, len(data), batch):
            x, y = crop(data.x[start : start + batch]), data.y[start : start + batch]
            right += int((base.model(x).argmax(-1) == y).sum())
    return 100 * right / len(data)


@torch.no_grad()
def milliseconds(base: Base, batch: int = 64, times: int = 15) -> float:
    """Forward time of one picture in a batch, the median of some runs, fp32."""
    x = torch.randn(batch, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    found = []
    with base.evaluating():
        for _ in range(times + 2):
            begun = time.perf_counter()
            base.model(x)
            found.append(1000 * (time.perf_counter() - begun) / batch)
    return median(found[2:])


def best(
    train: Callable[[Base, Task, float, Plan, int], Callable[[Labelled], float]],
    base: Base,
    task: Task,
    lrs: Sequence[float],
    plan: Plan,
    seed: int,
) -> dict[str, Any]:
    """The rate that is best on dev, with the accuracy on test there."""
    from tunesmith.study.fair import choose_lr

    made: dict[float, Callable[[Labelled], float]] = {}

    def dev(lr: float) -> float:
        made[lr] = train(base, task, lr, plan, seed)
        return made[lr](task.dev)

    choice = choose_lr(dev, lrs, lambda value: value)
    return {"accuracy": made[choice.lr](task.test), "tuning": choice.as_json()}
