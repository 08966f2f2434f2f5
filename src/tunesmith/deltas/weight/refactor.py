# SPDX-License-Identifier: Apache-2.0
"""Balance the factors of a low-rank part, and forget its momentum: two aids for training B A.

    B <- U sqrt(S),  A <- sqrt(S) V^T        with U S V^T the singular value decomposition of B A

The product is the same; afterwards B^T B = A A^T = S. The decomposition is that of an r x r core, between QR factors of B
and A^T. Moments of the old basis mean nothing in the new one, so reset them at the same steps.

Yang et al. 2025, arXiv 2505.22922.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import wide
from tunesmith.core.delta import site_seed
from tunesmith.core.errors import UsageError

# Singular values below this share of the largest are rounding.
DEAD = 1e-6
FILL = 1e-3


@torch.no_grad()
def balanced(B: Tensor, A: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, n] with the same product and B^T B = A A^T, in the dtypes they came in.

    Computed in fp32 or wider. Where B A has a rank below r, columns of B become zero and the rows of A beside them tiny
    random ones: with both at zero neither would get a gradient again. A product of zero is left as it is.
    """
    r = A.shape[0]
    Q_b, R_b = torch.linalg.qr(wide(B))  # [out, p], [p, r]
    Q_a, R_a = torch.linalg.qr(wide(A).T)  # [n, q], [q, r]
    U, S, Vh = torch.linalg.svd(R_b @ R_a.T, full_matrices=False)
    live = DEAD * S[:1] < S
    if not bool(live.any()):
        return B, A
    root = S[live].sqrt()
    k = len(root)
    new_B, new_A = torch.zeros_like(B), torch.empty_like(A)
    new_B[:, :k] = (Q_b @ (U[:, live] * root)).to(B.dtype)
    new_A[:k] = ((root[:, None] * Vh[live]) @ Q_a.T).to(A.dtype)
    fill = torch.randn(r - k, A.shape[1], generator=generator) * FILL * float(root[0]) / A.shape[1] ** 0.5
    new_A[k:] = fill.to(A)
    return new_B, new_A


def pairs(part: Any) -> list[str]:
    """The sites of a part whose change is a function of B A. Raises UsageError for a part with none, or with a gate."""
    found = []
    for path in part.kind_of:
        t = part.tensors(path)
        A, B = t.get("A"), t.get("B")
        if A is None or B is None or A.dim() != 2 or B.dim() != 2 or B.shape[1] != A.shape[0]:
            continue
        if any(n not in ("A", "B") and v.shape == A.shape[:1] for n, v in t.items() if n in ("g", "E")):
            hint = "bake the delta first: its gates go into A"
            raise UsageError(f"{part.info.name} has a gate between its factors", where=path, hint=hint)
        found.append(path)
    if not found:
        raise UsageError(f"{part.info.name} has no factors B and A", where=part.name, hint="use it on lora or dora")
    return found


@torch.no_grad()
def refactor(part: Any, *, seed: int = 0) -> None:
    """Balance B and A of every site of a low-rank part, in place; its change of the weights stays as it is.

    Raises UsageError for a part that holds no pair of factors, or a gate between them.
    """
    for path in pairs(part):
        A, B = part.parameter(path, "A"), part.parameter(path, "B")
        new_B, new_A = balanced(B, A, torch.Generator().manual_seed(site_seed(seed, path)))
        B.copy_(new_B)
        A.copy_(new_A)


def reset_momentum(part: Any, now: Any) -> None:
    """Forget the optimiser's moments and step counts of everything the part trains."""
    for path, name, tensor in part.items():
        if tensor.requires_grad:
            now.reset(path, name)
