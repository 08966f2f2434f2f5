# SPDX-License-Identifier: Apache-2.0
"""SHiRA trains a few random entries of each weight.

    W' = W + S      S of the shape of W, zero but for k = r (out + in) entries drawn at random, at most all

The values train from zero, so a fresh delta is the identity bit for bit; the places are drawn once from the seed and
stored. The change is of full rank at the size of a LoRA. Merges exactly.

Defaults: r 32 on every linear layer but the output head, as in PEFT, which refuses a layer with fewer entries than
r (out + in); here all of them train then. For other choices of entries, which the paper has too, see `sparse`.
Use when: many deltas must be merged or switched (random supports hardly meet). Avoid when: layers must stay fast while
not merged: a dense product is formed beside the frozen one.
Cost: k values and k int64 places per layer.

Bhardwaj et al. 2024, arXiv 2406.13175.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.algebra import Sparse
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.weight import sparse
from tunesmith.deltas.weight.lowrank import KINDS, check_ranks, rank_at


@register("shira", carrier="weight", paper="2406.13175", kinds=KINDS)
class SHiRA:
    """Train a few random entries of each weight."""

    rank: int = option(32, "r: as many entries as a LoRA of this rank has numbers", low=1, high=65536)
    targets: str = option("all-linear", "which layers to change")
    rank_pattern: dict[str, int] = option({}, "glob or last path part -> r of those layers")

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """`indices` [k] int64, rising, and `values` [k] fp32 zeros."""
        return sparse.entries(sparse.drawn(site, sparse.lora_equivalent(site, rank_at(self, site)), generator))

    def update(self, site: Site, t: dict[str, Tensor]) -> Sparse:
        """S."""
        return sparse.change(site, t)

    def check(self, sites: list[Site]) -> None:
        """Raise UsageError for a pattern that matches no target or a value that is no rank."""
        check_ranks("shira", self.rank_pattern, sites)

    def recipe(self) -> dict[str, float]:
        """Between the rates of full fine-tuning and of LoRA."""
        return {"lr": 2e-4}

    @classmethod
    def toy(cls) -> SHiRA:
        return cls(rank=2, targets="all-weights")
