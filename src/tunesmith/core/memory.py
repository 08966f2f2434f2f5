# SPDX-License-Identifier: Apache-2.0
"""Memory of this process and of its device: its peak, what is free, and whether freed memory is given back at once."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch


def reset_peak(device: torch.device) -> None:
    """Start a new peak measurement where the system allows it (Linux, CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the resident high-water mark


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the CUDA device, else the high-water mark of resident memory of this process; None where neither is told."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int | None:
    """Bytes that can still be used without swapping, the control group's limit included, or None if unknown."""
    free: list[int] = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return min(free) if free else None


# Names of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# Where glibc's own adaptation ends on a 64-bit system once large blocks come and go, and its default number of mappings.
_SETTLED = ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20), (_MMAP_MAX, 65536))
_KEEPING = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
_keepers = 0
_lock = threading.Lock()


@contextmanager
def keeping_memory() -> Iterator[bool]:
    """Within the block freed memory stays with the process and is used again; gives whether the system allows it.

    Tensors of a training step are made and freed in the same sizes at every step. glibc hands large ones back to the system
    each time, which then clears every page anew: up to a third of a step's processor time. What was kept is handed back at
    the end of the outermost block. Without effect where the C library is another or the user has set its limits.
    """
    global _keepers
    library = None if any(os.environ.get(name) for name in _CHOSEN) else _glibc()
    if library is None:
        yield False
        return
    with _lock:
        _keepers += 1
        if _keepers == 1:
            for option, value in _KEEPING:
                library.mallopt(option, value)
    try:
        yield True
    finally:
        with _lock:
            _keepers -= 1
            if not _keepers:
                for option, value in _SETTLED:
                    library.mallopt(option, value)
                library.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library of this process if it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version, library.mallopt, library.malloc_trim  # noqa: B018 (AttributeError elsewhere)
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, AttributeError):
        return None
    return library
