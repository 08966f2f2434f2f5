# SPDX-License-Identifier: Apache-2.0
"""Options that differ by path: a table from pattern to value, and an error for a pattern that matches no site."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from tunesmith.core.errors import UsageError, nearest
from tunesmith.core.sites import Site


def matches(pattern: str, path: str) -> bool:
    """Whether a glob, a whole path or a last path part names `path`."""
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(path, pattern)
    return path == pattern or path.endswith("." + pattern)


def pick(table: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern of `table` that matches `path`, else `default`."""
    return next((v for pattern, v in table.items() if matches(pattern, path)), default)


def require_used(owner: str, table: Mapping[str, Any], sites: Iterable[Site]) -> None:
    """Raise UsageError for a pattern that matches none of `sites`: it would be skipped in silence."""
    paths = [s.path for s in sites]
    for pattern in table:
        if not any(matches(pattern, p) for p in paths):
            hint = nearest(pattern, [*paths, *{p.rsplit(".", 1)[-1] for p in paths}])
            raise UsageError(f"pattern {pattern!r} matches none of its {len(paths)} targets", where=owner, hint=hint)
