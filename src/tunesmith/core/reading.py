# SPDX-License-Identifier: Apache-2.0
"""Rows that grow token by token under a model as it stands, over its own key-value cache or by reading all anew."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.core import apply
from tunesmith.core.delta import View
from tunesmith.core.errors import UsageError
from tunesmith.core.trace import primary

if TYPE_CHECKING:
    from tunesmith.core.base import Base

WORTH = 8  # common first tokens that are worth a pass of their own


def in_use(base: Base) -> tuple[View, ...]:
    """The stack in force on `base`."""
    app = apply.current(base)
    return app.stack if app is not None else ()


def reader(base: Base) -> Cached | Whole:
    """What reads rows under `base` with whatever is in use on it."""
    return Cached(base) if can_cache(base) else Whole(base)


def padded_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [B, T], padded on the left."""
    width = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, r in enumerate(rows):
        ids[i, width - len(r) :] = torch.tensor(list(r))
        mask[i, width - len(r) :] = 1
    return ids.to(device), mask.to(device)


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts have in common, leaving each at least one of its own."""
    low, high = min(map(list, prompts)), max(map(list, prompts))  # what the first and last in order share, all share
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(same, min(map(len, prompts)) - 1)


def accepted(base: Base) -> set[str]:
    """Names the model's forward takes; one that only hands `**kwargs` on takes what its parent class takes."""
    for cls in type(base.model).__mro__:
        if "forward" in cls.__dict__:
            given = inspect.signature(cls.__dict__["forward"]).parameters
            named = {n for n, p in given.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {"self"}
            if named or len(given) == 1:
                return named
    return set()


def can_cache(base: Base) -> bool:
    """Whether a key-value cache gives what the model gives without one.

    Programs of use (output parts) may run the model several times in one pass, which would fill the cache twice.
    """
    if not {"past_key_values", "use_cache", "attention_mask"} <= accepted(base):
        return False
    if getattr(base.model, "config", None) is None or getattr(base.model, "_is_stateful", False):
        return False
    once = all(
        part.info.carrier != "output" and (v.strength == 1.0 or part.info.carrier != "prompt")
        for v in in_use(base)
        for part in v.delta.parts
    )
    return once


def _checked(base: Base, out: Any, columns: int) -> Tensor:
    """Logits [B, T, V] in fp32 out of the model's output."""
    logits = primary(out)
    vocab = getattr(getattr(base.model, "config", None), "vocab_size", None)
    fits = logits is not None and logits.dim() == 3 and logits.shape[1] in (1, columns)
    if logits is None or not fits or (vocab and logits.shape[2] < vocab):
        shape = None if logits is None else list(logits.shape)
        hint = "a delta with a head answers with labels; score it as classification"
        raise UsageError(f"the output {shape} holds no logits over a vocabulary", where=base.name, hint=hint)
    return logits.float()


class Cached:
    """Rows in flight over a growing key-value cache."""

    def __init__(self, base: Base) -> None:
        from transformers import DynamicCache

        self.base, self.names = base, accepted(base)
        self.cache: Any = DynamicCache(config=base.model.config)
        self.mask: Tensor | None = None

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, what all of them begin with only once; next-token logits [B, V] in fp32."""
        n = shared_length(prompts) if len(prompts) > 1 else 0
        if n >= WORTH:
            first = torch.tensor([list(prompts[0][:n])], device=self.base.device)
            self.feed(first, torch.ones_like(first), last=True)
            self.keep([0] * len(prompts))
            prompts = [p[n:] for p in prompts]
        return self.feed(*padded_left(prompts, self.base.device), last=True)[:, -1]

    def more(self, tokens: Sequence[int]) -> Tensor:
        """One more token in every row; next-token logits [B, V] in fp32."""
        return self.read([[t] for t in tokens])

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """As many more tokens in every row; next-token logits [B, V] in fp32."""
        ids = torch.tensor([list(t) for t in tokens], dtype=torch.int64, device=self.base.device)
        return self.feed(ids, torch.ones_like(ids), last=True)[:, -1]

    @torch.no_grad()
    def feed(self, ids: Tensor, mask: Tensor, *, last: bool) -> Tensor:
        """Logits in fp32 after the new tokens [B, n]: [B, n, V], or [B, 1, V] (maybe more) with `last`."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": self.mask, "past_key_values": self.cache}
        inputs["use_cache"] = True
        if "position_ids" in self.names:
            inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if last and "logits_to_keep" in self.names:
            inputs["logits_to_keep"] = 1
        with self.base.evaluating():
            out = self.base.model(**inputs)
        return _checked(self.base, out, ids.shape[1])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order; a row may occur several times."""
        index = torch.tensor(list(rows), device=self.base.device)
        self.cache.batch_select_indices(index)
        assert self.mask is not None
        self.mask = self.mask[index]


class Whole:
    """Rows in flight over a model without a cache: every step reads the whole of each row.

    Padding is on the right, where a causal model cannot see it; a model that takes no mask gets rows of one length at a
    time and no padding at all.
    """

    def __init__(self, base: Base) -> None:
        self.base, self.names = base, accepted(base)
        self.rows: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; next-token logits [B, V] in fp32."""
        self.rows = [list(p) for p in prompts]
        return self._read()

    def more(self, tokens: Sequence[int]) -> Tensor:
        """One more token in every row; next-token logits [B, V] in fp32."""
        return self.read([[t] for t in tokens])

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """As many more tokens in every row; next-token logits [B, V] in fp32."""
        self.rows = [[*r, *t] for r, t in zip(self.rows, tokens, strict=True)]
        return self._read()

    @torch.no_grad()
    def _read(self) -> Tensor:
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault(0 if "attention_mask" in self.names else len(row), []).append(i)
        found: dict[int, Tensor] = {}
        for members in groups.values():
            found.update(zip(members, self._group([self.rows[i] for i in members]), strict=True))
        return torch.stack([found[i] for i in range(len(self.rows))])

    def _group(self, rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=self.base.device)
        lengths = torch.tensor([len(r) for r in rows], device=self.base.device)
        inputs: dict[str, Any] = {"input_ids": ids}
        if "attention_mask" in self.names:
            inputs["attention_mask"] = (torch.arange(width, device=ids.device) < lengths[:, None]).long()
        if "use_cache" in self.names:
            inputs["use_cache"] = False
        with self.base.evaluating():
            out = self.base.model(**inputs) if "input_ids" in self.names else self.base.model(ids)
        logits = _checked(self.base, out, width)
        return logits[torch.arange(len(rows), device=ids.device), lengths - 1]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.rows = [self.rows[i] for i in rows]
