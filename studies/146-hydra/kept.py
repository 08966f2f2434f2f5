# SPDX-License-Identifier: Apache-2.0
"""What an adapted encoder kept of its general features: similarity to the base's vectors, and neighbours on news."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.data import collate, read
from tunesmith.evaluate.drift import vectors
from tunesmith.study.spec import Context
from tunesmith.train.modes import measuring


def cka(X: Tensor, Y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of vectors [n, d] and [n, e] of the same rows: 1 up to rotation."""
    X, Y = (v.double() - v.double().mean(0) for v in (X, Y))
    return float((X.T @ Y).square().sum() / ((X.T @ X).norm() * (Y.T @ Y).norm()))


def neighbours(X: Tensor, known: Tensor, y: Tensor, y_known: Tensor, k: int = 10) -> float:
    """Accuracy of the majority among the k nearest (by cosine) known vectors; a tie goes to the lower class."""
    near = (F.normalize(X, dim=-1) @ F.normalize(known, dim=-1).T).topk(min(k, len(known)), dim=-1).indices
    votes = F.one_hot(y_known[near], int(y_known.max()) + 1).sum(1)
    return float((votes.argmax(-1) == y).double().mean())


@dataclass
class News:
    """AG News rows in a fixed order, the first `known` of them to look neighbours up in."""

    base: Base
    rows: list[dict[str, Any]]
    known: int
    precision: str
    pad: int
    of_base: Tensor | None = None

    def vectors(self) -> Tensor:
        """Sentence vectors [n, d] of the base as it stands, less heads."""

        def batches() -> Iterator[dict[str, Any]]:
            for i in range(0, len(self.rows), 50):
                batch = collate(self.rows[i : i + 50], pad_id=self.pad)
                yield {k: batch[k] for k in ("input_ids", "attention_mask")}

        with measuring(self.base, self.precision):
            return vectors(self.base, batches())

    def measure(self) -> dict[str, float]:
        """`cka` with the unchanged base and `knn` accuracy of the base as it stands."""
        if self.of_base is None:
            with self.base.without():
                self.of_base = self.vectors()
        X = self.vectors()
        y = torch.tensor([row["labels"] for row in self.rows])
        n = self.known
        return {"cka": cka(self.of_base, X), "knn": neighbours(X[n:], X[:n], y[n:], y[:n])}


def news(ctx: Context, base: Base, precision: str, known: int, asked: int, toy: list[dict[str, Any]]) -> News:
    """`known` training and `asked` validation rows of AG News cut to 48 tokens, drawn by a fixed seed.

    In a smoke run the `toy` rows, half of them known.
    """
    pad = int(getattr(base.tokenizer, "pad_token_id", 0) or 0)
    folder = ctx.data_folder("ag_news")
    if folder is None:
        return News(base, toy, len(toy) // 2, precision, pad)
    rows: list[dict[str, Any]] = []
    for split, n in (("train", known), ("validation", asked)):
        path = next(p for e in ("jsonl", "jsonl.gz") if (p := folder / f"{split}.{e}").is_file())
        found = read(str(path), format="classification")
        some = random.Random(f"news:{split}").sample(found.rows, n)
        ids = base.tokenizer([r["text"] for r in some], truncation=True, max_length=48)["input_ids"]
        names = found.labels or []
        rows += [
            {"input_ids": list(i), "labels": sorted(names).index(names[r["label"]])}
            for i, r in zip(ids, some, strict=True)
        ]
    return News(base, rows, known, precision, pad)
