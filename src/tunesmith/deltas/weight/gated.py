# SPDX-License-Identifier: Apache-2.0
"""What low-rank methods with a gate for each component share: B diag(g) A, its regulariser, and what pruning leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.lora import LoRA
from tunesmith.deltas.weight.lowrank import columns

Tensors = Mapping[str, Tensor]


def normal(site: Site, r: int, generator: torch.Generator, std: float = 0.02) -> dict[str, Tensor]:
    """A [r, in * kernel] and B [out, r], fp32, both from N(0, std^2): the gate makes the change nothing."""
    A = torch.randn(r, columns(site), generator=generator) * std
    return {"A": A, "B": torch.randn(site.shape[0], r, generator=generator) * std}


def gated(site: Site, B: Tensor, g: Tensor, A: Tensor, scale: float) -> LowRank:
    """scale * B diag(g) A with B [out, r], g [r] and A [r, in * kernel]."""
    return LowRank(B, g[:, None] * A, scale, site.shape)


def orthogonality(t: Tensors) -> Tensor:
    """||A A^T - I||_F + ||B^T B - I||_F."""
    A, B = t["A"], t["B"]
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    return torch.linalg.matrix_norm(A @ A.T - eye) + torch.linalg.matrix_norm(B.T @ B - eye)


def open_components(B: Tensor, g: Tensor, A: Tensor) -> dict[str, Tensor]:
    """{A: diag(g) A, B} of the components whose gate is not exactly zero; empty where there is none."""
    at = torch.nonzero(g.detach()).squeeze(1)
    if not len(at):
        return {}
    return {"A": (g[at, None] * A[at]).detach(), "B": B[:, at].detach().contiguous()}


def ranks(part: Any, gate: str) -> dict[str, int]:
    """The components in use at each site of a part: those whose gate is not exactly zero."""
    return {path: int(part.parameter(path, gate).count_nonzero()) for path in part.kind_of}


def as_lora(targets: str, found: Mapping[str, Tensors], scale: Callable[[str, int], float]) -> LoRA:
    """The LoRA that the tensors {A, B} of each path belong to, with `scale(path, rank)` at each.

    Paths without tensors are no longer among its targets. Where ranks or scales differ, every path is named.
    """
    rank = {path: len(t["A"]) for path, t in found.items() if t}
    alpha = {path: scale(path, r) * r for path, r in rank.items()}
    (most, first), _ = Counter((r, alpha[path]) for path, r in rank.items()).most_common(1)[0]
    if len(rank) < len(found):
        targets = ",".join(rank)
    if all((r, alpha[path]) == (most, first) for path, r in rank.items()):
        return LoRA(rank=most, alpha=first, targets=targets)
    # A pattern also matches paths that end with it, and the first that matches counts: so the longest come first.
    paths = sorted(rank, key=lambda path: (-len(path), path))
    return LoRA(
        rank=most,
        alpha=first,
        targets=targets,
        rank_pattern={path: rank[path] for path in paths},
        alpha_pattern={path: alpha[path] for path in paths},
    )
