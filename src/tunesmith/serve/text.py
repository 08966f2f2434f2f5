# SPDX-License-Identifier: Apache-2.0
"""Text of an answer as its tokens come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.core.errors import UsageError

MOST_STOPS, LONGEST_STOP = 8, 256


class Writer:
    """Turns tokens into text piece by piece; all pieces together are the text of all tokens, up to a stop string.

    `push` gives the text that is certain by now; after a stop string `stopped` is true and no more comes. `finish` gives
    what was held back.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        if len(stops) > MOST_STOPS or any(not s or len(s) > LONGEST_STOP for s in stops):
            what = f"at most {MOST_STOPS} stop strings of 1 to {LONGEST_STOP} characters"
            raise UsageError(f"there can be {what}", where="stop")
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ids: list[int] = []
        self.stopped = False
        self._from = self._read = 0  # tokens before `_from` no longer change; those before `_read` were decoded
        self._held = ""

    def push(self, token: int) -> str:
        """Take in a token."""
        if self.stopped:
            return ""
        self.ids.append(token)
        before = self._decode(self.ids[self._from : self._read])
        now = self._decode(self.ids[self._from :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""  # part of a character: its other bytes are in tokens to come
        self._from, self._read = self._read, len(self.ids)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """The rest, when no token will come any more."""
        if self.stopped:
            return ""
        before = self._decode(self.ids[self._from : self._read])
        now = self._decode(self.ids[self._from :])
        self._from = self._read = len(self.ids)
        out = self._release(now[len(before) :])
        held, self._held = self._held, ""
        return out + held

    def _release(self, text: str) -> str:
        self._held += text
        at = min((i for i in (self._held.find(s) for s in self.stops) if i >= 0), default=-1)
        if at >= 0:
            out, self._held, self.stopped = self._held[:at], "", True
            return out
        # keep the longest end that begins a stop string
        keep = max((n for s in self.stops for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
