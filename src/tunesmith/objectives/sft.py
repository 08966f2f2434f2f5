# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: next-token cross-entropy on the supervised tokens.

    loss = sum over t with y_{t+1} supervised of -log p(y_{t+1} | x_<=t)

summed, so that a batch split in any way adds up to the same gradient once divided by the number of supervised tokens.
Logits are computed only where a label is, and never all at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tunesmith.core.algebra import wide
from tunesmith.core.apply import current
from tunesmith.core.base import Base
from tunesmith.core.carriers import plain_differences
from tunesmith.core.features import features
from tunesmith.core.fused import shifted
from tunesmith.core.head_loss import head_loss, weight_loss
from tunesmith.core.objective import objective
from tunesmith.core.trace import primary

IGNORED = -100


@objective("sft")
@dataclass(frozen=True)
class SFT:
    """Next-token cross-entropy. The batch holds `input_ids`, `labels` (not shifted, -100 unsupervised) and masks."""

    unit = "tokens"

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Supervised tokens that have a position before them."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, base: Base, batch: Mapping[str, Any]) -> Tensor:
        """Summed loss (fp32 scalar) of the base as it stands, with whatever is in use."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        labels = batch["labels"][:, 1:]
        keep = labels != IGNORED
        traced = base.sites.trace
        head = base.sites[traced.head] if traced and traced.head and traced.direct else None
        if head is None:  # no head of its own, or logits that are capped or scaled after it
            logits = primary(base.model(**inputs))
            return _plain(logits, labels, keep)
        hidden = features(base, inputs)[:, :-1][keep]  # [N, d]
        app = current(base)
        if not (head.held or head.transposed):
            own = {n: p for n, p in head.module._parameters.items() if p is not None}
            actions = app.plan.get(head.path) if app is not None else None
            moved = plain_differences(actions, own) if actions else {}
            if moved is not None:  # nothing acts on the head, or plain differences of its weight and bias do
                bias = shifted(own["bias"], moved["bias"]) if "bias" in moved else own.get("bias")
                return weight_loss(hidden, own["weight"], bias, labels[keep], moved.get("weight"))
        return head_loss(hidden, head.module, labels[keep], head.shape[0])


def _plain(logits: Tensor | None, labels: Tensor, keep: Tensor) -> Tensor:
    assert logits is not None
    return nn.functional.cross_entropy(wide(logits[:, :-1][keep]), labels[keep], reduction="sum")
