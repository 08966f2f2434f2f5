# SPDX-License-Identifier: Apache-2.0
"""Model folders as lazy sources: values, depth and kinds by structure, and hostile folders."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import model_folder, moved, toy
from safetensors.torch import save_file

from tunesmith.compose.folders import INDEX, FolderChanges, ModelFolder
from tunesmith.core.errors import UsageError

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(model_folder, tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_read_as_stored(make: Make, shards: int) -> None:
    values = toy(0, torch.bfloat16) | {"scalar": torch.tensor(2.0), "none": torch.empty(0, 4)}
    folder = ModelFolder(make("a", values, shards=shards))
    assert set(folder.tensors) == set(values)
    for n, t in values.items():
        got = folder.read(n)
        assert got.dtype == t.dtype and got.shape == t.shape and torch.equal(got, t)
    assert folder.nbytes == sum(t.numel() * t.element_size() for t in values.values())
    folder.close()
    assert torch.equal(folder.read("norm.weight"), values["norm.weight"])


def test_changes_are_differences_in_fp32(make: Make) -> None:
    base = toy(0, torch.bfloat16)
    other = moved(base, 1)
    other["norm.weight"] = base["norm.weight"].clone()
    found = FolderChanges(make("base", base), [make("a", other, shards=2), make("b", base)])
    assert [n.split(":")[0] for n in found.names] == ["a", "b"]
    for place in found.places():
        w = base[place.key].float()
        assert torch.equal(place.base(), w) and place.shape == tuple(w.shape)
        first, second = found.at(place)
        assert second is None
        if place.key == "norm.weight":
            assert first is None
        else:
            assert first is not None and first.dense().dtype == torch.float32
            assert torch.equal(first.dense(), other[place.key].float() - w)
    assert {p.key for p in found.places()} == set(base)


def test_depth_and_kind_come_from_structure(make: Make) -> None:
    names = ["wte.weight", "h.0.mlp.experts.0.up.weight", "h.0.mlp.experts.1.up.weight", "h.1.mlp.up.weight"]
    names += ["h.2.norm.weight", "h.2.q.bias", "head.weight"]
    shapes: list[tuple[int, ...]] = [(8, 4), (4, 4), (4, 4), (4, 4), (4,), (4,), (8, 4)]
    folder = ModelFolder(make("a", {n: torch.zeros(s) for n, s in zip(names, shapes, strict=True)}))
    assert folder.blocks == ("h.", 3)
    assert [folder.depth(n) for n in names] == [None, 0, 0, 1, 2, 2, None]
    kinds = {n: folder.kind(n) for n in names}
    assert sorted((kinds["wte.weight"], kinds["head.weight"])) == ["embedding", "linear"]
    assert kinds["h.2.norm.weight"] == "norm" and kinds["h.2.q.bias"] == ""
    found = FolderChanges(folder, [ModelFolder(folder.path)])
    assert {(p.depth, p.of) for p in found.places()} == {(None, 1), (0, 3), (1, 3), (2, 3)}
    flat = ModelFolder(make("flat", {"0.weight": torch.zeros(2, 2), "head.weight": torch.zeros(2, 2)}))
    assert flat.blocks == ("", 0) and flat.depth("0.weight") is None


def test_one_name_for_two_folders_is_told_apart(make: Make, tmp_path: Path) -> None:
    base = make("base", toy())
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        model_folder(tmp_path / place, "same", moved(toy(), 1))
    found = FolderChanges(base, [tmp_path / "x" / "same", tmp_path / "y" / "same"])
    assert found.names[0].startswith("same:") and [n[-2:] for n in found.names] == ["#1", "#2"]


def test_a_head_saved_beside_its_tied_table_is_left_out(make: Make) -> None:
    tied = {n: t for n, t in toy().items() if n != "head.weight"}
    other = moved(tied, 1)
    found = FolderChanges(make("base", tied), [make("a", other | {"head.weight": other["embed.weight"].clone()})])
    assert found.tied_copies == {0: ["head.weight"]}
    with pytest.raises(UsageError, match=r"'head.weight', which the base .* lacks"):
        FolderChanges(found.base, [make("b", other | {"head.weight": other["embed.weight"] + 1})])


# What is wrong, and what the error says: each names the folder and the tensor or file
def _drop(d: dict[str, Any]) -> None:
    d.pop("layers.1.q.weight")


def _shape(d: dict[str, Any]) -> None:
    d["layers.1.q.weight"] = torch.zeros(4, 5)


def _dtype(d: dict[str, Any]) -> None:
    d["layers.1.q.weight"] = d["layers.1.q.weight"].half()


def _whole(d: dict[str, Any]) -> None:
    d["layers.1.q.weight"] = torch.zeros(4, 4, dtype=torch.int32)


def _extra(d: dict[str, Any]) -> None:
    d["layers.1.qq.weight"] = torch.zeros(4, 4)


def _rows(d: dict[str, Any]) -> None:
    d["embed.weight"] = torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop, r"lacks the tensor 'layers.1.q.weight'"),
        (_shape, r"'layers.1.q.weight' has shape \[4, 5\], the base \[4, 4\]"),
        (_dtype, r"'layers.1.q.weight' is float16, in the base float32"),
        (_whole, r"'layers.1.q.weight' is int32"),
        (_extra, r"'layers.1.qq.weight', which the base (?s:.*)did you mean 'layers.1.q.weight'"),
        (_rows, r"'embed.weight' has shape \[9, 4\]"),
    ],
)
def test_sources_that_do_not_fit_are_named(make: Make, change: Callable[[dict[str, Any]], None], says: str) -> None:
    other = toy(1)
    change(other)
    with pytest.raises(UsageError, match=says) as caught:
        FolderChanges(make("base", toy()), [make("odd", other)])
    assert str(caught.value).startswith(str(caught.value.where)) and "odd" in str(caught.value.where)


def test_mixed_dtypes_are_allowed_when_asked_for(make: Make) -> None:
    base, other = toy(), toy(1, torch.bfloat16)
    found = FolderChanges(make("base", base), [make("a", other)], mixed=True)
    for place in found.places():
        (change,) = found.at(place)
        assert change is not None
        assert torch.equal(change.dense(), other[place.key].float() - base[place.key])
    with pytest.raises(UsageError, match="is int32"):
        FolderChanges(found.base, [make("b", other | {"norm.weight": torch.zeros(4, dtype=torch.int32)})], mixed=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("whose", ["base", "odd"])
def test_values_that_are_not_finite_are_counted(make: Make, bad: float, whose: str) -> None:
    values = {"base": toy(), "odd": toy(1)}
    values[whose]["layers.0.q.weight"][1, 2] = bad
    found = FolderChanges(make("base", values["base"]), [make("odd", values["odd"])])
    with pytest.raises(UsageError, match=rf"{whose}: layers.0.q.weight: 1 of 16 values are NaN or infinite"):
        for place in found.places():
            found.at(place)


def test_other_architectures_and_packed_weights_are_refused(make: Make) -> None:
    base = make("base", toy())
    with pytest.raises(UsageError, match="another architecture: model_type 'other', the base has 'toy'"):
        FolderChanges(base, [make("a", toy(), model_type="other")])
    with pytest.raises(UsageError, match="packed weights"):
        ModelFolder(make("q", toy(), quantization_config={"bits": 4}))


def test_what_is_no_model_folder(make: Make, tmp_path: Path) -> None:
    folder = make("model", toy())
    with pytest.raises(UsageError, match="did you mean 'model'"):
        ModelFolder(tmp_path / "modell")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no config.json"):
        ModelFolder(tmp_path / "empty")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no safetensors file(?s:.*)convert the pickle"):
        ModelFolder(folder)
    (folder / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(UsageError, match="'a' stands there twice"):
        ModelFolder(folder)


def index(folder: Path, change: Callable[[dict[str, str]], Any]) -> Path:
    path = folder / INDEX
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update({"norm.weight": "model-00009-of-00002.safetensors"}), "which is not there"),
        (lambda m: m.update({"norm.weight": "../secret.safetensors"}), "outside the folder"),
        (lambda m: m.update({"norm.weight": "/etc/passwd"}), "outside the folder"),
        (lambda m: m.update({"norm.weight": "a\\b.safetensors"}), "outside the folder"),
        (lambda m: m.update({"norm.weight": "config.json"}), "no safetensors file"),
        (lambda m: m.update({"norm.weight": 3}), "must map tensors to files"),
        (lambda m: m.update({"norms.weight": next(iter(m.values()))}), "(?s)does not hold it.*'norm.weight'"),
        (lambda m: m.pop("norm.weight"), "'norm.weight', which the index does not name"),
        (lambda m: m.clear(), "must map tensors to files"),
    ],
)
def test_an_index_is_not_trusted(make: Make, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ModelFolder(index(make("a", toy(), shards=2), change))


def test_a_tensor_in_two_shards_and_a_missing_index(make: Make) -> None:
    folder = make("a", toy(), shards=2)
    (folder / INDEX).unlink()
    assert set(ModelFolder(folder).tensors) == set(toy())  # all shards are there
    save_file(toy(), folder / "model-00002-of-00002.safetensors")
    with pytest.raises(UsageError, match="stands in two shards"):
        ModelFolder(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="shards are missing: .* is one of 2"):
        ModelFolder(folder)


def raw(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"1234", "was cut off"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"12345678", "more than its header"),
        (b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}', b"1234", "shape and bytes disagree"),
        (b'{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}', b"1234", "dtype that is not known"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234", "damaged"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"12345678", "gap"),
        (b'{"a":{"dtype":"F32","shape":[1]}}', b"1234", "damaged"),
        (b'{"a":7}', b"", "damaged"),
        (b"[]", b"", "object belongs"),
        (b"{", b"", "not JSON"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"1234", "twice",
        ),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"1234", "within another",
        ),
    ],
)  # fmt: skip
def test_a_damaged_tensor_file_is_refused_before_it_is_read(make: Make, header: bytes, data: bytes, says: str) -> None:
    folder = make("a", toy())
    raw(folder / "model.safetensors", header, data)
    with pytest.raises(UsageError, match=says) as caught:
        ModelFolder(folder)
    assert "model.safetensors" in str(caught.value)


def test_files_cut_anywhere_are_refused(make: Make) -> None:
    file = make("a", toy()) / "model.safetensors"
    data = file.read_bytes()
    for keep in (0, 4, 8, 20, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:keep])
        with pytest.raises(UsageError):
            ModelFolder(file.parent)
    file.write_bytes(data)
    folder = ModelFolder(file.parent)
    file.write_bytes(data[:-4])
    with pytest.raises(UsageError, match="ends within"):
        for n in folder.tensors:
            folder.read(n)


def test_digests_tell_models_apart_and_are_the_same_for_copies(make: Make) -> None:
    one, same = ModelFolder(make("a", toy())), ModelFolder(make("b", toy()))
    other = toy()
    other["embed.weight"][7, 3] += 1
    assert one.digest == same.digest != ModelFolder(make("c", other)).digest
