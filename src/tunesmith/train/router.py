# SPDX-License-Identifier: Apache-2.0
"""Train what chooses between deltas: the gates of a composite (token by token), or the nearest task (text by text).

    both = compose.route(base, [sums, spelling])
    fit_router(base, both, {"sums": "sums.jsonl", "spelling": "spelling.jsonl"}, steps=120)

    nearest = Nearest.fit(encoder, {"sums": texts, "spelling": more})        # a text's delta by the mean of its states
    base(input_ids, deltas=[deltas[name] for name in nearest.choose(prompts)])

Gates: Xu et al. 2024, arXiv 2405.13053.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.effect import effect
from tunesmith.core.errors import DataError, UsageError, nearest
from tunesmith.core.features import features
from tunesmith.core.objective import Objective, get_objective
from tunesmith.data import Dataset, collate, plan_epoch, read
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import Trained, fit
from tunesmith.train.prepare import prepare
from tunesmith.train.tasks import RowTask

IGNORED = -100


@dataclass
class RoutedTask:
    """Encoded rows (`input_ids`, `labels`) with `expert`: the number of the delta they belong to, or one for each token."""

    rows: Sequence[Mapping[str, Any]]
    objective: Objective
    pad_id: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch([len(r["input_ids"]) for r in self.rows], batch_size, seed=seed, epoch=epoch)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Tensor]:
        """As `collate`, with `experts` [B, T], -100 on padding."""
        rows = [self.rows[i] for i in indices]
        made = collate([{k: r[k] for k in ("input_ids", "labels")} for r in rows], pad_id=self.pad_id)
        experts = torch.full_like(made["input_ids"], IGNORED)
        for k, r in enumerate(rows):
            n, e = len(r["input_ids"]), r["expert"]
            if not isinstance(e, int) and len(e) != n:
                raise DataError(f"{n} tokens but {len(e)} experts", where=f"row {indices[k] + 1}")
            experts[k, :n] = torch.as_tensor(e)
        return {**made, "experts": experts}

    def tokens(self, indices: Sequence[int]) -> int:
        return sum(len(self.rows[i]["input_ids"]) for i in indices)


def fit_router(
    base: Base,
    delta: Delta,
    data: Mapping[str, Any],
    *,
    c: float = 50.0,
    system: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Trained:
    """Train the gates of a composite in place; the base and the deltas in it stay bit for bit as they were.

    Args:
        delta: from `compose.route`.
        data: for each source of the composite, by name, rows of its task: anything that `ts.read` takes.
        c: weight of the gate loss, see the objective `routed`.
        settings: fields of `TrainConfig`.
    Raises UsageError for a name that is no source, or a source without data; DataError for rows that cannot be used.
    """
    names = sources_of(delta)
    for name in data:
        if name not in names:
            raise UsageError(f"{name!r} is no source of {delta.name!r}", hint=nearest(name, names))
    missing = [n for n in names if n not in data]
    if missing:
        raise UsageError(f"there is no data for {', '.join(missing)}", hint="a gate learns from rows of every task")
    config = TrainConfig.build({"lr": 5e-4, **settings})
    rows: list[dict[str, Any]] = []
    digests, pad = {}, 0
    for i, name in enumerate(names):
        given = data[name]
        dataset = given if isinstance(given, Dataset) else read(given)
        task = prepare(base, dataset, config, system=system).task
        if not isinstance(task, RowTask) or task.objective.unit != "tokens" or dataset.kind == "tagging":
            raise DataError(f"{dataset.kind} data cannot train gates", where=name, hint="chat or text, not packed")
        rows += [{**r, "expert": i} for r in task.rows]
        digests[name], pad = dataset.digest, task.pad_id
    trained = fit(base, delta, RoutedTask(rows, get_objective("routed")(c=c), pad), config, progress=progress)
    delta.provenance.update({"data": {"sources": digests, "rows": len(rows)}, "training": {**config.to_dict(), "c": c}})
    delta.provenance["effect"] = effect(base, delta)
    return trained


def sources_of(delta: Delta) -> list[str]:
    """Names of the deltas in a composite, in the order of its gates. Raises UsageError for one without gates."""
    composed = delta.provenance.get("composed") or {}
    if composed.get("combiner") != "meteora":
        raise UsageError(f"delta {delta.name!r} has no gates", hint="compose.route(base, deltas) makes one that has")
    return [s["name"] for s in composed["sources"]]


@dataclass(frozen=True)
class Nearest:
    """Which task a text is nearest to, by the cosine of its mean state to each task's: one delta for a whole text."""

    base: Base
    names: tuple[str, ...]
    centroids: Tensor

    @classmethod
    def fit(cls, base: Base, texts: Mapping[str, Sequence[str]]) -> Nearest:
        """The centroid of each task's texts under `base`, an encoder or a language model with a tokenizer."""
        if len(texts) < 2 or not all(texts.values()):
            raise UsageError("two tasks or more with a text each are needed to choose between them")
        made = cls(base, tuple(texts), torch.empty(0))
        means = torch.stack([F.normalize(made.embed(rows), dim=-1).mean(0) for rows in texts.values()])
        return replace(made, centroids=F.normalize(means, dim=-1))

    def choose(self, texts: Sequence[str]) -> list[str]:
        """The nearest task of each text."""
        best = (F.normalize(self.embed(texts), dim=-1) @ self.centroids.T).argmax(-1)
        return [self.names[i] for i in best.tolist()]

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """The mean state [n, d] fp32 of each text's tokens."""
        if self.base.tokenizer is None:
            raise UsageError(f"{self.base.name} has no tokenizer")
        out = []
        for start in range(0, len(texts), batch):
            ids = [{"input_ids": list(self.base.tokenizer(t)["input_ids"])} for t in texts[start : start + batch]]
            inputs = {k: v.to(self.base.device) for k, v in collate(ids).items()}
            with self.base.evaluating():
                h = features(self.base, inputs).float()
            mask = inputs["attention_mask"][..., None]
            out.append(((h * mask).sum(1) / mask.sum(1).clamp_min(1)).cpu())
        return torch.cat(out)
