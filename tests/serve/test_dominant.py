# SPDX-License-Identifier: Apache-2.0
"""A delta that has most of the batch is merged into copies: the tokens stay, the base stays, others do not notice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_cases import moved, tiny_llama

from tunesmith.core.base import Base
from tunesmith.core.errors import DeltaError
from tunesmith.deltas import IA3, DoRA, LoRA
from tunesmith.serve import dominant
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import AHEAD, Library
from tunesmith.serve.requests import Request
from tunesmith.serve.sampling import Sampling

GREEDY = Sampling(temperature=0)
METHODS: dict[str, list[Any]] = {
    "lora": [LoRA(rank=2)], "few": [LoRA(rank=3, targets="q,v")], "both": [LoRA(rank=2, targets="o"), IA3()], "dora": [DoRA(rank=2)],
}  # fmt: skip


def engine(base: Base, **more: Any) -> Engine:
    library = Library(base, 1 << 30)
    for i, (name, methods) in enumerate(METHODS.items()):
        library.add(moved(base, *methods, seed=i), name)
    return Engine(base, library, **{"cells": 2000, **more})


def ask(id: str, seed: int, delta: str | None, new: int) -> Request:
    rng = random.Random(seed)
    return Request(id, tuple(rng.randrange(67) for _ in range(7)), new, delta, GREEDY)


@pytest.mark.parametrize(("name", "merges"), [("lora", 1), ("few", 1), ("both", 1), ("dora", 0)])
def test_tokens_are_the_same_before_while_and_after(llama: Base, name: str, merges: int) -> None:
    before = llama.digest()
    asked = [ask(f"{name}{i}", i, name, 40 - 3 * i) for i in range(4)]
    late = [ask("other", 9, "lora" if name != "lora" else "few", 50), ask("base", 10, None, 45)]
    want = {r.id: engine(llama, dominant=None).generate([r])[r.id] for r in [*asked, *late]}
    e = engine(llama, dominant=0.6)
    assert e.dominant is not None
    got: dict[str, list[int]] = {r.id: [] for r in [*asked, *late]}
    for r in asked:
        e.submit(r)
    merged = []
    for step in range(200):
        if step == 6:  # they join rows that run merged, or will
            for r in late:
                e.submit(r)
        for event in e.step():
            if event.chosen is not None:
                got[event.id].append(event.chosen.token)
        merged.append(e.dominant.merged is not None)
        if e.idle:
            break
    assert got == want and llama.digest() == before
    assert e.dominant.merges == merges and any(merged) == bool(merges)
    assert merges == 0 or (not merged[0] and not merged[-1])  # not at once, and not for ever


def test_no_copies_without_memory_or_in_half_precision(llama: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dominant, "available_memory", lambda: 1000)
    e = engine(llama, dominant=0.6)
    want = engine(llama, dominant=None).generate([ask("a", 1, "lora", 30)])
    assert e.generate([ask("a", 1, "lora", 30)]) == want and e.dominant is not None and not e.dominant.merges
    half = tiny_llama()
    half.model.to(torch.bfloat16)
    assert engine(half).dominant is None


def test_deltas_of_waiting_requests_are_read_ahead(llama: Base, tmp_path: Path) -> None:
    for i in range(8):
        moved(llama, LoRA(rank=2), seed=i, name=f"d{i}").save(tmp_path / f"d{i}")
    library = Library(llama, 1 << 30)
    library.scan(tmp_path)
    e = Engine(llama, library, cells=2000, requests=1)
    asked = [ask(str(i), i, f"d{i}", 3) for i in range(8)]
    for r in asked:
        e.submit(r)
    (tmp_path / "d2" / "delta.safetensors").write_bytes(b"damaged")
    e.step()
    assert len(library._ahead) == AHEAD and library.loads == 1
    got: dict[str, list[int]] = {}
    errors = {}
    while not e.idle:
        for event in e.step():
            if event.error is not None:
                errors[event.id] = event.error
            if event.chosen is not None:
                got.setdefault(event.id, []).append(event.chosen.token)
    assert set(errors) == {"2"} and isinstance(errors["2"], DeltaError)
    assert library.loads == 7 and not library._ahead
    for r in (asked[1], asked[7]):
        assert got[r.id][-2:] == Engine(llama, library, cells=2000).generate([r])[r.id][-2:]


def test_what_nobody_waits_for_any_more_is_forgotten(llama: Base, tmp_path: Path) -> None:
    for i in range(3):
        moved(llama, LoRA(rank=2), seed=i, name=f"d{i}").save(tmp_path / f"d{i}")
    library = Library(llama, 1 << 30)
    library.scan(tmp_path)
    library.prefetch(["d0", "nobody"])
    next(iter(library._ahead.values())).result()
    library.prefetch(["d1"])
    assert list(library._ahead) == [library.find("d1").digest]
    moved(llama, LoRA(rank=2), seed=9, name="d1").save(tmp_path / "d1")  # written anew while it was read
    held = library.acquire("d1")
    assert held.digest == library.find("d1").digest and library.loads == 1
