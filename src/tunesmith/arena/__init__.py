# SPDX-License-Identifier: Apache-2.0
"""The arena: methods compared on a user's data under one budget, and what those comparisons recommend.

Names load on first use, so importing `tunesmith.arena` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# No name may equal that of a submodule, which would take its place once imported.
_HOME = {"run_compare": "compare", "load_comparison": "report", "recommended": "recommend", "parse_seconds": "budget"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
