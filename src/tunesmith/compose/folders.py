# SPDX-License-Identifier: Apache-2.0
"""Model folders as sources of changes: config.json and safetensors, read tensor by tensor, with no model built.

`ModelFolder` is one folder, `FolderChanges` the changes that several make to a base folder. Tensors are as stored: a
transformers `Conv1D` (GPT-2) holds its weight as [in, out], so a combiner that works row by row sees its columns.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.compose.vocabulary import VocabularyPlan, read_vocabulary
from tunesmith.core.algebra import Dense, Update, wide
from tunesmith.core.combine import Place
from tunesmith.core.errors import DeltaError, UsageError, nearest
from tunesmith.core.header import strict_json
from tunesmith.core.tensorfile import Entry, read_header, read_tensor, sampled_digest

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SMALL = 1 << 26  # bytes a JSON file of a model may have


class ModelFolder:
    """A Hugging Face model folder whose tensors are read one at a time.

    Raises UsageError for a folder without config.json or safetensors, an index that names missing shards, leaves the
    folder or disagrees with the shards, a tensor that stands in two shards, and any damaged file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.name = self.path.resolve().name or str(self.path)
        if not self.path.is_dir():
            siblings = [p.name for p in self.path.parent.iterdir() if p.is_dir()] if self.path.parent.is_dir() else []
            raise UsageError("there is no such model folder", where=str(path), hint=nearest(self.path.name, siblings))
        self.config = self._json(CONFIG, "this folder has no config.json, so it is no model")
        if self.config.get("quantization_config"):
            raise UsageError(
                "holds packed weights (its config has a quantization_config), which cannot be combined",
                where=str(self.path), hint="load it, dequantise it and save it in bf16 first",
            )  # fmt: skip
        self.files = self._shards()
        self.tensors: dict[str, Entry] = {}
        self.file_of: dict[str, str] = {}
        self._headers: dict[str, str] = {}
        for file in self.files:
            entries, self._headers[file] = read_header(self.path / file)
            for name, entry in entries.items():
                if name in self.tensors:
                    where = f"{self.path}: {name[:120]!r}"
                    raise UsageError(f"stands in two shards, {self.file_of[name]} and {file}", where=where)
                self.tensors[name], self.file_of[name] = entry, file
        self._check_index()
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def _json(self, name: str, missing: str) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            names = sorted(p.name for p in self.path.iterdir())
            raise UsageError(missing, where=str(self.path), hint=f"it holds {', '.join(names[:6]) or 'nothing'}")
        return read_json(path)

    def _shards(self) -> list[str]:
        """File names in order: those of the index, or the one file, or all there are."""
        if (self.path / INDEX).is_file():
            table = self._json(INDEX, "").get("weight_map")
            if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
                raise UsageError("its weight_map must map tensors to files", where=str(self.path / INDEX))
            names = sorted(set(table.values()))
            for n in names:
                self._check_shard_name(n)
            return names
        found = sorted(p.name for p in self.path.glob("*.safetensors"))
        if not found:
            other = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
            hint = "only safetensors are read: convert the pickle file elsewhere" if other else "expected " + SINGLE
            raise UsageError("this folder has no safetensors file", where=str(self.path), hint=hint)
        if SINGLE in found:
            return [SINGLE]
        numbered = {m[2] for n in found if (m := re.fullmatch(r"(.+)-\d+-of-(\d+)\.safetensors", n))}
        if numbered and any(len(found) < int(n) for n in numbered):
            hint = f"{len(found)} files are there and the index is missing; fetch the model again"
            raise UsageError(
                f"shards are missing: {found[0]} is one of {max(map(int, numbered))}", where=str(self.path), hint=hint
            )
        for n in found:
            self._check_shard_name(n)
        return found

    def _check_shard_name(self, name: str) -> None:
        where = str(self.path / INDEX)
        if not name or "/" in name or "\\" in name or name.startswith(".") or not name.isprintable():
            raise UsageError(f"the shard {name[:120]!r} lies outside the folder or has no plain name", where=where)
        if not name.endswith(".safetensors"):
            raise UsageError(f"the shard {name[:120]!r} is no safetensors file", where=where)
        file = self.path / name
        if not file.is_file():
            have = [p.name for p in self.path.glob("*.safetensors")]
            raise UsageError(
                f"the index names {name[:120]!r}, which is not there", where=where, hint=nearest(name, have)
            )

    def _check_index(self) -> None:
        if not (self.path / INDEX).is_file():
            return
        table = self._json(INDEX, "")["weight_map"]
        for name, file in table.items():
            if self.file_of.get(name) != file:
                what = f"the index puts {name[:120]!r} into {file[:80]}, which does not hold it"
                raise UsageError(what, where=str(self.path / INDEX), hint=nearest(name, self.tensors))
        extra = next((n for n in self.tensors if n not in table), None)
        if extra is not None:
            raise UsageError(
                f"the shards hold {extra[:120]!r}, which the index does not name", where=str(self.path / INDEX)
            )

    def read(self, name: str) -> Tensor:
        """A tensor as stored. Raises UsageError naming the nearest for one that is not there."""
        if name not in self.tensors:
            raise UsageError(f"has no tensor {name[:120]!r}", where=str(self.path), hint=nearest(name, self.tensors))
        file = self.file_of[name]
        return read_tensor(self._handle(file), self.tensors[name], str(self.path / file))

    def _handle(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(self.path / file, os.O_RDONLY)
            return self._open[file]

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            for handle in self._open.values():
                os.close(handle)
            self._open.clear()

    @cached_property
    def digest(self) -> str:
        """sha256 over headers and evenly spaced bytes of every tensor: tells models apart without reading all of them."""
        import hashlib

        h = hashlib.sha256()
        for file in self.files:
            entries = {n: e for n, e in self.tensors.items() if self.file_of[n] == file}
            h.update(sampled_digest(self._handle(file), entries, self._headers[file]).encode())
        return h.hexdigest()

    @cached_property
    def stamp(self) -> list[list[Any]]:
        """Name, bytes and time of change of every file: what a journal is bound to beside the digest."""
        stats = [(f, os.stat(self.path / f)) for f in [CONFIG, *self.files]]
        return [[f, s.st_size, s.st_mtime_ns] for f, s in stats]

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.tensors.values())

    @cached_property
    def blocks(self) -> tuple[str, int]:
        """Prefix and number of the repeated blocks: of all families `prefix.<int>.suffix` the one with most tensors.

        The outermost number counts, so experts within a block are no blocks. ("", 0) where nothing repeats.
        """
        seen: Counter[str] = Counter()
        numbers: dict[str, set[int]] = {}
        for name in self.tensors:
            m = re.match(r"^(.*?)(?:^|(?<=\.))(\d+)\.", name)
            if m:
                seen[m[1]] += 1
                numbers.setdefault(m[1], set()).add(int(m[2]))
        families = [(len(n), seen[p], p) for p, n in numbers.items() if len(n) > 1]
        if not families:
            return "", 0
        _, _, prefix = max(families, key=lambda f: (f[0], f[1]))
        return prefix, max(numbers[prefix]) + 1

    @cached_property
    def vocabulary_rows(self) -> int | None:
        """Rows of the token table: `vocab_size` of the config, where some tensor outside the blocks has so many."""
        inner = self.config.get("text_config")
        for table in (self.config, inner if isinstance(inner, dict) else {}):
            n = table.get("vocab_size")
            if isinstance(n, int) and not isinstance(n, bool):
                return n
        return None

    def depth(self, name: str) -> int | None:
        """The block a tensor is in, None outside the blocks."""
        prefix, count = self.blocks
        if not count or not name.startswith(prefix):
            return None
        head = name[len(prefix) :].split(".", 1)[0]
        return int(head) if head.isdigit() else None

    def is_vocabulary(self, name: str) -> bool:
        """Whether the rows of a tensor belong to tokens: it lies outside the blocks and has `vocab_size` of them."""
        shape = self.tensors[name].shape
        return self.depth(name) is None and len(shape) >= 1 and shape[0] == self.vocabulary_rows

    @cached_property
    def heads(self) -> frozenset[str]:
        """Names of the tensor that makes the scores of tokens, as transformers says; empty for other folders."""
        from tunesmith.compose.between import skeleton_of

        try:
            model: Any = skeleton_of(self)
        except UsageError:  # a folder of tensors with no model class of transformers
            return frozenset()
        out = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = None if out is None else getattr(out, "weight", None)
        return frozenset(n for n, t in model.state_dict(keep_vars=True).items() if found is not None and t is found)

    def kind(self, name: str) -> str:
        """The likely kind of site: by shape, and for the token table and the head by its rows."""
        shape, last = self.tensors[name].shape, name.rpartition(".")[2]
        if last != "weight":
            return ""
        if len(shape) == 2 and self.is_vocabulary(name):
            return "embedding" if next((n for n in self.tensors if self.is_vocabulary(n)), name) == name else "linear"
        return {1: "norm", 2: "linear", 3: "conv1d", 4: "conv2d"}.get(len(shape), "")

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """Token strings to ids from tokenizer.json, None where there is no such file."""
        file = self.path / "tokenizer.json"
        return read_vocabulary(file) if file.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises UsageError for a large, damaged or doubtful one."""
    try:
        with open(path, "rb") as f:
            data = f.read(_SMALL + 1)
        return strict_json(data, str(path))
    except OSError as e:
        raise UsageError(f"cannot be read ({e.strerror or e})", where=str(path)) from None
    except DeltaError as e:
        raise UsageError(e.what, where=e.where, hint=e.hint) from None


class FolderChanges:
    """Changes that model folders make to a base folder (see `core.combine.Changes`).

    Args:
        vocabulary: how token rows are matched (`vocabulary.align`), needed where tokenizers or table sizes differ.
        mixed: allow folders whose floating-point dtypes differ; everything is computed in fp32 either way.
    Raises UsageError naming folder and tensor where tensors are missing, added, or of another shape or dtype, and where
    vocabularies differ and no plan is given.
    """

    def __init__(
        self,
        base: str | os.PathLike[str] | ModelFolder,
        folders: Sequence[str | os.PathLike[str] | ModelFolder],
        *,
        vocabulary: VocabularyPlan | None = None,
        mixed: bool = False,
    ) -> None:
        if not folders:
            raise UsageError("there is nothing to combine", hint="give at least one model folder beside the base")
        self.base = base if isinstance(base, ModelFolder) else ModelFolder(base)
        self.folders = [f if isinstance(f, ModelFolder) else ModelFolder(f) for f in folders]
        # of the values, so that they do not depend on the order of the folders
        self.names = _unique([f"{f.name}:{f.digest[:16]}" for f in self.folders])
        self.plan = vocabulary
        self._keep: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.tied_copies: dict[int, list[str]] = {}
        if vocabulary is not None:
            vocabulary.check(len(self.folders))
        for i, f in enumerate(self.folders):
            _same_architecture(self.base, f)
            if vocabulary is None:
                _same_vocabulary(self.base, f)
            self._check_tensors(i, f, mixed)

    def _check_tensors(self, i: int, folder: ModelFolder, mixed: bool) -> None:
        own, theirs = self.base.tensors, folder.tensors
        where = str(folder.path)
        for name, entry in own.items():
            if name not in theirs:
                what = f"lacks the tensor {name[:120]!r} of the base {self.base.path}"
                raise UsageError(what, where=where, hint=nearest(name, theirs))
            got = theirs[name]
            rows = self.plan is not None and self.base.is_vocabulary(name) and folder.is_vocabulary(name)
            if (got.shape[1:] if rows else got.shape) != (entry.shape[1:] if rows else entry.shape):
                hint = "these are other architectures"
                if self.base.is_vocabulary(name) and folder.is_vocabulary(name):
                    hint = "the vocabularies differ in size: align them first, compose.vocabulary.align(base, folders)"
                what = f"{name[:120]!r} has shape {list(got.shape)}, the base {list(entry.shape)}"
                raise UsageError(what, where=where, hint=hint)
            if got.dtype != entry.dtype and not (
                mixed and got.dtype.is_floating_point and entry.dtype.is_floating_point
            ):
                hint = "name the dtype to write to combine them: dtype='bfloat16' (--dtype)"
                what = f"{name[:120]!r} is {_short(got.dtype)}, in the base {_short(entry.dtype)}"
                raise UsageError(what, where=where, hint=hint)
            if not entry.dtype.is_floating_point and not torch.equal(self.base.read(name), folder.read(name)):
                raise UsageError(f"{name[:120]!r} holds whole numbers that differ from the base's", where=where)
        for name in theirs:
            if name in own:
                continue
            if not self._is_tied_copy(folder, name):
                what = f"has the tensor {name[:120]!r}, which the base {self.base.path} lacks"
                raise UsageError(what, where=where, hint=nearest(name, own))
            self.tied_copies.setdefault(i, []).append(name)

    def _is_tied_copy(self, folder: ModelFolder, name: str) -> bool:
        """Whether a tensor that the base lacks is a second copy of the token table: a head saved beside what it is tied to."""
        entry = folder.tensors[name]
        same = [
            n for n, e in folder.tensors.items()
            if n != name and n in self.base.tensors and (e.shape, e.dtype) == (entry.shape, entry.dtype)
        ]  # fmt: skip
        return folder.is_vocabulary(name) and any(torch.equal(folder.read(name), folder.read(n)) for n in same)

    def place(self, name: str) -> Place:
        """The place of one of the base's tensors; its shape is the base's, or the aligned one."""
        path, _, last = name.rpartition(".")
        depth = self.base.depth(name)
        of = self.base.blocks[1] if depth is not None else 1
        value = partial(self.base_value, name)
        kind = self.base.kind(name)
        return Place(
            path, last, self.shape(name), kind=kind, depth=depth, of=of, base=value, head=lambda: name in self.base.heads
        )  # fmt: skip

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the result."""
        shape = self.base.tensors[name].shape
        return (self.plan.rows, *shape[1:]) if self.plan is not None and self.base.is_vocabulary(name) else shape

    def places(self) -> Iterator[Place]:
        """Every floating-point tensor of the base, in the order of its files."""
        for name, entry in self.base.tensors.items():
            if entry.dtype.is_floating_point:
                yield self.place(name)

    def base_value(self, name: str) -> Tensor:
        """The base's tensor in fp32 or wider; the last two asked for are kept. Not to be written to."""
        with self._lock:
            if name in self._keep:
                return self._keep[name]
        value = _finite(wide(self.base.read(name)), self.base, name)
        if self.plan is not None and self.base.is_vocabulary(name):
            value = self.plan.base_rows(
                value, lambda i: _finite(wide(self.folders[i].read(name)), self.folders[i], name)
            )
        with self._lock:
            self._keep[name] = value
            while len(self._keep) > 2:
                self._keep.popitem(last=False)
        return value

    def at(self, place: Place) -> list[Update | None]:
        """The difference of each folder from the base at one place, fp32 or wider; None where it is zero."""
        name = place.key
        base = self.base_value(name)
        if self.plan is not None and self.base.is_vocabulary(name):
            tables = [_finite(wide(f.read(name)), f, name) for f in self.folders]
            return [Dense(d) if bool(d.any()) else None for d in self.plan.changes(base, tables)]
        out: list[Update | None] = []
        for f in self.folders:
            value = f.read(name)
            change = value.sub_(base) if value.dtype == base.dtype else wide(value).sub_(base)
            low, high = (float(x) for x in torch.aminmax(change)) if change.numel() else (0.0, 0.0)
            if not (low > float("-inf") and high < float("inf")):
                _finite(wide(f.read(name)), f, name)
                raise UsageError(f"the difference of {name!r} overflows", where=str(f.path))
            out.append(Dense(change) if low != 0.0 or high != 0.0 else None)
        return out

    def forget(self, name: str) -> None:
        """Let go of a kept tensor."""
        with self._lock:
            self._keep.pop(name, None)

    def close(self) -> None:
        """Close every file."""
        for f in (self.base, *self.folders):
            f.close()


def _finite(value: Tensor, folder: ModelFolder, name: str) -> Tensor:
    if value.numel():
        low, high = torch.aminmax(value)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            bad = int((~torch.isfinite(value)).sum())
            what = f"{bad:,} of {value.numel():,} values are NaN or infinite"
            raise UsageError(what, where=f"{folder.path}: {name}", hint="the model is damaged or its training diverged")
    return value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unique(names: Sequence[str]) -> list[str]:
    """Names with a number where one occurs twice."""
    total, seen, out = Counter(names), Counter[str](), []
    for n in names:
        seen[n] += 1
        out.append(n if total[n] == 1 else f"{n}#{seen[n]}")
    return out


def _same_architecture(base: ModelFolder, folder: ModelFolder) -> None:
    for key in ("model_type", "architectures"):
        a, b = base.config.get(key), folder.config.get(key)
        if a is not None and b is not None and a != b:
            raise UsageError(f"is another architecture: {key} {b!r}, the base has {a!r}", where=str(folder.path))


def _same_vocabulary(base: ModelFolder, folder: ModelFolder) -> None:
    a, b = base.vocabulary, folder.vocabulary
    if a is None or b is None or a == b:
        return
    moved = [t for t in a if t in b and a[t] != b[t]]
    added, dropped = [t for t in b if t not in a], [t for t in a if t not in b]
    example = next(iter([*moved, *added, *dropped]))
    raise UsageError(
        f"has another vocabulary than the base: {len(added)} tokens added, {len(dropped)} missing, {len(moved)} moved "
        f"(for example {example[:40]!r})",
        where=str(folder.path), hint="align them first: compose.vocabulary.align(base, folders), --vocabulary base",
    )  # fmt: skip


def config_differences(base: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Settings that differ between two configs, as `key: base -> other`, leaving out names and versions."""
    skip = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
    keys = [k for k in dict.fromkeys([*base, *other]) if k not in skip and base.get(k) != other.get(k)]
    return [f"{k}: {base.get(k)!r} -> {other.get(k)!r}"[:160] for k in keys]
