# SPDX-License-Identifier: Apache-2.0
"""The training data as methods see it that learn their start from data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.method import observes
from tunesmith.core.sample import Sample
from tunesmith.train.config import TrainConfig
from tunesmith.train.prepare import START, prepare, start_of
from tunesmith.train.processes import is_main
from tunesmith.train.tasks import LoaderTask, Task, moved, outputs

BATCHES = 64


def sample_of(
    task: Task, config: TrainConfig, *, batches: int = BATCHES, tied: str = "both", progress: bool = False
) -> Sample:
    """At most `batches` batches of the task's first epoch, in the order of the run; trials treat ties as `tied` says."""

    context: dict[str, Any] = {}

    def stream() -> Iterator[Any]:
        for indices in itertools.islice(task.plan(config.batch_size, config.seed, 0), batches):
            yield task.batch(indices, 0)

    def run(base: Base, batch: Any) -> Any:
        return outputs(task, base, moved(batch, base.device))

    def loss(base: Base, batch: Any) -> Tensor:
        return task.objective.loss(base, moved(batch, base.device))

    def keep(batch: Any, supervised: bool = False) -> Tensor | None:
        if isinstance(task, LoaderTask):
            return None
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        if supervised and labels is not None and labels.dim() == 2:
            return labels != -100  # type: ignore[no-any-return]
        if mask is not None and mask.dim() == 4:  # packed rows: positions begin anew at 0, and padding is all zeros
            return (batch["position_ids"] != 0).flip(1).cumsum(1).flip(1) > 0
        return mask.bool() if mask is not None and mask.dim() == 2 else None

    def train(base: Base, methods: list[Any], share: float) -> Delta:
        from tunesmith.train.loop import fit, steps_of

        trial = Delta.create(base, *methods, name="trial", seed=config.seed, tied=tied)
        steps = max(1, round(share * steps_of(task, config)))
        fit(base, trial, task, dataclasses.replace(config, steps=steps, evaluate_every=None, patience=None,
                                                   anchor=0.0, gradient_dropout=0.0, tracker=None), progress=progress)  # fmt: skip
        return trial

    def read(base: Base, source: str) -> Sample:
        from tunesmith.data import read as rows_of

        plain = dataclasses.replace(config, overflow="truncate", packing=False)
        rows = rows_of(source)
        context[source] = {"digest": rows.digest, "rows": len(rows)}
        found = prepare(base, rows, plain)
        return sample_of(found.task, plain, batches=batches, tied=tied, progress=progress)

    other = None if isinstance(task, LoaderTask) else read
    return Sample(stream, run, loss, keep, train, read=other, context=context)


def sample(base: Base, data: Any, *, batch_size: int = 8, batches: int = BATCHES, seed: int = 0) -> Sample:
    """At most `batches` batches of `data` (what `ts.tune` takes) as probes and methods read them, long rows cut.

    Raises DataError for rows that cannot be used, UsageError for data the base cannot read.
    """
    from tunesmith.data import Dataset
    from tunesmith.data import read as rows_of

    config = TrainConfig(batch_size=batch_size, seed=seed, overflow="truncate")
    dataset = data if isinstance(data, Dataset) else rows_of(data)
    return sample_of(prepare(base, dataset, config).task, config, batches=batches)


def started(
    base: Base,
    methods: list[Any],
    task: Task,
    config: TrainConfig,
    name: str,
    tied: str,
    folder: Path | None = None,
    progress: bool = False,
) -> Delta:
    """The delta before its first step. What was learnt from data for it is kept in `folder/start` for a resume."""
    if not any(observes(m) for m in methods):
        delta = Delta.create(base, *methods, name=name, seed=config.seed, tied=tied)
        _begin(base, delta)
        return delta
    kept = folder / START if folder is not None else None
    if kept is not None and (kept / "delta.json").exists():
        return Delta.load(kept, base)
    sample = sample_of(task, config, tied=tied, progress=progress)
    delta = Delta.create(base, *methods, name=name, seed=config.seed, tied=tied, sample=sample)
    _begin(base, delta)
    if kept is not None and is_main():
        delta.save(kept)
    return delta


def _begin(base: Base, delta: Delta) -> None:
    """Where the base was derived with a delta to start from, give the same methods its tensors."""
    place = start_of(base)
    if place is None:
        return
    first = Delta.load(place, base)
    if [p.method for p in first.parts] != [p.method for p in delta.parts[: len(first.parts)]]:
        return
    with torch.no_grad():
        for mine, its in zip(delta.parts, first.parts, strict=False):
            for path, name, t in its.items():
                mine.parameter(path, name).copy_(t)
