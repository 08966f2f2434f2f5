# SPDX-License-Identifier: Apache-2.0
"""Merging folders out of core gives what merging the same changes in memory gives, for combiners of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_folders import llama, read_all, tuned

import tunesmith
from tunesmith.compose.between import between_folders
from tunesmith.compose.merge import merge
from tunesmith.compose.stream import merge_folders

# one of each kind: linear, elementwise, by rows, with a survey of the whole model, by depth, on the sphere
HOW = (
    "linear", "task-arithmetic:lam=0.5", "ties:density=0.4", "ties:density=0.3,per=model", "breadcrumbs", "lines", "slerp",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("models")
    base = llama(place / "base")
    return [base, tuned(place / "a", base, 1), tuned(place / "b", base, 2)]


@pytest.fixture(scope="module")
def deltas(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("deltas")
    for m in models[1:]:
        between_folders(models[0], m, place / m.name)
    return [place / m.name for m in models[1:]]


@pytest.mark.parametrize("how", HOW)
def test_it_equals_the_merge_in_memory(models: list[Path], deltas: list[Path], tmp_path: Path, how: str) -> None:
    merge_folders(models[0], models[1:], how, [1.0, 0.5], tmp_path / "out", shard_bytes=3000)
    base = tunesmith.load(models[0], dtype="fp32", device="cpu")
    made = merge(base, [tunesmith.Delta.load(d, base) for d in deltas], how, weights=[1.0, 0.5])
    want = base.merged(made).model.state_dict()
    got = read_all(tmp_path / "out")
    assert got.keys() == want.keys()
    for n, t in want.items():
        assert torch.allclose(got[n], t, atol=2e-6), n


@pytest.mark.parametrize("how", ["dare:density=0.5", "della-linear:density=0.5"])
def test_random_draws_depend_on_the_seed_and_not_on_the_order(models: list[Path], tmp_path: Path, how: str) -> None:
    for label, sources, seed in (("x", models[1:], 0), ("y", models[:0:-1], 0), ("z", models[1:], 1)):
        merge_folders(models[0], sources, how, None, tmp_path / label, seed=seed)
    x, y, z = (read_all(tmp_path / n) for n in "xyz")
    assert all(torch.allclose(x[n], y[n], atol=1e-6) for n in x)
    assert any(not torch.equal(x[n], z[n]) for n in x)
