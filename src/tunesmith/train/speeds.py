# SPDX-License-Identifier: Apache-2.0
"""How fast this machine is at what a training step is made of, measured in about half a second."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tunesmith.train.rehearsal import Rehearsal


@dataclass(frozen=True)
class Speeds:
    """Operations per second of products by (kind, number format), bytes per second of adding two tensors into memory that
    was used before and into fresh memory, and the seconds that one call in a model takes however small it is."""

    product: dict[tuple[str, torch.dtype], float]
    moved: float
    moved_large: float
    call: float

    def seconds(self, step: Rehearsal) -> float:
        """What a rehearsed step takes."""
        total = step.calls * self.call
        for (kind, dtype, flops, size), n in step.products.items():
            rate = self.product.get((kind, dtype)) or self.product[kind, torch.float32]
            total += n * max(flops / rate, size / self.moved)
        for (name, large), size in step.moved.items():
            speed = self.moved_large if large else self.moved
            total += size * SLOWER.get(name.rstrip("_"), 1.0) / speed
        return total


# A call in a model takes so many times a bare one: the Python around it, its part of the backward pass, cold caches.
# Found on SmolLM2 and MiniLM with LoRA, one thread of an AMD EPYC 9004, in processor time.
IN_A_MODEL = 24.0
# Times slower than adding two tensors, by byte: what computes more for each number, or reads it twice.
SLOWER: dict[str, float] = {
    "silu": 4.5, "silu_backward": 4.5, "gelu": 4.5, "gelu_backward": 4.5, "exp": 4.0, "logsumexp": 6.0, "pow": 2.0,
}  # fmt: skip


@functools.cache
def measure(threads: int) -> Speeds:
    """The speeds with the current number of threads, measured once in a process. Other work on the machine lowers them."""
    product = {}
    for dtype in (torch.float32, torch.bfloat16):
        tried: dict[str, tuple[float, Callable[[], object]]] = {}
        a, b = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        tried["matrix"] = 2.0 * a.numel() * 1536, lambda a=a, b=b: F.linear(a, b)  # type: ignore[misc]
        q = torch.ones(1, 8, 128, 64, dtype=dtype)
        tried["attention"] = (
            4.0 * q.numel() * 128, lambda q=q: F.scaled_dot_product_attention(q, q, q, is_causal=True),  # type: ignore[misc]
        )  # fmt: skip
        x, one, deep = (torch.ones(s, dtype=dtype) for s in ((8, 96, 24, 24), (96, 96, 1, 1), (96, 1, 3, 3)))
        tried["conv"] = 2.0 * x.numel() * 96, lambda x=x, w=one: F.conv2d(x, w)  # type: ignore[misc]
        tried["depthwise"] = 18.0 * x.numel(), lambda x=x, w=deep: F.conv2d(x, w, padding=1, groups=96)  # type: ignore[misc]
        for kind, (flops, run) in tried.items():
            product[kind, dtype] = flops / _typical(run)
    # The larger ones are above the size from which the C library asks the system for fresh memory every time.
    rates = [12 * n / _typical(_addition(n)) for n in (1 << 17, 9 << 20)]
    tiny = torch.ones(4, requires_grad=True)
    return Speeds(product, rates[0], rates[1], IN_A_MODEL * _typical(lambda: tiny * 2.0))


def _addition(n: int) -> Callable[[], object]:
    x, y = torch.ones(n), torch.ones(n)
    return lambda: torch.add(x, y)


def _typical(run: Callable[[], object], seconds: float = 0.06) -> float:
    """Median seconds of a call as the machine is now; processor time where one thread does the work."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    once = time.perf_counter()
    run()
    group = max(1, int(1e-3 / max(1e-7, time.perf_counter() - once)))  # long enough for the clock
    taken, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until or len(taken) < 3:
        began = clock()
        for _ in range(group):
            run()
        taken.append((clock() - began) / group)
    return max(statistics.median(taken), 1e-9)
