# SPDX-License-Identifier: Apache-2.0
"""The frozen products of a decoder: layers that read the same input as one, in the form that is fastest here.

    y = x [W1; W2; ...]^T + [b1; b2; ...]        x [N, in], y [N, out1 + out2 + ...]

The model's own weights stay where they are; a stacked or packed product holds a copy, made once. Which form is used is
measured when an engine starts, on this machine and in the base's dtype, and copies are made only while there is memory
for them. Layers that are no plain `nn.Linear` (packed bits, two factors) run by their own forward, one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.memory import available_memory

FORMS = ("own", "stacked", "packed")
ROWS = (1, 32)  # of the inputs on which forms are compared: a single stream and a full batch
SHARE = 0.25  # of the memory that is free, which the copies of all products may take
SLOWER = 1.1  # packed products are taken unless they are this much slower: a measurement on a busy machine is rough
CLOSE = 2e-2  # the gap between two forms, over the largest output: bf16 rounds in another order of summing


class Product:
    """The layers at some paths on one input. `slices` says where the outputs of each lie, `own` is its own forward.

    `call(x)` gives the base's outputs [N, sum of widths] for inputs [N, in]; they are fresh and may be changed in place.
    `widths` are the layers' numbers of outputs; a single layer of any kind needs none. `changes` [out, in] are added to
    copies of the weights of some paths, which must be plain layers.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], own: Mapping[str, Callable[..., Tensor]], widths: Sequence[int] = (),
        form: str = "own", changes: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.paths, self.form = tuple(layers), form
        self.call: Callable[[Tensor], Tensor]
        self.own = {p: own[p] for p in self.paths}
        ends = list(accumulate(widths, initial=0)) if len(layers) > 1 else [0, None]
        self.slices: dict[str, tuple[int, int | None]] = {
            p: (ends[i] or 0, ends[i + 1]) for i, p in enumerate(self.paths)
        }
        modules: list[Any] = list(layers.values())
        changes = changes or {}
        if (form == "own" and not changes) or not all(is_plain(m) for m in modules):
            self.form, self.call = "own", self._apart
            return
        weights = [m.weight.detach() for m in modules]
        weight = torch.cat([w + changes[p] if p in changes else w for p, w in zip(self.paths, weights, strict=True)])
        zeros = [weight.new_zeros(m.out_features) for m in modules]
        biases = [z if m.bias is None else m.bias.detach() for m, z in zip(modules, zeros, strict=True)]
        bias = torch.cat(biases) if any(m.bias is not None for m in modules) else None
        if form == "packed":
            self.call = partial(_packed_product, weight=_packed(weight), bias=bias)
        else:
            self.call = partial(F.linear, weight=weight, bias=bias)

    def _apart(self, x: Tensor) -> Tensor:
        made = [f(x) for f in self.own.values()]
        return made[0] if len(made) == 1 else torch.cat(made, -1)


def is_plain(module: nn.Module) -> bool:
    """Whether a layer computes x W^T + b with a dense weight."""
    return type(module) is nn.Linear


def _packed(weight: Tensor) -> Tensor:
    """A weight [out, in] in the layout in which oneDNN reads it. Raises RuntimeError where a build has none."""
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS[-1])
    return made


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@torch.no_grad()
def choose(layers: Sequence[nn.Module]) -> str:
    """The form for products of these layers: "own" where copies of them take more than `SHARE` of the free memory or
    where they are not plain, else "packed" unless it is slower over `ROWS` or gives other numbers, else "stacked".
    """
    weights: list[Tensor] = [m.weight for m in layers if is_plain(m)]  # type: ignore[misc]
    size, free = sum(w.numel() * w.element_size() for w in weights), available_memory()
    if not weights or (free is not None and size > SHARE * free):
        return "own"
    largest = max(weights, key=lambda w: w.numel() if w.shape[0] < 8 * w.shape[1] else 0)  # an output head is no layer
    if largest.device.type != "cpu" or largest.dtype not in (torch.float32, torch.bfloat16):
        return "stacked"
    x = torch.randn(ROWS[-1], largest.shape[1]).to(largest.dtype)
    try:
        again = _packed(largest)
        gap, wide = _gap(_packed_product(x, again, None), F.linear(x, largest))
    except (RuntimeError, AttributeError):  # a build of torch without oneDNN
        return "stacked"
    packed, plain = 0.0, 0.0
    for n in ROWS:
        fast, slow = _best((lambda z: _packed_product(z, again, None), lambda z: F.linear(z, largest)), x[:n])
        packed, plain = packed + fast, plain + slow
    return "packed" if gap <= CLOSE * wide and packed < SLOWER * plain else "stacked"


def _gap(a: Tensor, b: Tensor) -> tuple[float, float]:
    return float((a.float() - b.float()).abs().max()), float(b.float().abs().max())


def _best(calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor, seconds: float = 0.02) -> list[float]:
    """The shortest time of each call, of several in turn, so that a busy machine is busy for all of them."""
    for f in calls:
        f(x)
    best, until = [float("inf")] * len(calls), time.perf_counter() + seconds
    while time.perf_counter() < until:
        for i, f in enumerate(calls):
            started = time.perf_counter()
            f(x)
            best[i] = min(best[i], time.perf_counter() - started)
    return best
