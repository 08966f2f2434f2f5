# SPDX-License-Identifier: Apache-2.0
"""Skill localisation: the hand gradient, rounding within the budget, what is found, and sparse against dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from given_changes import Given, random_changes

from tunesmith.compose.graft import MovementGraft, _rounded, largest, localize, overlap, overlaps, relaxed, step_of
from tunesmith.compose.working import dense_delta, gradients, write
from tunesmith.core.base import Base
from tunesmith.core.combine import combined
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys


@pytest.fixture(scope="module")
def lm() -> Base:
    torch.set_num_threads(1)
    return toys()[0]


@pytest.fixture(scope="module")
def changes(lm: Base) -> Given:
    return random_changes(lm, 1, size=0.3)


X = torch.randint(0, 37, (16, 6), generator=torch.Generator().manual_seed(5))


def task(base: Base, changes: Given) -> tuple[Any, Any]:
    """Say what base + change says."""
    whole = dense_delta(base, [(p, changes.at(p)[0]) for p in changes.places()])
    with torch.no_grad(), base.using(whole):
        y = base.model(input_ids=X)["logits"][:, -1].softmax(-1)

    def loss(b: Base, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        logits = b.model(input_ids=X[rows])["logits"][:, -1]
        return F.cross_entropy(logits, y[rows], reduction="sum"), len(rows)

    return lambda: torch.arange(16).split(8), loss


def test_all_entries_are_the_fine_tuned_model_and_none_the_base(lm: Base, changes: Given) -> None:
    batches, loss = task(lm, changes)
    everything = {p.key: torch.arange(changes.at(p)[0].dense().numel()) for p in changes.places()}
    found = localize(lm, changes, batches, loss, budget=1.0, steps=1, lr=1e-9, given=everything)
    assert found.share == 1 and found.entries == found.total
    for place, u in found.changes:
        assert torch.equal(u.dense(), changes.at(place)[0].dense())
    tuned = dense_delta(lm, [(p, changes.at(p)[0]) for p in changes.places()])
    grafted = dense_delta(lm, found.changes)
    with torch.no_grad():
        with lm.using(tuned):
            expected = lm.model(input_ids=X)["logits"]
        with lm.using(grafted):
            assert torch.equal(lm.model(input_ids=X)["logits"], expected)
        plain = lm.model(input_ids=X)["logits"]
    none = localize(lm, changes, batches, loss, start=0.0, steps=1, lr=1e-9)
    assert none.entries == 0 and none.changes == []
    write(
        tuned,
        {
            k: torch.zeros_like(t)
            for k, t in gradients(lm, tuned, lambda: lm.model(input_ids=X)["logits"].sum()).items()
        },
    )
    with torch.no_grad(), lm.using(tuned):
        assert torch.equal(lm.model(input_ids=X)["logits"], plain)


def test_the_hand_gradient_is_that_of_autograd_through_functional_call(lm: Base, changes: Given) -> None:
    _batches, loss = task(lm, changes)
    g = torch.Generator().manual_seed(1)
    deltas = {p.key: changes.at(p)[0].dense() for p in changes.places()}
    S = {k: torch.rand(d.shape, generator=g).requires_grad_() for k, d in deltas.items()}
    start = {k: torch.rand(d.shape, generator=g) < 0.3 for k, d in deltas.items()}
    state = {k: t.detach() for k, t in lm.model.named_parameters()}
    for k, d in deltas.items():
        state[k] = state[k] + relaxed(S[k], start[k], 1.0) * d

    class Called:  # a base whose weights are the state
        def model(self, **inputs: Any) -> Any:
            return torch.func.functional_call(lm.model, state, kwargs=inputs)

    value, _ = loss(Called(), torch.arange(16))
    wanted = torch.autograd.grad(value, list(S.values()))
    delta = dense_delta(lm, [(p, changes.at(p)[0]) for p in changes.places()])
    write(delta, {k: relaxed(S[k].detach(), start[k], 1.0) * d for k, d in deltas.items()})
    G = gradients(lm, delta, lambda: loss(lm, torch.arange(16))[0])
    for (k, d), w in zip(deltas.items(), wanted, strict=True):
        torch.testing.assert_close(step_of(G[k], d, S[k].detach(), start[k], 1.0), w, atol=1e-5, rtol=1e-4)
    assert max(float(w.abs().max()) for w in wanted) > 1e-3


def test_the_budget_holds_after_rounding_and_leaving_it_is_reported(lm: Base, changes: Given) -> None:
    batches, loss = task(lm, changes)
    found = localize(lm, changes, batches, loss, budget=0.01, start=0.005, steps=6, lr=1e9)
    most = int(0.01 * found.total)
    assert all(row["entries"] <= most for row in found.curve) and 0 < found.entries <= most
    assert any(row["over"] for row in found.curve)  # a rate this large flips more than it may
    assert [row["step"] for row in found.curve] == list(range(7))
    gamma = {"a": torch.tensor([0.9, 0.4, 0.6]), "b": torch.tensor([0.7, 0.1])}
    kept, over = _rounded(gamma, 2)
    assert over and kept["a"].tolist() == [True, False, False] and kept["b"].tolist() == [True, False]
    assert not _rounded(gamma, 3)[1]


def test_the_search_finds_a_planted_skill_that_size_does_not_show(lm: Base) -> None:
    """Large entries of another layer hide the one that does the work."""
    g = torch.Generator().manual_seed(2)
    skill = torch.zeros(16)
    skill[3] = 2.0
    noise = torch.where(torch.rand(32, 16, generator=g) < 0.02, 3.0, 0.0) * torch.randn(32, 16, generator=g).sign()
    batches, loss = task(lm, Given(lm, [{"norm.bias": skill}]))
    loud = Given(lm, [{"norm.bias": skill, "layers.1.gate.weight": noise}])
    found = localize(lm, loud, batches, loss, budget=1 / 528, start=0.0, steps=10, lr=1e7)
    assert found.masks.keys() == {"norm.bias"} and found.masks["norm.bias"].tolist() == [3]
    assert found.by_depth == {1: 1} and found.score > found.curve[0]["score"]
    assert set(largest({k: u.dense() for k, u in loud.sources[0].items()}, 1)["norm.bias"].tolist()) == set()
    again = localize(lm, loud, batches, loss, budget=1 / 528, start=0.0, steps=10, lr=1e7)
    assert again.curve == found.curve


def test_sparse_storage_is_the_dense_copy_and_the_score_can_be_given(lm: Base, changes: Given) -> None:
    batches, loss = task(lm, changes)
    digest = lm.digest()
    found = localize(lm, changes, batches, loss, budget=0.05, start=0.02, steps=3, lr=1e6, score=lambda b: 1.0)
    assert found.score == 1.0 and lm.digest() == digest
    for place, u in found.changes:
        mask = torch.zeros(u.dense().numel(), dtype=torch.bool)
        mask[found.masks[place.key]] = True
        assert torch.equal(u.dense(), changes.at(place)[0].dense() * mask.reshape(u.shape))
    total = sum(changes.at(p)[0].dense().numel() for p in changes.places())
    assert found.total == total and sum(found.by_tensor.values()) == found.entries == sum(found.by_depth.values())


def test_overlap_of_masks() -> None:
    a = {"x": torch.tensor([1, 2, 3]), "y": torch.tensor([0])}
    b = {"x": torch.tensor([3, 4])}
    assert overlap(a, a) == overlap(b, b) == 1.0
    assert overlaps([a, b]) == [[1.0, 0.5], [0.25, 1.0]]
    with pytest.raises(UsageError, match="empty mask"):
        overlap(a, {"x": torch.tensor([], dtype=torch.int64)})


def test_the_combiner_keeps_the_entries_that_moved_most(lm: Base) -> None:
    two = random_changes(lm, 2)
    pairs = dict((p.key, u.dense()) for p, u in combined(MovementGraft(share=0.1), two, [1.0, 0.5]))
    edges = [torch.cat([u.dense().flatten() for u in s.values()]).abs() for s in two.sources]
    edges = [e.sort(descending=True).values[int(0.1 * len(e)) - 1] for e in edges]
    for key, value in pairs.items():
        d = [s[key].dense() for s in two.sources]
        expected = sum(w * torch.where(x.abs() >= e, x, 0.0) for w, x, e in zip((1.0, 0.5), d, edges, strict=True))
        torch.testing.assert_close(value, expected)
    one = Given(lm, [two.sources[0]])
    whole = dict((p.key, u.dense()) for p, u in combined(MovementGraft(share=1.0), one, [1.0]))
    assert all(torch.equal(v, one.sources[0][k].dense()) for k, v in whole.items()) and len(whole) == len(
        one.sources[0]
    )
    assert list(combined(MovementGraft(share=0.0), one, [1.0])) == []


def test_options_out_of_range_are_refused(lm: Base, changes: Given) -> None:
    batches, loss = task(lm, changes)
    for bad in ({"budget": 0.0}, {"start": 2.0}, {"steps": 0}, {"lr": 0.0}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            localize(lm, changes, batches, loss, **bad)
    with pytest.raises(UsageError, match="every changed tensor is left out"):
        localize(lm, changes, batches, loss, leave=lambda p: True)
    with pytest.raises(UsageError, match="does not change"):
        localize(lm, changes, batches, loss, given={"embed.weight": torch.tensor([0])})
    with pytest.raises(UsageError, match="places must be int64"):
        localize(lm, changes, batches, loss, given={"norm.bias": torch.tensor([99])})
    with pytest.raises(UsageError, match="saw no data"):
        localize(lm, changes, lambda: [], loss)
