# SPDX-License-Identifier: Apache-2.0
"""Options that differ by path: a table from pattern to value, an error for a pattern that matches no
site, and the other way round: the targets and the table that say what a set of paths has."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.core.errors import UsageError, nearest
from tunesmith.core.sites import Site

if TYPE_CHECKING:
    from tunesmith.core.base import Base

N = TypeVar("N", int, float)


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


def targets_of(base: Base, paths: Iterable[str], kinds: Iterable[str]) -> str:
    """Targets that select exactly these paths: last path parts where those suffice, else every path."""
    wanted, allowed = sorted(paths), tuple(kinds)
    short = ",".join(sorted({p.rsplit(".", 1)[-1] for p in wanted}))
    for text in (short, ",".join(wanted)):
        try:
            if sorted(s.path for s in base.sites.select(text, allowed)) == wanted:
                return text
        except UsageError:
            continue
    return "re:^(" + "|".join(re.escape(p) for p in wanted) + ")$"


def common(values: Mapping[str, N], default: N) -> tuple[N, dict[str, N]]:
    """The most frequent value and a pattern for the paths that differ, longest first (the first that matches counts)."""
    if not values:
        return default, {}
    most = Counter(values.values()).most_common(1)[0][0]
    odd = {p: v for p, v in values.items() if v != most}
    if any(q != p and q.endswith("." + p) for p in odd for q in values):  # a path that ends another: name them all
        odd = dict(values)
    return most, {p: odd[p] for p in sorted(odd, key=lambda p: (-len(p), p))}
