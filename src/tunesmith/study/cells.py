# SPDX-License-Identifier: Apache-2.0
"""Results of parts of a study, remembered in a JSON-lines file so that a killed study continues.

The first line binds the file to the code that produced it; every further line is one cell. A line cut short by a kill
is dropped, any other damage is an error.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError, TrainingError, UsageError

FORMAT = "tunesmith-cells/1"


def canonical(key: Mapping[str, Any]) -> str:
    """One text per key, whatever the order of its entries."""
    try:
        return json.dumps(dict(key), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"a cell key must be plain JSON: {error}") from None


class Cells:
    """Remembered results, in memory and in `path`. `bound` (plain JSON) says which code and settings they belong to."""

    def __init__(self, path: Path, bound: Mapping[str, Any]) -> None:
        self.path = path
        self.bound = dict(bound)
        self.seconds = 0.0
        self.computed = 0
        self._known: dict[str, tuple[Any, float]] = {}
        self._asked: set[str] = set()
        self._load()

    def _load(self) -> None:
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        whole, cut = lines[:-1], lines[-1] if lines else b""
        if not whole:
            self._rewrite([])
            return
        records = [_record(self.path, number, line) for number, line in enumerate(whole, 1)]
        header = records[0]
        if header.get("format") != FORMAT:
            raise DataError(f"this is not a {FORMAT} file", where=str(self.path), hint="move it away and run again")
        if header.get("bound") != self.bound:
            changed = [k for k in self.bound if header.get("bound", {}).get(k) != self.bound[k]]
            raise UsageError(
                f"these cells were computed by other code or settings (changed: {', '.join(changed) or 'keys'})",
                where=str(self.path),
                hint="run again with fresh=True to recompute them",
            )
        for number, record in enumerate(records[1:], 2):
            if set(record) != {"key", "value", "seconds"}:
                raise DataError("a cell needs key, value and seconds", where=f"{self.path}:{number}")
            self._known[canonical(record["key"])] = (record["value"], float(record["seconds"]))
        if cut:
            self._rewrite(whole[1:])

    def _rewrite(self, lines: list[bytes]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"format": FORMAT, "bound": self.bound}, sort_keys=True).encode()
        write_atomically(self.path, b"\n".join([header, *lines]) + b"\n")

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether the value of `key` is remembered."""
        return canonical(key) in self._known

    def get(self, key: Mapping[str, Any], fn: Callable[[], Any], *, took: float | None = None) -> Any:
        """The remembered value of `key`, or `fn()`, written to disk before it is returned.

        `took` is what the value cost where `fn` only hands over what was computed elsewhere. The value comes back as JSON gives it (tuples become lists), so a first and a resumed run see the same thing.
        Raises TrainingError when the value is not finite plain JSON, UsageError when one run asks for a key twice.
        """
        name = canonical(key)
        if name in self._asked:
            raise UsageError(f"the study asked for the cell {name} twice", hint="give every cell its own key")
        self._asked.add(name)
        if name not in self._known:
            start = time.perf_counter()
            value = fn()
            seconds = time.perf_counter() - start if took is None else took
            try:
                line = json.dumps({"key": dict(key), "value": value, "seconds": round(seconds, 3)}, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise TrainingError(f"the cell {name} returned something that is not finite JSON: {error}") from None
            with self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._known[name] = (json.loads(line)["value"], seconds)
            self.computed += 1
        value, seconds = self._known[name]
        self.seconds += seconds
        return value


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"damaged line: {error}", where=f"{path}:{number}", hint="delete the file to start over"
        ) from None
    if not isinstance(record, dict):
        raise DataError("every line must be a JSON object", where=f"{path}:{number}")
    return record


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside and rename, so a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
