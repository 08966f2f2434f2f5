# SPDX-License-Identifier: Apache-2.0
"""What is different only while a run lasts: module modes, fast paths, recomputation, and how signals are taken."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from tunesmith.core.apply import checkpoint_contexts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.memory import keeping_memory
from tunesmith.models.precision import parse
from tunesmith.train.attention import BlockAttention
from tunesmith.train.config import TrainConfig
from tunesmith.train.dropout import quick_dropouts
from tunesmith.train.norms import fused_norms


@contextmanager
def training_mode(base: Base, delta: Delta) -> Iterator[None]:
    """Train mode, but running statistics of the base stay fixed unless the delta holds its own."""
    flags = [(m, m.training) for m in base.model.modules()]
    owned = {p for part in delta.parts for p in part.paths if "running_mean" in part.tensors(p)}
    base.model.train()
    for path, m in base.modules.items():
        if "running_mean" in m._buffers and path not in owned:
            m.eval()
    try:
        yield
    finally:
        for m, flag in flags:
            m.training = flag


@contextmanager
def measuring(base: Base, precision: str) -> Iterator[None]:
    """Eval mode, no gradients, and the autocast that training in `precision` uses."""
    half = parse(precision, base.device) == torch.bfloat16 and base.dtype == torch.float32
    quick = torch.autocast(base.device.type, torch.bfloat16) if half else nullcontext()
    with base.evaluating(), torch.no_grad(), quick:
        yield


def in_state_format(delta: Delta, config: TrainConfig) -> None:
    """Put what trains into the number format that the settings ask for (fp32: as the methods made it)."""
    if config.state == "bf16":
        for _, t in delta.items():
            if t.requires_grad:
                t.data = t.data.to(torch.bfloat16)


@contextmanager
def fast_paths(base: Base, precision: str) -> Iterator[None]:
    """Norms in one pass; on the CPU memory that is used again, dropout, and in bf16 attention. Call it under the delta."""
    with ExitStack() as stack:
        stack.enter_context(fused_norms(base))
        if base.device.type == "cpu":
            stack.enter_context(keeping_memory())
            stack.enter_context(quick_dropouts(base))
            if parse(precision, base.device) == torch.bfloat16:
                stack.enter_context(BlockAttention())
        yield


@contextmanager
def recomputing(base: Base) -> Iterator[None]:
    """Gradient checkpointing of the repeated blocks for the run."""
    # transformers 5.2x renames it, and warns at the old name
    stem = next((s for s in ("activation", "gradient") if hasattr(base.model, f"{s}_checkpointing_enable")), None)
    if stem is None:
        raise UsageError("this model has no gradient checkpointing", where=base.name)
    already = any(getattr(m, "gradient_checkpointing", False) for m in base.model.modules())
    options = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    getattr(base.model, f"{stem}_checkpointing_enable")(**{f"{stem}_checkpointing_kwargs": options})
    try:
        yield
    finally:
        if not already:
            getattr(base.model, f"{stem}_checkpointing_disable")()


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM ask for a stop after the current step; a second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
