# SPDX-License-Identifier: Apache-2.0
"""Conjugate prompting on a model whose delta spoils one range of inputs only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.deltas import Full
from tunesmith.inspect.forgetting import LEET, Ability, Transform, forgetting, leet


class Two(nn.Module):
    """Doubles its input; the hidden unit sees inputs between -1 and 1 only."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.out.weight.copy_(torch.tensor([[2.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([x, (x.abs() < 1).float()], 1))


@pytest.fixture
def base() -> Base:
    return Base(Two().requires_grad_(False), example=(torch.rand(4, 1),))


@pytest.fixture
def delta(base: Base) -> Delta:
    """Adds 3 to the answer where the input is small."""
    made = Delta.create(base, Full(targets="out"))
    made.parts[0].parameter("out", "weight").data[0, 1] = 3.0
    return made


def answer(base: Base, prompts: Sequence[Any]) -> list[float]:
    return base.model(torch.tensor(prompts, dtype=torch.float32)[:, None])[:, 0].tolist()


def ability(n: int = 20, groups: bool = False) -> Ability:
    x = [(i + 1) / (n + 1) for i in range(n)]
    of = [i % 2 for i in range(n)] if groups else []
    return Ability("double", x, [2 * v for v in x], answer, lambda a, r: -abs(a - r), of)


def scale(by: float) -> Transform:
    return Transform(f"times {by:g}", lambda x: x * by, lambda y: y / by)


def test_apparent_and_recoverable(base: Base, delta: Delta) -> None:
    digest = (base.digest(), delta.digest)
    found = forgetting(base, delta, [ability(groups=True)], [scale(1), scale(100)], strengths=(0.5,))
    (row,) = found.rows
    assert row["base"] == pytest.approx(0, abs=1e-5) and row["delta"] == pytest.approx(-3, abs=1e-5)
    assert row["apparent"] == pytest.approx(3, abs=1e-5) and row["recoverable"] == pytest.approx(3, abs=1e-4)
    assert row["transform"] == "times 100" and row["gain_of_base"] == pytest.approx(0, abs=1e-4)
    assert row["recovered_by_strength"] == pytest.approx(1.5, abs=1e-5) and row["n"] == 10
    assert row["groups"].keys() == {"0", "1"}
    assert (base.digest(), delta.digest) == digest


def test_a_transform_by_one_is_the_identity(base: Base, delta: Delta) -> None:
    (row,) = forgetting(base, delta, [ability()], [scale(1)]).rows
    assert row["recoverable"] == 0 and row["gain_of_base"] == 0
    for t in (scale(1), scale(1.5), scale(3)):
        assert all(t.decode(t.encode(y)) == pytest.approx(y, abs=1e-12) for y in (-2.0, 0.0, 0.3, 7.0))


def test_the_transform_is_chosen_on_other_items_than_it_is_measured_on(base: Base, delta: Delta) -> None:
    """A transform that is right on the first half only is chosen and gains nothing on the second."""
    x = [(i + 1) / 21 for i in range(20)]
    first = set(x[:10])
    cheat = Transform("cheat", lambda v: v * 100 if v in first else v, lambda y: y / 100 if y > 6 else y)
    items = Ability("double", x, [2 * v for v in x], answer, lambda a, r: -abs(a - r))
    (row,) = forgetting(base, delta, [items], [cheat]).rows
    assert row["recoverable"] == pytest.approx(0, abs=1e-5) and row["apparent"] == pytest.approx(3, abs=1e-5)


def test_leetspeak_reads_back() -> None:
    words = [
        "What",
        "is",
        "the",
        "seventh",
        "word",
        "of",
        "this",
        "sentence,",
        "Aunt",
        "Elisa?",
        "Ten",
        "zebras",
        "quietly",
        "jump",
        "over",
        "lazy",
        "foxes",
    ]
    strings = [" ".join(words[i % 16 :] + words[: i % 16])[: 10 + i] for i in range(50)]
    assert len(set(strings)) == 50
    for s in strings:
        assert LEET.decode(LEET.encode(s)) == s
    assert leet("Taste") == "†4573" and LEET.encode(strings[-1]) != strings[-1]
    with pytest.raises(UsageError, match="'5'"):
        leet("What is 5 times two?")


def test_what_is_refused(base: Base, delta: Delta) -> None:
    with pytest.raises(UsageError, match="distinct"):
        forgetting(base, delta, [ability()], [scale(2), scale(2)])
    with pytest.raises(UsageError, match="two items"):
        Ability("one", [1], [1], answer, lambda a, r: 0.0)
    with pytest.raises(UsageError, match="differ in number"):
        Ability("x", [1, 2], [1], answer, lambda a, r: 0.0)
    short = Ability("x", [1.0, 2.0], [1, 2], lambda b, p: [1.0], lambda a, r: 0.0)
    with pytest.raises(UsageError, match="1 answers to 2"):
        forgetting(base, delta, [short], [scale(2)])
    with pytest.raises(UsageError, match="between 0 and 1"):
        forgetting(base, delta, [ability()], [scale(2)], choose=1.0)
