# SPDX-License-Identifier: Apache-2.0
"""Gradient dropout: its identities, that it is a function of seed and step, and that it keeps the base in a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.deltas import Full, Head, LoRA
from tunesmith.objectives import SFT
from tunesmith.train.agreement import Agreement, dropped, keep_probability
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.tasks import LoaderTask, RowTask


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_a_gradient_that_agrees_is_kept_whole() -> None:
    a = draw(50)
    for b in (a, 3 * a, torch.zeros(50, dtype=torch.float64)):
        torch.testing.assert_close(keep_probability(a, b), torch.ones_like(a), atol=1e-5, rtol=0)
        torch.testing.assert_close(dropped(a, b, uniform(50) * 0.9999, 1.0), a)


@pytest.mark.parametrize("k", [0.25, 1.0, 3.0])
def test_an_opposed_gradient_passes_with_probability_1_over_1_plus_k(k: float) -> None:
    a = draw(50).sign() * (draw(50, seed=1).abs() + 0.1)
    torch.testing.assert_close(keep_probability(a, -k * a), torch.full_like(a, 1 / (1 + k)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_mean_over_draws_is_p_times_a(share: float) -> None:
    a, b = draw(4), draw(4, seed=1)
    mean = dropped(a.expand(200_000, 4), b, uniform(200_000, 4), share).mean(0)
    P = keep_probability(a, b)
    torch.testing.assert_close(mean, ((1 - share) + share * P) * a, atol=5e-3, rtol=0)


def test_share_zero_changes_nothing() -> None:
    a = draw(9)
    assert torch.equal(dropped(a, -a, uniform(9), 0.0), a)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.fixture
def base() -> Base:
    torch.manual_seed(0)
    return Base(Net().eval(), example=(torch.randn(2, 6),))


def loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def task(n: int = 32, seed: int = 3) -> LoaderTask:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    y = (x[:, 0] > 0).long() + 2
    return LoaderTask([(x[i : i + 8], y[i : i + 8]) for i in range(0, n, 8)], loss)


def test_the_step_uses_the_gradient_of_the_equation(base: Base) -> None:
    """a and b by hand, U from the recorded seed: the gradients left on the delta are those of the formula."""
    delta = Delta.create(base, Full())
    with torch.no_grad():
        for i, (_, t) in enumerate(delta.items()):
            t.add_(0.3 * torch.randn(t.shape, generator=torch.Generator().manual_seed(i)))
    params = {k: t for k, t in delta.items() if t.requires_grad}
    data = task()
    batches = [data.batch([0], 0), data.batch([1], 0)]
    with base.frozen(), base.using(delta):
        x = torch.cat([b["batch"][0] for b in batches])
        y = torch.cat([b["batch"][1] for b in batches])
        with delta.off(), torch.no_grad():
            teacher = base.model(x).softmax(-1)
        soft = -(teacher * base.model(x).log_softmax(-1)).sum(-1).mean()
        b = torch.autograd.grad(soft, list(params.values()))
        F.cross_entropy(base.model(x), y).backward()
        a = [p.grad.clone() for p in params.values()]
        Agreement(base, delta, data, 1.0, seed=5).drop(7, batches, params)
    zeros = 0
    for p, a_i, b_i in zip(params.values(), a, b, strict=True):
        same, gone = torch.isclose(p.grad, a_i, atol=1e-7), p.grad == 0
        assert bool((same | gone).all())
        assert not bool((gone & (keep_probability(a_i, b_i) > 0.9999)).any()), "an agreeing entry was dropped"
        zeros += int(gone.sum())
    expected = sum(float((1 - keep_probability(a_i, b_i)).sum()) for a_i, b_i in zip(a, b, strict=True))
    spread = sum(
        float((q * (1 - q)).sum()) for a_i, b_i in zip(a, b, strict=True) for q in [keep_probability(a_i, b_i)]
    )
    assert expected > 10 and abs(zeros - expected) < 4 * spread**0.5


def test_it_is_a_function_of_seed_and_step(base: Base) -> None:
    kept = {}
    for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)):
        delta = Delta.create(base, LoRA(rank=2))
        with torch.no_grad():
            for _, t in delta.items():
                t.add_(0.5)
        params = dict(delta.items())
        for p in params.values():
            p.grad = torch.ones_like(p)
        data = task()
        with base.frozen(), base.using(delta):
            torch.manual_seed(len(kept))
            Agreement(base, delta, data, 1.0, seed).drop(step, [data.batch([0], 0)], params)
        found = torch.cat([p.grad.flatten() for p in params.values()])
        if (seed, step) in kept:
            assert torch.equal(found, kept[seed, step])
        kept[seed, step] = found
    assert not torch.equal(kept[0, 1], kept[0, 2]) and not torch.equal(kept[0, 1], kept[1, 1])


def test_at_the_base_nothing_is_dropped_and_off_is_the_run_as_it_was(base: Base) -> None:
    """The divergence has no gradient at the base, so the first step is the plain one."""
    config = TrainConfig(steps=1, lr=1e-2, precision="fp32", warmup=0.0)
    ends = []
    for share in (0.0, 1.0):
        delta = Delta.create(base, Full())
        fit(base, delta, task(), dataclasses.replace(config, gradient_dropout=share), progress=False)
        ends.append(torch.cat([t.detach().flatten() for _, t in delta.items()]))
    torch.testing.assert_close(ends[0], ends[1])


def test_it_keeps_more_of_the_base_while_the_task_is_learnt(base: Base) -> None:
    """New classes on one feature; what must stay is the base's answer, measured as KL on other inputs."""
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        p = base.model(x).log_softmax(-1)
    drift, last, first = {}, {}, {}
    for share in (0.0, 1.0):
        delta = Delta.create(base, Full(), seed=0)
        config = TrainConfig(steps=60, lr=5e-3, gradient_dropout=share, precision="fp32", clip=1e9)
        trained = fit(base, delta, task(), config, progress=False)
        with torch.no_grad(), base.using(delta):
            q = base.model(x).log_softmax(-1)
        drift[share] = float((p.exp() * (p - q)).sum(-1).mean())
        first[share], last[share] = trained.losses[0], trained.losses[-1]
    assert drift[1.0] < drift[0.0], drift
    assert last[1.0] < 0.7 * first[1.0], last


def test_real_tokens_count_and_padding_does_not() -> None:
    from tunesmith.core.toys import toys

    lm = toys()[0]
    delta = Delta.create(lm, LoRA(rank=2))
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(0.2 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)))
    rows = [{"input_ids": [3, 4, 5, 6, 7], "labels": [-100, 4, 5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    data = RowTask(rows, SFT())
    with lm.using(delta):
        agreement = Agreement(lm, delta, data, 1.0, 0)
        both, n = agreement.divergence(data.batch([0, 1], 0))
        first, n_1 = agreement.divergence(data.batch([0], 0))
        second, n_2 = agreement.divergence(data.batch([1], 0))
    assert (n, n_1, n_2) == (7, 5, 2)
    torch.testing.assert_close(both, first + second, atol=1e-5, rtol=0)
    assert float(both.detach()) > 0.01


def test_a_new_head_is_refused(base: Base) -> None:
    delta = Delta.create(base, Head(classes=5))
    with pytest.raises(UsageError, match="new head"):
        fit(base, delta, task(), TrainConfig(steps=1, gradient_dropout=1.0), progress=False)
    with pytest.raises(UsageError, match="gradient_dropout"):
        TrainConfig(gradient_dropout=1.5)
