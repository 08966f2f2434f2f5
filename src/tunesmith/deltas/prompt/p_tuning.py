# SPDX-License-Identifier: Apache-2.0
"""P-tuning puts n vectors in front of the input embeddings that a small net makes while training.

    y = f([P; E(x)])[n:]      P = W_3 relu(W_2 relu(W_1 Z + b_1) + b_2) + b_3      Z, P [n, d], width h inside

Z and the net train, everything else is frozen; after training P alone is kept (`bake`), which is then prompt tuning. It
is never the identity and cannot be merged. Z starts at N(0, 1) and the net uniform within 1/sqrt(fan-in), as torch's own
layers do. Only the net of three linear layers is here; the paper's recurrent one is not.

Defaults: 20 tokens, h as wide as the embeddings.
Use when: prompt tuning trains unstably or too slowly.
Avoid when: as for prompt tuning: small models, full contexts.
Cost: while training n d + 2 h (d + 1) + h (h + 1) numbers about; afterwards n d.

Liu et al. 2021, arXiv 2103.10385; the net is that of PEFT's `PromptEncoder` (MLP).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.prompt.prompt_tuning import PromptTuning
from tunesmith.deltas.prompt.tokens import embedding_site


@register(
    "p-tuning", carrier="prompt", paper="2103.10385", kinds=("model",), identity_at_init=False, strength="on-off",
    merge="it adds tokens to the input, which no weight can hold",
)  # fmt: skip
class PTuning:
    """Put vectors made by a small net in front of the input embeddings."""

    tokens: int = option(20, "number n of vectors", low=1, high=100_000)
    hidden: int = option(0, "width h of the net; 0 is that of the embeddings", low=0, high=65536)

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Z [n, d], W_1 [h, d], W_2 [h, h], W_3 [d, h] and their biases, fp32."""
        d = embedding_site(site).shape[1]
        h = self.hidden or d
        t = {"Z": torch.randn(self.tokens, d, generator=generator)}
        for i, (rows, width) in enumerate(((h, d), (h, h), (d, h)), 1):
            bound = width**-0.5
            t[f"W_{i}"] = torch.empty(rows, width).uniform_(-bound, bound, generator=generator)
            t[f"b_{i}"] = torch.empty(rows).uniform_(-bound, bound, generator=generator)
        return t

    def model(self, site: Site, t: dict[str, Tensor], call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """As prompt tuning, with P made by the net."""
        return self.baked().model(site, {"P": _made(t)}, call, inputs)

    def bake(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """P alone: the net is gone."""
        return {"P": _made(t).detach()}

    def baked(self) -> PromptTuning:
        """The method whose tensors `bake` gives."""
        return PromptTuning(tokens=self.tokens)

    def fits(self, site: Site) -> str | None:
        """Why the model cannot be used, if so."""
        return self.baked().fits(site)

    def recipe(self) -> dict[str, float]:
        """A net under AdamW."""
        return {"lr": 1e-3}

    @classmethod
    def toy(cls) -> PTuning:
        return cls(tokens=2, hidden=6)


def _made(t: dict[str, Tensor]) -> Tensor:
    x = torch.relu(F.linear(t["Z"], t["W_1"], t["b_1"]))
    x = torch.relu(F.linear(x, t["W_2"], t["b_2"]))
    return F.linear(x, t["W_3"], t["b_3"])  # [n, d]
