# SPDX-License-Identifier: Apache-2.0
"""Where a merged model lands: a folder that nothing else wrote, put in place in one step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from tunesmith.core.errors import UsageError

RECORD = "tunesmith_merge.json"
FORMAT = "tunesmith-merge/1"


def free(into: str | os.PathLike[str]) -> Path:
    """The folder to write. Raises UsageError for a file, or a folder with anything but an earlier merge in it."""
    target = Path(os.path.abspath(Path(into).expanduser()))
    if not target.name:
        raise UsageError("is no folder a model can be written to", where=str(into))
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir()):
        raise UsageError("is not a folder", where=str(into), hint="choose another name")
    if target.is_dir() and any(target.iterdir()) and not is_merge(target):
        hint = "choose another folder, or empty this one"
        raise UsageError("holds something that no merge wrote, so it is not overwritten", where=str(into), hint=hint)
    return target


def is_merge(folder: Path) -> bool:
    """Whether everything in the folder was written by an earlier merge."""
    try:
        record = json.loads((folder / RECORD).read_bytes()[: 1 << 24])
        ours = set(record["files"]) | {RECORD} if record.get("format") == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return {p.name for p in folder.iterdir()} <= ours


def publish(fresh: Path, target: Path) -> None:
    """Give the finished folder its name; an earlier merge there goes only once the new one has taken its place."""
    os.chmod(fresh, 0o777 & ~umask())
    if not target.exists():
        os.rename(fresh, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.old.", dir=target.parent))
    os.rename(target, aside / "was")
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(aside / "was", target)
        raise
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(aside, ignore_errors=True)


def umask() -> int:
    """The process's mask of file rights."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
