# SPDX-License-Identifier: Apache-2.0
"""Changes written down by hand, and those of dense models, for tests of what works on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tunesmith.core.algebra import Dense, Update, wide
from tunesmith.core.base import Base
from tunesmith.core.combine import Place


class Given:
    """`sources[i]` maps "path.name" to an update (or a dense tensor) of a tensor of `base`."""

    def __init__(self, base: Base, sources: Sequence[Mapping[str, Update | Tensor]], names: Sequence[str] = ()) -> None:
        self.sources = [{k: Dense(u) if isinstance(u, Tensor) else u for k, u in s.items()} for s in sources]
        self.names = list(names) or [str(i) for i in range(len(self.sources))]
        self._places = {}
        for s in base.sites.all():
            for name, value in s.params().items():
                key = f"{s.path}.{name}" if s.path else name
                if any(key in source for source in self.sources) and key not in self._places:
                    self._places[key] = Place(s.path, name, tuple(value.shape), s.kind, s.depth, s.of, s.tied if name == "weight" else (),
                                              base=lambda v=value: wide(v.detach()))  # fmt: skip
        missing = {k for s in self.sources for k in s} - set(self._places)
        assert not missing, missing

    def places(self) -> Iterator[Place]:
        yield from self._places.values()

    def at(self, place: Place) -> list[Update | None]:
        return [s.get(place.key) for s in self.sources]


def random_changes(
    base: Base, count: int, *, seed: int = 0, size: float = 0.1, kinds: Sequence[str] = ("linear", "norm"),
    dtype: torch.dtype = torch.float32,
) -> Given:  # fmt: skip
    """Gaussian changes of every parameter of the sites of these kinds."""
    g = torch.Generator().manual_seed(seed)
    keys = {
        f"{s.path}.{n}": t.shape
        for s in base.sites.all()
        if s.kind in kinds
        for n, t in s.params().items()
        if n in ("weight", "bias")
    }
    return Given(
        base,
        [{k: (size * torch.randn(shape, generator=g)).to(dtype) for k, shape in keys.items()} for _ in range(count)],
    )
