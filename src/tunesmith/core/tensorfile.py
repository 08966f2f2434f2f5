# SPDX-License-Identifier: Apache-2.0
"""Safetensors files read and written tensor by tensor, so that nothing needs a whole file in memory.

Reading copies one tensor's bytes into memory of its own: unlike a mapped file it never counts in the resident size of
the process for longer than it is used. The header of a foreign file is checked in full before anything is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import DeltaError, ResourceError, UsageError, nearest
from tunesmith.core.header import DTYPE_NAMES, DTYPES, JSON_LIMIT, strict_json

SAMPLES = 64  # stretches of a tensor's bytes that its quick digest reads
STRETCH = 64  # bytes in each


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `begin` is where its bytes start in the file, `nbytes` how many there are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def nbytes_of(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, Entry], str]:
    """The tensors of a safetensors file in the order of their bytes, and the sha256 of its header.

    Raises UsageError for a file that is cut off, damaged, or lists a tensor twice, over another, with a dtype that is
    not known, or outside the file.
    """
    where = str(path)
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or 8 + length > size or length > JSON_LIMIT:
                raise UsageError(f"was cut off or is no safetensors file ({size:,} bytes)", where=where, hint=_AGAIN)
            raw = f.read(length)
    except OSError as e:
        raise UsageError(f"cannot be read ({e.strerror or e})", where=where) from None
    try:
        found = strict_json(raw.rstrip(b" "), where)
    except DeltaError as e:
        raise UsageError(e.what, where=e.where, hint=e.hint) from None
    found.pop("__metadata__", None)
    entries = sorted((_entry(k, v, 8 + length, where) for k, v in found.items()), key=lambda e: (e.begin, e.nbytes))
    end = 8 + length
    for entry in entries:
        if entry.begin != end:
            what = "begins within another tensor" if entry.begin < end else "leaves a gap before it"
            raise UsageError(f"{entry.name[:120]!r} {what}", where=where, hint=_AGAIN)
        end += entry.nbytes
    if end != size:
        what = "was cut off" if end > size else "holds more than its header says"
        raise UsageError(f"{what}: {size:,} bytes, the header says {end:,}", where=where, hint=_AGAIN)
    return {e.name: e for e in entries}, hashlib.sha256(raw).hexdigest()


_AGAIN = "the file is damaged; fetch or write it again"


def _entry(name: str, value: Any, start: int, where: str) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise UsageError(f"the entry of {name[:120]!r} is damaged", where=where, hint=_AGAIN)
    dtype, shape, span = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPES:
        raise UsageError(f"{name[:120]!r} has a dtype that is not known", where=where, hint=nearest(str(dtype), DTYPES))
    whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**48 for n in shape) and len(shape) <= 16
    pair = isinstance(span, list) and len(span) == 2 and all(type(n) is int and 0 <= n < 2**62 for n in span)
    if not whole or not pair or span[1] - span[0] != nbytes_of(DTYPES[dtype], shape):
        raise UsageError(f"the entry of {name[:120]!r} is damaged: shape and bytes disagree", where=where, hint=_AGAIN)
    return Entry(name, DTYPES[dtype], tuple(shape), start + span[0], span[1] - span[0])


def read_tensor(handle: int, entry: Entry, where: str) -> Tensor:
    """One tensor in memory of its own, by an open file's descriptor. Raises UsageError where the file got shorter."""
    out = torch.empty(entry.shape, dtype=entry.dtype)
    if not entry.nbytes:
        return out
    view = memoryview(out.view(-1).view(torch.uint8).numpy().data)
    done = 0
    while done < entry.nbytes:
        got = os.preadv(handle, [view[done:]], entry.begin + done)
        if not got:
            raise UsageError(f"ends within {entry.name[:120]!r}", where=where, hint=_AGAIN)
        done += got
    return out


def sampled_digest(handle: int, entries: Mapping[str, Entry], header_sha256: str) -> str:
    """sha256 over the header and 64 evenly spaced stretches of every tensor: quick, and other for other training."""
    h = hashlib.sha256(header_sha256.encode())
    for e in entries.values():
        if e.nbytes <= SAMPLES * STRETCH:
            h.update(os.pread(handle, e.nbytes, e.begin))
            continue
        step = (e.nbytes - STRETCH) / (SAMPLES - 1)
        for i in range(SAMPLES):
            h.update(os.pread(handle, STRETCH, e.begin + int(i * step)))
    return h.hexdigest()


class TensorWriter:
    """A safetensors file written one tensor at a time, in the order planned.

    Args:
        plan: name, dtype and shape of every tensor, in the order in which they will come.
        hashed: whether to take the sha256 of the whole file on the way.
    Raises UsageError for a tensor that was not planned next, ResourceError for a disk that is full.
    """

    def __init__(
        self,
        path: Path,
        plan: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str] | None = None,
        hashed: bool = False,
    ) -> None:
        self.path, self.plan, self._at = path, list(plan), 0
        head: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        end = 0
        for name, dtype, shape in self.plan:
            if name in head:
                raise UsageError(f"{name!r} is planned twice", where=str(path))
            size = nbytes_of(dtype, shape)
            head[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=True).encode()
        text += b" " * (-len(text) % 8)
        self.total = 8 + len(text) + end
        self._hash = hashlib.sha256() if hashed else None
        with disk(path, self.total):
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by `__exit__`)
            self._write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def put(self, name: str, value: Tensor) -> None:
        """Write the next tensor, which must have the planned name, dtype and shape."""
        want = self.plan[self._at] if self._at < len(self.plan) else ("nothing", value.dtype, tuple(value.shape))
        if want != (name, value.dtype, tuple(value.shape)):
            what = f"{want[0]} ({want[1]}, {list(want[2])}) is due, not {name} ({value.dtype}, {list(value.shape)})"
            raise UsageError(what, where=str(self.path))
        self._at += 1
        if value.numel():
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            with disk(self.path, self.total):
                self._write(flat.numpy().data)

    def _write(self, data: bytes | memoryview) -> None:
        if self._hash is not None:
            self._hash.update(data)
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view) or 0 :]

    def _finish(self) -> None:
        if self._at != len(self.plan):
            raise UsageError(f"{len(self.plan) - self._at} planned tensors never came", where=str(self.path))
        with disk(self.path, self.total):
            os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        """The digest of the file, once everything is written and where `hashed` asked for it."""
        return self._hash.hexdigest() if self._hash is not None else ""


class disk:
    """Turns failures of the file system in a block into a ResourceError that names the path."""

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path, self.size = path, size

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if not isinstance(e, OSError):
            return
        full = "No space left" in str(e) or "quota" in str(e).lower()
        what = "the disk is full" if full else f"cannot be written ({e.strerror or e})"
        need = f"{self.size:,} bytes are needed; " if self.size else ""
        raise ResourceError(
            what, where=str(self.path), hint=f"{need}free some space or choose another folder"
        ) from None


def tensors_in(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file, one at a time. Raises UsageError for a damaged file."""
    entries, _ = read_header(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(AttributeError):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for name, entry in entries.items():
            yield name, read_tensor(handle, entry, str(path))
    finally:
        os.close(handle)
