# SPDX-License-Identifier: Apache-2.0
"""Heads fitted as linear probes on the base's features, and tasks that share one base under heads that stay fixed.

Fine-tuning from a fitted head leaves the features where the head expects them. With the head inside the model (`probed`)
a change covers it too; with heads beside the model (`ProbeWorld`) every task's change is a change of one backbone, and
changes of several tasks can be merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.trace import primary
from tunesmith.study.worlds.arms import train
from tunesmith.study.worlds.encoder import States, UpperWorld
from tunesmith.study.worlds.world import Score
from tunesmith.train.modes import measuring
from tunesmith.train.tasks import Task


@dataclass(frozen=True)
class Probe:
    """logits = W x + b with W [classes, d], b [classes], for features x [n, d]."""

    W: Tensor
    b: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W, self.b)


def fit_probe(x: Tensor, y: Tensor, classes: int, *, decay: float = 1e-3, steps: int = 60) -> Probe:
    """The softmax regression of y [n] on x [n, d], with `decay` / 2 ||W||^2 added to the mean loss (L-BFGS, from zero).

    Features are standardised for the fit and the scale is folded back into W and b.
    """
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    z = (x - mean) / std
    W = torch.zeros(classes, x.shape[1], requires_grad=True)
    b = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([W, b], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(z, W, b), y) + 0.5 * decay * W.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    W, b = W.detach() / std, b.detach()
    return Probe(W, b - W @ mean)


def pooled_states(world: UpperWorld, rows: States) -> Tensor:
    """Features [n, d] of cached rows: the mean over tokens of the last states of the model as it stands."""
    found: dict[int, Tensor] = {}
    with measuring(world.base, world.precision):
        for indices, batch in world._batches(rows):
            h = primary(world.base.model(**batch))
            assert h is not None
            found.update(zip(indices, _mean(h, batch["attention_mask"]).float(), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def _mean(h: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(h.dtype)[..., None]
    return (h * weight).sum(1) / weight.sum(1)


class Probed(nn.Module):
    """Encoder blocks with a linear head on the mean over tokens: states [B, T, d] to `logits` [B, classes]."""

    def __init__(self, encoder: nn.Module, probe: Probe) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(probe.W.shape[1], probe.W.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(probe.W)
            self.head.bias.copy_(probe.b)
        self.head.requires_grad_(False)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        h = self.encoder(inputs_embeds, attention_mask)["last_hidden_state"]
        return {"logits": self.head(_mean(h, attention_mask))}


def probed(world: UpperWorld, classes: int, *, decay: float = 1e-3) -> UpperWorld:
    """The world with a head fitted on its training rows and taken into the model: deltas reach it, no companion is needed."""
    learn = world.task.rows
    probe = fit_probe(pooled_states(world, learn), torch.tensor(learn.labels), classes, decay=decay)
    model = Probed(world.base.model, probe).eval()
    example = learn.some(range(min(2, len(learn))))
    base = Base(model, example=example, name=f"{world.base.name}-probed")
    return UpperWorld(world.name, base, world.task, world.held, (), world.batch, world.precision)


@dataclass
class ProbeWorld:
    """One of several tasks on a shared base, under a fixed head; `metric` is accuracy.

    `features(rows)` gives [n, d] of the base as it stands; `held` maps "dev" and "test" to rows and labels [n].
    """

    name: str
    base: Base
    task: Task
    held: dict[str, tuple[Any, Tensor]]
    features: Callable[[Any], Tensor]
    probe: Probe
    batch: int = 32
    precision: str = "fp32"
    companions: Sequence[Any] = ()
    higher_is_better: bool = True
    pool: str = "auto"
    known: dict[str, float] = field(default_factory=dict)

    def logits(self, split: str) -> Tensor:
        """Logits [n, classes] of the base as it stands, under the task's head."""
        return self.probe(self.features(self.held[split][0]))

    def score(self, split: str) -> Score:
        y = self.held[split][1]
        right = [float(r) for r in (self.logits(split).argmax(-1) == y).tolist()]
        return Score(sum(right) / len(right), right, [1] * len(right))

    def retention(self) -> dict[str, float]:
        return {}

    def fresh(self, seed: int, **options: Any) -> Delta:
        """An untrained change of the backbone with the fixed head beside it; `options` are those of `full`."""
        head = methods.build("head", {"classes": len(self.probe.b), "pool": self.pool})
        delta = Delta.create(self.base, methods.build("full", options), head, seed=seed)
        part = delta.part("head")
        for path in part.kind_of:
            part.put(path, "W", self.probe.W, trainable=False)
            part.put(path, "b", self.probe.b, trainable=False)
        return delta

    def tuned(
        self, lr: float, steps: int, seed: int, options: Mapping[str, Any] | None = None, **settings: Any
    ) -> Delta:
        """The backbone's change after `steps` of full fine-tuning under the fixed head; the head is not in it."""
        delta = self.fresh(seed, **dict(options or {}))
        train(self, [], lr=lr, steps=steps, seed=seed, start=delta, **settings)
        return Delta(self.name, [delta.part("full")], provenance=delta.provenance)


def text_task(world: UpperWorld, classes: int) -> ProbeWorld:
    """The upper blocks of a text world under a head that is fitted on its training rows and stays fixed."""
    learn = world.task.rows
    probe = fit_probe(pooled_states(world, learn), torch.tensor(learn.labels), classes)
    held = {s: (world.held[s], torch.tensor(world.held[s].labels)) for s in ("dev", "test")}
    return ProbeWorld(
        world.name, world.base, world.task, held, lambda rows: pooled_states(world, rows), probe, world.batch,
        world.precision, pool="mean",
    )  # fmt: skip


def shares(worlds: Sequence[ProbeWorld], delta: Delta | None, singles: Sequence[float], split: str) -> list[float]:
    """Accuracy of each task under `delta` over what its own fine-tuning reaches; None as the delta is the base."""
    out = []
    for world, single in zip(worlds, singles, strict=True):
        with world.base.using(delta):
            out.append(world.score(split).metric / max(single, 1e-9))
    return out
