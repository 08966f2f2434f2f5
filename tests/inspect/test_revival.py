# SPDX-License-Identifier: Apache-2.0
"""Revival, the rows that hide an old task, and linear read-outs, on a net that was taught to answer otherwise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import TrainingError, UsageError
from tunesmith.core.probe import PROBES
from tunesmith.core.sample import Sample
from tunesmith.inspect.readout import block_states, capability, readout
from tunesmith.inspect.revival import looks_until, mean_loss, revive
from tunesmith.inspect.wrapper import Wrapper, ablation, leading, row_scores

Batch = tuple[Tensor, Tensor]


def rows(n: int, seed: int, classes: int = 3) -> list[Batch]:
    """Batches of 16 rows whose class is a fixed linear function of them."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(classes, 6, generator=torch.Generator().manual_seed(99))
    X = torch.randn(n, 6, generator=g)
    return list(zip(X.split(16), (X @ W.T).argmax(1).split(16), strict=True))


def loss(base: Base, batch: Batch) -> Tensor:
    return F.cross_entropy(base.model(batch[0]), batch[1], reduction="sum")


def sample(n: int = 96, seed: int = 0) -> Sample:
    return Sample(lambda: rows(n, seed), lambda b, batch: b.model(batch[0]), loss)


def fit(base: Base, parameters: list[Tensor], batches: list[Batch], steps: int, lr: float) -> None:
    optimiser = torch.optim.Adam(parameters, lr=lr)
    for i in range(steps):
        optimiser.zero_grad()
        loss(base, batches[i % len(batches)]).backward()
        optimiser.step()


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))
    made = Base(model, example=(rows(16, 1)[0][0],), name="net")
    fit(made, list(model.parameters()), rows(960, 2), 300, 1e-2)
    model.requires_grad_(False)
    for p in model.parameters():
        p.grad = None
    return made


@pytest.fixture(scope="module")
def tuned(base: Base) -> Delta:
    """A delta that makes every answer the next class."""
    delta = Delta.create(base, ts.Full(targets="everything"))
    with base.frozen(), base.using(delta):
        moved = [(x, (y + 1) % 3) for x, y in rows(960, 3)]
        fit(base, [t for _, t in delta.items()], moved, 60, 3e-3)
    return delta


def test_a_hidden_ability_comes_back_faster_than_one_that_was_never_there(base: Base, tuned: Delta) -> None:
    before, digest = base.digest(), tuned.digest
    found = PROBES.parse("revival:lr=0.003,steps=128,level=0.8").measure(base, tuned, sample())
    assert found.values["loss_delta"] > 5 * found.values["loss_base"]
    assert 0 < found.values["steps"] <= 128 and found.rows[0]["recovered"] == pytest.approx(0, abs=1e-6)
    assert found.rows[-1]["recovered"] >= 0.8 and found.rows[-1]["step"] == found.values["steps"]
    assert (base.digest(), tuned.digest) == (before, digest)
    torch.manual_seed(1)
    blank = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))
    never = Base(blank.requires_grad_(False), example=base.probe())
    data = rows(96, 0)

    def score(b: Base) -> float:
        return -mean_loss(b, sample(), data[::2])

    curves = [
        revive(b, d, data[1::2], loss, score, -6.0, lr=3e-3, looks=range(1, 60), method=how)
        for b, d, how in ((base, tuned, None), (never, None, ts.Full()))
    ]
    assert curves[0].scores[0] < -6 and curves[1].scores[0] < -6  # neither can do it at first
    assert curves[0].reached is not None and 1.5 * curves[0].reached < (curves[1].reached or 60)


def test_the_unmodified_base_needs_no_steps(base: Base) -> None:
    fresh = Delta.create(base, ts.Full(targets="everything"))
    found = PROBES.parse("revival").measure(base, fresh, sample())
    assert found.values["steps"] == 0 and found.rows == []
    curve = revive(base, fresh, rows(32, 0), loss, lambda b: 1.0, 1.0, lr=1e-3, looks=[1, 2])
    assert (curve.reached, curve.steps) == (0, [0])


def test_another_method_may_train_on_top(base: Base, tuned: Delta) -> None:
    found = PROBES.parse('revival:lr=0.01,steps=64,level=0.5,method="lora"').measure(base, tuned, sample())
    assert found.values["steps"] and found.values["steps"] <= 64


def test_what_cannot_be_revived(base: Base, tuned: Delta) -> None:
    probe = PROBES.parse("revival")
    for some in (None, sample(16)):
        with pytest.raises(UsageError, match="two batches"):
            probe.measure(base, tuned, some)
    for some, how in ((None, None), (Delta.create(base, ts.FixedMask(targets="everything", share=0.5)), None)):
        with pytest.raises(UsageError, match="trains"):
            revive(base, some, rows(32, 0), loss, lambda b: 0.0, 1.0, lr=1e-3, looks=[1], method=how)
    with pytest.raises(TrainingError, match="nan"):
        revive(base, tuned, rows(32, 0), lambda b, x: loss(b, x) * math.nan, lambda b: 0.0, 1.0, lr=1e-3, looks=[1])
    assert looks_until(5) == [1, 2, 4, 5] and looks_until(1) == [1]


# The wrapper


def test_zeroing_no_rows_changes_nothing_and_ablation_is_undone(base: Base, tuned: Delta) -> None:
    whole = base.merged(tuned)
    assert ablation(whole, {}) is None and ablation(whole, leading(row_scores(whole, sample()), 0)) is None
    found = Wrapper(top_k=3).measure(base, tuned, sample())
    assert found.rows[0]["k"] == 0 and found.rows[0]["loss"] == pytest.approx(found.values["loss_delta"])
    assert found.values["loss_best"] <= found.values["loss_delta"]
    out, digest = whole.probe_outputs(), whole.digest()
    some = ablation(whole, {"2": [0, 5], "0": [1]})
    with whole.using(some):
        assert not torch.equal(whole.probe_outputs(), out)
    zeroed = whole.merged(some)
    for path, which in (("2", [0, 5]), ("0", [1])):
        W = zeroed.modules[path].weight
        assert not W[which].any() and int((whole.modules[path].weight != W).any(1).sum()) == len(which)
    assert torch.equal(whole.probe_outputs(), out) and whole.digest() == digest


def test_scores_are_first_order_estimates(base: Base, tuned: Delta) -> None:
    """Zeroing a row moves the loss by -score, up to second order: shrinking the row by a little shows it."""
    whole = base.merged(tuned)
    scores, batches = row_scores(whole, sample()), rows(96, 0)
    total = float(sum(loss(whole, b) for b in batches))
    for path, row in (("0", 3), ("2", 7)):
        layer, eps = whole.modules[path], 1e-3
        kept = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight[row] *= 1 - eps
            moved = float(sum(loss(whole, b) for b in batches)) - total
            layer.weight.copy_(kept)
        assert moved == pytest.approx(-eps * float(scores[path][row]), rel=0.05, abs=2e-4)


def test_one_small_weight_changes_the_loss_by_minus_w_times_its_gradient(base: Base, tuned: Delta) -> None:
    whole, batches = base.merged(tuned), rows(96, 0)
    W = whole.modules["2"].weight
    i, j = divmod(int(W.abs().argmin()), W.shape[1])
    with torch.no_grad():
        W[i, j] = 1e-2
    with torch.enable_grad():
        W.requires_grad_(True)
        (g,) = torch.autograd.grad(sum(loss(whole, b) for b in batches), W)
    W.requires_grad_(False)
    old = float(sum(loss(whole, b).double() for b in batches))
    W.detach()[i, j] = 0
    assert float(sum(loss(whole, b).double() for b in batches)) - old == pytest.approx(
        -1e-2 * float(g[i, j]), rel=0.2, abs=1e-3
    )


def test_rows_that_are_not_there(base: Base) -> None:
    with pytest.raises(UsageError, match="0..23"):
        ablation(base, {"2": [24]})
    with pytest.raises(UsageError, match="cannot be chosen"):
        leading({"2": torch.zeros(3)}, 4)
    with pytest.raises(UsageError, match="old task"):
        Wrapper().measure(base, Delta.create(base, ts.Full()), None)


# Read-outs


def toy_lm(seed: int) -> Base:
    from tunesmith.core.toys import toys

    return toys(seed)[0]


def test_a_random_model_reads_out_at_chance() -> None:
    """Labels that no position shows: a linear layer on states of a random model is right by chance."""
    base, g = toy_lm(0), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 37, (600, 7), generator=g)
    assert len(torch.unique(ids, dim=0)) == 600  # train and test strings share none
    y = torch.randint(0, 5, (600,), generator=g)
    states = block_states(base, [{"input_ids": part} for part in ids.split(100)], lambda b, x: b.model(**x))
    train, test = ({p: h[s] for p, h in states.items()} for s in (slice(0, 400), slice(400, None)))
    found = capability(train, y[:400], test, y[400:], steps=200, lr=1e-2)
    assert len(found.rows) == 2 and all(abs(r["accuracy"] - 0.2) < 0.1 for r in found.rows)


def test_a_read_out_finds_what_is_there_and_where_it_was_asked_for() -> None:
    base, g = toy_lm(0), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 10, (300, 7), generator=g)
    at = torch.randint(0, 7, (300,), generator=g)
    batches = [{"input_ids": a, "at": b} for a, b in zip(ids.split(100), at.split(100), strict=True)]

    def run(b: Base, batch: dict[str, Any]) -> Any:
        return b.model(input_ids=batch["input_ids"])

    states = block_states(base, batches, run, lambda batch: batch["at"])
    y = (ids[torch.arange(300), at] % 2).long()
    assert readout(states["layers.0"][:200], y[:200], states["layers.0"][200:], y[200:], steps=300, lr=3e-2) > 0.85
    last = block_states(base, batches, run)["layers.1"]
    with torch.no_grad():
        whole = base.model.layers[1](base.model.layers[0](base.model.embed(ids), None), None)
    torch.testing.assert_close(last, whole[:, -1], atol=1e-5, rtol=0)
    assert not any(m._forward_hooks for m in base.model.modules())
    with pytest.raises(UsageError, match="do not agree"):
        readout(last, y[:5], last, y)
