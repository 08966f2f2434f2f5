# SPDX-License-Identifier: Apache-2.0
"""Hashed sharing: the map's load and numbers, gradients, scaling, and the full model at full budget."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys
from tunesmith.deltas import HashShared
from tunesmith.deltas.weight.hash_shared import MODES, gamma
from tunesmith.deltas.weight.hashing import Fold, P, draw_numbers, polynomial, signs

NUMBERS = torch.tensor([1234567891, 987654321, 2038074741, 55555555, 1999999999, 777777777])


def fold(n: int, m: int) -> Fold:
    return Fold(n, m, NUMBERS)


def test_the_polynomial_is_exact_where_plain_int64_overflows() -> None:
    a = [int(v) for v in NUMBERS[:3]]
    for x in (0, 1, 2**31, 2**40 + 12345, P - 1, P, 5 * P + 3):
        want = (a[0] * x + a[1] * x * x + a[2]) % P
        assert int(polynomial(torch.tensor(x), NUMBERS[:3])) == want


def test_the_map_is_the_same_everywhere() -> None:
    """Values by Python's own integers, and pinned: another machine must give these."""
    f = fold(1000, 37)
    a, b = [int(v) for v in NUMBERS[:3]], [int(v) for v in NUMBERS[3:]]
    cells = f.cells(torch.arange(1000)).tolist()
    for i in (0, 36, 37, 500, 999):
        c, o = divmod(i, 37)
        assert cells[i] == ((a[0] * c + a[1] * c * c + a[2]) % P % 37 + o) % 37
    g = signs(0, 1000, NUMBERS[3:]).tolist()
    for i in (0, 15, 16, 500, 999):
        w = i // 16
        h = (b[0] * w + b[1] * w * w + b[2]) % P
        assert g[i] == (-1 if (h >> (i % 16)) & 1 else 1)
    assert cells[:3] + cells[37:40] + cells[990:993] == PINNED_CELLS
    assert g[:24] == PINNED_SIGNS


PINNED_CELLS = [4, 5, 6, 21, 22, 23, 1, 2, 3]
PINNED_SIGNS = [-1, 1, 1, 1, -1, -1, -1, 1, 1, -1, 1, 1, -1, -1, -1, -1, 1, 1, -1, -1, -1, 1, -1, -1]


@pytest.mark.parametrize(("start", "length"), [(0, 1), (5, 40), (16, 16), (31, 2), (1003, 77)])
def test_signs_of_a_stretch_are_those_of_the_whole(start: int, length: int) -> None:
    whole = signs(0, 2000, NUMBERS[3:])
    assert torch.equal(signs(start, length, NUMBERS[3:]), whole[start : start + length])


def test_signs_are_balanced_and_do_not_go_with_the_cells() -> None:
    g = signs(0, 200_000, NUMBERS[3:]).double()
    assert abs(float(g.mean())) < 5 / math.sqrt(200_000)
    for lag in (1, 2, 8, 16, 17, 97):
        assert abs(float((g[lag:] * g[:-lag]).mean())) < 5 / math.sqrt(200_000), lag


@pytest.mark.parametrize(("n", "m"), [(100, 100), (100, 150), (1, 5), (64, 64)])
def test_with_room_for_all_the_map_is_injective(n: int, m: int) -> None:
    assert len(set(fold(n, m).cells(torch.arange(n)).tolist())) == n


@pytest.mark.parametrize(("n", "m"), [(1000, 37), (1000, 999), (1000, 1), (500, 250), (13, 7)])
def test_loads_differ_by_at_most_one_and_are_counted(n: int, m: int) -> None:
    f = fold(n, m)
    load = torch.bincount(f.cells(torch.arange(n)), minlength=m)
    assert load.max() - load.min() <= 1
    assert load.min() >= n // m and load.max() <= math.ceil(n / m)
    assert torch.equal(f.load(), load)


@pytest.mark.parametrize(("start", "length"), [(0, 1000), (0, 1), (36, 2), (37, 37), (123, 456), (999, 1)])
def test_slices_are_the_gather_through_indices(start: int, length: int) -> None:
    f, psi = fold(1000, 37), torch.randn(37)
    assert torch.equal(f.gather(psi, start, length), psi[f.cells(torch.arange(start, start + length))])


def test_the_gradient_is_the_scatter_add() -> None:
    f = fold(1000, 37)
    psi = torch.zeros(37, dtype=torch.float64, requires_grad=True)
    up = torch.randn(800, dtype=torch.float64)
    (f.signed(psi, 111, 800) * up).sum().backward()
    at = torch.arange(111, 911)
    want = torch.zeros(37, dtype=torch.float64)
    want.scatter_add_(0, f.cells(at), up * signs(111, 800, NUMBERS[3:]))
    torch.testing.assert_close(psi.grad, want)


def stirred(base: Base, method: HashShared, seed: int = 0) -> Delta:
    delta = Delta.create(base, method, seed=seed)
    with torch.no_grad():
        delta.parts[0].parameter("", "psi").normal_()
    return delta


def test_weights_count_through_all_layers() -> None:
    """The change of every weight is that of its global position, layer after layer."""
    for base in toys():
        method = HashShared(budget=50, scale=0.5, targets="all-weights")
        part = stirred(base, method).parts[0]
        sizes = {p: math.prod(base.sites[p].shape) for p in part.kind_of}
        f = Fold(sum(sizes.values()), 50, part.tensors(next(iter(sizes)))["numbers"])
        i, g = torch.arange(f.n), signs(0, f.n, f.numbers[3:])
        want = 0.5 * g * part.parameter("", "psi").detach()[f.cells(i)]
        found = [method.update(base.sites[p], part.tensors(p)).dense().flatten() for p in part.kind_of]
        torch.testing.assert_close(torch.cat(found).detach(), want, atol=0, rtol=0)


@pytest.mark.parametrize(("budget", "m"), [(0.1, None), (300, 300), (1.0, None), (1e-9, 1)])
def test_the_budget_is_a_share_or_a_number(budget: float, m: int | None) -> None:
    base = toys()[0]
    delta = Delta.create(base, HashShared(budget=budget))
    n = sum(math.prod(base.sites[p].shape) for p in delta.parts[0].kind_of)
    assert delta.trainable_parameters == (math.floor(budget * n) if m is None else m)


def test_what_has_no_room_is_refused() -> None:
    with pytest.raises(UsageError, match="outside"):
        HashShared(budget=3e9)


def test_tied_partners_share_their_positions() -> None:
    base = toys()[1]
    delta = stirred(base, HashShared(budget=20, targets="embed"))
    with base.using(delta):
        live = base.probe_outputs()
    merged = base.merged(delta)
    assert merged.model.head.weight.data_ptr() == merged.model.embed.weight.data_ptr()
    torch.testing.assert_close(merged.probe_outputs(), live, atol=1e-5, rtol=0)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10, bias=False), nn.Tanh(), nn.Linear(10, 3, bias=False))


def sgd(method: HashShared, steps: int = 20, lr: float = 0.1, seed: int = 0) -> list[torch.Tensor]:
    """The weights of every layer after SGD steps through the delta."""
    base = Base(mlp(), example=(torch.randn(2, 6),))
    delta = Delta.create(base, method, seed=seed)
    part, psi = delta.parts[0], delta.parts[0].parameter("", "psi")
    optimiser = torch.optim.SGD([psi], lr=lr)
    for step in range(steps):
        with base.frozen(), base.using(delta):
            loss_of(base.model, step).backward()
        method.before_step(part, None)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return [m.weight.detach() for m in base.merged(delta).model if isinstance(m, nn.Linear)]


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=g)
    return nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


@pytest.mark.parametrize("scale", [1.0, 0.2, 7.0])
def test_with_full_budget_sgd_is_that_of_the_ordinary_net(scale: float) -> None:
    net = mlp()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(20):
        loss_of(net, step).backward()
        optimiser.step()
        optimiser.zero_grad()
    # count^2 / (count + 1e-3) is 0.999 for one weight a cell: the rate is 0.1 % larger, as in the released code
    found = sgd(HashShared(budget=1.0, scale=scale, targets="everything"), lr=0.1 / 1.001)
    for W, want in zip(found, (m.weight.detach() for m in net if isinstance(m, nn.Linear)), strict=True):
        torch.testing.assert_close(W, want, atol=1e-4, rtol=0)
        assert (W - want).abs().max() < 1e-2 * (want - mlp()[0 if W.shape[1] == 6 else 2].weight).abs().max()


def test_scaling_makes_the_scale_cancel_under_sgd_and_without_it_it_does_not() -> None:
    one, two = (sgd(HashShared(budget=20, scale=s, targets="everything")) for s in (1.0, 2.0))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    plain = [sgd(HashShared(budget=20, scale=s, targets="everything", gradient_scaling="none")) for s in (1.0, 2.0)]
    assert (plain[0][0] - plain[1][0]).abs().max() > 1e-2


def test_gamma_has_the_forms_of_the_authors() -> None:
    """lambda = 1, 2, 3 at three weights of one cell."""
    count, total, squares = torch.tensor([3.0]), torch.tensor([6.0]), torch.tensor([14.0])
    want = {"mean-move": 36 / 3.001, "sum": 6.0, "mean": 2.0, "root": math.sqrt(14), "square": 14.0}
    assert set(want) | {"none"} == set(MODES)
    for mode, value in want.items():
        assert float(gamma(mode, count, total, squares)) == pytest.approx(value)


def test_the_delta_is_a_vector_and_a_few_numbers() -> None:
    base = toys()[0]
    delta = Delta.create(base, HashShared(budget=64))
    stored = {name for _, name, t in delta.parts[0].items() if t.requires_grad}
    assert stored == {"psi"} and delta.trainable_parameters == 64
    others = sum(t.numel() for _, t in delta.items() if not t.requires_grad)
    assert others == 6 + 2 * len(delta.parts[0].kind_of)
    drawn = [Delta.create(base, HashShared(), seed=s).parts[0].parameter("", "numbers").tolist() for s in range(3)]
    seen = {tuple(row) for row in drawn}
    assert len(seen) == 3 and all(v % 2 == 1 and 0 < v < P for row in seen for v in row)
    assert draw_numbers(torch.Generator().manual_seed(0)).dtype == torch.int64
