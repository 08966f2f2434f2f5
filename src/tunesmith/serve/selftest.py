# SPDX-License-Identifier: Apache-2.0
"""The proof a server owes: a mixed batch = one request at a time = the merged model, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.trace import primary
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.requests import Request
from tunesmith.serve.sampling import Sampling

GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Proof:
    """What was compared: requests, tokens, how many of them differed, and deltas that cannot be merged (compared live)."""

    requests: int
    tokens: int
    deltas: int
    alone_differs: int
    merged_differs: int
    live_only: tuple[str, ...]
    shared: bool

    @property
    def holds(self) -> bool:
        return not self.alone_differs and not self.merged_differs

    def __str__(self) -> str:
        said = "holds" if self.holds else "FAILS"
        return (
            f"selftest {said}: {self.requests} requests under {self.deltas} deltas and the base, {self.tokens} tokens; "
            f"{self.alone_differs} differ from one at a time, {self.merged_differs} from the merged models"
        )


@torch.no_grad()
def selftest(
    base: Base, library: Library, prompts: Sequence[Sequence[int]], *, deltas: int = 8, new: int = 12, cells: int = 8192
) -> Proof:
    """Serve the prompts under the base and the first `deltas` of the library, greedily, in the three ways.

    Raises UsageError for a base that is not in fp32,
    where rounding would pass for a difference, and for a library without a delta.
    """
    if base.dtype not in (torch.float32, torch.float64):
        raise UsageError("the proof is one in fp32", where=str(base.dtype), hint="load the base with dtype='float32'")
    names = sorted(library.entries)[:deltas]
    if not names or not prompts:
        raise UsageError("there is nothing to prove", hint="register a delta and give a prompt")
    requests = [
        Request(f"{n or 'base'}#{j}", tuple(prompts[(i + j) % len(prompts)]), new, n, GREEDY)
        for i, n in enumerate([None, *names])
        for j in range(2)
    ]
    engine = Engine(base, library, cells=cells)
    together = engine.generate(requests)
    alone, merged, live = 0, 0, []
    tokens = sum(len(a) for a in together.values())
    for r in requests:
        alone += _differ(together[r.id], engine.generate([r])[r.id])
    for name in (None, *names):
        held = None if name is None else library.acquire(name)
        if held is not None and held.decoder is not None:  # several models: nothing to merge
            library.release(held)
            live.append(held.name)
            continue
        mergeable = held is None or all(p.info.mergeable for p in held.view.delta.parts)
        with base.using(None if mergeable or held is None else held.view):
            model = base if not mergeable or held is None else base.merged(held.view)
            for r in (r for r in requests if r.delta == name):
                merged += _differ(together[r.id], _written(model, r))
        if held is not None:
            library.release(held)
            live += [] if mergeable else [held.name]
    return Proof(len(requests), tokens, len(names), alone, merged, tuple(live), engine.decoder is not None)


def _differ(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))


def _written(base: Base, r: Request) -> list[int]:
    """The greedy answer by the model's own forward pass over all tokens, step by step."""
    ids = list(r.prompt)
    for _ in range(r.new):
        with base.evaluating():
            z = primary(base.model(input_ids=torch.tensor([ids], device=base.device)))
        assert isinstance(z, Tensor)
        ids.append(int(z[0, -1].argmax()))
    return ids[len(r.prompt) :]
