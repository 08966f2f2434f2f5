# SPDX-License-Identifier: Apache-2.0
"""The runs of study 045: a tuned change, pruned at random with several choices of q, and by size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch

from tunesmith.compose import darex
from tunesmith.compose.build import build
from tunesmith.compose.collect import DeltaChanges
from tunesmith.compose.merge import merge
from tunesmith.core.delta import Delta
from tunesmith.core.errors import TrainingError
from tunesmith.core.sample import Sample
from tunesmith.study.spec import Context
from tunesmith.study.worlds.encoder import upper
from tunesmith.study.worlds.probed import ProbeWorld, text_task
from tunesmith.study.worlds.text import few_shot

SEARCHED = 1000  # the mask that q is searched under; those reported are 0, 1, 2, ...


@dataclass(frozen=True)
class Sizes:
    """Blocks that are tuned, rows of each class by set, rows to choose on and to report on, steps, masks, step of q."""

    blocks: int
    train: dict[str, int]
    dev: int
    test: int
    steps: int
    masks: int
    step: float
    etas: tuple[float, ...]
    length: int = 48


def world_of(ctx: Context, name: str, sizes: Sizes, seed: int) -> ProbeWorld:
    text = few_shot(
        ctx, name, sizes.train[name], seed, dev=sizes.dev, test=sizes.test, general=0, length=sizes.length, precision="fp32"
    )  # fmt: skip
    return text_task(upper(text, sizes.blocks), len(text.labels))


def accuracy(w: ProbeWorld, delta: Delta | None, split: str) -> float:
    """Percent correct with a delta in use."""
    with w.base.using(delta):
        return 100 * w.score(split).metric


class Pruned:
    """A tuned change with its pruned forms."""

    def __init__(self, w: ProbeWorld, delta: Delta) -> None:
        self.w, self.changes = w, DeltaChanges(w.base, [delta])

    def at(self, p: float, q: Any, mask: int) -> Delta:
        return build(
            self.w.base, darex.prune(self.changes, p, q, seed=mask), name="pruned", facts={"p": p, "seed": mask}
        )

    def reported(self, p: float, q: Any, masks: int) -> dict[str, Any]:
        """Test accuracy, mean over masks."""
        found = [accuracy(self.w, self.at(p, q, m), "test") for m in range(masks)]
        return {"metric": mean(found), "masks": found}


def one_change(w: ProbeWorld, delta: Delta, ps: Sequence[float], sizes: Sizes) -> dict[str, Any]:
    """Every way of pruning one change. Dev rows choose; test rows are for reporting."""
    made = Pruned(w, delta)
    rows = w.held["dev"][0]
    with w.base.using(delta):
        tuned = w.features(rows)
    sites = [s for s in w.base.sites.all() if s.kind == "linear"]
    sample = _sample(w)
    with w.base.using(delta):
        means = darex.mean_inputs(w.base, sites, sample)
    out: dict[str, Any] = {"unpruned": {"dev": accuracy(w, delta, "dev"), "test": accuracy(w, delta, "test")},
                           "base": accuracy(w, None, "test"), "p": {}}  # fmt: skip

    def dev(p: float, q: Any) -> float:
        return accuracy(w, made.at(p, q, SEARCHED), "dev")

    def moved(p: float, q: Any) -> float:
        with w.base.using(made.at(p, q, SEARCHED)):
            return float(darex.state_change(w.features(rows), tuned))

    for p in ps:
        labelled = darex.global_q(lambda q, p=p: dev(p, q), p, step=sizes.step)
        unlabelled = darex.global_q(lambda q, p=p: moved(p, q), p, step=sizes.step, maximise=False)
        layers = {eta: darex.analytic_q(made.changes, means, p, eta) for eta in sizes.etas}
        scores = {eta: dev(p, found.q) for eta, found in layers.items()}
        eta = max(sizes.etas, key=lambda e: (scores[e], -e))
        by_size = merge(w.base, [delta], f"graft:share={1 - p}")
        choice: dict[str, Any] = {
            "no rescale": 1.0, "dare": None, "global, labelled": labelled.values["q"], "global, unlabelled": unlabelled.values["q"],
            "by layer, analytic": layers[eta].q,
        }  # fmt: skip
        found = {arm: made.reported(p, q, sizes.masks) for arm, q in choice.items()}
        found["by size"] = {"metric": accuracy(w, by_size, "test")}
        chosen = {
            "labelled": labelled.values["q"],
            "unlabelled": unlabelled.values["q"],
            "eta": eta,
            "mean q by layer": layers[eta].mean,
        }
        out["p"][str(p)] = {"arms": found, "chosen": chosen}
    return out


def adamr(
    w: ProbeWorld, lr: float, steps: int, seed: int, pulls: Sequence[float], p: float, masks: int
) -> list[dict[str, Any]]:
    """Plain DARE after training with each strength of the pull; 0 is plain Adam."""
    rows = []
    for pull in pulls:
        try:
            delta = w.tuned(lr, steps, seed, {"pull": pull})
        except TrainingError:
            continue
        made = Pruned(w, delta)
        dev = mean(accuracy(w, made.at(p, None, SEARCHED + m), "dev") for m in range(masks))
        rows.append({"pull": pull, "unpruned dev": accuracy(w, delta, "dev"), "unpruned": accuracy(w, delta, "test"),
                     "dare dev": dev, "dare": made.reported(p, None, masks)["metric"]})  # fmt: skip
    return rows


def _sample(w: ProbeWorld) -> Sample:
    rows = w.held["dev"][0]
    at = [list(range(i, min(i + 32, len(rows)))) for i in range(0, len(rows), 32)]
    run: Callable[..., Any] = lambda base, batch: base.model(**batch)  # noqa: E731
    keep: Callable[..., Any] = lambda batch, supervised=False: batch["attention_mask"].bool()  # noqa: E731
    return Sample(lambda: [rows.some(i) for i in at], run, lambda base, batch: torch.zeros(()), keep)
