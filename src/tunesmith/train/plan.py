# SPDX-License-Identifier: Apache-2.0
"""What a run would touch, hold in memory and take, before any weight is loaded.

The model is built without memory (on torch's meta device) from its configuration, so sites, parameters and shapes are
real. Memory is a sum of what each phase must hold, minutes are operations over this machine's measured speeds; both are
counted in a rehearsal of a training step without numbers (see `rehearsal`).
"""

from __future__ import annotations

import math
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
from tunesmith.train.cached import Cut, Refused, check_deterministic, find_cut
from tunesmith.train.config import TrainConfig
from tunesmith.train.derived import parted
from tunesmith.train.modes import in_state_format, training_mode
from tunesmith.train.parts import parts_of
from tunesmith.train.prepare import choose_methods, prepare
from tunesmith.train.rehearsal import positions, rehearse
from tunesmith.train.speeds import Speeds, measure
from tunesmith.train.tasks import Task

# Measured on SmolLM2, MiniLM and EfficientNet-Lite0, from one row to a thousand tokens in a batch (Linux, glibc).
OVERHEAD = 490_000_000  # interpreter, torch, transformers, accelerate and tokenizer
LOADED = 1.3  # what loading leaves behind, over the weights
SLACK = 1.28  # memory that the allocator keeps for tensors that are gone, and scratch space of products
MIXED = 2.2  # the same where parts are of many lengths, whose blocks fit into each other's places badly
UNLIKE = 1.25  # the longest row of one part over that of another from which on lengths count as many
OPTIMISER_BYTES = 32  # that AdamW reads and writes for each number it trains, in fp32


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
    flops: float | None
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
    in_state_format(delta, config)
    task, notes = ready.task, list(ready.notes)
    epoch = task.plan(config.batch_size, config.seed, 0)
    steps = config.steps or max(1, math.ceil(config.epochs * len(epoch)))
    lengths = getattr(task, "lengths", None) or [1] * len(task)
    tokens = round(sum(lengths) * steps / len(epoch))
    parts = [part for batch in epoch for part in parts_of(task, batch, config, base.device)]
    speeds = measure(torch.get_num_threads())
    try:
        held, seconds, flops = _rehearsed(base, delta, task, parts, steps / len(epoch), config, speeds)
    except Exception as e:  # code that decides by values cannot be rehearsed; a plan by formula is better than none
        notes.append(f"memory and time are rough: the step could not be rehearsed ({type(e).__name__}: {str(e)[:120]})")
        held, seconds, flops = _by_formula(base, delta, task, parts, tokens, config, speeds)
    seconds += steps * delta.trainable_parameters * OPTIMISER_BYTES / speeds.moved_large
    widths = [max(lengths[i] for i in part) for part in parts]
    memory = _memory(base, delta, held * (MIXED if max(widths) > UNLIKE * min(widths) else SLACK))
    return Plan(
        base.name, [methods.info_of(m).name for m in chosen], _rows(base, delta), delta.trainable_parameters,
        sum(p.numel() for p in base.model.parameters()), len(lengths), tokens, max(lengths), steps, memory,
        seconds / 60, flops, available_memory(), notes,
    )  # fmt: skip


def _rehearsed(
    base: Base, delta: Delta, task: Task, parts: list[list[int]], epochs: float, config: TrainConfig, speeds: Speeds
) -> tuple[float, float, float]:
    """(bytes held by the largest part, seconds, operations) of `epochs` passes over `parts`."""
    sizes = [positions(task, part) for part in parts]
    low, high = (pick(range(len(parts)), key=sizes.__getitem__) for pick in (min, max))
    cut = _kept(base, delta, config, epochs)
    total_seconds = total_flops = 0.0
    held = 0.0
    for served, passes in ((None, epochs),) if cut is None else ((None, 1.0), (cut, epochs - 1)):
        large = rehearse(base, delta, task, parts[high], config, served)
        small = large if sizes[low] == sizes[high] else rehearse(base, delta, task, parts[low], config, served)
        held = max(held, large.held)
        # What a pass costs grows with its size, nearly in proportion.
        per_size = [_between(n, (sizes[low], sizes[high]), [speeds.seconds(r) for r in (small, large)]) for n in sizes]
        total_seconds += passes * sum(per_size)
        total_flops += passes * sum(_between(n, (sizes[low], sizes[high]), [small.flops, large.flops]) for n in sizes)
    return held, total_seconds, total_flops


def _between(at: int, ends: tuple[int, int], values: list[float]) -> float:
    low, high = ends
    return values[1] if low == high else values[0] + (values[1] - values[0]) * (at - low) / (high - low)


def _kept(base: Base, delta: Delta, config: TrainConfig, epochs: float) -> Cut | None:
    """Where later epochs begin if features of a frozen prefix are kept."""
    if config.cache_features == "off" or config.gradient_checkpointing or epochs <= 1:
        return None
    try:
        cut = find_cut(base, delta)
        with training_mode(base, delta):
            if config.cache_features == "auto":
                check_deterministic(base, cut)
    except Refused:
        return None
    return cut


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


def _memory(base: Base, delta: Delta, held: float) -> dict[str, int]:
    """Bytes in each phase: what the process is, the weights, the delta, and what a step holds beside them, with all slack."""
    tensors = [*base.model.parameters(), *base.model.buffers()]  # packed layers hold their weights in buffers
    weights = sum(t.numel() * t.element_size() for t in tensors)
    trained = sum(t.numel() * t.element_size() for _, t in delta.items() if t.requires_grad)
    stored = delta.nbytes
    weights = round(weights * LOADED)
    training = weights + stored + 2 * trained + round(held)  # 2: AdamW's moments
    return {
        "load": weights + OVERHEAD,
        "train": training + OVERHEAD,
        "evaluate": weights + stored + round(held) // 2 + OVERHEAD,
        "save": weights + 3 * stored + OVERHEAD,
        "merge": 2 * weights + stored + OVERHEAD,
    }


def _by_formula(
    base: Base, delta: Delta, task: Task, parts: list[list[int]], tokens: int, config: TrainConfig, speeds: Speeds
) -> tuple[float, float, float]:
    """The same from the widths of the linear layers alone."""
    dtype = parse(config.precision, "cpu")
    largest = max(positions(task, part) for part in parts)
    sites = _linear_sites(base)
    width = sum(s.shape[1] + s.shape[0] for s in sites)
    if config.gradient_checkpointing:
        blocks = max(1, len([s for s in base.sites.all() if s.kind == "block"]))
        width = width // blocks + blocks * max((s.shape[1] for s in sites), default=0)
    full = any(part.info.name == "full" for part in delta.parts)
    flops = 2.0 * tokens * sum(math.prod(s.shape) for s in sites) * (3 if full else 2) * 1.05
    return (
        float(largest * width * torch.empty((), dtype=dtype).element_size()),
        flops / speeds.product["matrix", dtype] * 2,
        flops,
    )
