# SPDX-License-Identifier: Apache-2.0
"""Train a base's own weights, as a new base: pre-training under a mask, repair after factorising, plain fine-tuning.

A delta is what the toolkit trains otherwise; this is for bases that are still being made. The given base stays as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.apply import strip
from tunesmith.core.base import Base
from tunesmith.core.derive import Made, step
from tunesmith.core.errors import TrainingError, UsageError
from tunesmith.derive.sparsify import keeping


@dataclass(frozen=True)
class Schedule:
    """AdamW with warm-up and a cosine from `lr` to `floor` times `lr`; decay acts on tensors of two or more dimensions.

    `precision` is "fp32" or "bf16" (autocast over fp32 weights).
    """

    steps: int
    lr: float
    weight_decay: float = 0.0
    warmup: float = 0.05
    floor: float = 0.0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 <= self.warmup <= 1 or self.clip <= 0 or not self.lr >= 0:
            raise UsageError("needs steps and lr of 0 or more, warm-up in 0..1, clip above 0", where="Schedule")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"{self.precision!r} is not a choice", where="precision", hint="fp32 or bf16")

    def rate(self, at: int) -> float:
        """The factor on `lr` of step `at`, from 0."""
        warm = round(self.warmup * self.steps)
        if at < warm:
            return (at + 1) / warm
        done = (at - warm) / max(1, self.steps - warm)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class TrainedBase:
    """A base whose own weights were trained, and the loss of every step."""

    base: Base
    losses: list[float] = field(default_factory=list)


def own_copy(base: Base) -> Base:
    """The base with tensors of its own, ties kept, so that training them leaves the given one as it is."""
    model = copy.deepcopy(base.model)
    strip(model)
    return Base(
        model, tokenizer=base.tokenizer, example=base._example, name=base.name, family=base.family, source=base.source
    )


def train_own(
    base: Base,
    batches: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    schedule: Schedule,
    *,
    name: str = "train",
    trained: Callable[[str], bool] = lambda name: True,
    extra: Callable[[Base], Callable[[], Tensor]] | None = None,
) -> TrainedBase:
    """A new base whose own floating parameters were trained; a mask that `base` is under is kept exactly.

    Args:
        batches: the batch of step i, from 0.
        loss: `loss(model, batch)`, the mean over the batch.
        trained: which parameters train, by name; the others stay.
        extra: given the new base, a function whose value is added to the loss of every step.
    Raises TrainingError for a loss that is not finite, UsageError where nothing would train.
    """
    new = own_copy(base)
    names = [n for n, p in new.model.named_parameters() if p.is_floating_point() and trained(n)]
    params = [new.model.get_parameter(n) for n in names]
    if not params:
        raise UsageError("no parameter was chosen to train", where=base.name)
    new.model.requires_grad_(False)
    for p in params:
        p.requires_grad_(True)
    optimiser = _optimiser(params, schedule)
    more = extra(new) if extra is not None else None
    losses: list[float] = []
    modes = [(m, m.training) for m in new.model.modules()]
    new.model.train()
    quick = torch.autocast(new.device.type, torch.bfloat16) if schedule.precision == "bf16" else nullcontext()
    with torch.random.fork_rng(devices=[]), keeping(new):
        torch.manual_seed(schedule.seed)
        for i in range(schedule.steps):
            batch = batches(i)
            with quick:
                value = loss(new.model, batch)
            if more is not None:
                value = value + more()
            if not bool(torch.isfinite(value)):
                hint = "a smaller learning rate, or more warm-up"
                raise TrainingError(f"the loss is {float(value.detach())}", where=f"step {i + 1}", hint=hint)
            value.backward()
            torch.nn.utils.clip_grad_norm_(params, schedule.clip)
            for group in optimiser.param_groups:
                group["lr"] = schedule.lr * schedule.rate(i)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(float(value.detach()))
    new.model.requires_grad_(False)
    for m, flag in modes:
        m.training = flag
    made = Made({"": new.model}, {"losses": losses[-1:]}, repeatable="training went into it")
    return TrainedBase(step(base, made, name, asdict(schedule)), losses)


def _optimiser(params: Iterable[nn.Parameter], schedule: Schedule) -> torch.optim.Optimizer:
    listed = list(params)
    groups = [
        {"params": [p for p in listed if p.dim() >= 2], "weight_decay": schedule.weight_decay},
        {"params": [p for p in listed if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=schedule.lr, betas=schedule.betas)
