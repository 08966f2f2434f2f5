# SPDX-License-Identifier: Apache-2.0
"""What the gates of a forward pass said: a method tells, whoever watches the pass reads. For losses on gates and traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Seen = dict[str, Tensor]
_WATCHING: ContextVar[Seen | None] = ContextVar("tunesmith_gates", default=None)


@contextmanager
def watched() -> Iterator[Seen]:
    """The gate logits [..., n] of every gated site that runs within the block, by path; the last pass where it runs twice."""
    seen: Seen = {}
    token = _WATCHING.set(seen)
    try:
        yield seen
    finally:
        _WATCHING.reset(token)


def tell(path: str, logits: Tensor) -> None:
    """Called by a method with its gate logits at a site."""
    seen = _WATCHING.get()
    if seen is not None:
        seen[path] = logits
