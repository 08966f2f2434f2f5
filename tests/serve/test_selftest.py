# SPDX-License-Identifier: Apache-2.0
"""The proof of a server holds where it should, and fails where something is wrong."""

from __future__ import annotations

import pytest
import torch
from serve_cases import moved, tiny_llama

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.deltas import IA3, LoRA, PrefixTuning
from tunesmith.serve.library import Library
from tunesmith.serve.selftest import selftest

PROMPTS = [[5, 6, 7], [8, 9], [1, 2, 3, 4]]


def stocked(base: Base) -> Library:
    library = Library(base, 1 << 30)
    for i, m in enumerate([LoRA(rank=2), IA3(), PrefixTuning(tokens=2)]):
        library.add(moved(base, m, seed=i), f"d{i}")
    return library


def test_the_three_ways_agree(llama: Base) -> None:
    proof = selftest(llama, stocked(llama), PROMPTS, new=6)
    assert proof.holds and proof.requests == 8 and proof.tokens == 48 and proof.live_only == ("d2",) and proof.shared
    assert "selftest holds" in str(proof)


def test_a_fault_in_the_batch_is_found(llama: Base) -> None:
    library = stocked(llama)
    held = library.acquire("d0")
    path = next(iter(held.low))
    A, B = held.low[path]
    held.low[path] = (A, 3 * B)
    proof = selftest(llama, library, PROMPTS, new=6)
    assert not proof.holds and proof.merged_differs > 0 and proof.alone_differs == 0 and "FAILS" in str(proof)


def test_what_proves_nothing_is_refused(llama: Base) -> None:
    with pytest.raises(UsageError, match="nothing to prove"):
        selftest(llama, Library(llama, 1), PROMPTS)
    half = tiny_llama()
    half.model.to(torch.bfloat16)
    with pytest.raises(UsageError, match="fp32"):
        selftest(half, stocked(half), PROMPTS)
