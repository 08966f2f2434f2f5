# SPDX-License-Identifier: Apache-2.0
"""PELA's repair: train a factorised model towards the one it came from, before it is used for anything.

    L = L_task + a mean_blocks MSE(f_s, f_t) + b MSE(z_s, z_t) + g mean_pairs (max |R L - W_t| - eps)^2

f are block outputs, z the primary outputs, s the student, t the frozen teacher; every parameter of the student trains.
The last term pulls the largest error of an entry towards eps: its gradient reaches one entry of each product.

Defaults: a 1, b 0, g 1, eps 1e-3 (the paper's Swin recipe; its DeiT runs have g 0). The student trains, the teacher is
in eval mode; student and teacher run once a step each.
Use when: a factorised base lost more than it may, and data of the kind it was trained on is at hand.
Avoid when: the teacher fits in memory only alone.
Cost: a forward pass of the teacher and, for g > 0, one product R L of each factored layer a step.

Guo et al. 2023, arXiv 2310.10700.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.carriers import hidden_of
from tunesmith.core.errors import UsageError
from tunesmith.core.trace import primary
from tunesmith.derive.factorise import FactoredLinear
from tunesmith.derive.own import Schedule, TrainedBase, train_own


def repair(
    student: Base,
    teacher: Base,
    batches: Callable[[int], Any],
    run: Callable[[nn.Module, Any], Any],
    loss: Callable[[Any, Any], Tensor],
    schedule: Schedule,
    *,
    feature: float = 1.0,
    logits: float = 0.0,
    weight: float = 1.0,
    eps: float = 1e-3,
    taps: Iterable[str] | None = None,
) -> TrainedBase:
    """A new base: the student, all of it trained towards the teacher.

    Args:
        batches: the batch of step i, from 0.
        run: `run(model, batch)`: one forward pass.
        loss: `loss(output, batch)`: the task's mean loss.
        feature, logits, weight: a, b and g above; a term of weight 0 is not computed.
        taps: paths of the modules whose outputs are compared (default: the repeated blocks of the teacher).
    Raises UsageError where there is nothing to compare, or no factored layer for the last term.
    """
    paths = list(taps) if taps is not None else [s.path for s in teacher.sites.all() if s.kind == "block"]
    missing = [p for p in paths if p not in student.modules or p not in teacher.modules]
    if missing or (feature and not paths):
        hint = "name modules that both have: taps=[...]"
        raise UsageError("there are no outputs that can be compared", where=", ".join(missing) or None, hint=hint)
    if weight and not any(isinstance(m, FactoredLinear) for m in student.model.modules()):
        raise UsageError("no layer is factored, so no product can be kept close", where=student.name, hint="weight=0")

    def total(model: nn.Module, batch: Any) -> Tensor:
        with _outputs(model, paths if feature else []) as mine:
            output = run(model, batch)
        value = loss(output, batch)
        if feature or logits:
            with torch.no_grad(), teacher.evaluating(), _outputs(teacher.model, paths if feature else []) as theirs:
                target = run(teacher.model, batch)
            if feature:
                value = value + feature * feature_loss(mine, theirs)
            if logits:
                value = value + logits * F.mse_loss(_primary(output).float(), _primary(target).float())
        return value

    def close(new: Base) -> Callable[[], Tensor]:
        pairs = perturbed_pairs(new, teacher)
        return lambda: weight * perturbation(pairs, eps)

    return train_own(student, batches, total, schedule, name="pela-repair", extra=close if weight else None)


def feature_loss(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    """The mean over modules of the mean squared difference of their outputs; 0 where they are the same."""
    return torch.stack([F.mse_loss(mine[p].float(), theirs[p].float()) for p in theirs]).mean()


def perturbed_pairs(student: Base, teacher: Base) -> list[tuple[FactoredLinear, Tensor]]:
    """Each factored layer of the student with the teacher's dense weight [out, in] of the same path, fp32."""
    out = []
    for path, module in student.modules.items():
        if isinstance(module, FactoredLinear):
            out.append((module, teacher.sites.of(path, "linear").params()["weight"].detach().float()))
    return out


def perturbation(pairs: list[tuple[FactoredLinear, Tensor]], eps: float) -> Tensor:
    """mean over pairs of (max |R L - W| - eps)^2, in fp32; the gradient is that of the largest entry alone."""
    with torch.autocast(pairs[0][1].device.type, enabled=False):
        worst = [(m.second.weight.float() @ m.first.weight.float() - W).abs().max() for m, W in pairs]
        return (torch.stack(worst) - eps).square().mean()


@contextmanager
def _outputs(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The hidden states that the modules at `paths` give during the block, the last of each."""
    seen: dict[str, Tensor] = {}
    handles = []
    for path in paths:

        def hook(_m: nn.Module, _args: Any, out: Any, path: str = path) -> None:
            seen[path] = hidden_of(out)[0]

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield seen
    finally:
        for h in handles:
            h.remove()


def _primary(output: Any) -> Tensor:
    found = primary(output)
    if found is None:
        raise UsageError("the model's output holds no tensor")
    return found
