# SPDX-License-Identifier: Apache-2.0
"""Verbs that combine: merge of several sources, between, scale, subtract, compress."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import tuned

import tunesmith
from tunesmith.core.store import save

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def other(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second delta on the tiny model."""
    base = tunesmith.load(tiny, device="cpu")
    delta = tunesmith.Delta.create(base, tunesmith.LoRA(rank=2), name="other", seed=2)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(0.2 * torch.randn(t.shape, generator=g))
    folder = tmp_path_factory.mktemp("deltas") / "other"
    save(delta, folder, base=base)
    return folder


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models made from the tiny one."""
    place = tmp_path_factory.mktemp("tuned")
    return tuned(place / "a", tiny, 1), tuned(place / "b", tiny, 2)


@torch.no_grad()
def logits(model: Path, *deltas: tuple[Path, float]) -> torch.Tensor:
    base = tunesmith.load(model, device="cpu", dtype="fp32")
    views = [tunesmith.Delta.load(d, base).at(s) for d, s in deltas]
    with base.using(*views):
        return base.model(input_ids=torch.tensor([[5, 9, 40, 41]])).logits


def test_two_deltas_become_one(run: Run, tiny: Path, saved: Path, other: Path, tmp_path: Path) -> None:
    words = ("merge", saved, other, "--method", "task-arithmetic", "--weights", "0.5,-0.3", "--model", tiny)
    found = run(*words, "--into", tmp_path / "both", "--json")
    assert found.code == 0, found.err
    assert found.json["form"] == "delta" and found.json["largest_gap"] < 1e-4 < found.json["effect"]
    assert "largest output change" in found.json["proof"]
    want = logits(tiny, (saved, 0.5), (other, -0.3))
    assert torch.allclose(logits(tiny, (tmp_path / "both", 1.0)), want, atol=1e-3)
    found = run(*words, "--into", tmp_path / "model", "--as", "model", "--json")
    assert found.code == 0, found.err
    assert torch.allclose(logits(tmp_path / "model"), want, atol=1e-3)


def test_models_are_merged_against_a_base(run: Run, tiny: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    from model_folders import read_all

    words = ("merge", *models, "--method", "linear", "--weights", "3,1", "--model", tiny, "--into")
    found = run(*words, tmp_path / "soup", "--shard-size", "20KB", "--json")
    assert found.code == 0, found.err
    data = found.json
    assert data["combiner"] == "linear" and data["tensors_checked"] == 8 and data["largest_change"] > 0
    assert "model.safetensors.index.json" in data["files"] and "tokenizer.json" in data["files"]
    a, b, got = (read_all(f) for f in (*models, tmp_path / "soup"))
    for n in a:
        assert torch.allclose(got[n], 0.75 * a[n] + 0.25 * b[n], atol=1e-6), n
    assert run(*words, tmp_path / "soup").code == 0  # an earlier merge is replaced
    found = run(*words, tmp_path / "delta", "--as", "delta", "--json")
    assert found.code == 0, found.err
    assert torch.allclose(logits(tiny, (tmp_path / "delta", 1.0)), logits(tmp_path / "soup"), atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_vocabularies_are_matched_on_request(run: Run, tiny: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    odd = tmp_path / "odd"
    shutil.copytree(models[0], odd)
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (odd / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ("merge", odd, "--method", "linear", "--model", tiny, "--into", tmp_path / "out")
    found = run(*words)
    assert found.code == 2 and "2 moved" in found.err and "--vocabulary base" in found.err
    found = run(*words, "--vocabulary", "base", "--json")
    assert found.code == 0 and found.json["vocabulary"]["models"][0]["moved"] == 2
    found = run(*words, "--vocabulary", "bases")
    assert found.code == 2 and "did you mean 'base'" in found.err


def test_between_two_models_is_a_delta(run: Run, tiny: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    found = run("between", tiny, models[0], "--to", tmp_path / "d", "--json")
    assert found.code == 0, found.err
    assert found.json["gap"] < 1e-6 and found.json["sites"] == {"full": 21}
    assert torch.allclose(logits(tiny, (tmp_path / "d", 1.0)), logits(models[0]), atol=1e-4)
    assert run("verify", tmp_path / "d", "--model", tiny).code == 0
    assert run("verify", tmp_path / "d").code == 0  # the delta says where its base lies
    found = run("between", tiny, models[0], "--to", tmp_path / "low", "--rank", 4)
    assert found.code == 0 and "relative error" in found.out.splitlines()[-3]


def test_scale_and_subtract(run: Run, tiny: Path, saved: Path, other: Path, tmp_path: Path) -> None:
    found = run("scale", saved, "-0.5", "--to", tmp_path / "s", "--model", tiny, "--json")
    assert found.code == 0, found.err
    assert torch.allclose(logits(tiny, (tmp_path / "s", 1.0)), logits(tiny, (saved, -0.5)), atol=1e-3)
    found = run("scale", saved, "1", "--start", "0.1", "--to", tmp_path / "l", "--model", tiny, "--json")
    assert found.code == 0, found.err
    found = run("subtract", saved, other, "--to", tmp_path / "m", "--model", tiny, "--json")
    assert found.code == 0, found.err
    want = logits(tiny, (saved, 1.0), (other, -1.0))
    assert torch.allclose(logits(tiny, (tmp_path / "m", 1.0)), want, atol=1e-3)
    found = run("subtract", saved, saved, "--to", tmp_path / "n", "--model", tiny)
    assert found.code in (2, 4) and "the sources cancel" in found.err and not (tmp_path / "n").exists()


def test_compress_says_its_error(run: Run, tiny: Path, saved: Path, tmp_path: Path) -> None:
    found = run("compress", saved, "--rank", 1, "--to", tmp_path / "c", "--model", tiny, "--json")
    assert found.code == 0, found.err
    assert 0 < found.json["relative_error"] < 1 and 0 < found.json["of_the_bytes"] < 1
    assert "relative error" in found.json["proof"]
    found = run("compress", saved, "--method", "dare:density=0.5", "--to", tmp_path / "d", "--model", tiny, "--json")
    assert found.code == 0, found.err


def test_bad_input_is_named(
    run: Run, tiny: Path, saved: Path, other: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    x = tmp_path / "x"
    a, b = models
    both = ("merge", saved, other, "--model", tiny, "--into", x)
    cases: list[tuple[tuple[object, ...], str]] = [
        (both, "how the sources are to be combined is not said"),
        ((*both, "--method", "tiess"), "did you mean 'ties'"),
        ((*both, "--method", "ties:densit=0.2"), "did you mean 'density'"),
        ((*both, "--method", "linear", "--weights", "1"), "1 weights for 2 sources"),
        ((*both, "--method", "linear", "--weights", "a,b"), "is no list of numbers"),
        ((*both, "--method", "linear", "--as", "models"), "did you mean 'model'"),
        ((*both, "--method", "linear", "--dtype", "float32"), "for model folders"),
        (("merge", saved, a, "--method", "linear", "--into", x), "is a model folder and"),
        (("merge", saved, "--model", tiny, "--into", x, "--weights", "1"), "nothing to be combined with"),
        (("merge", a, b, "--method", "linear", "--into", x), "none is named"),
        (("merge", a, b, "--method", "linear", "--model", saved, "--into", x), "no model folder"),
        (("merge", a, b, "--method", "linear", "--model", tiny, "--shard-size", "big", "--into", x), "is no size"),
        (("between", tiny, saved, "--to", x), "is no model folder"),
        (("between", tiny, tiny, "--to", x), "are equal"),
        (("between", tiny, a, "--to", tiny), "is there already"),
        (("scale", saved, "0", "--to", x, "--model", tiny), "0 is the base itself"),
        (("scale", saved, "2", "--to", x, "--modle", tiny), "--modle"),
        (("scale", saved, "half", "--to", x, "--model", tiny), "is no number"),
        (("scale", saved, "2", "--to", tiny, "--model", tiny), "is there already"),
        (("compress", saved, "--method", "svdd", "--to", x, "--model", tiny), "unknown combiner 'svdd'"),
    ]
    for words, says in cases:
        found = run(*words)
        assert found.code in (2, 4), (words, found.err)
        assert says in found.err, (says, found.err)
        assert not x.exists(), words


def test_a_packed_base_has_three_targets(run: Run, tiny: Path, tmp_path: Path) -> None:
    from tunesmith import derive

    parent = tunesmith.load(tiny, device="cpu", dtype="fp32")
    packed = derive.quantise(parent, bits=4, block=16)
    derive.save_derived(packed, tmp_path / "packed")
    delta = tunesmith.Delta.create(packed, tunesmith.LoRA(rank=2, targets="attention"), name="d", seed=1)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(0.2 * torch.randn(t.shape, generator=g))
    save(delta, tmp_path / "d", base=packed)
    found = run("merge", tmp_path / "d", "--model", tmp_path / "packed", "--into", tmp_path / "out", "--json")
    assert found.code == 0, found.err
    rows = {r["target"]: r for r in found.json["targets"]}
    assert rows["dequantised"]["gap"] < 1e-3 < rows["requantised"]["gap"] and rows["delta"]["gap"] == 0
    assert rows["requantised"]["bytes"] < rows["delta"]["bytes"] < rows["dequantised"]["bytes"]
    with packed.using(delta):
        want = packed.model(input_ids=torch.tensor([[5, 9, 40, 41]])).logits
    assert torch.allclose(logits(tmp_path / "out"), want, atol=1e-3)
    found = run("merge", tmp_path / "d", "--model", tmp_path / "packed", "--into", tmp_path / "out2", "--packed",
                tmp_path / "again", "--json")  # fmt: skip
    assert found.code == 0, found.err
    row = next(r for r in found.json["targets"] if r["target"] == "requantised")
    assert row["gap"] == pytest.approx(rows["requantised"]["gap"], rel=1e-3) and row["folder"] == str(
        tmp_path / "again"
    )
    again = tunesmith.load(tmp_path / "again")
    held = [p for p, m in again.modules.items() if isinstance(m, derive.QuantLinear)]
    assert held == [p for p, m in packed.modules.items() if isinstance(m, derive.QuantLinear)] != []
    moved = again.modules["model.layers.0.self_attn.q_proj"].dense_weight()
    assert not torch.equal(moved, packed.modules["model.layers.0.self_attn.q_proj"].dense_weight()), (
        "the delta is in it"
    )
    refused = run("merge", tmp_path / "d", "--model", tiny, "--into", tmp_path / "out3", "--packed", tmp_path / "x")
    assert refused.code != 0 and not (tmp_path / "out3").exists()


@pytest.mark.parametrize(("text", "size"), [("500MB", 500_000_000), ("5GiB", 5 << 30), ("12", 12), ("1.5k", 1500)])
def test_sizes(text: str, size: int) -> None:
    from tunesmith.cli.merging import parsed_size

    assert parsed_size(text) == size


def test_combiners_are_listed_with_their_options(run: Run) -> None:
    rows = {r["name"]: r for r in run("methods", "--family", "combiners", "--json").json["combiners"]}
    assert {"linear", "ties"} <= set(rows)
    assert "density" in {o["name"] for o in rows["ties"]["options"]}
    found = run("methods", "ties", "--family", "combiners")
    assert found.code == 0 and "density" in found.out
    found = run("methods", "--family", "combiner")
    assert found.code == 2 and "did you mean 'combiners'" in found.err
    found = run("methods", "tie", "--family", "combiners")
    assert found.code == 2 and "did you mean 'ties'" in found.err
