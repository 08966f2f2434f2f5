# SPDX-License-Identifier: Apache-2.0
"""Small bases, deltas with known changes, and samples of token rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.sample import Sample
from tunesmith.core.toys import toys


class Plain(nn.Module):
    """Two layers with nothing of a language model about them."""

    def __init__(self, out: int = 24, inner: int = 24) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inner, out), nn.Linear(out, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def plain() -> Base:
    torch.manual_seed(0)
    return Base(Plain(), example=(torch.randn(3, 24),), name="plain")


@pytest.fixture
def lm() -> Base:
    return toys()[0]


@pytest.fixture
def planted() -> Callable[..., Delta]:
    """A delta that adds given matrices to the weights of given sites."""

    def make(base: Base, **change: Tensor) -> Delta:
        paths = {k.replace("__", "."): v for k, v in change.items()}
        delta = Delta.create(base, ts.Full(targets=",".join(paths), bias=False))
        for path, value in paths.items():
            delta.parts[0].parameter(path, "weight").data.copy_(value)
        return delta

    return make


@pytest.fixture
def noisy() -> Callable[..., Delta]:
    """A low-rank delta with random values."""

    def make(base: Base, rank: int = 2, size: float = 0.2, seed: int = 0, **options: Any) -> Delta:
        delta = Delta.create(base, ts.LoRA(rank=rank, **options), seed=seed)
        g = torch.Generator().manual_seed(seed)
        for _, t in delta.items():
            t.data += size * torch.randn(t.shape, generator=g)
        return delta

    return make


@pytest.fixture
def rows() -> Callable[..., Sample]:
    """A sample of token rows; labels of -100 mark the prompt, tokens of -1 padding on the right."""

    def make(ids: Tensor, answers: Tensor) -> Sample:
        real = ids >= 0
        batch = {"input_ids": ids.clamp_min(0), "labels": torch.where(answers & real, ids, -100)}

        def keep(b: Any, supervised: bool = False) -> Tensor:
            return b["labels"] != -100 if supervised else real

        return Sample(
            lambda: [batch], lambda base, b: base.model(input_ids=b["input_ids"]), lambda base, b: torch.zeros(()), keep
        )

    return make
