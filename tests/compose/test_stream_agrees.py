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


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ("dare:density=0.3", {"lm_head.weight"}),
        ("dare-ties:density=0.3,exempt=none", set()),
        ("della:density=0.3", set()),
        ("della:density=0.3,exempt=heads", {"lm_head.weight"}),
        ("della-linear:density=0.3,exempt=outside",
         {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"}),
    ],
    ids=["default", "none", "della", "heads", "outside"],  # the text of a set differs between workers
)  # fmt: skip
def test_what_is_not_pruned_is_the_same_in_memory_and_on_disk(
    models: list[Path], deltas: list[Path], tmp_path: Path, how: str, left: set[str]
) -> None:
    base = tunesmith.load(models[0], dtype="fp32", device="cpu")
    merge_folders(models[0], models[1:2], how, None, tmp_path / "out")
    streamed = read_all(tmp_path / "out")
    merged = base.merged(merge(base, [tunesmith.Delta.load(deltas[0], base)], how)).model.state_dict()
    start, full = base.model.state_dict(), read_all(models[1])
    for got in (streamed, merged):
        for n in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight",
                  "model.layers.0.input_layernorm.weight"):  # fmt: skip
            dropped = float((got[n] == start[n]).float().mean())
            if n in left:
                assert torch.allclose(got[n], full[n], atol=1e-6), n
            else:
                assert dropped > 0.3, n


def test_a_tied_table_is_a_head(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    other = tuned(tmp_path / "a", base, 1)
    between_folders(base, other, tmp_path / "d")
    merge_folders(base, [other], "dare:density=0.3", None, tmp_path / "out")
    loaded = tunesmith.load(base, dtype="fp32", device="cpu")
    merged = loaded.merged(merge(loaded, [tunesmith.Delta.load(tmp_path / "d", loaded)], "dare:density=0.3"))
    table, up = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    full = read_all(other)
    for got in (read_all(tmp_path / "out"), merged.model.state_dict()):
        assert torch.allclose(got[table], full[table], atol=1e-6)
        assert not torch.allclose(got[up], full[up], atol=1e-3)
