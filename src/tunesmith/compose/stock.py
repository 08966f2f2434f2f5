# SPDX-License-Identifier: Apache-2.0
"""Model Stock: the mean of the changes, pulled back towards the base by how much they disagree.

    D = t mean_i D_i        t = n c / (1 + (n - 1) c), c the mean cosine over pairs of changes

for each tensor (with `filter_wise` for each row of it). Orthogonal changes give the base, parallel ones their mean. Low-rank
changes stay low-rank: cosines come from the factors. Sources must have equal weights, as the paper knows none; with one
source that source comes back.

Deviations from mergekit 0.1.5: cosines of changes whose norms multiply to less than 1e-6 are not damped, so that scaling all
changes scales the result; two sources are the least there, any number will do here.

Jang et al. 2024, arXiv 2403.19522.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tunesmith.compose.linear import weighted
from tunesmith.core.algebra import Dense, Update, inner, norm
from tunesmith.core.combine import Now, Place, combiner, dense
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option


@combiner("model-stock", paper="2403.19522", whole={}, expected={"linear": "the ratio depends on the angles"})
class ModelStock:
    """The mean of the changes, shrunk by the angles between them."""

    filter_wise: bool = option(False, "one ratio for each row of a matrix, not for the tensor")

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        """The change of one tensor. Raises UsageError for weights that differ."""
        n = len(changes)
        if n == 1:
            return changes[0]
        if max(weights) - min(weights) > 1e-9 * max(map(abs, weights)):
            raise UsageError(f"model-stock has no weights, got {list(weights)}", hint="give all sources the same")
        if self.filter_wise and len(at.shape) > 1:
            D = torch.stack([d.flatten(1) for d in dense(at, changes)])
            size = D.norm(dim=-1)  # [n, rows]
            pairs = [
                (D[i] * D[j]).sum(-1) / (size[i] * size[j]).clamp_min(1e-30) for i in range(n) for j in range(i + 1, n)
            ]
            cos = torch.stack(pairs).mean(0).clamp(-1, 1)
            ratio = torch.tensor([_ratio(float(c), n) for c in cos], dtype=D.dtype, device=D.device)
            return Dense((ratio[:, None] * D.mean(0)).reshape(at.shape))
        found = [u for u in changes if u is not None]
        sizes = [float(norm(u)) for u in found]
        cosines = [
            float(inner(found[i], found[j])) / (sizes[i] * sizes[j]) if sizes[i] * sizes[j] > 0 else 0.0
            for i in range(len(found))
            for j in range(i + 1, len(found))
        ]
        c = sum(max(-1.0, min(1.0, x)) for x in cosines) / (n * (n - 1) / 2)  # a pair with an unchanged tensor counts 0
        return weighted(changes, [_ratio(c, n) / n] * n)


def _ratio(c: float, n: int) -> float:
    """n c / (1 + (n - 1) c), 0 at its pole."""
    below = 1 + (n - 1) * c
    return 0.0 if abs(below) < 1e-6 else n * c / below
