# SPDX-License-Identifier: Apache-2.0
"""The chat layout that goes with a base and a delta, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View, as_view
from tunesmith.core.errors import UsageError
from tunesmith.data.templates import TemplateInfo, template_info


def layout_for(base: Base, delta: Delta | View | None = None, system: str | None = None) -> TemplateInfo:
    """The chat layout to use: the one stored with the delta, else the tokenizer's. `system` overrides the stored one.

    Raises UsageError for a base without a tokenizer, DataError for a damaged record.
    """
    return layout_from(base, as_view(delta).delta.layout if delta is not None else {}, system)


def layout_from(base: Base, stored: Mapping[str, Any], system: str | None = None) -> TemplateInfo:
    """The same from the `layout` in a delta's header."""
    if base.tokenizer is None:
        raise UsageError(f"{base.name} has no tokenizer, so it cannot read or write text")
    record = stored.get("template")
    info = TemplateInfo.from_dict(record) if record else None
    if info is None or not info.template:
        return template_info(base.tokenizer, system=system)
    return info if system is None else replace(info, system=system)


def stop_ids_for(base: Base, info: TemplateInfo) -> tuple[int, ...]:
    """Every token that ends an answer: those of the layout and those the model itself names."""
    own = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    named = [own] if isinstance(own, int) else list(own or [])
    return tuple(sorted({*info.stop_ids, *(int(i) for i in named)}))
