# SPDX-License-Identifier: Apache-2.0
"""Full checkpoints merged out of core: read, combined and written one tensor at a time.

    W' = W + combine(W_1 - W, ..., W_n - W)        in fp32, cast once to the stored dtype

One tensor is computed while the next is read and the last written, so memory is that of a few tensors, whatever the size
of the model. A combiner with a survey reads everything twice, others once. Shards appear in a hidden folder beside the
target, which takes the target's name when all are there; a journal lets a killed run go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.compose.folders import CONFIG, INDEX, SINGLE, FolderChanges, ModelFolder, config_differences, read_json
from tunesmith.compose.journal import Journal
from tunesmith.compose.vocabulary import TOKENIZER, VocabularyPlan, with_new_tokens
from tunesmith.core import landing
from tunesmith.core.algebra import Update
from tunesmith.core.combine import COMBINERS, Chosen, Now, Place
from tunesmith.core.errors import ResourceError, UsageError, nearest
from tunesmith.core.registry import config as options_of
from tunesmith.core.tensorfile import TensorWriter, disk, nbytes_of, read_header, read_tensor

SHARD_BYTES = 5_000_000_000
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PIECE = 1 << 18  # entries added at once
AHEAD = 1 << 29  # bytes of fp32 a tensor may need at all sources together to be read ahead
CHECKED = 8  # tensors computed again and compared with what was written
BESIDE = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class MergedFolder:
    """What a merge wrote, with its proof.

    `largest_change` is the largest absolute change of an entry before the cast, `zero_share` the share of floating-point
    entries with no change, `unchanged_share` that of entries which the cast left at the base's value. `checked` tensors
    were computed again and equal what the files hold, `resumed` shards were there from an earlier run.
    """

    path: Path
    files: dict[str, int]
    tensors: int
    largest_change: float
    zero_share: float
    unchanged_share: float
    checked: int
    resumed: int
    record: dict[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        size = sum(self.files.values())
        return (
            f"{self.tensors} tensors, largest change {self.largest_change:.3g}, {self.zero_share:.1%} of entries "
            f"unchanged ({self.unchanged_share:.1%} after rounding), {self.checked} tensors read back equal, {size:,} bytes"
        )


@dataclass
class _Tally:
    """Counts over the floating-point entries of a shard."""

    entries: int = 0
    zero: int = 0
    unchanged: int = 0
    largest: float = 0.0

    def add(self, other: _Tally) -> None:
        self.entries, self.zero = self.entries + other.entries, self.zero + other.zero
        self.unchanged, self.largest = self.unchanged + other.unchanged, max(self.largest, other.largest)


def merge_folders(
    base: str | os.PathLike[str] | ModelFolder,
    folders: Sequence[str | os.PathLike[str] | ModelFolder],
    how: Any,
    weights: Sequence[float] | None,
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    vocabulary: VocabularyPlan | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    resume: bool = True,
    progress: Progress | None = None,
) -> MergedFolder:
    """Merge the changes that model folders make to a base folder into a new model folder.

    Args:
        how: a combiner, or its name with options ("ties:density=0.2").
        weights: one a folder, 1 for all by default.
        dtype: of the floating-point tensors written, the base's by default; naming one allows sources of mixed dtypes.
        vocabulary: a plan from `vocabulary.align` where token tables differ.
        shard_bytes: bytes of tensors a file may hold; a larger tensor has a file of its own.
        resume: go on with an unfinished run of exactly this job; otherwise its remains are removed.
        progress: called with bytes done, bytes in all and the tensor's name.
    Raises UsageError for sources that do not fit together, a target that holds something else, or a result that equals
    the base; ResourceError for a disk that is full or another merge at work.
    """
    target = landing.free(out)
    if isinstance(how, str):
        how = COMBINERS.parse(how)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=nearest(dtype, DTYPES))
    if shard_bytes < 1:
        raise UsageError(f"shard_bytes must be at least 1, not {shard_bytes}")
    given = checked_weights(weights, len(folders), getattr(how, "info", None))
    changes = FolderChanges(base, folders, vocabulary=vocabulary, mixed=dtype is not None)
    try:
        _not_a_source(target, changes)
        job = _Job(changes, how, given, dtype, seed, shard_bytes)
        return job.run(target, resume, progress or (lambda *_: None))
    finally:
        changes.close()


def checked_weights(weights: Sequence[float] | None, count: int, info: Any = None) -> list[float]:
    """One finite weight a source, 1 each by default, and no more sources than the combiner takes. Raises UsageError."""
    out = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(out) != count:
        raise UsageError(f"{len(out)} weights for {count} sources", hint="give one weight a source, in their order")
    if any(w != w or abs(w) == float("inf") for w in out):
        raise UsageError("a weight must be finite", where=str(out))
    most = info.facts.get("most") if info is not None else None
    used = sum(w != 0 for w in out)
    if most is not None and used > most:
        raise UsageError(
            f"{info.name} takes {most} sources, got {used}", hint="merge two, then the result with the next"
        )
    return out


def _not_a_source(target: Path, changes: FolderChanges) -> None:
    for f in (changes.base, *changes.folders):
        if target.exists() and target.samefile(f.path):
            raise UsageError("is one of the models to merge", where=str(target), hint="choose another folder")


class _Job:
    """One merge: its plan of shards, the computation of a tensor, and the run."""

    def __init__(
        self, changes: FolderChanges, how: Any, weights: list[float], dtype: str | None, seed: int, shard_bytes: int
    ) -> None:
        self.changes, self.how, self.given, self.seed = changes, how, weights, seed
        self.used = Chosen(changes, [i for i, w in enumerate(weights) if w != 0])  # a source of weight 0 has no say
        self.weights = [w for w in weights if w != 0]
        self.dtype = DTYPES[dtype] if dtype else None
        self.now = Now(seed, names=tuple(self.used.names), dense=True)
        info = getattr(how, "info", None)
        self.how_name = info.name if info is not None else f"{type(how).__module__}.{type(how).__qualname__}"
        self.how_options = options_of(how) if info is not None else {k: repr(v) for k, v in sorted(vars(how).items())}
        self.shards = self._shards(shard_bytes)
        self.total = sum(self._nbytes(n) for names in self.shards.values() for n in names)

    def _out(self, name: str) -> torch.dtype:
        stored = self.changes.base.tensors[name].dtype
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored

    def _nbytes(self, name: str) -> int:
        return nbytes_of(self._out(name), self.changes.shape(name))

    def _shards(self, limit: int) -> dict[str, list[str]]:
        """Tensors by file, in the order of the base's; within a file wider dtypes come first, which keeps them aligned."""
        groups: list[list[str]] = []
        room = 0
        for name in self.changes.base.tensors:
            size = self._nbytes(name)
            if not groups or size > room:
                groups.append([])
                room = limit
            groups[-1].append(name)
            room -= size
        if len(groups) == 1:
            files = [SINGLE]
        else:
            files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        ordered = [sorted(g, key=lambda n: -self._out(n).itemsize) for g in groups]
        return dict(zip(files, ordered, strict=True))

    @property
    def digest(self) -> str:
        """sha256 over everything the result depends on."""
        sources = [[f.digest, f.stamp] for f in (self.changes.base, *self.changes.folders)]
        plan = self.changes.plan
        body = [
            sources, self.how_name, self.how_options, self.given, str(self.dtype), self.seed, self.shards,
            None if plan is None else [plan.base_index, plan.index, plan.missing, plan.new_tokens],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()

    def run(self, target: Path, resume: bool, progress: Progress) -> MergedFolder:
        work = target.with_name(f".{target.name[:100]}.merging")
        self._room(target)
        journal = Journal(work, self.digest, resume=resume)
        try:
            resumed = len(journal.done)
            if hasattr(self.how, "survey") and resumed < len(self.shards):
                surveyed = self.how.survey(self.used, self.weights, self.now)
                self.now = replace(self.now, surveyed=surveyed)
            done, tally = 0, _Tally()
            for file, names in self.shards.items():
                entry = journal.done.get(file)
                if entry is None:
                    counted = self._write(work, file, names, lambda n, d=done: progress(d + n[0], self.total, n[1]))
                    entry = journal.finished(file, tally=vars(counted))
                tally.add(_Tally(**entry["tally"]))
                done += sum(self._nbytes(n) for n in names)
                progress(done, self.total, file)
            if tally.largest == 0.0:
                hint = "the models are copies of the base, or the options and weights cancel everything"
                raise UsageError("the merge equals the base", where=str(target), hint=hint)
            checked = self._reread(work)
            return self._finish(work, target, journal, tally, checked, resumed)
        except UsageError:  # no later run of this job can do better: what lies there is of no use
            shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            journal.close()

    def _room(self, target: Path) -> None:
        with disk(target), contextlib.suppress(FileNotFoundError):
            at = next(p for p in (target.parent, *target.parent.parents) if p.exists())
            left = shutil.disk_usage(at).free
            if left < self.total and not target.with_name(f".{target.name[:100]}.merging").exists():
                hint = f"{self.total:,} bytes are needed, {left:,} are free"
                raise ResourceError("the disk has too little room", where=str(target), hint=hint)

    def _write(self, work: Path, file: str, names: list[str], progress: Callable[[tuple[int, str]], None]) -> _Tally:
        """Compute one shard into a file that takes its name when it is whole."""
        plan = [(n, self._out(n), self.changes.shape(n)) for n in names]
        part, tally, done = work / f"{file}.part", _Tally(), 0
        with TensorWriter(part, plan) as writer, ThreadPoolExecutor(1) as ahead:
            waiting: Future[None] | None = None
            for name, value, counted in self._computed(names):
                tally.add(counted)
                if waiting is not None:
                    waiting.result()
                waiting = ahead.submit(writer.put, name, value)
                done += self._nbytes(name)
                progress((done, name))
            if waiting is not None:
                waiting.result()
        with disk(part):
            os.chmod(part, 0o666 & ~landing.umask())
            os.rename(part, work / file)
        return tally

    def _computed(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor, _Tally]]:
        """Every tensor of a shard, the next one being read while one is computed."""
        with ThreadPoolExecutor(1) as reader:
            coming: Future[_Read] | None = None
            for i, name in enumerate(names):
                read = coming.result() if coming is not None else self._read(name)
                after = names[i + 1] if i + 1 < len(names) else None
                small = after is not None and self._needs(after) + self._needs(name) <= AHEAD
                coming = reader.submit(self._read, after) if after is not None and small else None
                value, counted = self._combine(name, read)
                del read
                self.changes.forget(name)
                yield name, value, counted
                del value

    def _needs(self, name: str) -> int:
        return 4 * self.changes.base.tensors[name].numel * (1 + len(self.changes.folders))

    def _read(self, name: str) -> _Read:
        if not self.changes.base.tensors[name].dtype.is_floating_point:
            return _Read(self.changes.base.read(name))
        place = self.changes.place(name)
        changes = self.used.at(place)
        return _Read(self.changes.base_value(name), place, changes)

    def _combine(self, name: str, read: _Read) -> tuple[Tensor, _Tally]:
        """One tensor of the result in its stored dtype."""
        base, out = read.base, self._out(name)
        if read.place is None:
            return base, _Tally()
        still = all(c is None for c in read.changes)
        change = None if still else self.how.combine(read.place, read.changes, self.weights, self.now)
        n = base.numel()
        if change is None or not n:
            return base.to(out), _Tally(n, n, n)
        dense = change.dense()
        if dense.shape != base.shape:
            what = f"{self.how_name} gave a change of shape {list(dense.shape)} for {list(base.shape)}"
            raise UsageError(what, where=name)
        value, largest, whole, moved, same = torch.empty(base.shape, dtype=out), 0.0, True, 0, 0
        pieces = zip(*(t.reshape(-1).split(PIECE) for t in (base, dense, value)), strict=True)
        for b, d, v in pieces:  # each stays in the cache for all that is asked of it
            torch.add(b, d, out=v)  # the sum in fp32, cast once
            size = max(abs(float(x)) for x in torch.aminmax(d))
            largest = size if size > largest or size != size else largest
            whole = whole and bool(torch.isfinite(torch.stack(torch.aminmax(v))).all())
            moved, same = moved + int(torch.count_nonzero(d)), same + int(torch.count_nonzero(torch.eq(v, b)))
        if not largest < float("inf") or not whole:
            hint = "a wider dtype may hold it: dtype='bfloat16' or 'float32'"
            raise UsageError(f"the merged values overflow in {str(out).removeprefix('torch.')}", where=name, hint=hint)
        return value, _Tally(n, n - moved, same, largest)

    def _reread(self, work: Path) -> int:
        """Compute some tensors again and compare them with the files bit for bit; every file's header is checked."""
        files: dict[str, tuple[str, Any]] = {}
        for file, names in self.shards.items():
            entries, _ = read_header(work / file)
            if list(entries) != names:
                raise ResourceError(
                    "was read back otherwise than written", where=str(work / file), hint="check the disk"
                )
            files.update((n, (file, e)) for n, e in entries.items())
        pool = sorted(files, key=lambda n: files[n][1].numel)  # small ones: this is a check of files, not a second run
        pool = pool[: max(CHECKED, len(pool) // 2)]
        some = pool[:: max(1, len(pool) // CHECKED)][:CHECKED]
        if hasattr(self.how, "survey") and self.now.surveyed is None:
            return 0  # all shards are of an earlier run, whose survey is gone
        for name in some:
            want, _ = self._combine(name, self._read(name))
            file, entry = files[name]
            handle = os.open(work / file, os.O_RDONLY)
            try:
                got = read_tensor(handle, entry, str(work / file))
            finally:
                os.close(handle)
            if not torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8)):
                raise ResourceError("was read back otherwise than written", where=f"{work / file}: {name}")
        return len(some)

    def _finish(
        self, work: Path, target: Path, journal: Journal, tally: _Tally, checked: int, resumed: int
    ) -> MergedFolder:
        changes, base = self.changes, self.changes.base
        with disk(work):
            if len(self.shards) > 1:
                table = {n: file for file, names in self.shards.items() for n in names}
                _json(work / INDEX, {"metadata": {"total_size": self.total}, "weight_map": table})
            _json(work / CONFIG, self._config())
            for pattern in BESIDE:
                for file in sorted(base.path.glob(pattern)):
                    if file.is_file():
                        shutil.copyfile(file, work / file.name)
            if changes.plan is not None and changes.plan.new_tokens:
                _json(work / TOKENIZER, with_new_tokens(read_json(base.path / TOKENIZER), changes.plan))
            made = sorted(p.name for p in work.iterdir() if not p.name.startswith("."))
            record = self._record(made, tally, checked)
            _json(work / landing.RECORD, record)
            journal.remove()
            landing.publish(work, target)
        files = {p.name: p.stat().st_size for p in sorted(target.iterdir())}
        n = max(1, tally.entries)
        return MergedFolder(
            target,
            files,
            len(base.tensors),
            tally.largest,
            tally.zero / n,
            tally.unchanged / n,
            checked,
            resumed,
            record,
        )

    def _config(self) -> dict[str, Any]:
        made = dict(self.changes.base.config)
        if self.dtype is not None:
            for key in {"dtype", "torch_dtype"} & made.keys() or {"torch_dtype"}:
                made[key] = str(self.dtype).removeprefix("torch.")
        plan = self.changes.plan
        if plan is not None:
            inner = made["text_config"] if "vocab_size" not in made else made
            inner["vocab_size"] = plan.rows
        return made

    def _record(self, files: list[str], tally: _Tally, checked: int) -> dict[str, Any]:
        """Sources, options and proof, without paths of this machine."""
        changes, base = self.changes, self.changes.base
        sources = [
            {
                "name": f.name, "digest": f.digest, "weight": w, "bytes": f.nbytes,
                "config_differences": config_differences(base.config, f.config),
                "tied_copies_left_out": changes.tied_copies.get(i, []),
            }
            for i, (f, w) in enumerate(zip(changes.folders, self.given, strict=True))
        ]  # fmt: skip
        proof = {
            "tensors": len(base.tensors), "entries": tally.entries, "largest_change": tally.largest,
            "zero_entries": tally.zero, "entries_at_base_value": tally.unchanged, "tensors_checked": checked,
        }  # fmt: skip
        return {
            "format": landing.FORMAT, "files": files, "base": base.name, "base_digest": base.digest, "sources": sources,
            "combiner": self.how_name, "options": self.how_options, "seed": self.seed,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "vocabulary": None if changes.plan is None else changes.plan.to_dict(), "proof": proof, "job": self.digest,
        }  # fmt: skip


@dataclass
class _Read:
    base: Tensor
    place: Place | None = None
    changes: Sequence[Update | None] = ()


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
