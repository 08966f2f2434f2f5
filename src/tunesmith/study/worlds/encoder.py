# SPDX-License-Identifier: Apache-2.0
"""The upper blocks of MiniLM-L6 with a head on labelled sentences, with the lower blocks run once.

`upper(world, blocks)` turns a world of `text.few_shot` into one where only the last `blocks` encoder blocks are left: the
states [T, d] that enter them are computed once for every row and kept in memory, so a training step costs a fraction. A
delta on those blocks is the same delta on the whole encoder. Splits, head, metric and retention stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.objective import Objective, get_objective
from tunesmith.core.trace import primary
from tunesmith.data import plan_epoch
from tunesmith.evaluate.drift import cosine, vectors
from tunesmith.study.worlds.text import Row, TextWorld
from tunesmith.study.worlds.world import Score
from tunesmith.train.modes import measuring


class UpperEncoder(nn.Module):
    """The last blocks of a BERT-like encoder. Its modules are those of the model it is taken from."""

    def __init__(self, model: nn.Module, blocks: int) -> None:
        super().__init__()
        every: Any = model.encoder.layer  # type: ignore[union-attr]
        if not 1 <= blocks <= len(every):
            raise UsageError(f"must lie in 1..{len(every)}, got {blocks}", where="blocks")
        self.layer = nn.ModuleList(list(every)[len(every) - blocks :])

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """States [B, T, d] below the first block and mask [B, T], 1 where seen, to states [B, T, d] after the last."""
        return {"last_hidden_state": _through(self.layer, inputs_embeds, attention_mask)}


def _through(layers: Sequence[nn.Module] | nn.ModuleList, x: Tensor, attention_mask: Tensor) -> Tensor:
    seen = attention_mask[:, None, None, :].bool().expand(-1, 1, x.shape[1], -1)  # [B, 1, T, T]
    for layer in layers:
        x = layer(x, seen)
        x = x[0] if isinstance(x, tuple) else x
    return x


@torch.no_grad()
def below(base: Base, rows: Sequence[Row], blocks: int, *, batch: int = 64) -> list[Tensor]:
    """For each row the states [T, d], fp32, that enter the last `blocks` blocks of `base`."""
    model: Any = base.model
    lower = list(model.encoder.layer)[: len(model.encoder.layer) - blocks]
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    with measuring(base, "fp32"):
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            ids, mask = _padded([torch.tensor(rows[i]["input_ids"])[:, None] for i in some])
            h = _through(lower, model.embeddings(input_ids=ids[..., 0]), mask)
            for k, i in enumerate(some):
                out[i] = h[k, : len(rows[i]["input_ids"])].float().clone()
    return out


def _padded(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [T_i, d] padded on the right to [B, T, d], and the mask [B, T]."""
    width = max(len(v) for v in values)
    x = values[0].new_zeros(len(values), width, values[0].shape[1])
    mask = torch.zeros(len(values), width, dtype=torch.int64)
    for k, v in enumerate(values):
        x[k, : len(v)], mask[k, : len(v)] = v, 1
    return x, mask


@dataclass(frozen=True)
class States:
    """Rows as cached states [T, d] with an int label each."""

    states: list[Tensor]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.states)

    def some(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`inputs_embeds` [B, T, d] and `attention_mask` [B, T] of some rows."""
        x, mask = _padded([self.states[i] for i in indices])
        return {"inputs_embeds": x, "attention_mask": mask}

    def part(self, n: int) -> States:
        """The first `n` rows."""
        return States(self.states[:n], self.labels[:n])


@dataclass
class StatesTask:
    """Cached rows as a training task, bucketed by length."""

    rows: States
    objective: Objective = field(default_factory=lambda: get_objective("classification")())

    def __len__(self) -> int:
        return len(self.rows)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch([len(s) for s in self.rows.states], batch_size, seed=seed, epoch=epoch)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        return {**self.rows.some(indices), "labels": torch.tensor([self.rows.labels[i] for i in indices])}

    def tokens(self, indices: Sequence[int]) -> int:
        return sum(len(self.rows.states[i]) for i in indices)


@dataclass
class UpperWorld:
    """The upper blocks with a head to learn; `metric` is accuracy on cached rows."""

    name: str
    base: Base
    task: StatesTask
    held: dict[str, States]
    companions: Sequence[Any]
    batch: int
    precision: str
    higher_is_better: bool = True
    eval_batch: int = 64

    def score(self, split: str) -> Score:
        """Accuracy and mean loss on "dev" or "test"."""
        rows = self.held[split]
        logits = self.logits(rows)
        y = torch.tensor(rows.labels)
        right = [float(r) for r in (logits.argmax(-1) == y).tolist()]
        values = {"accuracy": sum(right) / len(right), "loss": float(F.cross_entropy(logits.double(), y))}
        return Score(values["accuracy"], right, [1] * len(right), values)

    def logits(self, rows: States) -> Tensor:
        """Logits [n, classes] in fp32 of the model as it stands, in the order of the rows."""
        found: dict[int, Tensor] = {}
        with measuring(self.base, self.precision):
            for indices, batch in self._batches(rows):
                out = primary(self.base.model(**batch))
                assert out is not None
                found.update(zip(indices, out.float(), strict=True))
        return torch.stack([found[i] for i in range(len(rows))])

    def retention(self) -> dict[str, float]:
        """`cosine` to the base's sentence vectors on general text, mean over texts. The head plays no part."""
        found = cosine(self._of_base, self._vectors())
        return {"cosine": sum(found) / len(found)}

    @cached_property
    def _of_base(self) -> Tensor:
        with self.base.without():
            return self._vectors()

    def _vectors(self) -> Tensor:
        with measuring(self.base, self.precision):
            return vectors(self.base, (batch for _, batch in self._batches(self.held["general"])))

    def _batches(self, rows: States) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        order = sorted(range(len(rows)), key=lambda i: len(rows.states[i]))
        for start in range(0, len(order), self.eval_batch):
            indices = order[start : start + self.eval_batch]
            yield indices, rows.some(indices)


def upper(world: TextWorld, blocks: int, *, known: UpperWorld | None = None) -> UpperWorld:
    """The world of the last `blocks` blocks of a text world's encoder, in fp32.

    `known` is an earlier one of the same encoder, set and `blocks`: its test and general states are used again.
    """
    base = world.base
    learn = world.task.rows
    held = {k: v for k, v in known.held.items() if k in ("test", "general")} if known is not None else {}
    for split, rows in world.held.items():
        if split not in held:
            held[split] = States(below(base, rows, blocks), [int(r["labels"]) for r in rows])
    task = StatesTask(States(below(base, learn, blocks), [int(r["labels"]) for r in learn]))
    if known is not None:
        return UpperWorld(world.name, known.base, task, held, known.companions, world.batch, "fp32")
    model = UpperEncoder(base.model, blocks).eval()
    x, mask = _padded(task.rows.states[:2])
    made = Base(model, example={"inputs_embeds": x, "attention_mask": mask}, name=f"{base.name}-top{blocks}")
    return UpperWorld(world.name, made, task, held, world.companions, world.batch, "fp32")
