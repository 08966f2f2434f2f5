# SPDX-License-Identifier: Apache-2.0
"""A delta that most of the batch runs under, merged into copies of the weights it changes.

    W' = W + B A        for its rows; other rows go through W as ever, in products of their own

The base's own weights stay as they are: nothing has to be undone. Copies are made once a delta has had most of the tokens
for a while, only of the products it touches and only while there is memory, and go when it has not. It is used in fp32
and wider: a sum rounded to half precision loses part of what a small delta adds, and saves little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tunesmith.core.memory import available_memory
from tunesmith.serve.decoder import Decoder
from tunesmith.serve.mixed import Resident
from tunesmith.serve.products import SHARE, Product, is_plain


@dataclass(frozen=True)
class Merged:
    """A delta and the products with its low-rank changes folded in, by their paths."""

    resident: Resident
    products: Mapping[tuple[str, ...], Product]


class Dominant:
    """Watches who runs, and merges.

    Args:
        share: of a step's tokens that makes a delta dominant.
        patience: steps in a row with (or without) a dominant delta before copies are made (or let go).
    """

    def __init__(self, decoder: Decoder, *, share: float = 0.75, patience: int = 16) -> None:
        self.decoder, self.share, self.patience = decoder, share, patience
        self.merged: Merged | None = None
        self.merges = 0
        self._candidate: Resident | None = None
        self._steps = self._idle = 0

    def turn(self, tokens: Mapping[int, tuple[Resident | None, int]]) -> Merged | None:
        """What is merged in a step with these tokens, by the `id` of each delta."""
        total = sum(n for _, n in tokens.values())
        top = next((r for r, n in tokens.values() if r is not None and n >= self.share * total), None)
        self._steps = self._steps + 1 if top is not None and top is self._candidate else int(top is not None)
        self._candidate = top
        if self.merged is not None:
            self._idle = 0 if top is self.merged.resident else self._idle + 1
            if self._idle >= self.patience:
                self.merged = None
        if (
            top is not None
            and self._steps == self.patience
            and (self.merged is None or self.merged.resident is not top)
        ):
            self.merged = self._merge(top)
            self._idle = 0
        return self.merged

    @torch.no_grad()
    def _merge(self, r: Resident) -> Merged | None:
        d, modules = self.decoder, self.decoder.base.modules
        touched = [g for g in (*d.groups, (d.head,)) if any(p in r.low for p in g)]
        paths = [p for g in touched for p in g]
        if not touched or not r.low.keys() <= set(paths) or not all(is_plain(modules[p]) for p in paths):
            return None
        size, free = sum(modules[p].weight.nbytes for p in paths), available_memory()  # type: ignore[union-attr]
        if free is not None and size > SHARE * free:
            return None
        self.merges += 1
        changes = {p: B @ A for p, (A, B) in r.low.items()}
        return Merged(r, {g: d.product(g, changes) for g in touched})
