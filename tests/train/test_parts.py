# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.deltas import BitFit, LoRA
from tunesmith.objectives import SFT
from tunesmith.train import parts
from tunesmith.train.config import TrainConfig
from tunesmith.train.parts import parts_of
from tunesmith.train.tasks import LoaderTask, RowTask

METHODS = (LoRA(rank=2), BitFit())
CPU = torch.device("cpu")


def rows(*lengths: int) -> RowTask:
    return RowTask([{"input_ids": [1] * n, "labels": [1] * n} for n in lengths], SFT())


def test_parts_are_even_and_hold_about_so_many_tokens(monkeypatch: Any) -> None:
    monkeypatch.setitem(parts.POSITIONS, "cpu", 100)
    task = rows(*[30] * 8)
    assert parts_of(task, range(8), TrainConfig(), CPU) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert parts_of(task, range(3), TrainConfig(), CPU) == [[0, 1, 2]]
    assert parts_of(task, range(8), TrainConfig(micro_batch=5), CPU) == [[0, 1, 2, 3, 4], [5, 6, 7]]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parts_of(task, range(8), TrainConfig(), CPU) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_row_longer_than_a_part_is_a_part(monkeypatch: Any) -> None:
    monkeypatch.setitem(parts.POSITIONS, "cpu", 100)
    assert parts_of(rows(10, 250, 20), range(3), TrainConfig(), CPU) == [[0], [1], [2]]


def test_pictures_and_the_batches_of_a_loader_stay_whole(monkeypatch: Any) -> None:
    monkeypatch.setitem(parts.POSITIONS, "cpu", 4)
    pictures = RowTask([{"array": torch.zeros(3, 4, 4), "label": 0}] * 9, SFT())
    assert parts_of(pictures, range(9), TrainConfig(), CPU) == [list(range(9))]
    loader = LoaderTask([torch.zeros(64, 3)], lambda out, batch: out.sum())
    assert parts_of(loader, [0], TrainConfig(), CPU) == [[0]]


def test_training_takes_the_path_of_the_whole_batch(trained: Any, lm: Any, monkeypatch: Any) -> None:
    done, whole = trained(*METHODS, base=lm(dtype=torch.float64), steps=6)
    monkeypatch.setitem(parts.POSITIONS, "cpu", 12)
    seen: list[int] = []
    cut = parts._size
    monkeypatch.setattr(parts, "_size", lambda *a: seen.append(cut(*a)) or seen[-1])
    again, cut_up = trained(*METHODS, base=lm(dtype=torch.float64), steps=6)
    assert again.losses == pytest.approx(done.losses, rel=1e-9)
    for (key, a), (_, b) in zip(whole.items(), cut_up.items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=key)
    assert seen and max(seen) == 2  # of 8 rows


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_every_device_has_its_room(device: str) -> None:
    assert len(parts_of(rows(*[16] * 8), range(8), TrainConfig(), torch.device(device))) == 1
