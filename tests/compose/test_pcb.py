# SPDX-License-Identifier: Apache-2.0
"""PCB-Merging against its definition written out over one flat row for each source (card 052)."""

from __future__ import annotations

import pytest
import torch
from compose_cases import dense, gap, moved
from torch import Tensor

import tunesmith as ts
from tunesmith.compose import PCB, merge
from tunesmith.core.algebra import Dense, Update
from tunesmith.core.combine import COMBINERS, Place, combined
from tunesmith.core.toys import toys

BASE = toys()[0]


class Flat:
    """Changes from rows [n, d], cut into tensors."""

    def __init__(self, D: Tensor, cuts: list[int]) -> None:
        self.pieces = dict(enumerate(D.split(cuts, dim=1)))
        self.names = [str(i) for i in range(len(D))]

    def places(self):  # type: ignore[no-untyped-def]
        for i, t in self.pieces.items():
            yield Place(f"layer{i}", "weight", (t.shape[1],), "linear")

    def at(self, place: Place) -> list[Update | None]:
        return [Dense(row) for row in self.pieces[int(place.path[5:])]]


def merged(how: PCB, D: Tensor, cuts: list[int], weights: list[float]) -> Tensor:
    found = {p.path: u.dense() for p, u in combined(how, Flat(D, cuts), weights)}
    return torch.cat([found[f"layer{i}"] for i in range(len(cuts))])


def by_definition(
    D: Tensor, ratio: float, lam: Tensor, trim: float = 1e-4, normed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The merged row, C and S; ranks as in the released code."""
    n, d = D.shape

    def clip(x: Tensor, below: float, above: float) -> Tensor:
        s = x.sort(dim=1).values
        return torch.minimum(torch.maximum(x, s[:, int(d * below), None]), s[:, int(d * (1 - above) - 1), None])

    def unit(x: Tensor) -> Tensor:
        low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
        return (x - low) / (high - low)

    M = clip(D.abs(), trim, trim)
    C = D.sign() * M
    others = D.sign() * unit(M) if normed else D
    P = torch.exp(n * unit(M) ** 2) * torch.tanh(D * others.sum(0))
    S = unit(clip(P, 1 - ratio, 0))
    return (S * lam[:, None] * C).sum(0) / S.sum(0).clamp_min(1e-12), C, S


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.5])
def test_equals_the_definition_over_the_whole_model(ratio: float, normed: bool) -> None:
    D = torch.randn(3, 10_000) * torch.tensor([[0.02], [0.5], [1.0]])
    lam = [1.0, 0.8, 1.2]
    want, _, S = by_definition(D, ratio, torch.tensor(lam), normed=normed)
    made = merged(PCB(ratio=ratio, agree="normed" if normed else "raw"), D, [4000, 1, 5999], lam)
    assert torch.equal(made != 0, want != 0)
    assert torch.allclose(made, want, rtol=1e-5, atol=1e-7)
    kept = (S > 0).float().mean(1)
    assert bool(((kept - ratio).abs() <= 1.5e-4).all())
    shares = S / S.sum(0).clamp_min(1e-12)
    assert torch.allclose(shares.sum(0)[S.sum(0) > 0], torch.ones(()), atol=1e-6)


def test_one_source_keeps_its_largest_entries_clipped() -> None:
    D = torch.randn(1, 5000)
    made = merged(PCB(ratio=0.1, lam=1.2), D, [5000], [1.0])
    _, C, S = by_definition(D, 0.1, torch.tensor([1.2]))
    kept = made != 0
    assert torch.allclose(made[kept], 1.2 * C[0][kept], rtol=1e-5) and int(kept.sum()) == 499
    assert float(D.abs()[0][kept].min()) >= float(D.abs()[0][~kept].max())
    assert float(S.min()) >= 0 and float(S.max()) == 1


def test_identical_sources_give_one_of_them_on_what_is_kept() -> None:
    row = torch.randn(1, 4000)
    made = merged(PCB(), row.repeat(3, 1), [2000, 2000], [1.0] * 3)
    _, C, _ = by_definition(row.repeat(3, 1), 0.1, torch.ones(3))
    kept = made != 0
    assert int(kept.sum()) == 399 and torch.allclose(made[kept], C[0][kept], rtol=1e-5)


def test_nothing_of_equal_entries_and_no_division_by_zero() -> None:
    """A row without spread has no scores; the change is none, not NaN."""
    assert torch.equal(merged(PCB(), torch.ones(2, 50), [50], [1.0, 1.0]), torch.zeros(50))


def test_on_deltas_it_is_global_over_tensors() -> None:
    """Through the engine: the flat rows of a model's changes, a low-rank source and a dense one."""
    a, b = moved(BASE, "lora", {"rank": 2}, 0), moved(BASE, "full", {}, 1)
    rows = dense(BASE, a, b)
    D = torch.stack([torch.cat([t[i].flatten() for t in rows.values()]) for i in range(2)]).float()
    want, _, _ = by_definition(D, 0.1, torch.ones(2))
    made = dense(BASE, merge(BASE, [a, b], "pcb"))
    found = torch.cat([(made[k][0] if k in made else torch.zeros_like(t[0])).flatten() for k, t in rows.items()])
    assert torch.allclose(found.float(), want, rtol=1e-4, atol=1e-6)
    assert gap(made, dense(BASE, merge(BASE, [b, a], "pcb"))) < 1e-6


def test_it_is_registered_with_its_limits() -> None:
    assert COMBINERS.get("pcb").facts["most"] == 64
    with pytest.raises(ts.TunesmithError, match="outside"):
        PCB(ratio=0.0)


@pytest.mark.parametrize("use", ["size", "agreement"])
def test_ablations_score_by_one_of_the_two(use: str) -> None:
    torch.manual_seed(3)
    D = torch.randn(3, 400)
    got = merged(PCB(ratio=0.2, use=use), D, [400], [1.0, 1.0, 1.0])
    low, high = D.abs().min(1).values, D.abs().sort(1).values[:, max(int(400 * (1 - 1e-4) - 1), 0)]
    C = D.sign() * D.abs().clamp(low[:, None], high[:, None])
    size = (C.abs() - low[:, None]) / (high - low)[:, None]
    P = torch.exp(3 * size**2) if use == "size" else torch.tanh(D * D.sum(0))
    least = P.sort(1).values[:, int(400 * 0.8)]
    S = (P.clamp_min(least[:, None]) - least[:, None]) / (P.max(1).values - least)[:, None]
    want = (S * C).sum(0) / S.sum(0).clamp_min(1e-12)
    torch.testing.assert_close(got.flatten(), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, merged(PCB(ratio=0.2), D, [400], [1.0, 1.0, 1.0]))
