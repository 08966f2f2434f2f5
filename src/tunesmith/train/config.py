# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run: one frozen dataclass, checked, hashed into every checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import UsageError, nearest

SCHEDULES = ("cosine", "linear", "constant", "wsd")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OVERFLOWS = ("error", "truncate", "skip")
CACHING = ("auto", "on", "off")
STATES = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Sizes are in examples (rows after packing), lengths in tokens, `lr=None` is the method's own.

    One optimiser step sees `batch_size` rows, computed `micro_batch` at a time with the same result (None: so many that
    they make about 1,024 tokens on a processor, see `parts`). `steps` counts optimiser steps and takes the place of
    `epochs` when given. `warmup` and `decay` are shares of all steps; `decay` is used by the `wsd` schedule. `anchor`
    weighs the KL to the base on text the base writes itself (see `anchor`), which keeps what the base knew.
    `gradient_dropout` drops gradients that pull away from the base (see `agreement`). `patience` stops after that many
    evaluations without a better validation loss. `cache_features` keeps what frozen layers before the delta give from epoch
    to epoch: "auto" where nothing but rounding changes, "on" without the dropout of these layers, or an error, "off" never.
    `state` is the number format of what trains, of its gradients and of AdamW's moments: "bf16" halves that memory and
    keeps 8 bits of each number, so that small steps on large numbers are lost.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    micro_batch: int | None = None
    lr: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    anchor: float = 0.0
    gradient_dropout: float = 0.0
    precision: str = "auto"
    state: str = "fp32"
    seed: int = 0
    max_length: int = 1024
    overflow: str = "error"
    packing: bool = False
    gradient_checkpointing: bool = False
    cache_features: str = "auto"
    evaluate_every: int | None = None
    patience: int | None = None
    checkpoint_every: int = 50
    nonfinite_limit: int = 3
    tracker: str | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_type(f.name, str(f.type), getattr(self, f.name))
        positive = ("epochs", "steps", "batch_size", "micro_batch", "clip", "max_length", "evaluate_every", "patience")
        for name in (*positive, "checkpoint_every", "nonfinite_limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"must be above 0, got {value}", where=name)
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"must lie in 0..1, got {getattr(self, name)}", where=name)
        if not 0 <= self.gradient_dropout <= 1:
            raise UsageError(f"must lie in 0..1, got {self.gradient_dropout}", where="gradient_dropout")
        if self.lr is not None and not 0 <= self.lr < float("inf"):
            raise UsageError(f"must be a finite number of 0 or more, got {self.lr}", where="lr")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UsageError(f"must be two numbers of 0 or more, below 1, got {self.betas}", where="betas")
        for name in ("weight_decay", "anchor"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"must be a finite number of 0 or more, got {getattr(self, name)}", where=name)
        for name, choices in (
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("overflow", OVERFLOWS),
            ("cache_features", CACHING),
            ("state", STATES),
        ):
            if getattr(self, name) not in choices:
                raise UsageError(f"unknown {name} {getattr(self, name)!r}", hint=nearest(getattr(self, name), choices))

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From plain values. Raises UsageError naming the nearest key for an unknown one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UsageError(f"there is no training setting {key!r}", hint=nearest(key, known))
        made = {k: tuple(v) if k == "betas" and isinstance(v, list) else v for k, v in values.items()}
        return cls(**made)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    @property
    def digest(self) -> str:
        """A hash of everything that changes the losses."""
        kept = {k: v for k, v in self.to_dict().items() if k not in ("checkpoint_every", "tracker")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _check_type(name: str, declared: str, value: Any) -> None:
    """Refuse a value of another type than the field's. Raises UsageError."""
    kind, _, optional = declared.partition(" | ")
    if value is None and optional:
        return
    good = {
        "int": isinstance(value, int), "float": isinstance(value, int | float), "str": isinstance(value, str),
        "tuple[float, float]": isinstance(value, tuple) and all(type(v) in (int, float) for v in value),
    }.get(kind, False)  # fmt: skip
    if not (isinstance(value, bool) if kind == "bool" else good and not isinstance(value, bool)):
        raise UsageError(f"must be {declared.replace(' | None', ' or None')}, got {value!r}", where=name)
    if kind == "float" and not abs(value) < float("inf") and name != "lr":
        raise UsageError(f"must be a finite number, got {value}", where=name)


def rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning-rate factor in 0..1 of optimiser step `step` (from 0) of `total`."""
    warm = round(config.warmup * total)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, total - warm)
    if config.schedule == "linear":
        return 1.0 - done
    if config.schedule == "wsd":
        tail = max(config.decay, 1e-9)
        return min(1.0, (1.0 - done) / tail)
    return 0.5 * (1.0 + math.cos(math.pi * done))
