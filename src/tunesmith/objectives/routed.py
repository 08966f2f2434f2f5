# SPDX-License-Identifier: Apache-2.0
"""Next-token loss plus the cross-entropy of every gate against the delta that a token's example belongs to.

    loss = L_lm + c * L_gate
    L_gate of an example = mean over gated sites and labelled tokens t of -log softmax(g_t)[e_{t+1}]

As in the released code the logits at t are matched with the label of t + 1, and c is 50. There everything is one mean over
the batch; here each example's mean counts by its supervised tokens, so that a batch split in any way gives one gradient.

Xu et al. 2024, arXiv 2405.13053.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.algebra import wide
from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.gates import watched
from tunesmith.core.objective import objective
from tunesmith.objectives.sft import IGNORED, SFT


@objective("routed")
@dataclass(frozen=True)
class Routed:
    """`sft` with gates: the batch also holds `experts` [B, T], the number of each token's delta (-100: none)."""

    c: float = 50.0
    unit = "tokens"

    def count(self, batch: Mapping[str, Tensor]) -> int:
        return SFT().count(batch)

    def loss(self, base: Base, batch: Mapping[str, Any]) -> Tensor:
        """Summed loss. Raises UsageError where no gate ran or its output has not a row for each token."""
        with watched() as seen:
            lm = SFT().loss(base, {k: v for k, v in batch.items() if k != "experts"})
        if not self.c:
            return lm
        if not seen:
            raise UsageError("no gate ran", hint="route(base, deltas) makes a delta with gates")
        labels = batch["experts"][:, 1:]
        keep = labels != IGNORED
        per_row = (batch["labels"][:, 1:] != IGNORED).sum(1) / keep.sum(1).clamp_min(1)  # [B]
        weight = torch.where(keep, per_row[:, None], 0.0) / len(seen)
        total = lm
        for path, g in seen.items():
            if g.shape[:2] != batch["experts"].shape:
                raise UsageError(f"gates of shape {tuple(g.shape)} for tokens {tuple(labels.shape)}", where=path)
            each = F.cross_entropy(wide(g[:, :-1]).transpose(1, 2), labels.clamp_min(0), reduction="none")  # [B, T - 1]
            total = total + self.c * (each * weight).sum()
        return total
