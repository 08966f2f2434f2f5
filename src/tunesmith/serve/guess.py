# SPDX-License-Identifier: Apache-2.0
"""What a request may write next, looked up in what it has read and written (prompt lookup).

Where the last few tokens stood before, the tokens that followed them there are guessed to follow again. The engine
computes guesses together with the token before them, draws at each place as it would have done, and keeps those guesses
that are what was drawn: the answer is that of one token at a time, in fewer passes where texts repeat themselves. A pass
over a few tokens costs little more than one over a single token, since both read all weights once.

A request that guesses wrong guesses fewer tokens, one that guesses right more.

Speculative decoding: Leviathan et al. 2023, arXiv 2211.17192; by lookup: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must have stood before
START, MOST = 3, 16  # guesses at first, and at most


class Guesses:
    """The places of short runs of tokens in one request. `made` and `right` count guesses."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = list(prompt)
        self._read = len(self._tokens)
        self._after: dict[tuple[int, ...], int] = {}  # where the last run of these tokens ended that has a successor
        self._indexed = 0
        self._bold = START
        self.made = self.right = 0

    def next(self, answer: Sequence[int], room: int) -> list[int]:
        """At most `room` tokens that may follow prompt and `answer`, which only ever grows."""
        self._tokens += answer[len(self._tokens) - self._read :]
        tokens, n = self._tokens, len(self._tokens)
        for end in range(max(1, self._indexed), n):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - size : end])] = end
        self._indexed = n
        for size in range(min(LONGEST, n), SHORTEST - 1, -1):
            at = self._after.get(tuple(tokens[n - size :]))
            if at is not None:
                found: list[int] = []
                for i in range(at, at + min(room, self._bold)):  # past the end: a text that goes in circles goes on
                    found.append(tokens[i] if i < n else found[i - n])
                return found
        return []

    def told(self, made: int, right: int) -> None:
        """How many of the last guesses were right."""
        self.made, self.right = self.made + made, self.right + right
        self._bold = min(MOST, 2 * self._bold) if right == made else max(1, right)
