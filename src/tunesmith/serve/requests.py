# SPDX-License-Identifier: Apache-2.0
"""What an engine is asked, what it tells, and what it keeps of a request under way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.core.decoding import Joint
from tunesmith.core.errors import TunesmithError
from tunesmith.serve.constrain import Guide, Rule
from tunesmith.serve.guess import Guesses
from tunesmith.serve.mixed import Resident
from tunesmith.serve.pages import Page
from tunesmith.serve.sampling import Chosen, Sampling

REASONS = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True)
class Request:
    """Tokens to continue, under a delta of the library or none (the base); `rule` says what the answer may be."""

    id: str
    prompt: tuple[int, ...]
    new: int
    delta: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    arrived: float = 0.0
    rule: Rule | None = None


@dataclass(frozen=True)
class Event:
    """What happened to a request in a step: a token, the end (`reason` one of REASONS), or both."""

    id: str
    chosen: Chosen | None = None
    reason: str | None = None
    error: TunesmithError | None = None


@dataclass
class Live:
    """A request in the batch. `cached` tokens of prompt + answer are in its cells."""

    request: Request
    resident: Resident | None
    shared: bool
    guide: Guide | None = None
    answer: list[int] = field(default_factory=list)
    cached: int = 0
    held: int = 0  # cells it has
    caches: int = 1  # cells that a token takes
    joint: Joint | None = None
    pages: list[Page] = field(default_factory=list)  # of its first tokens, shared with whoever begins alike
    cells: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # of its tokens, in their order
    guesses: Guesses | None = None
    guessed: list[int] = field(default_factory=list)  # what this step takes for its next tokens

    @property
    def tokens(self) -> list[int]:
        return [*self.request.prompt, *self.answer]

    def next(self, n: int) -> list[int]:
        """The next `n` tokens that are not in the cache yet."""
        read = len(self.request.prompt)
        if self.cached >= read:
            return self.answer[self.cached - read : self.cached - read + n]
        return self.tokens[self.cached : self.cached + n]

    def grow(self, cells: Tensor) -> None:
        """Put the cells of the next tokens behind those it has, in a buffer that is as long as it can get."""
        if not len(self.cells):
            self.cells = torch.empty(len(self.request.prompt) + self.request.new, dtype=torch.int64)
        self.cells[self.held : self.held + len(cells)] = cells
        self.held += len(cells)

    def guess(self, room: int) -> list[int]:
        """What it may write next, at most `room` tokens; nothing while it still reads, or has a token left to write."""
        room = min(room, self.request.new - len(self.answer) - 1)
        if self.due != 1 or room < 1:
            return []
        if self.guesses is None:
            self.guesses = Guesses(self.request.prompt)
        return self.guesses.next(self.answer, room)

    def alone(self, size: int) -> int:
        """Its tokens that lie in no page of `size`."""
        return len(self.request.prompt) + len(self.answer) - size * len(self.pages)

    @property
    def digest(self) -> str | None:
        return self.resident.digest if self.resident is not None else None

    @property
    def due(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.request.prompt) + len(self.answer) - self.cached
