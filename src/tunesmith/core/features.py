# SPDX-License-Identifier: Apache-2.0
"""What a model's output layer reads: its features, without computing the output product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tunesmith.core import apply
from tunesmith.core.errors import UsageError
from tunesmith.core.sites import Site, SiteMap
from tunesmith.core.trace import primary

if TYPE_CHECKING:
    from tunesmith.core.base import Base


def features(base: Base, inputs: Mapping[str, Any], call: Callable[..., Any] | None = None) -> Tensor:
    """The input of the head where the base has one, else its primary output (such as the last hidden state).

    Gives [B, T, d] for sequence models and [B, d] for others, in the base's dtype. `call` runs the base (default: its
    model); deltas on the head itself do not act, all others do. Raises UsageError when no tensor comes out.
    """
    return _features(base, call or base.model, inputs)[0]


def head_input(site: Site, call: Callable[..., Any], inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """The same from inside a method's `model`, with the output the base gave in passing (its logits mean nothing)."""
    app = apply.on_model(site.module)
    if app is None:
        raise UsageError("features can be read this way only while a delta is in use on the model")
    return _features(app.base, call, inputs)


def head_site(site: Site) -> Site | None:
    """The output head of the model at `site`, if it has one."""
    return None if site.map is None else head_of(site.map)


def head_of(sites: SiteMap) -> Site | None:
    """The output head among the sites of a model, if it has one."""
    heads = [s for s in sites.role("head") if s.kind == "linear"]
    traced = sites.trace.head if sites.trace is not None else None
    return next((s for s in heads if s.path == traced), heads[0] if heads else None)


def _features(base: Base, call: Callable[..., Any], inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    head = head_of(base.sites)
    if head is None:
        out = call(**inputs)
        found = primary(out)
    else:
        with apply.passing(base, head.path) as seen:
            out = call(**inputs)
        # what went in, not what came out: a model may cap or scale its logits; a prompt delta cuts its own tokens off
        found, cut = seen[-1] if seen else None, primary(out)
        if found is not None and cut is not None and found.dim() == cut.dim() == 3:
            found = found[:, -cut.shape[1] :]
    if found is None:
        raise UsageError("the model's output holds no tensor", where=base.name)
    return found, out
