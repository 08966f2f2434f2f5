# SPDX-License-Identifier: Apache-2.0
"""What the loop trains on: rows, how they become batches, and which objective scores them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.errors import DataError, UsageError
from tunesmith.core.objective import Objective
from tunesmith.data import collate, collate_packed, plan_epoch


class Task(Protocol):
    """Batches by index, deterministic given seed and epoch."""

    objective: Objective

    def __len__(self) -> int: ...

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]: ...

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]: ...

    def tokens(self, indices: Sequence[int]) -> int: ...


@dataclass
class RowTask:
    """Encoded rows (token lists, or arrays with labels), bucketed by length, padded to a multiple of `pad_to`."""

    rows: Sequence[dict[str, Any]]
    objective: Objective
    pad_id: int = 0
    prepare: Callable[[dict[str, Tensor]], dict[str, Any]] | None = None
    pad_to: int | None = 8
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [len(r["input_ids"]) if "input_ids" in r else 1 for r in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch(self.lengths, batch_size, seed=seed, epoch=epoch, longest_first=epoch == 0)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        made = collate([self.rows[i] for i in indices], pad_id=self.pad_id, pad_to=self.pad_to)
        return self.prepare(made) if self.prepare else made

    def tokens(self, indices: Sequence[int]) -> int:
        return sum(self.lengths[i] for i in indices)

    def row_lengths(self) -> list[int]:
        """Tokens of each row, which is the same in every epoch."""
        return list(self.lengths)


@dataclass
class PackedTask:
    """Rows that hold several examples each behind a block-diagonal mask."""

    packed: Sequence[Any]
    objective: Objective
    pad_id: int = 0
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return len(self.packed)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch([p.length for p in self.packed], batch_size, seed=seed, epoch=epoch, longest_first=epoch == 0)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        return collate_packed([self.packed[i] for i in indices], pad_id=self.pad_id, dtype=self.dtype)

    def tokens(self, indices: Sequence[int]) -> int:
        return sum(self.packed[i].length for i in indices)

    def row_lengths(self) -> list[int]:
        """Tokens of each row, which is the same in every epoch."""
        return [p.length for p in self.packed]


@dataclass(frozen=True)
class FunctionObjective:
    """A user's own loss over a batch: `loss(output, batch) -> mean loss`, weighted by rows."""

    fn: Callable[[Any, Any], Tensor]
    unit = "examples"

    def count(self, batch: Mapping[str, Any]) -> int:
        return rows_of(batch["batch"])

    def loss(self, base: Base, batch: Mapping[str, Any]) -> Tensor:
        value = self.fn(call(base.model, batch["batch"]), batch["batch"])
        if not isinstance(value, Tensor) or value.dim():
            raise UsageError("loss(output, batch) must return a scalar tensor (the mean over rows)")
        return value * self.count(batch)


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments in a user's batch: a mapping without labels, the first of (inputs, labels), or the batch."""
    if isinstance(batch, Mapping):
        return (), {k: v for k, v in batch.items() if k not in ("labels", "label", "y", "target")}
    if isinstance(batch, tuple | list):
        return (batch[0],), {}
    return (batch,), {}


def call(model: torch.nn.Module, batch: Any) -> Any:
    """The model's output for a user's batch."""
    args, kwargs = inputs_of(batch)
    return model(*args, **kwargs)


def outputs(task: Task, base: Base, batch: Any) -> Any:
    """The base's output for a batch of the task on its device, with whatever is in use; labels do not go in."""
    if isinstance(task, LoaderTask):
        return call(base.model, batch["batch"])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if len(inputs) == 1:  # a lone array, whatever the model calls it
        return base.model(next(iter(inputs.values())))
    return base.model(**inputs)


def rows_of(batch: Any) -> int:
    """The number of rows in a user's batch."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0])
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((int(v.shape[0]) for v in values if isinstance(v, Tensor) and v.dim()), 1)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: moved(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(moved(v, device) for v in batch)
    return batch


class LoaderTask:
    """Any iterable of ready batches. Each epoch is one pass under a seed of its own, so that a resumed run sees what an
    uninterrupted one would have seen; this holds for torch's generator and for one that a `DataLoader` brings along.
    An iterator can be read only once: its batches serve every epoch. `most` bounds a pass, for loaders without end.
    """

    def __init__(
        self, loader: Iterable[Any], loss: Callable[[Any, Any], Tensor], *, seed: int = 0, most: int | None = None
    ) -> None:
        self.loader, self.objective = loader, FunctionObjective(loss)
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            hint = "a DataLoader, or a list of (x, y)"
            raise UsageError(f"{type(loader).__name__} is no iterable of batches", hint=hint)
        self._once = isinstance(loader, Iterator)
        self._epoch, self._batches = -1, [None]
        self._seed, self._most = seed, most
        self._fill(0)

    def _fill(self, epoch: int) -> None:
        if epoch == self._epoch or (self._once and self._epoch >= 0):
            return
        own = getattr(self.loader, "generator", None)
        state = own.get_state() if isinstance(own, torch.Generator) else None
        seed = self._seed * 1_000_003 + epoch
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                if state is not None:
                    own.manual_seed(seed)
                self._batches = list(itertools.islice(self.loader, self._most))
        finally:
            if state is not None:
                own.set_state(state)
        self._epoch = epoch
        if not self._batches:
            raise DataError("the loader gives no batch", hint="pass a DataLoader, or a list of (x, y)")

    def __len__(self) -> int:
        return len(self._batches)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        if seed != self._seed:
            self._seed, self._epoch = seed, -1
        self._fill(epoch)
        return [[i] for i in range(len(self._batches))]

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        self._fill(epoch)
        return {"batch": self._batches[indices[0]]}

    def tokens(self, indices: Sequence[int]) -> int:
        return sum(rows_of(self._batches[i]) for i in indices)
