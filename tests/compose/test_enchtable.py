# SPDX-License-Identifier: Apache-2.0
"""EnchTable: interference against its formula, the merge's limits, and linearised training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from given_changes import Given, random_changes

from tunesmith.compose.enchtable import EnchTable, interference, linearised
from tunesmith.core.base import Base
from tunesmith.core.combine import combined
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys

KEY = "layers.0.gate.weight"


@pytest.fixture(scope="module")
def lm() -> Base:
    torch.set_num_threads(1)
    return toys()[0]


def merged(how: Any, changes: Given, weights: Any = (1.0, 1.0)) -> dict[str, torch.Tensor]:
    return {p.key: u.dense() for p, u in combined(how, changes, list(weights))}


def by_definition(t: torch.Tensor, s: torch.Tensor, keep: float, factor: float) -> float:
    us, ss, vs = [], [], []
    for D in (t, s):
        U, S, V = torch.linalg.svd(D, full_matrices=False)
        k = max(1, int(keep * len(S)))
        us.append(U[:, :k]), ss.append(S[:k]), vs.append(V[:k])
    U, S, V = torch.cat(us, 1), torch.cat(ss), torch.cat(vs)
    one = torch.eye(len(S)).to(U)
    M = (U.T @ U - one) @ torch.diag(S) @ (V @ V.T - one)
    return float(torch.norm(M, p=1)) / len(S) ** 2 * factor


@pytest.mark.parametrize("shape", [(2, 2), (6, 9), (9, 6)])
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_interference_is_the_formula(shape: tuple[int, int], keep: float) -> None:
    g = torch.Generator().manual_seed(shape[0])
    t, s = (torch.randn(shape, generator=g).double() for _ in range(2))
    found = interference(t, s, keep=keep, factor=7.0)
    assert found.value == pytest.approx(by_definition(t, s, keep, 7.0), rel=1e-9)
    assert found.weight == pytest.approx(math.exp(-found.value)) and 0 < found.weight <= 1
    assert found.directions == 2 * max(1, int(keep * min(shape)))


def test_a_case_by_hand() -> None:
    """Rank-one changes with directions 45 degrees apart on the left and equal ones on the right.

    U^T U - 1 has c = cos 45 off the diagonal, V V^T - 1 has 1: the product is diag(c s2, c s1), and k = 2.
    """
    t = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    s = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    expected = (math.sqrt(0.5) * (3 + math.sqrt(2))) / 4 * 200
    found = interference(t, s, keep=0.5)
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.overlap == pytest.approx((0.5 + 1) / 2, rel=1e-6)


def test_changes_in_orthogonal_spaces_do_not_interfere() -> None:
    t, s = torch.zeros(4, 4), torch.zeros(4, 4)
    t[:2, :2], s[2:, 2:] = torch.randn(2, 2), torch.randn(2, 2)
    found = interference(t, s)
    assert (found.value, found.weight, found.overlap) == (
        pytest.approx(0, abs=1e-5),
        pytest.approx(1),
        pytest.approx(0),
    )
    low = interference(
        torch.outer(torch.randn(6), torch.randn(9)), torch.outer(torch.randn(6), torch.randn(9)), keep=1.0
    )
    assert low.directions == 2  # directions of singular value zero are arbitrary and left out
    same = interference(t, t)
    assert same.overlap == pytest.approx(1, rel=1e-5)


def test_interference_grows_linearly_with_the_changes_and_is_no_overlap() -> None:
    g = torch.Generator().manual_seed(0)
    t, s = (torch.randn(64, 64, generator=g) for _ in range(2))
    one = interference(t, s).value
    assert interference(3 * t, 3 * s).value == pytest.approx(3 * one, rel=1e-4)
    equal = interference(t, t)
    assert one > 2 * equal.value and equal.overlap > 0.99  # the card measured 76 and 33
    assert (one, equal.value) == (pytest.approx(76, rel=0.05), pytest.approx(33, rel=0.05))


def test_nothing_is_added_without_a_safety_change_or_with_beta_zero(lm: Base) -> None:
    changes = random_changes(lm, 2)
    task = {k: u.dense() for k, u in changes.sources[0].items()}
    zero = Given(lm, [changes.sources[0], {k: torch.zeros_like(d) for k, d in task.items()}])
    alone = Given(lm, [changes.sources[0], {}])
    for found in (merged(EnchTable(beta=0.0), changes), merged(EnchTable(), zero), merged(EnchTable(), alone)):
        assert found.keys() == task.keys() and all(torch.equal(found[k], task[k]) for k in task)


def test_the_scale_of_the_safety_change_does_not_matter(lm: Base) -> None:
    changes = random_changes(lm, 2)
    louder = Given(lm, [changes.sources[0], {k: u.dense() * 37.0 for k, u in changes.sources[1].items()}])
    one, two = merged(EnchTable(beta=0.2), changes), merged(EnchTable(beta=0.2), louder)
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-4)
    weighted = merged(EnchTable(beta=0.2), changes, (1.0, 5.0))
    for key in one:
        torch.testing.assert_close(one[key], weighted[key], atol=1e-5, rtol=1e-4)


def test_the_merge_is_its_equation_and_vectors_have_weight_one(lm: Base) -> None:
    changes = random_changes(lm, 2, size=0.05)
    extra = {**changes.sources[1], "embed.weight": torch.randn(37, 16)}
    del extra["norm.weight"]
    given = Given(lm, [changes.sources[0], extra])
    t = {k: u.dense() for k, u in changes.sources[0].items()}
    s = {k: given.sources[1][k].dense() for k in extra}
    common = t.keys() & s.keys()
    a = 0.1 * math.sqrt(
        sum(float(t[k].square().sum()) for k in common) / sum(float(s[k].square().sum()) for k in common)
    )
    found = merged(EnchTable(factor=20.0), given)
    assert found.keys() == t.keys()  # what only the safety delta changes stays as in the task's model
    torch.testing.assert_close(found["norm.weight"], t["norm.weight"])
    torch.testing.assert_close(found["norm.bias"], t["norm.bias"] + a * s["norm.bias"])
    for key in (KEY, "layers.1.attention.k.weight"):
        w = math.exp(-by_definition(t[key], a * s[key], 0.5, 20.0))
        assert 0 < w < 1
        torch.testing.assert_close(found[key], t[key] + w * a * s[key], atol=1e-6, rtol=1e-4)
    plain = merged(EnchTable(weighing="none"), given)
    torch.testing.assert_close(plain[KEY], t[KEY] + a * s[KEY])


def test_the_learned_weight_lies_in_its_range_and_lower_interference_means_more(lm: Base) -> None:
    changes = random_changes(lm, 2)
    found = merged(EnchTable(weighing="learned"), changes)
    assert torch.allclose(found[KEY], changes.sources[0][KEY].dense())  # the descent runs to zero
    apart = torch.zeros(32, 16), torch.zeros(32, 16)
    apart[0][:8, :8], apart[1][8:, 8:] = 1.0, 1.0
    how = EnchTable(weighing="learned")
    assert how.weight(*apart) == pytest.approx(0.5, abs=0.1) and how.weight(apart[0], torch.zeros(32, 16)) == 1.0


def test_two_sources_and_matrices_of_one_shape_are_needed(lm: Base) -> None:
    with pytest.raises(UsageError, match="takes 2 sources, got 3"):
        merged(EnchTable(), random_changes(lm, 3), (1.0,) * 3)
    for a, b in ((torch.ones(2), torch.ones(2)), (torch.ones(2, 2), torch.ones(2, 3))):
        with pytest.raises(UsageError, match="one shape"):
            interference(a, b)


def test_linearising_one_layer_in_its_own_weight_is_exact_and_a_network_is_not() -> None:
    torch.manual_seed(0)
    single = Base(torch.nn.Linear(4, 3), example=(torch.randn(2, 4),))
    x, D = torch.randn(5, 4), torch.randn(3, 4)
    found = linearised(single, {"weight": D}, {"input": x})
    torch.testing.assert_close(found, x @ (single.model.weight + D).T + single.model.bias)
    ids = {"input_ids": torch.randint(0, 37, (3, 5), generator=torch.Generator().manual_seed(0))}
    lm = toys()[0]
    lm.model.double()
    name, W = "layers.0.attention.q.weight", lm.model.layers[0].attention.q.weight
    g = torch.Generator().manual_seed(1)
    change = torch.randn(W.shape, generator=g, dtype=torch.float64, requires_grad=True)

    def f(step: float) -> torch.Tensor:
        state = {name: W.detach() + step * change.detach()}
        return torch.func.functional_call(lm.model, state, kwargs=ids)["logits"].detach()

    h = 1e-4
    slope = (f(h) - f(-h)) / (2 * h)
    out = linearised(lm, {name: change}, ids)
    torch.testing.assert_close(out.detach(), f(0.0) + slope, atol=1e-7, rtol=1e-6)
    assert (out.detach() - f(1.0)).abs().max() > 1e-3
    double = linearised(lm, {name: 2 * change.detach()}, ids)  # linear in the change
    torch.testing.assert_close(double - f(0.0), 2 * (out.detach() - f(0.0)), atol=1e-5, rtol=1e-4)
    out.square().sum().backward()
    assert change.grad is not None and float(change.grad.abs().max()) > 0
    with pytest.raises(UsageError, match="fits no parameter"):
        linearised(lm, {"nothing": change}, ids)
