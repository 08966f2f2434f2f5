# SPDX-License-Identifier: Apache-2.0
"""Factors beside each other: whatever comes and goes, a row of a table is its delta's, and slots have no gaps."""

from __future__ import annotations

import random

import pytest
import torch
from serve_cases import moved
from torch import nn

from tunesmith.core.base import Base
from tunesmith.deltas import LoRA
from tunesmith.serve import products
from tunesmith.serve.mixed import Resident, resident
from tunesmith.serve.products import Product
from tunesmith.serve.stacks import Stacks


def layer(i: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{i}.self_attn.{n}_proj" for n in "qkv")


def holds(stacks: Stacks, r: Resident) -> bool:
    """Whether the table's factors at every layer multiply to those of the delta."""
    found = 0
    for family in stacks.families.values():
        for group in family.factors if r in family.members else ():
            A, parts = family.of(group)
            slot = family.members.index(r)
            for path, column, rank, B in parts:
                a, b = r.low[path]
                assert torch.equal(A[slot, :, column : column + rank], a.T.to(A)) and torch.equal(B[slot], b.T.to(B))
                found += 1
    return found == len(r.low)


def test_any_coming_and_going_keeps_slots_dense_and_rows_right(llama: Base) -> None:
    methods = [LoRA(rank=1 + i % 3, targets="q,v" if i % 4 == 3 else "q,k,v,o") for i in range(9)]
    deltas = [resident(llama, moved(llama, m, seed=i)) for i, m in enumerate(methods)]
    stacks, rng = Stacks([layer(0), layer(1)]), random.Random(0)
    for _ in range(40):
        wanted, kept = rng.sample(deltas, rng.randrange(6)), rng.sample(deltas, rng.randrange(6))
        before = {id(r) for f in stacks.families.values() for r in f.members}
        stacks.settle(wanted, kept)
        here = [r for f in stacks.families.values() for r in f.members]
        assert {id(r) for r in here} == {id(r) for r in wanted} | (before & {id(r) for r in kept})
        assert all(holds(stacks, r) for r in here)
        assert sorted(stacks.place(r) for r in here) == [
            (i, slot) for i, f in enumerate(stacks.families.values()) for slot in range(len(f.members))
        ]
    assert stacks.place(None) > max(stacks.place(r) for r in deltas)


def test_only_deltas_of_one_shape_share_a_table(llama: Base) -> None:
    kinds = [LoRA(rank=2, targets="q"), LoRA(rank=3, targets="q"), LoRA(rank=2, targets="q"), LoRA(rank=2, targets="o")]
    stacks = Stacks()
    stacks.settle([resident(llama, moved(llama, m, seed=i)) for i, m in enumerate(kinds)])
    assert [len(f.members) for f in stacks.families.values()] == [2, 1, 1]


@pytest.mark.parametrize("form", products.FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_form_of_a_product_gives_the_layers_outputs(form: str, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(64, 32, bias=False), "b": nn.Linear(64, 48), "c": nn.Linear(64, 16, bias=False)}
    layers = {n: m.to(dtype) for n, m in layers.items()}
    try:
        product = Product(layers, {n: m.forward for n, m in layers.items()}, (32, 48, 16), form)
    except (RuntimeError, AttributeError):
        pytest.skip("this build of torch packs nothing")
    x = torch.randn(rows, 64).to(dtype)
    with torch.no_grad():
        y = product.call(x)
        for name, module in layers.items():
            lo, hi = product.slices[name]
            assert torch.allclose(y[:, lo:hi].float(), module(x).float(), atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_layers_that_are_not_plain_run_by_themselves() -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    layers = {"a": nn.Linear(8, 4), "b": Odd(8, 4)}
    product = Product(layers, {n: m.forward for n, m in layers.items()}, (4, 4), "stacked")
    x = torch.randn(2, 8)
    assert product.form == "own"
    assert torch.equal(product.call(x), torch.cat([m(x) for m in layers.values()], -1))


def test_copies_are_made_only_while_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(64, 64) for _ in range(4)]
    assert products.choose(layers) in ("stacked", "packed")
    monkeypatch.setattr(products, "available_memory", lambda: 4 * 64 * 64 * 4)
    assert products.choose(layers) == "own"
