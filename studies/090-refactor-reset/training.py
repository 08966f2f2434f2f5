# SPDX-License-Identifier: Apache-2.0
"""Training from scratch: Adam, Adam in a projected space (GaLore, Fira), refactorisation and resets, and their memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.deltas.weight.refactor import balanced

from .gpt import GPT, Factorised, Full, Shape, SparsePlus, Text, loss_on


@dataclass(frozen=True)
class Arm:
    """A kind of layer, what is done every K steps, and the rule of the updates ("adam", "galore", "fira")."""

    kind: str
    refactor: bool = False
    reset: bool = False
    rule: str = "adam"


@dataclass(frozen=True)
class Plan:
    """One run. `every` is K, also the steps between two projections; `recovery` the steps a reset warms up again."""

    lr: float
    steps: int
    batch: int
    every: int
    recovery: int = 10
    warmup: float = 0.1
    floor: float = 0.1


class Projected(torch.optim.Optimizer):
    """Adam on P^T G with P [m, r] from the left singular vectors of a gradient G [m, n], m <= n (else on G P).

    The update is `scale` times what is projected back. `fira` adds the rest G - P P^T G, every column scaled by how much
    Adam scaled the projected one, its norm growing by at most 1 % a step. P is made anew every `every` steps; Adam's
    moments stay.
    """

    def __init__(
        self, params: Any, lr: float, rank: int, every: int, *, scale: float = 0.25, fira: bool = False
    ) -> None:
        super().__init__(params, {"lr": lr, "rank": rank, "every": every, "scale": scale, "fira": fira})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    tall = p.shape[0] > p.shape[1]
                    update = self._update(p, p.grad.T if tall else p.grad, group)
                    p.sub_(group["lr"] * (update.T if tall else update))

    def _update(self, p: Tensor, G: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        state["step"] = state.get("step", 0) + 1
        if (state["step"] - 1) % group["every"] == 0:
            state["P"] = torch.linalg.svd(G, full_matrices=False)[0][:, : group["rank"]]
        P = state["P"]
        R = P.T @ G  # [r, n]
        m, v = (state.setdefault(k, torch.zeros_like(R)) for k in ("m", "v"))
        m.lerp_(R, 0.1)
        v.mul_(0.999).addcmul_(R, R, value=0.001)
        t = state["step"]
        N = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        update = P @ N
        if group["fira"]:
            rest = (G - P @ R) * (N.norm(dim=0) / R.norm(dim=0).clamp_min(1e-8))
            norm, before = float(rest.norm()), state.get("rest")
            if before is not None and norm > 1.01 * before > 0:
                rest, norm = rest * (1.01 * before / norm), 1.01 * before
            state["rest"] = norm
            update = update + rest
        return group["scale"] * update


def factor(plan: Plan, step: int, *, reset: bool) -> float:
    """The rate over its peak at `step` (from 0): warm-up, cosine to `floor`, and a short warm-up after every reset."""
    warm = max(1, round(plan.warmup * plan.steps))
    done = min(1.0, max(0.0, (step - warm) / max(1, plan.steps - warm)))
    value = (step + 1) / warm if step < warm else plan.floor + (1 - plan.floor) * 0.5 * (1 + math.cos(math.pi * done))
    since = step % plan.every
    if reset and step >= plan.every and since < plan.recovery:
        value *= (since + 1) / (plan.recovery + 1)
    return value


def optimisers(model: GPT, arm: Arm, plan: Plan, shape: Shape) -> list[torch.optim.Optimizer]:
    """Adam on everything, or on everything but the full layers, which are updated in a projected space."""
    if arm.rule == "adam":
        return [torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=0.0)]
    inner = [m.W for m in model.layers()]
    mine = {id(p) for p in inner}
    others = [p for p in model.parameters() if id(p) not in mine]
    return [
        torch.optim.AdamW(others, lr=plan.lr, weight_decay=0.0),
        Projected(inner, plan.lr, shape.rank, plan.every, fira=arm.rule == "fira"),
    ]


def fit(arm: Arm, plan: Plan, shape: Shape, text: Text, seed: int) -> tuple[GPT, list[float]]:
    """A model trained from scratch and its losses by step. Ends early where a loss is not finite."""
    torch.manual_seed(seed)
    model = GPT(arm.kind, shape)
    rules = optimisers(model, arm, plan, shape)
    generator = torch.Generator().manual_seed(1000 + seed)
    losses: list[float] = []
    for step in range(plan.steps):
        for rule in rules:
            for group in rule.param_groups:
                group["lr"] = plan.lr * factor(plan, step, reset=arm.reset)
        loss = loss_on(model, text.batch(plan.batch, shape.context, generator))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rule in rules:
            rule.step()
            rule.zero_grad(set_to_none=True)
        if (step + 1) % plan.every == 0 and step + 1 < plan.steps:
            if arm.refactor:
                refactor(model, seed=step)
            if arm.reset:
                for rule in rules:
                    rule.state.clear()
    return model, losses


@torch.no_grad()
def refactor(model: GPT, seed: int = 0) -> None:
    """Balance the factors of every layer that has some; what the model computes stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers():
        if isinstance(layer, Factorised):
            B, A = balanced(layer.B, layer.A, generator)
            layer.B.copy_(B)
            layer.A.copy_(A)


@torch.no_grad()
def held_out(model: GPT, rows: Tensor, batch: int = 64) -> float:
    """Mean next-byte loss in nats."""
    total = sum(float(loss_on(model, x)) * len(x) for x in rows.split(batch))
    return total / len(rows)


def memory(arm: Arm, shape: Shape) -> int:
    """Bytes of weights, gradients and optimiser states in fp32 (indices of a sparse support int64), computed."""
    model = GPT(arm.kind, shape)
    trained = sum(p.numel() for p in model.parameters())
    indices = sum(8 * m.at.numel() for m in model.layers() if isinstance(m, SparsePlus))
    states = 2 * trained
    if arm.rule != "adam":
        for m in model.layers():
            assert isinstance(m, Full)
            low, high = sorted(m.W.shape)
            r = min(shape.rank, low)
            states += 2 * r * high + low * r - 2 * m.W.numel()
    return 4 * (2 * trained + states) + indices
