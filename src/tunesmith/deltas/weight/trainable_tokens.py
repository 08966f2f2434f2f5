# SPDX-License-Identifier: Apache-2.0
"""Trainable tokens trains chosen rows of the token embedding.

    E'[token] = E[token] + d[i]      E [vocabulary, dim], d [n, dim], one row for each of the n tokens

d trains and starts at zero, so a fresh delta is the identity bit for bit, and texts without the tokens stay so while it
trains (unless the output embedding is tied: then their logits move too). The other rows are frozen. Where input and output
embedding are one tensor, both sides change, as in PEFT; `tied="untie"` changes the input alone. Merges exactly. PEFT stores
the new rows E[token] + d. Tokens beyond the vocabulary need a base with a larger embedding: they are refused.

Defaults: the embedding that the model names as its input; without such a name, the only one there is.
Use when: a few words or markers must get a (new) meaning: reserved tokens, control codes, the name of a concept.
Avoid when: how the tokens are used must change too (add `lora`), or most of the vocabulary moves (try `full`).
Cost: n dim numbers.

PEFT's trainable tokens, github.com/huggingface/peft, version 0.21.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import Rows
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site

DEFAULT = "embeddings"


@register("trainable-tokens", carrier="weight", kinds=("embedding",))
class TrainableTokens:
    """Train chosen rows of the token embedding."""

    tokens: list[int] = option([], "ids of the tokens whose rows train")
    targets: str = option(DEFAULT, "which embeddings; the default is the input embedding alone")
    lr_ratio: float = option(1.0, "learning rate of the rows over the run's", low=1e-3, high=1e6)

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """rows [n] int64, rising, and d [n, dim], zero, fp32."""
        return {"rows": torch.tensor(sorted(self.tokens)), "d": torch.zeros(len(self.tokens), site.shape[1])}

    def update(self, site: Site, t: dict[str, Tensor]) -> Rows:
        """d in its rows."""
        return Rows(t["rows"], t["d"], site.shape)

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for tokens that are none, no ids, or repeated."""
        odd = [i for i in self.tokens if not isinstance(i, int) or isinstance(i, bool) or i < 0]
        if odd or not self.tokens or len(set(self.tokens)) != len(self.tokens):
            what = (
                "there are no tokens to train"
                if not self.tokens
                else f"{odd[0]!r} is no id"
                if odd
                else "an id repeats"
            )
            raise UsageError(what, where="trainable-tokens.tokens", hint="for example tokens=[17, 42]")

    def among(self, sites: list[Site]) -> list[Site]:
        """The input embedding, or every target that was named. Raises UsageError for ids beyond its rows."""
        if self.targets == DEFAULT and len(sites) > 1:
            sites = _of_input(sites)
        for s in sites:
            if max(self.tokens) >= s.shape[0]:
                hint = "give the base a larger embedding first (resize_token_embeddings)"
                raise UsageError(f"token {max(self.tokens)} is beyond the {s.shape[0]} rows", where=s.path, hint=hint)
        return sites

    def learning_rates(self) -> dict[str, float]:
        """Beside a method that wants small steps the rows want larger ones."""
        return {"d": self.lr_ratio}

    def recipe(self) -> dict[str, float]:
        """Few numbers, seen seldom."""
        return {"lr": 1e-3}

    @classmethod
    def toy(cls) -> TrainableTokens:
        return cls(tokens=[11, 2, 3, 5, 8, 1, 13])


def _of_input(sites: list[Site]) -> list[Site]:
    model: Any = sites[0].map.of("", "model").module if sites[0].map is not None else None
    getter = getattr(model, "get_input_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        found = None
    named = [s for s in sites if s.module is found]
    if not named:
        paths = ", ".join(s.path for s in sites)
        raise UsageError(
            f"which of {len(sites)} embeddings holds the tokens is not known", where=paths, hint="targets=PATH"
        )
    return named
