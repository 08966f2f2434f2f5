# SPDX-License-Identifier: Apache-2.0
"""How far a delta moves what the base itself computes: its vectors for inputs, read without any new head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.apply import current
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import UsageError
from tunesmith.core.trace import primary


@contextmanager
def headless(base: Base) -> Iterator[None]:
    """Within the block the base runs with what is in use, less the heads that replace its output."""
    app = current(base)
    views = [] if app is None else [View(_without_head(v.delta), v.strength) for v in app.stack]
    with base.without(), base.using(*(v for v in views if v.delta.parts), check=False):
        yield


def _without_head(delta: Delta) -> Delta:
    return Delta(delta.name, [p for p in delta.parts if p.info.name != "head"], provenance=delta.provenance)


@torch.no_grad()
def vectors(base: Base, batches: Iterable[Any]) -> Tensor:
    """One vector per row, [n, d] fp32: the base's own output, as it stands less heads, mean over real tokens.

    Each batch is a dict of named inputs (with `attention_mask` where rows are padded) or a tuple. Raises UsageError for
    an output that is no tensor.
    """
    out = []
    with headless(base), base.evaluating():
        for batch in batches:
            named = isinstance(batch, Mapping)
            found = primary(base.model(**batch) if named else base.model(*batch))
            if found is None:
                raise UsageError("the model's output holds no tensor", where=base.name)
            out.append(_pooled(found.float(), batch.get("attention_mask") if named else None))
    return torch.cat(out)


def _pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    if x.dim() == 3:
        real = torch.ones(x.shape[:2], device=x.device) if mask is None else mask.to(x.dtype)
        return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    return x.flatten(2).mean(2) if x.dim() > 2 else x


def cosine(before: Tensor, after: Tensor) -> list[float]:
    """Cosine of each row's vector [n, d] before and after: 1 where nothing turned."""
    return F.cosine_similarity(before.double(), after.double(), dim=-1).tolist()
