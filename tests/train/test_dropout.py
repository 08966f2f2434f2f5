"""Dropout with a mask drawn four entries at a time: its share, its mean, its gradient, and what it leaves to torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.deltas import LoRA
from tunesmith.train import modes
from tunesmith.train.dropout import dropped, quick_dropout, quick_dropouts, scale


@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 65536, 65535 / 65536])
def test_the_share_dropped_is_p_in_every_lane(p: float) -> None:
    torch.manual_seed(0)
    n = 400_000
    found = dropped((n,), p).view(-1, 4).double().mean(0)
    assert torch.all((found - p).abs() < 5 * (p * (1 - p) / (n / 4)) ** 0.5 + 1e-9)


def test_entries_are_independent_of_their_neighbours() -> None:
    torch.manual_seed(1)
    m = dropped((400_000,), 0.3).double() - 0.3
    for step in range(1, 9):
        assert abs(float((m[step:] * m[:-step]).mean())) < 5 * 0.21 / 400_000**0.5


def test_the_plain_form_under_the_same_mask() -> None:
    x = torch.randn(3, 7, requires_grad=True)
    torch.manual_seed(2)
    mask = dropped(x.shape, 0.4)
    torch.manual_seed(2)
    y = quick_dropout(x, 0.4)
    want = x.masked_fill(mask, 0.0) * scale(0.4)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(*(torch.autograd.grad(v.sin().sum(), x)[0] for v in (y, want)))


def model(p: float, **options: bool) -> Base:
    torch.manual_seed(0)
    return Base(nn.Sequential(nn.Linear(6, 6), nn.Dropout(p, **options), nn.Linear(6, 2)), example=torch.randn(2, 6))


@pytest.mark.parametrize("p, options", [(0.0, {}), (1.0, {}), (1e-6, {}), (0.3, {"inplace": True})])
def test_what_it_leaves_to_torch(p: float, options: dict[str, bool]) -> None:
    with quick_dropouts(model(p, **options)) as found:
        assert found == []


def test_in_eval_mode_nothing_is_dropped() -> None:
    base, x = model(0.5), torch.ones(5, 6)
    base.model.eval()
    want = base.model(x)
    with quick_dropouts(base) as found:
        assert found == ["1"] and torch.equal(base.model(x), want)


def test_a_run_takes_it_and_the_seed_decides() -> None:
    base, x, found = model(0.2), torch.ones(64, 6), []
    base.model.train()
    plain = type(base.model[1]).forward  # type: ignore[index]
    with base.using(Delta.create(base, LoRA(rank=1))), modes.fast_paths(base, "fp32"):
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            found.append(base.model(x).detach())
    torch.manual_seed(3)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], base.model(x))  # torch's own draw from the same seed is another
    assert base.model[1].forward.__func__ is plain  # type: ignore[index]
