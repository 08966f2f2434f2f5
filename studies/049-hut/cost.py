# SPDX-License-Identifier: Apache-2.0
"""What one adapted layer costs: multiply-adds counted by hand, and seconds measured, for HUT and LoRA."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta

FORWARD, BOTH = "forward", "forward and backward"


def crossover(n_in: int, n_out: int) -> float:
    """Tokens from which building W' once is cheaper than LoRA's thin products, per rank: in * out / (in + out)."""
    return n_in * n_out / (n_in + n_out)


def counts(arm: str, tokens: int, n_in: int, n_out: int, rank: int) -> dict[str, int]:
    """Multiply-adds of a pass over x [tokens, in] that needs a gradient, the frozen layer's own included.

    Forward: LoRA adds T r (in + out); HUT builds W' = W * (1 + B A) in in * out (r + 1) and adds nothing per token.
    Backward: both pass the gradient to x (T in out); LoRA's factors cost 2 T r (in + out); HUT needs the dense gradient of
    W' (T in out), its product with W and two products with the factors, in * out (2 r + 1).
    """
    frozen, area, thin = tokens * n_in * n_out, n_in * n_out, tokens * rank * (n_in + n_out)
    if arm == "lora":
        forward, backward = frozen + thin, frozen + 2 * thin
    else:
        forward, backward = frozen + area * (rank + 1), 2 * frozen + area * (2 * rank + 1)
    return {FORWARD: forward, BOTH: forward + backward}


def measured(width: int, tokens: list[int], rank: int, repeats: int) -> list[dict[str, Any]]:
    """Counts and median seconds of a `width` x `width` layer in fp32, arms in turn so that both meet the same load."""
    layer = torch.nn.Linear(width, width, bias=False)
    base = Base(torch.nn.Sequential(layer), example=(torch.randn(1, width),), name="one layer")
    arms = {"hut": ts.HUT(rank=rank, targets="0"), "lora": ts.LoRA(rank=rank, alpha=float(rank), targets="0")}
    deltas = {arm: Delta.create(base, method) for arm, method in arms.items()}
    rows = []
    for T in tokens:
        x, g = torch.randn(T, width, requires_grad=True), torch.randn(T, width)
        seconds: dict[str, dict[str, list[float]]] = {arm: {FORWARD: [], BOTH: []} for arm in arms}
        for i in range(repeats + 1):  # the first pass warms up
            for arm, delta in deltas.items():
                with base.frozen(), base.using(delta):
                    start = time.perf_counter()
                    with torch.no_grad():
                        base.model(x)
                    middle = time.perf_counter()
                    base.model(x).backward(g)
                    end = time.perf_counter()
                if i:
                    seconds[arm][FORWARD].append(middle - start)
                    seconds[arm][BOTH].append(end - middle)
        for arm in arms:
            found = counts(arm, T, width, width, rank)
            rows.append({"arm": arm, "tokens": T, "counts": found,
                         "seconds": {k: median(v) for k, v in seconds[arm].items()}})  # fmt: skip
    return rows
