# SPDX-License-Identifier: Apache-2.0
"""The tiny models, deltas and the server that the tests of serving share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from serve_cases import moved, tiny_llama
from serve_http import Served

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.deltas import IA3, LoRA


@pytest.fixture(scope="session")
def llama() -> Base:
    return tiny_llama()


@pytest.fixture(scope="module")
def base() -> Base:
    found = tiny_llama(vocab_size=300, max_position_embeddings=512, eos_token_id=None, bos_token_id=None)
    return Base(found.model, tokenizer=byte_tokenizer(), name="tiny", family="causal-lm")


@pytest.fixture(scope="module")
def root(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deltas")
    for i in range(4):
        moved(base, LoRA(rank=i + 1) if i < 3 else IA3(), seed=i, name=f"d{i}").save(root / f"d{i}")
    Delta.create(base, LoRA(rank=2), name="blank").save(root / "blank")
    return root


@pytest.fixture(scope="module")
def served(base: Base, root: Path) -> Iterator[Served]:
    made = Served(base, root)
    yield made
    made.close()
