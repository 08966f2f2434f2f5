# SPDX-License-Identifier: Apache-2.0
"""Merge deltas of one base into one delta, and the small verbs around it: scale, negate, subtract, compress.

    both = merge(base, [a, b], "ties:density=0.3", weights=[1, 0.5])
    less = scale(base, a, 0.5)
    calm = scale(base, a, depth="linear", start=0.1, end=1.0)        # LiNeS
    without = subtract(base, a, b)

Every verb takes the base, because what a delta changes is known only there, and leaves its arguments as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.compose.build import agreed, build, by_tensor, parents, sources, weighted_parts
from tunesmith.compose.collect import DeltaChanges
from tunesmith.core import nearest
from tunesmith.core.algebra import norm
from tunesmith.core.base import Base
from tunesmith.core.combine import COMBINERS, Combiner, combined
from tunesmith.core.delta import Delta, View, as_view
from tunesmith.core.errors import UsageError
from tunesmith.core.errors import nearest as nearest_name
from tunesmith.core.registry import config


def merge(
    base: Base,
    deltas: Sequence[Delta | View],
    method: str | Combiner = "linear",
    weights: Sequence[float] | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Delta:
    """One delta of several.

    Args:
        base: what all of them were made for.
        deltas: deltas, or deltas at a strength.
        method: a combiner, or its name with options as in "ties:density=0.2".
        weights: one number for each delta; 1 for all by default. A delta of weight 0 is left out.
        name: of the result; the names of the sources joined by "+" by default.
        seed: of combiners that draw at random; stored with the result.
    The result names its sources, their digests and weights, and the combiner with its options. Entries of the layout
    (templates, labels) on which the sources differ are left out and named in `provenance["composed"]["layout_dropped"]`.
    Raises UsageError for parts that cannot be combined, weights that do not fit, or a result without any change;
    BaseMismatch for a delta of another base.
    """
    if isinstance(deltas, Delta | View) or not deltas:
        raise UsageError("merge takes a list with at least one delta", hint="merge(base, [a, b])")
    how = combiner_of(method)
    views = [as_view(d) for d in deltas]
    given = [1.0] * len(views) if weights is None else [_number(w) for w in weights]
    if len(given) != len(views):
        raise UsageError(f"{len(views)} deltas and {len(given)} weights", hint="one weight for each delta")
    counted = [(v, w) for v, w in zip(views, given, strict=True) if w != 0]
    used, rest = [v for v, _ in counted], [w for _, w in counted]
    linear = hasattr(how, "coefficients")
    alike = by_tensor(base, used) if linear else []
    changes = DeltaChanges(base, used, aside={id(p) for parts in alike for p in parts})
    others = weighted_parts(base, alike, how.coefficients(rest)) if alike else []  # type: ignore[attr-defined]
    layout, dropped = agreed(used)
    facts: dict[str, Any] = {
        "combiner": how.info.name, "options": config(how), "seed": seed, "sources": sources(views, given),  # type: ignore[attr-defined]
    }  # fmt: skip
    if dropped:
        facts["layout_dropped"] = dropped
    label = name or "+".join(v.delta.name for v in used) or "merged"
    return build(
        base, combined(how, changes, rest, seed=seed), name=label, facts=facts, others=others, lineage=parents(used),
        layout=layout,
    )  # fmt: skip


def _number(w: Any) -> float:
    if isinstance(w, bool) or not isinstance(w, int | float):
        raise UsageError(f"a weight must be a number, got {w!r}", where="weights")
    return float(w)


def combiner_of(method: str | Any) -> Any:
    """A registered combiner from its name with options, or the instance itself. Raises UsageError."""
    if isinstance(method, str):
        return COMBINERS.parse(method)
    info = getattr(method, "info", None)
    if isinstance(method, type) or not hasattr(method, "combine") or info is None:
        hint = nearest_name(getattr(method, "__name__", ""), [i.name for i in COMBINERS.all()])
        raise UsageError(f"{method!r} is no combiner", hint=hint)
    return method


def scale(
    base: Base,
    delta: Delta | View,
    s: float = 1.0,
    *,
    depth: str | None = None,
    start: float = 1.0,
    end: float = 1.0,
    name: str | None = None,
) -> Delta:
    """The delta times `s`, as a delta of its own; low-rank stays low-rank.

    With `depth="linear"` block l of L is scaled by s (start + (end - start) l / (L - 1)) and what lies outside the blocks
    by s start (LiNeS, Wang et al. 2024, arXiv 2410.17146). Raises UsageError for another depth.
    """
    from tunesmith.compose.linear import TaskArithmetic
    from tunesmith.compose.lines import Lines

    if depth not in (None, "linear"):
        raise UsageError(f"unknown depth={depth!r}", hint=nearest_name(str(depth), ["linear"]))
    if depth is None and (start != 1.0 or end != 1.0):
        raise UsageError("start and end are of a scale by depth", hint='scale(base, delta, depth="linear", start=.1)')
    how = TaskArithmetic() if depth is None else Lines(alpha=float(start), beta=float(end - start))
    return merge(base, [delta], how, weights=[s], name=name or as_view(delta).delta.name)


def negate(base: Base, delta: Delta | View, *, name: str | None = None) -> Delta:
    """The delta with its sign turned, as in forgetting by negation (Ilharco et al. 2022, arXiv 2212.04089)."""
    return scale(base, delta, -1.0, name=name or f"-{as_view(delta).delta.name}")


def subtract(base: Base, a: Delta | View, b: Delta | View, *, name: str | None = None) -> Delta:
    """a - b."""
    label = name or f"{as_view(a).delta.name}-{as_view(b).delta.name}"
    return merge(base, [a, b], "task-arithmetic", weights=[1.0, -1.0], name=label)


@dataclass(frozen=True)
class Compressed:
    """A smaller delta and how far it is off: ||dW - dW'||_F / ||dW||_F at each tensor, and over all of them together.

    `lost` names changes that the form cannot hold; `ratio` is the bytes of the result over those of the delta.
    """

    delta: Delta
    errors: dict[str, float]
    error: float
    lost: tuple[str, ...]
    ratio: float


@torch.no_grad()
def compress(
    base: Base, delta: Delta | View, how: str | Combiner = "svd", *, rank: int = 8, seed: int = 0
) -> Compressed:
    """The delta in less room, with its error.

    `how="svd"` gives the nearest low-rank change of every weight matrix, of at most `rank` (truncated decomposition); a
    combiner that drops entries ("dare:density=0.01", "breadcrumbs", "ties:density=0.1") gives a sparse delta, its draw
    fixed by `seed`. Raises UsageError for a part that cannot be merged.
    """
    view = as_view(delta)
    if how == "svd":
        fit = nearest.nearest_lora(base, view, rank)
        return Compressed(fit.delta, fit.errors, fit.error, fit.lost, fit.delta.nbytes / max(view.delta.nbytes, 1))
    made = merge(base, [view], how, name=f"{view.delta.name}-small", seed=seed)
    pair = DeltaChanges(base, [view, made])
    errors: dict[str, float] = {}
    off = total = 0.0
    for place in pair.places():
        was, now = pair.at(place)
        size = float(norm(was)) ** 2 if was is not None else 0.0
        gap = (was.dense() if was is not None else 0) - (now.dense() if now is not None else 0)  # type: ignore[operator]
        rest = float(gap.double().square().sum())
        errors[place.key] = (rest / size) ** 0.5 if size else 0.0
        off, total = off + rest, total + size
    return Compressed(made, errors, (off / total) ** 0.5 if total else 0.0, (), made.nbytes / max(view.delta.nbytes, 1))
