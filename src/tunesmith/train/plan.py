# SPDX-License-Identifier: Apache-2.0
"""What a run would touch, hold in memory and take, before any weight is loaded.

The model is built without memory (on torch's meta device) from its configuration, so sites, parameters and shapes are
real. Memory is a sum of what each phase must hold; minutes come from the arithmetic and a measured matrix speed.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import ResourceError, UsageError
from tunesmith.core.memory import available_memory
from tunesmith.core.sites import Site
from tunesmith.data import Dataset, read
from tunesmith.models.precision import parse
from tunesmith.models.skeleton import skeleton
from tunesmith.train.config import TrainConfig
from tunesmith.train.derived import parted
from tunesmith.train.prepare import choose_methods, prepare

_OVERHEAD = 450_000_000  # interpreter, torch, tokenizer and allocator slack


@dataclass(frozen=True)
class Plan:
    """Sites by kind of change, counts, bytes per phase, and the time on this machine."""

    model: str
    methods: list[str]
    rows: list[dict[str, Any]]
    trainable: int
    total: int
    examples: int
    tokens: int
    longest: int
    steps: int
    memory: dict[str, int]
    minutes: float | None
    available: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.available is None or self.peak <= self.available

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "fits": self.fits}

    def require(self) -> None:
        """Raise ResourceError when the peak is above what the machine has free."""
        if not self.fits:
            raise ResourceError(
                f"training needs about {self.peak / 1e9:.1f} GB, {(self.available or 0) / 1e9:.1f} GB are free",
                where=max(self.memory, key=lambda k: self.memory[k]),
                hint="lower micro_batch or max_length, use gradient_checkpointing, or a method with fewer parameters",
            )


def plan(model: str | Base, data: Any, *, method: Any = None, system: str | None = None, **settings: Any) -> Plan:
    """Plan `tune(model, data, method=method, **settings)` without loading the weights of `model`.

    Raises what `tune` would raise for the same arguments: unknown settings, targets that match nothing, bad data.
    """
    config = TrainConfig.build(settings)
    recipe, method = parted(method)
    if recipe is not None:
        hint = "tune with --steps 1 --no-receipt makes the base; then plan on runs/NAME/base"
        raise UsageError(f"what {recipe.info.name} makes of a base is known once it is made", where="method", hint=hint)
    base = model if isinstance(model, Base) else skeleton(model)
    dataset = data if isinstance(data, Dataset) else read(data)
    ready = prepare(base, dataset, replace(config, packing=False), system=system)
    chosen = choose_methods(base, method, ready)
    with torch.no_grad():
        delta = Delta.create(base, *chosen, seed=config.seed)
    lengths = getattr(ready.task, "lengths", None) or [1] * len(ready.task)
    per_epoch = math.ceil(len(lengths) / config.batch_size)
    steps = config.steps or max(1, math.ceil(config.epochs * per_epoch))
    micro = min(config.micro_batch or config.batch_size, config.batch_size, len(lengths))
    longest = max(lengths)
    tokens = round(sum(lengths) * steps / per_epoch)
    size = 4 if parse(config.precision, "cpu") == torch.float32 else 2
    memory = _memory(base, delta, micro * longest, ready.supervised, size, config)
    flops = _flops(base, delta, tokens)
    return Plan(
        base.name, [methods.info_of(m).name for m in chosen], _rows(base, delta), delta.trainable_parameters,
        sum(p.numel() for p in base.model.parameters()), len(lengths), tokens, longest, steps, memory,
        flops / matrix_speed(size) / 60 if base.family != "vision" else None, available_memory(), list(ready.notes),
    )  # fmt: skip


def _rows(base: Base, delta: Delta) -> list[dict[str, Any]]:
    """One row per method, role and shape: how many sites, which path for example, how many parameters."""
    groups: Counter[tuple[str, str, str, tuple[int, ...]]] = Counter()
    example: dict[tuple[str, str, str, tuple[int, ...]], str] = {}
    counts: Counter[tuple[str, str, str, tuple[int, ...]]] = Counter()
    for part in delta.parts:
        for path, kind in part.kind_of.items():
            s = base.sites.of(path, kind)
            key = (part.name, s.kind, s.role or path.rsplit(".", 1)[-1] or "model", s.shape)
            groups[key] += 1
            example.setdefault(key, path or "(the model)")
            counts[key] += sum(t.numel() for n, t in part.tensors(path).items() if t.requires_grad)
    return [
        {
            "method": k[0], "kind": k[1], "role": k[2], "shape": list(k[3]), "sites": n, "example": example[k],
            "trainable": counts[k],
        }
        for k, n in groups.items()
    ]  # fmt: skip


def _linear_sites(base: Base) -> list[Site]:
    return [s for s in base.sites.all() if s.kind in ("linear", "conv1d", "conv2d") and s.role != "head"]


def _memory(base: Base, delta: Delta, tokens: int, supervised: float, size: int, config: TrainConfig) -> dict[str, int]:
    """Bytes held in each phase."""
    held = [*base.model.parameters(), *base.model.buffers()]  # packed layers hold their weights in buffers
    weights = sum(t.numel() * t.element_size() for t in held)
    trained = sum(t.numel() * t.element_size() for _, t in delta.items() if t.requires_grad)
    stored = delta.nbytes
    # Each linear keeps its input for backward where a delta on it needs it; what comes out is the next one's input.
    width = sum(s.shape[1] + s.shape[0] for s in _linear_sites(base))
    blocks = max(1, len([s for s in base.sites.all() if s.kind == "block"]))
    if config.gradient_checkpointing:
        width = width // blocks + blocks * max((s.shape[1] for s in _linear_sites(base)), default=0)
    activations = tokens * width * size
    head = next((s for s in base.sites.role("head")), None)
    logits = min(64_000_000 * 3, int(tokens * supervised) * head.shape[0] * 4 * 3) if head is not None else 0
    training = weights + stored + 3 * trained + activations + logits
    return {
        "load": weights + _OVERHEAD,
        "train": training + _OVERHEAD,
        "evaluate": weights + stored + tokens * (width // blocks) * size * 2 + logits + _OVERHEAD,
        "save": weights + 3 * stored + _OVERHEAD,
        "merge": 2 * weights + stored + _OVERHEAD,
    }


def _flops(base: Base, delta: Delta, tokens: int) -> float:
    """Multiply-adds times two: forward everywhere, backward to the activations from the first changed block on."""
    wide = sum(math.prod(s.shape) for s in _linear_sites(base))
    full = any(part.info.name == "full" for part in delta.parts)
    return 2.0 * tokens * wide * (3 if full else 2) * 1.05


def matrix_speed(size: int) -> float:
    """Multiply-add operations per second (times two) of a product of the shapes of a small model, measured for 0.2 s."""
    dtype = torch.float32 if size == 4 else torch.bfloat16
    a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    best, until = 0.0, time.perf_counter() + 0.2
    while time.perf_counter() < until:
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * 512 * 576 * 1536 / (time.perf_counter() - began))
    # Element-wise work and thin products take about as long as the wide ones.
    return best * 0.5
