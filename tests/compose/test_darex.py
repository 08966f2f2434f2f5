# SPDX-License-Identifier: Apache-2.0
"""DAREx: the pruned change against its formula, the choices of q, and AdamR against torch's Adam."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from given_changes import Given, random_changes

from tunesmith.compose import darex
from tunesmith.compose.working import dense_delta
from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.sample import Sample
from tunesmith.core.toys import toys

KEY = "layers.0.gate.weight"


@pytest.fixture(scope="module")
def lm() -> Base:
    torch.set_num_threads(1)
    return toys()[0]


def only(pairs: Any) -> torch.Tensor:
    ((_, update),) = pairs
    return update.dense()


def test_with_q_of_one_minus_p_it_is_dare(lm: Base) -> None:
    D = torch.randn(32, 16)
    changes = Given(lm, [{KEY: D}])
    place = next(changes.places())
    mask = torch.zeros(512)
    mask[darex.keeps(place, 0.9, 7)] = 1
    mask = mask.reshape(32, 16)
    for q, scale in ((None, 0.1), (0.1, 0.1), (0.4, 0.4), ({KEY: 0.3}, 0.3), ({"other": 0.2}, 0.2)):
        torch.testing.assert_close(only(darex.prune(changes, 0.9, q, seed=7)), mask * D / scale)
    assert torch.equal(only(darex.prune(changes, 0.0)), D)
    assert torch.equal(only(darex.prune(changes, 0.9, leave=lambda p: True)), D)


def test_dare_is_right_on_average_and_a_larger_q_shrinks_it(lm: Base) -> None:
    D = torch.randn(32, 16).double()
    changes = Given(lm, [{KEY: D}])
    p, n = 0.9, 2000
    total = sum(only(darex.prune(changes, p, seed=s)) for s in range(n))
    sigma = D.abs() * math.sqrt(p / (1 - p) / n)
    z = (total / n - D) / sigma  # about N(0, 1) in each of 512 entries
    assert float(z.square().mean()) == pytest.approx(1, abs=0.25) and float(z.abs().max()) < 4.5
    assert float((z.abs() < 3).double().mean()) > 0.99
    halved = sum(only(darex.prune(changes, p, 0.2, seed=s)) for s in range(200)) / 200
    assert float((halved * D).sum() / D.square().sum()) == pytest.approx(0.5, abs=0.05)


def test_what_is_stored_is_the_surviving_share(lm: Base) -> None:
    changes = random_changes(lm, 1)
    sizes = [(u.values.numel(), math.prod(u.shape)) for _, u in darex.prune(changes, 0.9, seed=1)]
    kept, total = (sum(s[i] for s in sizes) for i in (0, 1))
    assert kept == pytest.approx(0.1 * total, abs=4 * math.sqrt(0.09 * total))
    assert all(
        u.indices.dtype == torch.int64 and u.indices.shape == u.values.shape for _, u in darex.prune(changes, 0.9)
    )
    same = [u.indices for _, u in darex.prune(changes, 0.9, seed=1)]
    assert all(torch.equal(a, u.indices) for a, (_, u) in zip(same, darex.prune(changes, 0.9, seed=1), strict=True))
    assert not all(len(a) == len(u.indices) for a, (_, u) in zip(same, darex.prune(changes, 0.9, seed=2), strict=True))


def test_phi_is_symmetric_about_a_half_where_it_is_a_half() -> None:
    assert darex.phi(0.5) == 0.5
    for p in (0.01, 0.1, 0.3, 0.49, 0.4999, 0.49996, 0.4999999):
        assert darex.phi(p) == pytest.approx(darex.phi(1 - p), rel=1e-9)
    assert darex.phi(0.49994) == pytest.approx(darex.phi(0.49996), rel=1e-7)  # the series meets the formula
    assert darex.phi(0.99) == pytest.approx(0.98 / math.log(99))
    for bad in (0.0, 1.0):
        with pytest.raises(UsageError, match="between 0 and 1"):
            darex.phi(bad)


@pytest.mark.parametrize("stops", [False, True])
def test_the_analytic_q_of_a_row_is_where_its_bound_is_smallest(stops: bool) -> None:
    g = torch.Generator().manual_seed(0)
    c = torch.randn(7, 30, generator=g)
    if stops:  # sums of one sign: the bias grows with q, so that the walk ends early
        c = 0.1 * c + torch.linspace(0.1, 0.5, 7)[:, None]
    p, eta = 0.9, 0.8
    found = darex.rows_q(c, p, eta, share=2.0)  # never stops early
    grid = torch.arange(0.1, 0.999, 1e-3, dtype=torch.float64)
    a, b = c.double().sum(1), c.double().square().sum(1)
    bound = (eta * (1 - (1 - p) / grid)[None] * a[:, None] + eta**2 * darex.phi(p) * b[:, None] / (4 * grid**2)
             + math.log(2 / 0.05)).abs()  # fmt: skip
    first = torch.tensor(
        [int((row[1:] > row[:-1]).nonzero()[0]) if bool((row[1:] > row[:-1]).any()) else len(grid) - 1 for row in bound]
    )
    torch.testing.assert_close(found, grid[first], atol=1e-6, rtol=0)
    assert ((found >= 1 - p) & (found < 1)).all() and found.std() > 0
    early = darex.rows_q(c, p, eta)
    best, at, past, walked = (
        torch.full((7,), math.inf).double(),
        torch.full((7,), 0.1).double(),
        torch.zeros(7).bool(),
        0,
    )
    for i, value in enumerate(bound.T):  # the walk of the released code
        better = (value < best) & ~past
        at[better], best[better] = grid[i], value[better]
        past, walked = past | (value > best), i
        if float(past.double().mean()) >= 0.8:
            break
    torch.testing.assert_close(early, at, atol=1e-6, rtol=0)
    assert (walked < len(grid) - 1) == stops
    assert (early <= found + 1e-9).all() and (darex.rows_q(torch.zeros(3, 4), p, eta) == 1 - p).all()


def test_q_by_layer_uses_mean_inputs_and_gives_a_bias_its_weights_q(lm: Base) -> None:
    changes = random_changes(lm, 1, size=2.0, kinds=("linear", "norm"))
    x = torch.randint(0, 37, (4, 6), generator=torch.Generator().manual_seed(1))
    sample = Sample(lambda: [x[:2], x[2:]], lambda b, ids: b.model(input_ids=ids), lambda b, ids: torch.zeros(()))
    sites = [s for s in lm.sites.all() if s.kind == "linear" and s.role != "head"]
    means = darex.mean_inputs(lm, sites, sample)
    with torch.no_grad():
        h = lm.model.layers[0].norm1(lm.model.embed(x))
    torch.testing.assert_close(means["layers.0.attention.q"], h.reshape(-1, 16).mean(0), atol=1e-5, rtol=1e-5)
    found = darex.analytic_q(changes, means, 0.9, 0.8, leave=lambda pl: pl.path == "head")
    weights = {f"{s.path}.weight" for s in sites}
    assert weights <= set(found.q) and "head.weight" not in found.q and "norm.weight" not in found.q
    assert all(0.1 <= q < 1 for q in found.q.values()) and found.mean > 0.1
    path = "layers.0.attention.q"
    c = changes.sources[0][f"{path}.weight"].dense() * means[path]
    c = torch.cat([c, changes.sources[0][f"{path}.bias"].dense()[:, None]], 1)
    assert (
        found.q[f"{path}.weight"] == found.q[f"{path}.bias"] == pytest.approx(float(darex.rows_q(c, 0.9, 0.8).mean()))
    )
    with pytest.raises(UsageError, match="no pruned weight has a mean input"):
        darex.analytic_q(changes, {}, 0.9, 0.8)


def test_one_q_for_all_is_searched_from_dares_up_to_one() -> None:
    tried: list[float] = []

    def score(q: float) -> float:
        tried.append(q)
        return -abs(q - 0.36)

    found = darex.global_q(score, 0.9, held_out=lambda q: 100 * q)
    assert tried[0] == pytest.approx(0.1) and tried[-1] == 1.0 and len(tried) == 19
    assert all(b > a for a, b in itertools.pairwise(tried))
    assert found.values["q"] == pytest.approx(0.35) and found.start["q"] == pytest.approx(0.1)
    assert (found.held_out, found.start_held_out) == (pytest.approx(35), pytest.approx(10))
    assert darex.global_q(lambda q: q, 0.9, maximise=False).values["q"] == pytest.approx(0.1)
    for bad in ({"p": 0.0}, {"p": 1.0}, {"p": 0.5, "step": 0.0}):
        with pytest.raises(UsageError):
            darex.global_q(lambda q: q, **bad)


def test_output_changes() -> None:
    a, b = torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([[1.0, 3.0, 9.0]])
    assert float(darex.state_change(a, b)) == pytest.approx((1 + 2 + 8) / 3)
    assert float(darex.top_logit_change(a, b, top=2)) == pytest.approx((8**2 + 2**2) / 2)
    assert float(darex.top_logit_change(a, b)) == pytest.approx((1 + 4 + 64) / 3)


def test_learned_q_lowers_the_output_change_under_its_mask(lm: Base) -> None:
    changes = random_changes(lm, 1, size=0.3)
    digest = lm.digest()
    x = torch.randint(0, 37, (8, 6), generator=torch.Generator().manual_seed(1))

    def run(b: Base, ids: torch.Tensor) -> torch.Tensor:
        return b.model(input_ids=ids)["logits"]

    found = darex.learned_q(lm, changes, lambda: x.split(4), run, 0.9, lr=0.05, steps=12, change=darex.top_logit_change)
    assert lm.digest() == digest and all(1 - 0.9 <= q <= 1 for q in found.q.values())

    def change_with(q: Any) -> float:
        tuned = dense_delta(lm, [(p, changes.at(p)[0]) for p in changes.places()])
        pruned = dense_delta(lm, darex.prune(changes, 0.9, q))
        with torch.no_grad():
            with lm.using(tuned):
                h = [run(lm, b) for b in x.split(4)]
            with lm.using(pruned):
                return sum(float(darex.top_logit_change(run(lm, b), y)) for b, y in zip(x.split(4), h, strict=True)) / 2

    seen = found.facts["changes"]
    assert seen[0] == pytest.approx(change_with(None), rel=1e-4)
    assert change_with(found.q) == pytest.approx(min(seen), rel=1e-4) and min(seen) < 0.7 * seen[0]
    stopped = darex.learned_q(lm, changes, lambda: [x], run, 0.9, lr=1e-12, steps=30, patience=2)
    assert stopped.facts["steps"] < 30


def weights() -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=g)) for s in ((4, 3), (5,))]


def test_adamr_without_a_pull_is_adam() -> None:
    mine, theirs = weights(), weights()
    ours, peer = darex.AdamR(mine, lr=1e-2, pull=0.0), torch.optim.Adam(theirs, lr=1e-2)
    for i in range(20):
        for params, optimiser in ((mine, ours), (theirs, peer)):
            optimiser.zero_grad()
            sum((t.sin() * (i + 1)).sum() for t in params).backward()
            optimiser.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


@pytest.mark.parametrize("form", ["l1", "l2"])
def test_adamr_stays_at_its_start_without_a_gradient_and_never_goes_past_it(form: str) -> None:
    mine = weights()
    start = [t.detach().clone() for t in mine]
    optimiser = darex.AdamR(mine, lr=0.1, pull=0.5, form=form)
    for _ in range(5):
        for t in mine:
            t.grad = torch.zeros_like(t)
        optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, start, strict=True))
    with torch.no_grad():
        for t in mine:
            t.add_(1.0)
    for t in mine:
        t.grad = torch.zeros_like(t)
    optimiser.step()  # v = 0: the pull is as strong as it may be
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, start, strict=True))


def test_the_pull_is_the_formula() -> None:
    mine = weights()
    start = [torch.zeros_like(t) for t in mine]
    optimiser = darex.AdamR(mine, lr=0.01, pull=0.3, anchors=start)
    plain = weights()
    peer = torch.optim.Adam(plain, lr=0.01)
    moments = [torch.zeros_like(t) for t in mine]
    for n in range(1, 6):
        grads = [(t.detach() * n).cos() for t in mine]
        moments = [0.999 * v + 0.001 * g.square() for v, g in zip(moments, grads, strict=True)]
        hat = [v / (1 - 0.999**n) for v in moments]
        rate = 0.3 * 0.01 / math.sqrt(float(torch.cat([h.flatten() for h in hat]).mean()))
        with torch.no_grad():
            for t in plain:
                t.sub_(rate * t)
        for t, s, g in zip(mine, plain, grads, strict=True):
            t.grad, s.grad = g.clone(), g.clone()
        optimiser.step()
        peer.step()
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    with pytest.raises(UsageError, match="same shape"):
        darex.AdamR(weights(), anchors=start[:1])
    with pytest.raises(UsageError, match="unknown form"):
        darex.AdamR(weights(), form="l3")


@pytest.mark.parametrize("form", ["l1", "l2"])
def test_the_option_of_full_fine_tuning_is_adamr_on_its_differences(form: str) -> None:
    from tunesmith.core.delta import Delta
    from tunesmith.deltas import Full
    from tunesmith.train.surgery import Now

    base = Base(torch.nn.Linear(3, 4).requires_grad_(False), example=(torch.ones(2, 3),))
    delta = Delta.create(base, Full(pull=0.3, pull_form=form))
    part = delta.parts[0]
    mine = [t for _, _, t in part.items()]
    theirs = [torch.nn.Parameter(torch.zeros_like(t)) for t in mine]
    ours = torch.optim.AdamW(mine, lr=0.01, weight_decay=0.0)
    peer = darex.AdamR(theirs, lr=0.01, pull=0.3, form=form)
    for n in range(1, 7):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = 4.0 * (a.detach() * n + n).cos()  # as with a loss scale of 4
            b.grad = a.grad / 4
        part.method.before_step(part, Now(part, n, 6, 1.0, ours, scale=4.0))
        for a in mine:
            a.grad = a.grad / 4
        ours.step()
        peer.step()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert any(bool(t.any()) for t in mine)
