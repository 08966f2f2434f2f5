# SPDX-License-Identifier: Apache-2.0
"""The two things every trial is measured by: its target on held-out rows, and what the base still does as before.

Target: the metric of the data's kind; for conversations and plain text the mean next-token loss (nats per token) of the
supervised tokens, mean over rows, unless a metric over generated answers is named for the test rows. Retention: for a
base that writes text, its perplexity on the shipped passages divided by that with the delta; for other bases that read
text the cosine of their vectors of those passages, before and after; else the cosine of their outputs on the held-out
inputs. 1 means nothing was lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.reading import accepted
from tunesmith.data import Dataset, collate
from tunesmith.evaluate.drift import cosine, headless, vectors
from tunesmith.evaluate.metrics import Metric, metric_for
from tunesmith.evaluate.metrics import metric as named_metric
from tunesmith.evaluate.panels import probes
from tunesmith.evaluate.score import (
    Examples,
    Predictions,
    answer,
    constant,
    examples,
    head_logits,
    model_inputs,
    row_nll,
)
from tunesmith.train.config import TrainConfig
from tunesmith.train.modes import measuring
from tunesmith.train.prepare import prepare

LOSS = Metric("loss", False, lambda pair, _: float(pair[0]) / max(1, int(pair[1])), note="nats per supervised token")
SPOKEN = ("chat", "text")
_EVAL_BATCH = 64
_PASSAGE = 128  # tokens of a passage that an encoder reads


@dataclass(frozen=True)
class Scores:
    """A metric over rows: the headline and the score of every row, in the order of the data."""

    value: float
    rows: list[float]


@dataclass
class Yardstick:
    """Measures a base as it stands, with whatever deltas are in use, on fixed held-out rows."""

    base: Base
    dev: Dataset
    test: Dataset
    config: TrainConfig
    system: str | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.metric is not None and self.kind == "text":
            raise UsageError("plain text is measured by its loss", where="metric")
        self.for_dev, self.for_test = self._rule(None), self._rule(self.metric)

    @property
    def kind(self) -> str:
        return self.test.kind

    def _rule(self, name: str | None) -> Metric:
        if name is not None:
            return named_metric(name)
        if self.kind in SPOKEN:
            return LOSS
        made = self._laid["test"]
        return metric_for(made.kind, made.references)

    @cached_property
    def _laid(self) -> dict[str, Examples]:
        return {
            name: examples(self.base, data, system=self.system, max_length=self.config.max_length)
            for name, data in (("dev", self.dev), ("test", self.test))
        }

    @cached_property
    def _encoded(self) -> dict[str, list[Mapping[str, Any]]]:
        rows = {}
        for name, data in (("dev", self.dev), ("test", self.test)):
            ready = prepare(self.base, data, replace(self.config, packing=False), system=self.system)
            rows[name] = list(ready.task.rows)  # type: ignore[attr-defined]
        return rows

    def score(self, split: str) -> Scores:
        """The target on "dev" or "test"."""
        rule = self.for_dev if split == "dev" else self.for_test
        with measuring(self.base, self.config.precision):
            if rule is LOSS:
                rows = self._encoded[split]
                found = rule.evaluate(row_nll(self.base, rows), [None] * len(rows))
            else:
                made = self._laid[split]
                found = rule.evaluate(answer(self.base, made, batch_size=_EVAL_BATCH).outputs, made.references)
        return Scores(found.value, found.scores)

    def constant(self) -> Scores | None:
        """The best constant answer on the test rows, where the data has one."""
        if self.kind in (*SPOKEN, "preference"):
            return None
        made: Predictions = constant(self._laid["test"])
        found = self.for_test.evaluate(made.outputs, made.references)
        return Scores(found.value, found.scores)

    def answers(self) -> str:
        """Why the base alone has no score on the target, or nothing."""
        if self.kind in SPOKEN:
            return ""
        if self.base.source.get("new_tensors"):
            return "its output layer is new and untrained"
        try:
            head_logits(self.base, self._laid["test"], [0])
        except UsageError:
            return "it has no output for these labels"
        return ""

    # What is kept

    @property
    def writes(self) -> bool:
        return self.base.family == "causal-lm" and self.base.tokenizer is not None

    @property
    def retention_name(self) -> str:
        if self.writes:
            return "perplexity of the base / with the delta, plain text"
        if self.base.tokenizer is not None:
            return "cosine to the base's vectors, plain text"
        return "cosine to the base's outputs, held-out inputs"

    def retention(self) -> float:
        """1 where the base does what it did; see the module."""
        with measuring(self.base, self.config.precision):
            if self.writes:
                with headless(self.base):
                    return math.exp(self._before - self._loss())
            found = cosine(self._before, self._vectors())
        return sum(found) / len(found)

    @cached_property
    def _before(self) -> Any:
        with self.base.without(), measuring(self.base, self.config.precision):
            return self._loss() if self.writes else self._vectors()

    def _loss(self) -> float:
        pairs = row_nll(self.base, self._passages)
        return sum(n for n, _ in pairs) / sum(t for _, t in pairs)

    def _vectors(self) -> Tensor:
        return vectors(self.base, self._batches())

    @cached_property
    def _passages(self) -> list[dict[str, list[int]]]:
        texts = [row["text"] for row in probes("retention_text")]
        ids = self.base.tokenizer(texts, truncation=True, max_length=_PASSAGE)["input_ids"]
        return [{"input_ids": list(i), "labels": list(i)} for i in ids]

    def _batches(self) -> list[Any]:
        if self.base.tokenizer is None:
            made = self._laid["dev"]
            steps = range(0, len(made), _EVAL_BATCH)
            return [model_inputs(self.base, made, list(range(len(made)))[i : i + _EVAL_BATCH])[0] for i in steps]
        names = accepted(self.base)
        return [_inputs(self._passages[i : i + 8], names, self.base) for i in range(0, len(self._passages), 8)]


def _inputs(rows: Sequence[dict[str, Any]], names: Any, base: Base) -> dict[str, Tensor]:
    batch = collate([{"input_ids": r["input_ids"]} for r in rows], pad_id=int(base.tokenizer.pad_token_id or 0))
    return {k: v.to(base.device) for k, v in batch.items() if k in names}
