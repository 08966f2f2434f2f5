# SPDX-License-Identifier: Apache-2.0
"""Merging model folders out of core: values, shards, resuming, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import llama, model_folder, moved, read_all, toy, tuned

from tunesmith.compose.journal import Journal
from tunesmith.compose.stream import MergedFolder, merge_folders
from tunesmith.core import landing
from tunesmith.core.algebra import Dense, Update
from tunesmith.core.combine import Changes, Now, Place
from tunesmith.core.errors import ResourceError, UsageError

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(model_folder, tmp_path)


class Plus:
    """The weighted sum of the changes."""

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        terms = [w * c.dense() for c, w in zip(changes, weights, strict=True) if c is not None]
        return Dense(sum(terms[1:], terms[0])) if terms else None


class Levelled(Plus):
    """As `Plus`, divided by the largest entry of any change, which a survey finds."""

    def survey(self, changes: Changes, weights: Sequence[float], now: Now) -> float:
        return max(float(c.dense().abs().max()) for p in changes.places() for c in changes.at(p) if c is not None)

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        found = super().combine(at, changes, weights, now)
        return None if found is None else found.scaled(1 / now.surveyed)


class Dying(Plus):
    """As `Plus`, but the process is interrupted at one tensor."""

    at = ""

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        if at.key == Dying.at:
            raise KeyboardInterrupt
        return super().combine(at, changes, weights, now)


def three(make: Make, dtype: torch.dtype = torch.float32) -> tuple[Path, list[Path], list[dict[str, Any]]]:
    base = toy(0, dtype)
    values = [base, moved(base, 1), moved(base, 2)]
    folders = [make(n, v, shards=s) for n, v, s in zip(["base", "a", "b"], values, (1, 2, 1), strict=True)]
    return folders[0], folders[1:], values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_taken_in_fp32_and_cast_once(make: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    base, folders, (w, a, b) = three(make, dtype)
    found = merge_folders(base, folders, Plus(), [0.5, 0.25], tmp_path / "out")
    got = read_all(tmp_path / "out")
    assert got.keys() == w.keys()
    largest = 0.0
    for n in w:
        change = 0.5 * (a[n].float() - w[n].float()) + 0.25 * (b[n].float() - w[n].float())
        assert got[n].dtype == dtype
        assert torch.equal(got[n], (w[n].float() + change).to(dtype)), n
        largest = max(largest, float(change.abs().max()))
    assert found.largest_change == pytest.approx(largest, rel=1e-6)
    assert found.checked == 7 and found.zero_share < 0.1


def test_a_double_checkpoint_stays_double(make: Make, tmp_path: Path) -> None:
    base = toy(0, torch.float64)
    other = {n: t + 1e-12 for n, t in base.items()}
    merge_folders(make("base", base), [make("a", other)], Plus(), None, tmp_path / "out")
    for n, t in read_all(tmp_path / "out").items():
        assert torch.allclose(t, other[n], rtol=0, atol=1e-15)


@pytest.mark.parametrize("limit", [1, 100, 200, 10**9])
def test_shards_hold_what_the_index_says(make: Make, tmp_path: Path, limit: int) -> None:
    base, folders, (w, a, _) = three(make)
    merge_folders(base, folders[:1], Plus(), None, tmp_path / "out", shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    got = read_all(tmp_path / "out")
    for n in w:
        assert torch.equal(got[n], w[n] + (a[n] - w[n]))
    if limit == 10**9:
        assert [f.name for f in files] == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(w) and set(index["weight_map"].values()) == {f.name for f in files}
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in w.values())
    for f in files:
        held = [n for n, v in index["weight_map"].items() if v == f.name]
        assert len(held) == 1 or sum(w[n].numel() * 4 for n in held) <= limit


def test_transformers_loads_the_result(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folders = [llama(tmp_path / "base"), tuned(tmp_path / "tuned", tmp_path / "base")]
    merge_folders(folders[0], folders[1:], Plus(), [0.5], tmp_path / "out", shard_bytes=2000)
    base, other, got = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (*folders, tmp_path / "out"))
    for n, t in base.items():
        assert torch.allclose(got[n], (t + other[n]) / 2, atol=1e-6), n


def test_a_source_of_weight_zero_has_no_say(make: Make, tmp_path: Path) -> None:
    base, folders, (w, a, _) = three(make)
    found = merge_folders(base, folders, Plus(), [1.0, 0.0], tmp_path / "out")
    for n, t in read_all(tmp_path / "out").items():
        assert torch.equal(t, w[n] + (a[n] - w[n]))
    assert [s["weight"] for s in found.record["sources"]] == [1.0, 0.0]
    with pytest.raises(UsageError, match="equals the base"):
        merge_folders(base, folders, Plus(), [0, 0], tmp_path / "x")


def test_a_combiner_with_a_survey_sees_everything_first(make: Make, tmp_path: Path) -> None:
    base, folders, (w, a, b) = three(make)
    merge_folders(base, folders, Levelled(), None, tmp_path / "out")
    top = max(float((v[n] - w[n]).abs().max()) for v in (a, b) for n in w)
    for n, t in read_all(tmp_path / "out").items():
        assert torch.allclose(t, w[n] + (a[n] - w[n] + b[n] - w[n]) / top, atol=1e-6)


def test_a_killed_run_goes_on_where_it_stopped(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folders, _ = three(make)
    whole = merge_folders(base, folders, Plus(), None, tmp_path / "whole", shard_bytes=1)
    names = [n for n in read_all(base)]
    order: list[str] = []
    die(base, folders, tmp_path, monkeypatch)
    work = tmp_path / ".out.merging"
    left = sorted(p.name for p in work.glob("*.safetensors"))
    assert len(left) == 3 and not (tmp_path / "out").exists()
    seen = Plus.combine

    def noting(self: Plus, at: Place, *rest: Any) -> Update | None:
        order.append(at.key)
        return seen(self, at, *rest)

    monkeypatch.setattr(Plus, "combine", noting)
    found = merge_folders(base, folders, Dying(), None, tmp_path / "out", shard_bytes=1)
    assert found.resumed == 3 and not work.exists()
    assert len(dict.fromkeys(order[: len(names) - 3])) == len(names) - 3
    assert {k: v for k, v in found.files.items() if k.endswith("safetensors")} == {
        k: v for k, v in whole.files.items() if k.endswith("safetensors")
    }
    for n, t in read_all(tmp_path / "whole").items():
        assert torch.equal(t, read_all(tmp_path / "out")[n])
    assert found.largest_change == whole.largest_change and found.zero_share == whole.zero_share


def die(base: Path, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until three of seven shards are written."""
    monkeypatch.setattr(Dying, "at", _fourth(base))
    with pytest.raises(KeyboardInterrupt):
        merge_folders(base, folders, Dying(), None, tmp_path / "out", shard_bytes=1)
    monkeypatch.setattr(Dying, "at", "")


def _fourth(base: Path) -> str:
    from tunesmith.compose.folders import ModelFolder

    return list(ModelFolder(base).tensors)[3]


@pytest.mark.parametrize("how", ["other weights", "damaged shard", "no resume", "cut journal"])
def test_only_sound_shards_of_the_same_job_are_kept(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    base, folders, _ = three(make)
    die(base, folders, tmp_path, monkeypatch)
    work = tmp_path / ".out.merging"
    if how == "damaged shard":
        file = sorted(work.glob("*.safetensors"))[0]
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    if how == "cut journal":
        text = (work / ".journal").read_text()
        (work / ".journal").write_text(text[:-10])
    weights = [0.5, 0.5] if how == "other weights" else None
    found = merge_folders(base, folders, Dying(), weights, tmp_path / "out", shard_bytes=1, resume=how != "no resume")
    assert found.resumed == (2 if how in ("damaged shard", "cut journal") else 0)
    merge_folders(base, folders, Plus(), weights, tmp_path / "whole", shard_bytes=1)
    for n, t in read_all(tmp_path / "whole").items():
        assert torch.equal(t, read_all(tmp_path / "out")[n])


def test_sources_that_changed_in_between_start_anew(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders, (_, a, _) = three(make)
    die(base, folders, tmp_path, monkeypatch)
    from safetensors.torch import save_file

    for file in folders[0].glob("*.safetensors"):
        held = read_all(folders[0]).keys() & _names(file)
        save_file({n: a[n] * 2 for n in held}, file)
    assert merge_folders(base, folders, Dying(), None, tmp_path / "out", shard_bytes=1).resumed == 0


def _names(file: Path) -> set[str]:
    from tunesmith.core.tensorfile import read_header

    return set(read_header(file)[0])


def test_two_merges_into_one_folder_are_refused(make: Make, tmp_path: Path) -> None:
    base, folders, _ = three(make)
    other = Journal(tmp_path / ".out.merging", "x", resume=True)
    with pytest.raises(ResourceError, match="another merge is writing"):
        merge_folders(base, folders, Plus(), None, tmp_path / "out")
    other.close()
    assert isinstance(merge_folders(base, folders, Plus(), None, tmp_path / "out"), MergedFolder)


def test_a_killed_process_leaves_no_target_and_can_be_resumed(make: Make, tmp_path: Path) -> None:
    base, folders, _ = three(make)
    code = f"""
import os
from tunesmith.compose.stream import merge_folders
from tunesmith.core.algebra import Dense
class Dying:
    def combine(self, at, changes, weights, now):
        if at.key == {_fourth(base)!r}:
            os.kill(os.getpid(), 9)
        return Dense(sum(c.dense() for c in changes))
Dying.__module__ = {__name__!r}
out = {str(tmp_path / "out")!r}
merge_folders({str(base)!r}, {[str(f) for f in folders]!r}, Dying(), None, out, shard_bytes=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    assert merge_folders(base, folders, Dying(), None, tmp_path / "out", shard_bytes=1).resumed == 3


def test_a_merge_that_equals_the_base_is_refused_and_leaves_nothing(make: Make, tmp_path: Path) -> None:
    base = make("base", toy())
    with pytest.raises(UsageError, match="equals the base"):
        merge_folders(base, [make("copy", toy())], Plus(), None, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "copy"]


def test_rounding_that_swallows_the_change_is_told(make: Make, tmp_path: Path) -> None:
    base = {n: torch.ones_like(t) for n, t in toy(0, torch.bfloat16).items()}
    other = {n: t.float() + 1e-4 for n, t in base.items()}
    found = merge_folders(make("base", base), [make("a", other)], Plus(), None, tmp_path / "out", dtype="bfloat16")
    assert found.zero_share == 0.0 and found.unchanged_share == 1.0


def test_the_record_says_what_was_done_and_holds_no_paths(make: Make, tmp_path: Path) -> None:
    base, folders, _ = three(make)
    found = merge_folders(base, folders, Plus(), [1, 2], tmp_path / "out", seed=3)
    text = (tmp_path / "out" / landing.RECORD).read_text()
    record = json.loads(text)
    assert record == found.record and str(tmp_path) not in text
    assert record["base"] == "base" and [s["name"] for s in record["sources"]] == ["a", "b"]
    assert [s["weight"] for s in record["sources"]] == [1.0, 2.0] and record["seed"] == 3
    assert record["proof"]["largest_change"] == found.largest_change
    assert landing.is_merge(tmp_path / "out")
    merge_folders(base, folders, Plus(), None, tmp_path / "out")  # an earlier merge may be replaced
    assert json.loads((tmp_path / "out" / landing.RECORD).read_text())["sources"][1]["weight"] == 1.0


def test_foreign_folders_sources_and_bad_arguments_are_refused(make: Make, tmp_path: Path) -> None:
    base, folders, _ = three(make)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="not overwritten"):
        merge_folders(base, folders, Plus(), None, mine)
    with pytest.raises(UsageError, match="not overwritten"):
        merge_folders(base, folders, Plus(), None, folders[0])
    merge_folders(base, folders, Plus(), None, tmp_path / "out")
    with pytest.raises(UsageError, match="one of the models"):
        merge_folders(base, [tmp_path / "out"], Plus(), None, tmp_path / "out")
    for weights, text in (([1.0], "1 weights for 2"), ([1.0, float("nan")], "finite")):
        with pytest.raises(UsageError, match=text):
            merge_folders(base, folders, Plus(), weights, tmp_path / "x")
    with pytest.raises(UsageError, match="did you mean 'float16'|'bfloat16'"):
        merge_folders(base, folders, Plus(), None, tmp_path / "x", dtype="bfloat")
    with pytest.raises(UsageError, match="nothing to combine"):
        merge_folders(base, [], Plus(), None, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_values_that_overflow_the_written_dtype_are_refused(make: Make, tmp_path: Path) -> None:
    base, folders, _ = three(make, torch.float16)
    with pytest.raises(UsageError, match="overflow in float16"):
        merge_folders(base, folders, Plus(), [1e7, 1], tmp_path / "x")
    assert not (tmp_path / ".x.merging").exists()


def test_whole_numbers_are_kept_and_must_agree(make: Make, tmp_path: Path) -> None:
    ids = {"layers.0.ids": torch.arange(4)}
    base, a = toy() | ids, moved(toy(), 1) | ids
    merge_folders(make("base", base), [make("a", a)], Plus(), None, tmp_path / "out")
    assert torch.equal(read_all(tmp_path / "out")["layers.0.ids"], torch.arange(4))
    with pytest.raises(UsageError, match="whole numbers that differ"):
        odd = a | {"layers.0.ids": torch.arange(4) + 1}
        merge_folders(tmp_path / "base", [make("b", odd)], Plus(), None, tmp_path / "x")


def test_progress_ends_at_the_total(make: Make, tmp_path: Path) -> None:
    base, folders, (w, _, _) = three(make)
    seen: list[tuple[int, int]] = []
    merge_folders(
        base, folders, Plus(), None, tmp_path / "out", shard_bytes=100, progress=lambda d, t, n: seen.append((d, t))
    )
    total = sum(t.numel() * 4 for t in w.values())
    assert seen[-1] == (total, total) and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_memory_is_that_of_a_few_tensors(make: Make, tmp_path: Path) -> None:
    """160 MiB a model in tensors of 4 MiB: three models never are in memory, nor one of them."""
    size = (1024, 1024)
    base = {f"layers.{i}.w.weight": torch.full(size, float(i)) for i in range(40)}
    folders = [make("base", base), make("a", {n: t + 1 for n, t in base.items()})]
    del base
    code = f"""
import torch
from tunesmith.core.memory import peak_memory
from tunesmith.compose.stream import merge_folders
from tunesmith.core.algebra import Dense
torch.set_num_threads(1)
class First:
    def combine(self, at, changes, weights, now):
        return Dense(changes[0].dense())
before = peak_memory(torch.device("cpu"))
merge_folders({str(folders[0])!r}, [{str(folders[1])!r}], First(), None, {str(tmp_path / "out")!r})
print(peak_memory(torch.device("cpu")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120 << 20
