# SPDX-License-Identifier: Apache-2.0
"""Into which numbers a delta of a packed base is merged, and what each choice costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tunesmith.core.base import Base
    from tunesmith.core.delta import Delta


def is_packed(base: Base) -> bool:
    """Whether some linear layer of the base holds its weight in another form than a dense tensor."""
    from tunesmith.core.held import is_held

    return any(is_held(m) for m in base.modules.values())


def unpacked(base: Base) -> Base:
    """The base with every packed layer as the dense one it stands for; dense tensors are shared."""
    from tunesmith.core.apply import sharing_copy
    from tunesmith.core.base import Base as Made
    from tunesmith.core.held import dense_layer, is_held, put_module

    model: Any = sharing_copy(base.model)
    held = [path for path, m in base.modules.items() if is_held(m)]
    for path in held:
        if any(path.startswith(other + ".") for other in held):
            continue  # what a packed layer is made of goes with it
        module: Any = base.modules[path]
        put_module(model, path, dense_layer(module.dense_weight().detach(), module.bias))
    source = {k: v for k, v in base.source.items() if k != "derived"}
    return Made(
        model, tokenizer=base.tokenizer, example=base._example, name=base.name, family=base.family, source=source
    )


def target_gaps(base: Base, delta: Delta, merged: Base) -> list[dict[str, Any]]:
    """The largest gap of each target's outputs to those of the applied delta, and what was not possible and why.

    `dequantised` folds the delta into dense weights, `requantised` packs these again by the recipes that made the base,
    and `delta` leaves it on top of the packed base.
    """
    from tunesmith.core.derive import records
    from tunesmith.core.errors import TunesmithError

    with base.using(delta):
        want = base.probe_outputs()
    rows: list[dict[str, Any]] = [
        {"target": "dequantised", "gap": _gap(merged.probe_outputs(), want), "bytes": _bytes(merged), "why_not": None}
    ]
    try:
        again = _again(merged, records(base))
        rows.append(
            {"target": "requantised", "gap": _gap(again.probe_outputs(), want), "bytes": _bytes(again), "why_not": None}
        )
    except TunesmithError as e:
        rows.append({"target": "requantised", "gap": None, "bytes": None, "why_not": e.what})
    rows.append({"target": "delta", "gap": 0.0, "bytes": _bytes(base) + delta.nbytes, "why_not": None})
    return rows


def write_packed(base: Base, folder: Path, dense: Path, want: Tensor) -> dict[str, Any]:
    """Write the merged model packed again, as a derived base of the dense folder that was merged into, and open it.

    `want` are the outputs of base and delta on the probe. Raises UsageError for recipes that cannot be run again.
    """
    import tunesmith
    from tunesmith.core.derive import records
    from tunesmith.core.derived_store import save_derived

    merged = tunesmith.load(dense.resolve(), dtype=base.dtype, device=str(base.device), task=base.source.get("task"))
    place = save_derived(_again(merged, records(base)), folder)
    opened = tunesmith.load(place, device=str(base.device))
    return {
        "target": "requantised", "folder": str(place), "gap": _gap(_probed(opened, base), want),
        "bytes": _bytes(opened), "why_not": None,
    }  # fmt: skip


def _probed(opened: Base, base: Base) -> Tensor:
    from tunesmith.core.base import Base as Made

    return Made(opened.model, example=base.probe(), family=base.family).probe_outputs()


def _again(merged: Base, steps: list[dict[str, Any]]) -> Base:
    """The recipes of another base run on this one. Raises UsageError for one that data went into."""
    from tunesmith.core.derive import RECIPES, derive
    from tunesmith.core.expected import retyped

    _require_repeatable(steps)
    for step in steps:
        cls = RECIPES.get(step["recipe"]).cls
        merged = derive(merged, cls(**retyped(cls, step["options"])))
    return merged


def require_repeatable(base: Base) -> None:
    """Raise UsageError for a base that cannot be packed again as it was."""
    from tunesmith.core.derive import records

    _require_repeatable(records(base))


def _require_repeatable(steps: list[dict[str, Any]]) -> None:
    from tunesmith.core.errors import UsageError

    if not steps:
        raise UsageError("the base does not say how it was packed")
    for step in steps:
        if step.get("not_repeatable"):
            raise UsageError(f"recipe {step['recipe']!r} cannot be run again: {step['not_repeatable']}")


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _bytes(base: Base) -> int:
    from itertools import chain

    model = base.model
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
