# SPDX-License-Identifier: Apache-2.0
"""Into which numbers a delta of a packed base is merged, and what each choice costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def _again(merged: Base, steps: list[dict[str, Any]]) -> Base:
    """The recipes of another base run on this one. Raises UsageError for one that data went into."""
    from tunesmith.core.derive import RECIPES, derive
    from tunesmith.core.errors import UsageError
    from tunesmith.core.expected import retyped

    if not steps:
        raise UsageError("the base does not say how it was packed")
    for step in steps:
        if step.get("not_repeatable"):
            raise UsageError(f"recipe {step['recipe']!r} cannot be run again: {step['not_repeatable']}")
        cls = RECIPES.get(step["recipe"]).cls
        merged = derive(merged, cls(**retyped(cls, step["options"])))
    return merged


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _bytes(base: Base) -> int:
    from itertools import chain

    model = base.model
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
