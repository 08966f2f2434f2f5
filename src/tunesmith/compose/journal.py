# SPDX-License-Identifier: Apache-2.0
"""What a long merge has finished, so that a killed run goes on where it stopped.

One line of JSON a finished shard, after a first line with the digest of the job. A shard counts only if its file still
has the size and sampled digest of its line; a line that was cut off ends the journal.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ResourceError, UsageError
from tunesmith.core.tensorfile import disk, read_header, sampled_digest

NAME = ".journal"
FORMAT = "tunesmith-merge-journal/1"


class Journal:
    """The work folder of one job. Raises ResourceError where another process is at work in it."""

    def __init__(self, folder: Path, job: str, *, resume: bool) -> None:
        self.folder, self.job = folder, job
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115 (held until `close`)
        self._claim()
        self.done = self._read() if resume else {}
        if not self.done:
            self._start()

    def _claim(self) -> None:
        """Take the folder for this process; the claim ends with the process, however it ends."""
        try:
            import fcntl
        except ImportError:  # not a POSIX system: two merges into one folder are not told apart there
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            hint = "wait for it, or choose another folder"
            raise ResourceError("another merge is writing here", where=str(self.folder), hint=hint) from None

    def _read(self) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        found: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(self._file):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if number == 0:
                if not isinstance(entry, dict) or (entry.get("format"), entry.get("job")) != (FORMAT, self.job):
                    return {}
            elif isinstance(entry, dict) and isinstance(entry.get("file"), str) and self._holds(entry):
                found[entry["file"]] = entry
        return found

    def _holds(self, entry: Mapping[str, Any]) -> bool:
        name = entry["file"]
        path = self.folder / name
        if "/" in name or "\\" in name or not path.is_file() or path.stat().st_size != entry.get("bytes"):
            return False
        try:
            return file_digest(path) == entry.get("digest")
        except UsageError:
            return False

    def _start(self) -> None:
        with disk(self.folder):
            for left in self.folder.iterdir():
                if left.name != NAME:
                    shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            self._file.seek(0)
            self._file.truncate()
            self._line({"format": FORMAT, "job": self.job})

    def finished(self, file: str, **facts: Any) -> dict[str, Any]:
        """Note a shard that lies whole in the folder; returns its entry."""
        path = self.folder / file
        entry = {"file": file, "bytes": path.stat().st_size, "digest": file_digest(path), **facts}
        with disk(self.folder):
            self._line(entry)
        self.done[file] = entry
        return entry

    def _line(self, entry: Mapping[str, Any]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """The journal is no part of the model."""
        os.unlink(self.folder / NAME)

    def close(self) -> None:
        """End the claim on the folder."""
        self._file.close()


def file_digest(path: Path) -> str:
    """The sampled digest of a safetensors file. Raises UsageError for a damaged one."""
    entries, head = read_header(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        return sampled_digest(handle, entries, head)
    finally:
        os.close(handle)
