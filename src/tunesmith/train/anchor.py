# SPDX-License-Identifier: Apache-2.0
"""Keep what the base knew: pull the tuned model towards the base on text that the base writes itself.

    loss = task loss + weight * mean over tokens of KL(base || base + delta)

on rows sampled from the base at temperature 1, so no general data is needed. The base is this model with the delta off;
nothing is copied. What is measured afterwards (the retention panel) is other text, written by people.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.evaluate.generate import generate
from tunesmith.train.divergence import divergence

# Common first words of English sentences; a conversation is begun by the tokenizer's own start token.
_OPENINGS = [
    "The",
    "In",
    "It",
    "When",
    "A",
    "She",
    "He",
    "We",
    "There",
    "To",
    "If",
    "Many",
    "One",
    "This",
    "How",
    "My",
    "On",
    "After",
    "For",
    "You",
    "Some",
    "At",
    "Most",
    "Before",
    "They",
    "What",
    "As",
    "During",
    "People",
    "Water",
    "Every",
]
ROWS, LENGTH, PER_STEP = 32, 48, 1


class Anchor:
    """Rows of the base's own writing [ROWS, LENGTH], `PER_STEP` of them in turn at every step: about a tenth more work."""

    def __init__(self, base: Base, delta: Delta, weight: float, seed: int) -> None:
        self.base, self.delta, self.weight = base, delta, weight
        with delta.off(), base.evaluating():
            self.rows = own_writing(base, ROWS, LENGTH, seed)

    def loss(self, step: int) -> Tensor:
        """weight * KL in fp32 for the rows of one step; its gradient reaches the delta alone."""
        at = [(step * PER_STEP + i) % len(self.rows) for i in range(PER_STEP)]
        ids = self.rows[at]
        total, tokens = divergence(self.base, self.delta, lambda: self.base.model(input_ids=ids), where="anchor")
        return self.weight * total.float() / tokens


@torch.no_grad()
def own_writing(base: Base, rows: int, length: int, seed: int) -> Tensor:
    """Token ids [rows, length] sampled from the base at temperature 1, a quarter of them as conversations.

    Raises UsageError for a base that does not write text.
    """
    if base.family != "causal-lm" or base.tokenizer is None:
        raise UsageError(
            f"{base.name} does not write text, so it cannot be anchored to its own", hint="leave anchor at 0"
        )
    start = base.tokenizer.bos_token_id
    prompts = []
    for i in range(rows):
        word = base.tokenizer(_OPENINGS[i % len(_OPENINGS)], add_special_tokens=False)["input_ids"]
        prompts.append([int(start)] if i % 4 == 0 and start is not None else [int(t) for t in word])
    short = min(len(p) for p in prompts)
    made = dict(
        generate(base, prompts, max_new_tokens=length - short, stop_ids=(), batch_size=rows, temperature=1.0, seed=seed)
    )
    whole = [(p + made[i])[:length] for i, p in enumerate(prompts)]
    width = min(len(r) for r in whole)
    return torch.tensor([r[:width] for r in whole], device=base.device)
