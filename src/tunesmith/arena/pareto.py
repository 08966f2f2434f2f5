# SPDX-License-Identifier: Apache-2.0
"""The Pareto front: what no other beats in every respect."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[Sequence[float]]) -> list[bool]:
    """For each point whether no other is at least as good in every number and better in one; larger is better."""
    return [
        not any(
            all(a >= b for a, b in zip(other, point, strict=True))
            and any(a > b for a, b in zip(other, point, strict=True))
            for other in points
        )
        for point in points
    ]
