"""Freed memory stays with the process inside the block, and is handed back after it."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from tunesmith.core import memory
from tunesmith.core.memory import keeping_memory

glibc = pytest.mark.skipif(memory._glibc() is None, reason="another C library")


class Library:
    """Stands in for glibc and writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.trimmed = 0

    def mallopt(self, option: int, value: int) -> int:
        self.calls.append((option, value))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trimmed += 1
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(memory, "_glibc", lambda: made)
    for name in memory._CHOSEN:
        monkeypatch.delenv(name, raising=False)
    return made


def test_nested_blocks_set_and_settle_once(library: Library) -> None:
    with keeping_memory() as on, keeping_memory():
        assert on and library.calls == list(memory._KEEPING)
    assert library.calls == [*memory._KEEPING, *memory._SETTLED] and library.trimmed == 1


def test_it_settles_after_an_error_too(library: Library) -> None:
    with pytest.raises(ValueError), keeping_memory():
        raise ValueError
    assert library.trimmed == 1 and memory._keepers == 0


def test_the_limits_of_the_user_stand(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    with keeping_memory() as on:
        assert not on
    assert not library.calls


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with keeping_memory() as on:
        assert not on


@glibc
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the page faults of Linux")
def test_large_tensors_find_their_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in memory._CHOSEN:
        monkeypatch.delenv(name, raising=False)

    def faults(times: int = 4, size: int = 70 << 20) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            torch.ones(size, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with keeping_memory():
        faults(12)  # aligned blocks may move to and fro at first
        kept = faults()
    assert kept * 10 < faults()
