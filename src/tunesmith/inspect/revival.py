# SPDX-License-Identifier: Apache-2.0
"""How many steps on the old task bring back what a delta took away: few mean that it was hidden, not lost.

The delta trains on, as a copy, on the old task (or another method trains on top of it), and the loss on held-out batches of
that task is looked at again and again. Recovered is

    1 - (L_t - L_base) / (L_delta - L_base)        L: mean loss of a held-out batch, t: step

and the answer is the first look at which it reaches `level`. It means nothing without a control: the same training of
a model that never had the ability. `revive` takes any base and delta, so that the control is a second call.

Needs a sample of the old task of two batches or more; every `hold`-th batch is held out. The rate should lie below that of
the fine-tuning, and be the control's too.

Jain et al. 2024, arXiv 2311.12786 (reverse fine-tuning). There all weights train with AdamW; here that is `method="full"`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View, as_view, clone_part
from tunesmith.core.errors import TrainingError, UsageError
from tunesmith.core.probe import Finding, probe
from tunesmith.core.registry import option
from tunesmith.core.sample import Sample


@dataclass(frozen=True)
class Curve:
    """Scores at steps (0 is before training), and the first of them at which the goal was reached (None: never)."""

    steps: list[int]
    scores: list[float]
    reached: int | None


def revive(
    base: Base,
    delta: Delta | View | None,
    batches: Sequence[Any],
    loss: Callable[[Base, Any], torch.Tensor],
    score: Callable[[Base], float],
    goal: float,
    *,
    lr: float,
    looks: Iterable[int],
    method: Any | None = None,
    seed: int = 0,
) -> Curve:
    """Train on `batches` in turn with AdamW until `score` (higher is better) reaches `goal`, or the looks are over.

    A copy of the delta trains, at the strength of the view; with `method` a fresh delta of it trains on top, and the delta
    stays as it is. Base and delta are as before afterwards. A goal that is met at once is reached after 0 steps.
    Raises UsageError where nothing could train or be trained on, TrainingError for a loss that is not finite.
    """
    if not batches:
        raise UsageError("there are no batches to train on", where="revive")
    view = None if delta is None else as_view(delta)
    if method is not None:
        tuned = Delta.create(base, method, name="revival", seed=seed)
        stack: tuple[Any, ...] = (view, tuned)
    elif view is not None:
        parts = [clone_part(p) for p in view.delta.parts]
        tuned = Delta(view.delta.name, parts, provenance=view.delta.provenance)
        stack = (tuned.at(view.strength),)
    else:
        raise UsageError("without a delta nothing trains", where="revive", hint="give a method, such as Full()")
    trained = [t for _, t in tuned.items() if t.requires_grad]
    if not trained:
        raise UsageError("nothing in this delta trains", where="revive", hint="give a method, such as Full()")
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    steps, scores, done = [0], [], 0
    with base.frozen(), base.using(*stack, check=False):
        scores.append(score(base))
        for look in sorted(set(looks) - {0}):
            if scores[-1] >= goal:
                break
            for step in range(done, look):
                optimiser.zero_grad(set_to_none=True)
                with base.evaluating(), torch.enable_grad():
                    value = loss(base, batches[step % len(batches)])
                if not bool(torch.isfinite(value)):
                    raise TrainingError(
                        f"the loss is {float(value.detach())} at step {step + 1}", hint="use a smaller rate"
                    )
                value.backward()
                optimiser.step()
            done = look
            steps.append(look)
            scores.append(score(base))
    return Curve(steps, scores, steps[-1] if scores[-1] >= goal else None)


def looks_until(steps: int) -> list[int]:
    """1, 2, 4, 8 ... and `steps` itself."""
    return sorted({*(2**k for k in range(int(math.log2(max(steps, 1))) + 1)), steps})


@torch.no_grad()
def mean_loss(base: Base, sample: Sample, batches: Sequence[Any]) -> float:
    """Mean of the summed losses of batches, in eval mode, of the base as it stands."""
    with base.evaluating():
        return sum(float(sample.loss(base, b)) for b in batches) / len(batches)


@probe("revival", paper="2311.12786", data=True, slow=True)
class Revival:
    """Steps of training on the old task until what the delta took away is back."""

    lr: float = option(1e-4, "learning rate; below that of the fine-tuning", low=1e-9, high=10.0)
    steps: int = option(256, "steps after which it is given up", low=1, high=1_000_000)
    level: float = option(0.9, "share of the lost ground that counts as back", low=0.01, high=1.0)
    hold: int = option(2, "every so many-th batch is held out to measure on", low=2, high=1000)
    method: str = option("", "method that trains on top of the delta; nothing means that the delta itself trains on")
    least: float = option(0.01, "loss below this share of the base's is no loss", low=0.0, high=1.0)

    def measure(self, base: Base, delta: Delta | View, sample: Sample | None = None) -> Finding:
        """One row a look. `steps` is None where the ground was not won back, 0 where none was lost.

        Raises UsageError without a sample of at least two batches.
        """
        batches = [] if sample is None else list(sample.batches())
        if sample is None or len(batches) < 2:
            raise UsageError(
                f"the old task is needed in two batches or more, got {len(batches)}", where="revival",
                hint="one part is trained on, the other measured on",
            )  # fmt: skip
        held, learn = batches[:: self.hold], [b for i, b in enumerate(batches) if i % self.hold]
        before = mean_loss(base, sample, held)
        with base.using(delta):
            after = mean_loss(base, sample, held)
        gap = after - before
        facts = {"held_out_batches": len(held), "trained_on_batches": len(learn), "control": "none: see revive"}
        values: dict[str, Any] = {"loss_base": before, "loss_delta": after, "steps": 0}
        if gap <= self.least * abs(before):
            return Finding("revival", f"Nothing was lost on this task ({gap:+.4g})", values, [], facts)
        how = methods.get(self.method).cls() if self.method else None
        found = revive(
            base, delta, learn, sample.loss, lambda b: -mean_loss(b, sample, held), -(before + (1 - self.level) * gap),
            lr=self.lr, looks=looks_until(self.steps), method=how,
        )  # fmt: skip
        rows = [
            {"step": step, "loss": -s, "recovered": 1 - (-s - before) / gap}
            for step, s in zip(found.steps, found.scores, strict=True)
        ]
        values["steps"], values["recovered"] = found.reached, rows[-1]["recovered"]
        told = f"{found.reached} steps" if found.reached is not None else f"not within {found.steps[-1]} steps"
        share = f"{100 * self.level:.0f} % of the lost ground"
        return Finding("revival", f"{share} came back after {told}" if found.reached else f"{share} came back {told}",
                       values, rows, facts)  # fmt: skip
