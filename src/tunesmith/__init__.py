# SPDX-License-Identifier: Apache-2.0
"""Tunesmith: adapt a pre-trained model with little data and few parameters, and prove what changed.

    import tunesmith as ts
    base = ts.load("smollm2-135m-instruct")
    run = ts.tune(base, "tickets.jsonl", method=ts.LoRA(rank=8))
    with base.using(run.delta):
        ...

Names are loaded when first used, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "Base": "tunesmith.core.base",
    "Delta": "tunesmith.core.delta",
    "Run": "tunesmith.train.runs",
    "TunesmithError": "tunesmith.core.errors",
    "arbitrary": "tunesmith.deltas.weight.apet",
    "checks": "tunesmith",
    "compose": "tunesmith",
    "compress": "tunesmith.compose",
    "decode": "tunesmith",
    "derive": "tunesmith",
    "diff": "tunesmith.evaluate.difference",
    "prove": "tunesmith.evaluate.run",
    "load": "tunesmith.models.open",
    "merge": "tunesmith.compose",
    "methods": "tunesmith.core.method",
    "negate": "tunesmith.compose",
    "option": "tunesmith.core.method",
    "plan": "tunesmith.train.plan",
    "read": "tunesmith.data",
    "register": "tunesmith.core.method",
    "route": "tunesmith.compose",
    "scale": "tunesmith.compose",
    "resume": "tunesmith.train.tune",
    "subtract": "tunesmith.compose",
    "sample": "tunesmith.train.sample",
    "tune": "tunesmith.train.tune",
}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if _NAMES.get(name) == "tunesmith":
        return importlib.import_module(f"tunesmith.{name}")
    if name in _NAMES:
        # `prove` is `evaluate.run.evaluate`: the package of that name would shadow it here.
        return getattr(importlib.import_module(_NAMES[name]), "evaluate" if name == "prove" else name)
    found = getattr(importlib.import_module("tunesmith.deltas"), name, None)
    if found is None:
        from tunesmith.core.errors import nearest

        methods = importlib.import_module("tunesmith.deltas").__all__
        raise AttributeError(f"tunesmith has no {name!r}; {nearest(name, [*_NAMES, *methods])}")
    return found


def __dir__() -> list[str]:
    return sorted([*_NAMES, *importlib.import_module("tunesmith.deltas").__all__, "__version__"])
