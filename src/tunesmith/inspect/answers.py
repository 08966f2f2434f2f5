# SPDX-License-Identifier: Apache-2.0
"""Answer tokens in batches of supervised text: where they are, and what a model says of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.sample import Sample
from tunesmith.core.trace import primary


def supervised(sample: Sample, batch: Any) -> Tensor:
    """Which tokens carry a label, [B, T] bool. Raises UsageError for data without answers."""
    keep = sample.keep(batch, supervised=True)
    if keep is None or keep.dim() != 2:
        raise UsageError("this probe needs text with prompts and answers", hint="rows with a prompt and a completion")
    return keep


def nth_answer_token(keep: Tensor) -> Tensor:
    """For each token [B, T] its number t = 0, 1, ... within its run of answer tokens, -1 outside.

    Every answer of a conversation, and of a packed row, counts from 0 again.
    """
    count = torch.zeros(keep.shape[0], dtype=torch.int64, device=keep.device)
    out = torch.full(keep.shape, -1, dtype=torch.int64, device=keep.device)
    for i in range(keep.shape[1]):
        out[:, i] = torch.where(keep[:, i], count, -1)
        count = torch.where(keep[:, i], count + 1, 0)
    return out


def tokens_of(batch: Any) -> Tensor:
    """The token ids [B, T] of a batch. Raises UsageError where it holds none."""
    ids = batch.get("input_ids") if isinstance(batch, dict) else None
    if ids is None:
        raise UsageError("this probe needs batches with input_ids", hint="text data for a language model")
    return ids


def logits_of(base: Base, sample: Sample, batch: Any) -> Tensor:
    """The logits [B, T, vocab] of one batch, as the base stands, fp32. Raises UsageError for other outputs."""
    with torch.no_grad(), base.evaluating():
        out = primary(sample.run(base, batch))
    if out is None or out.dim() != 3 or out.shape[:2] != tokens_of(batch).shape:
        raise UsageError(
            "the model gives no logits for every token", where=base.name, hint="use a causal language model"
        )
    return out.float()
