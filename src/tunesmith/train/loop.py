# SPDX-License-Identifier: Apache-2.0
"""The training loop: any delta, any task, on Accelerate.

One optimiser step sums the loss over all its micro-batches and processes and divides once by the number of units, so
a batch gives one gradient however it is split. Every step is a function of (seed, step), so a run that was killed and
resumed gives the losses of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import DeltaError, Interrupted, ResourceError, TrainingError, UsageError
from tunesmith.core.memory import peak_memory, reset_peak
from tunesmith.models.precision import parse
from tunesmith.train import checkpoint as ckpt
from tunesmith.train import sharding
from tunesmith.train.agreement import Agreement
from tunesmith.train.anchor import Anchor
from tunesmith.train.cached import Prefix
from tunesmith.train.config import TrainConfig, rate
from tunesmith.train.guard import PATIENCE, STATISTICS, Guard, locate_nonfinite, poisoned
from tunesmith.train.journal import jsonable, truncate
from tunesmith.train.modes import fast_paths, in_state_format, recomputing, stop_signals, training_mode
from tunesmith.train.parts import parts_of
from tunesmith.train.processes import accelerator, agreed, anywhere
from tunesmith.train.progress import Reporter
from tunesmith.train.surgery import Now
from tunesmith.train.tasks import Task, moved

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Trained:
    """What a run did: losses by step, validation losses, cost, and the events worth knowing."""

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    best_step: int | None = None
    resumed_at: int | None = None
    skipped: list[dict[str, Any]] = field(default_factory=list)
    stopped_early: bool = False
    world: int = 1
    cached: str = ""


class _Adapted(nn.Module):
    """Base and delta as one module for DDP and FSDP; the base's own tree is not changed."""

    def __init__(self, base: Base, delta: Delta, task: Task) -> None:
        super().__init__()
        self.model, self.delta = base.model, delta
        self._base, self._task = (base,), task

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        return self._task.objective.loss(self._base[0], batch)


def fit(
    base: Base,
    delta: Delta,
    task: Task,
    config: TrainConfig,
    *,
    validation: Task | None = None,
    out: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    score: Callable[[Base], float] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train `delta` on `task`. The base is left bit for bit as it was, also when training fails.

    Args:
        validation: scored by loss every `evaluate_every` steps (by default once per epoch); the delta with the lowest
            loss is kept.
        score: replaces the validation loss by a number of the user's (higher is better), such as a metric over
            generated texts; called with the base while the delta is in use.
        out: folder for checkpoints and `log.jsonl`; without it nothing is written.
        resume: continue from the newest checkpoint in `out`.
    Raises TrainingError when the loss stays non-finite, or a tensor that should train does not move or one that should
    not does; Interrupted after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    if not len(task):
        raise UsageError("there is nothing to train on")
    if (config.evaluate_every or config.patience) and validation is None and score is None:
        which = "evaluate_every" if config.evaluate_every else "patience"
        raise UsageError("it needs validation data or a score", where=which)
    if out and not resume and ckpt.newest(out / "checkpoint"):
        raise UsageError("a checkpoint is here already", where=str(out), hint="resume=True, or another folder")
    half = parse(config.precision, base.device) == torch.float16
    processes = accelerator(base.device, half, config.tracker, out)
    in_state_format(delta, config)
    with ExitStack() as stack:
        stack.enter_context(base.frozen())
        used = stack.enter_context(sharding.sharded(base)) if sharding.wanted() else base
        stack.enter_context(training_mode(used, delta))
        if config.gradient_checkpointing:
            stack.enter_context(recomputing(used))
        stack.enter_context(used.using(delta))
        stack.enter_context(fast_paths(used, config.precision))
        return _Loop(used, delta, task, config, processes, validation, out, resume, progress, score, on_step).run()


class _Loop:
    def __init__(
        self,
        base: Base,
        delta: Delta,
        task: Task,
        config: TrainConfig,
        processes: Accelerator,
        validation: Task | None,
        out: Path | None,
        resume: bool,
        progress: bool,
        score: Callable[[Base], float] | None,
        on_step: Callable[[int, float], None] | None,
    ) -> None:
        self.base, self.delta, self.task, self.config = base, delta, task, config
        self.validation, self.out, self.score, self.on_step = validation, out, score, on_step
        self.dtype = parse(config.precision, base.device)
        self.accelerator = processes
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.per_epoch = per_epoch = len(task.plan(config.batch_size, config.seed, 0))
        self.total = steps_of(task, config)
        self.every = config.evaluate_every or (per_epoch if validation is not None or score else None)
        self._changed()
        if not self.params:
            raise UsageError(f"delta {delta.name!r} has nothing to train")
        optimiser = _optimiser(delta, config, one_pass=self.dtype != torch.float16)
        self.model: Any = _Adapted(base, delta, task)
        if sharding.wanted():  # the base is in shards already, and the delta's gradients are exchanged here
            self.optimiser = self.accelerator.prepare_optimizer(optimiser)
        else:
            self.model, self.optimiser = self.accelerator.prepare(self.model, optimiser)
        self.state = Trained(world=self.world)
        self.best: dict[str, Tensor] = {}
        self.best_value: float | None = None
        self.stale, self.bad, self.first = 0, 0, 0
        self.planned: tuple[int, list[list[int]]] = (-1, [])
        if resume:
            self._resume()
        if self.out and self.accelerator.is_main_process:
            truncate(self.out / "log.jsonl", self.first)
        self.statistics = [t for k, t in delta.items() if k.rsplit("/", 1)[-1] in STATISTICS]
        self.prefix = Prefix(base, delta, task, config, self.total / per_epoch, out, self._autocast)
        self.anchor = Anchor(base, delta, config.anchor, config.seed) if config.anchor else None
        share = config.gradient_dropout
        self.agreement = Agreement(base, delta, task, share, config.seed) if share else None
        fresh = bool(delta.provenance.get("untrained", False))
        self.guard = Guard(base, delta, moving=config.lr != 0 and self.first < PATIENCE, all_move=fresh)
        self.reporter = Reporter(
            self.total, self.first, task.objective.unit, progress and self.accelerator.is_main_process
        )

    def _changed(self) -> None:
        """Take stock of what trains: at the start, and when a method has replaced a tensor."""
        self.params = {k: t for k, t in self.delta.items() if t.requires_grad}
        self.names = {id(p): k for k, p in self.params.items()}

    def run(self) -> Trained:
        if self.config.tracker:
            self.accelerator.init_trackers("tunesmith", config=_flat(self.config.to_dict()))
        reset_peak(self.base.device)
        began = time.perf_counter()
        before = self.state.seconds
        with self.reporter, stop_signals() as stop:
            for step in range(self.first, self.first if self.state.stopped_early else self.total):
                self._step(step)
                self.state.seconds = before + time.perf_counter() - began
                due = self.every and ((step + 1) % self.every == 0 or step + 1 == self.total)
                if due and self._evaluate(step + 1):
                    break
                if anywhere(self.accelerator, stop.is_set()):
                    self._save(step + 1)
                    hint = (
                        "continue with: tunesmith tune --resume" if self.out else "nothing was saved: no output folder"
                    )
                    raise Interrupted(f"stopped after step {step + 1} of {self.total}", hint=hint)
                if self.out and (step + 1) % self.config.checkpoint_every == 0 and step + 1 < self.total:
                    self._save(step + 1)
            self.guard.base_unchanged()
            if self.out:
                self._save(self.state.steps)
        if self.best:
            _load(self.delta, self.best)
        self.state.cached = self.prefix.close()
        self.delta.provenance.pop("untrained", None)
        self.state.peak_memory_bytes = peak_memory(self.base.device) or 0
        if self.config.tracker:
            self.accelerator.end_training()
        return self.state

    def _step(self, step: int) -> None:
        torch.manual_seed(_step_seed(self.config.seed, step, self.rank))  # dropout too is a function of the step
        statistics = [t.detach().clone() for t in self.statistics]
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self.planned[0]:
            self.planned = (epoch, self.task.plan(self.config.batch_size, self.config.seed, epoch))
        indices = self.planned[1][index]
        parts = parts_of(self.task, indices, self.config, self.base.device)
        batches = [self.task.batch(p, epoch) for p in parts]
        units = sum(self.task.objective.count(b) for b in batches)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * rate(self.config, step, self.total)
        loss = self._backward(parts, batches, epoch, units) + self._penalise(step)
        if self.agreement is not None:
            scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else 1.0
            self.agreement.drop(step, batches, self.params, self._autocast, scale)
        self._call("before_step", step)
        norm = self.accelerator.clip_grad_norm_(list(self.params.values()), self.config.clip)
        # In fp16 the loss scale finds its level by letting gradients overflow; the scaler skips those steps itself.
        finite = math.isfinite(loss) and (self.dtype == torch.float16 or bool(torch.isfinite(norm)))
        if finite:
            self.optimiser.step()
            self.bad = 0
        else:
            self._nonfinite(step, indices, batches, loss, epoch, statistics)
        taken = finite and not getattr(self.optimiser, "step_was_skipped", False)
        if taken:
            self._call("after_step", step)
        self.optimiser.zero_grad(set_to_none=True)
        self.guard.after(step - self.first, taken)
        self.state.losses.append(loss)
        self.state.steps = step + 1
        tokens = self.task.tokens(indices)
        self.state.tokens += tokens
        self._log({"step": step + 1, "loss": loss, "tokens": tokens})
        self.reporter.step(step + 1, loss, tokens)
        if self.on_step:
            self.on_step(step + 1, loss)

    def _backward(self, parts: list[list[int]], batches: list[dict[str, Any]], epoch: int, units: int) -> float:
        total = 0.0
        for i, (part, batch) in enumerate(zip(parts, batches, strict=True)):
            weight = 1.0
            if self.world > 1:
                mine = part[self.rank :: self.world]
                weight = 1.0 if mine else 0.0  # a process without rows still takes part in the gradient exchange
                batch = self.task.batch(mine or part[:1], epoch)
            last = i == len(batches) - 1
            quiet: AbstractContextManager[Any] = nullcontext() if last else self.accelerator.no_sync(self.model)
            batch = moved(batch, self.base.device)
            with quiet, self.prefix.served(part, epoch, batch), self._autocast():
                value = self.model(batch) * weight
                if not value.requires_grad:
                    hint = "does the loss use the model's output, and does the delta touch what it uses?"
                    raise TrainingError("the loss does not depend on anything that trains", hint=hint)
                # Gradients are averaged over processes; the sum is wanted.
                self.accelerator.backward(value * (self.world / max(1, units)))
            total += float(value.detach())
        if sharding.wanted():
            sharding.average_gradients(list(self.params.values()), self.accelerator)
        if self.world > 1:
            shared = torch.tensor(total, dtype=torch.float64, device=self.base.device)
            total = float(self.accelerator.reduce(shared, "sum"))
        return total / max(1, units)

    def _penalise(self, step: int) -> float:
        """Add the gradients of the methods' penalties and of the anchor; gives their sum."""
        terms = [
            part.method.penalty(self.base.sites.of(path, kind), part.tensors(path))
            for part in self.delta.parts
            if hasattr(part.method, "penalty")
            for path, kind in part.kind_of.items()
        ]
        if self.anchor is not None:
            with self._autocast():
                terms.append(self.anchor.loss(step))
        if not terms:
            return 0.0
        total = torch.stack([t.float() for t in terms]).sum()
        if total.requires_grad:
            self.accelerator.backward(total)
        return float(total.detach())

    @torch.no_grad()
    def _call(self, hook: str, step: int) -> None:
        """Let methods scale gradients, project, re-select or re-allocate what they train."""
        for part in self.delta.parts:
            if hasattr(part.method, hook):
                share = rate(self.config, step, self.total)
                scaler = self.accelerator.scaler if hook == "before_step" else None
                scale = 1.0 if scaler is None else float(scaler.get_scale())
                now = Now(
                    part, step + 1, self.total, share, _bare(self.optimiser), self._reshaped, self.base.sites, scale
                )
                getattr(part.method, hook)(part, now)

    def _reshaped(self) -> None:
        if self.world > 1:
            hint = "run it in one process, or choose a method whose tensors keep their shape"
            raise TrainingError("a method replaced a tensor, which gradient exchange cannot follow", hint=hint)
        self._changed()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.bfloat16 and self.base.dtype == torch.float32:
            return torch.autocast(self.base.device.type, torch.bfloat16)
        return nullcontext()

    def _nonfinite(
        self, step: int, indices: list[int], batches: list[dict[str, Any]], loss: float, epoch: int,
        statistics: list[Tensor],
    ) -> None:  # fmt: skip
        self.bad += 1
        with self._autocast():
            where = locate_nonfinite(self.base, self.task, [moved(b, self.base.device) for b in batches])
            rows = poisoned(self.base, self.task, indices, epoch)
        for t, kept in zip(self.statistics, statistics, strict=True):
            t.data.copy_(kept)  # what such a batch did to running statistics is taken back
        event = {"step": step + 1, "rows": rows, "batch": indices, "loss": jsonable(loss), "layer": where}
        self.state.skipped.append(event)
        self._log({"nonfinite": event})
        self.reporter.note(f"step {step + 1}: loss or gradient is not finite (rows {rows[:8]}, {where}); step skipped")
        if self.bad >= self.config.nonfinite_limit:
            if self.out:
                self._save(step)
            raise TrainingError(
                f"{self.bad} steps in a row were not finite", where=f"step {step + 1}, rows {rows[:8]}, {where}",
                hint="the delta is as it was after the last good step; lower the learning rate or check these rows",
            )  # fmt: skip

    @torch.no_grad()
    def _evaluate(self, step: int) -> bool:
        """Score, keep the best, say whether to stop."""
        with self.base.evaluating(), self._autocast():
            value = -float(self.score(self.base)) if self.score else mean_loss(self.base, self.validation, self.config)
        value = agreed(self.accelerator, value)
        self.state.validation.append((step, value))
        self._log({"step": step, "validation": jsonable(value)})
        self.reporter.note(
            f"step {step}: {'score ' + format(-value, '.4f') if self.score else f'validation loss {value:.4f}'}"
        )
        if self.best_value is None or value < self.best_value or math.isnan(self.best_value):
            self.best_value, self.state.best_step, self.stale = value, step, 0
            self.best = {k: t.detach().clone() for k, t in self.delta.items()}
        else:
            self.stale += 1
        self.state.stopped_early = bool(self.config.patience and self.stale >= self.config.patience)
        return self.state.stopped_early

    def _log(self, row: dict[str, Any]) -> None:
        if "loss" in row:
            row = {**row, "loss": jsonable(row["loss"])}
        if self.config.tracker and "step" in row:
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
        if self.out and self.accelerator.is_main_process:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                with open(self.out / "log.jsonl", "a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")
            except OSError as e:
                hint = "the last checkpoint is whole: mend this and run again with --resume"
                raise ResourceError(
                    f"the log cannot be written ({e.strerror or e})", where=str(self.out), hint=hint
                ) from None

    def _save(self, step: int) -> None:
        if not self.out or not self.accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {f"delta/{k}": t for k, t in self.delta.items()}
        tensors.update({f"best/{k}": t for k, t in self.best.items()})
        optim, numbers = ckpt.optimiser_state(_bare(self.optimiser), self.names)
        rng, generators = ckpt.random_state()
        state = {
            "config": self.config.digest, "total": self.total, "optimiser": numbers, "random": generators,
            "trained": {**vars(self.state)}, "best_value": self.best_value, "stale": self.stale, "bad": self.bad,
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }  # fmt: skip
        ckpt.write(self.out / "checkpoint", step, {**tensors, **optim, **rng}, state)

    def _resume(self) -> None:
        path = ckpt.newest(self.out / "checkpoint") if self.out else None
        if path is None:
            return  # killed before the first checkpoint: the run starts again and gives the same losses
        tensors, state = ckpt.read(path)
        if state.get("config") != self.config.digest or state.get("total") != self.total:
            raise UsageError("the checkpoint was made with other settings or data", where=str(path))
        try:
            self._restore(tensors, state)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, AssertionError) as e:
            hint = "remove this checkpoint to start the run again"
            raise DeltaError(f"the checkpoint does not fit this run ({e!r:.120})", where=str(path), hint=hint) from None

    def _restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        if type(state["step"]) is not int or not 0 <= state["step"] <= self.total:
            raise ValueError(f"step {state['step']!r}")
        _load(
            self.delta,
            {k.removeprefix("delta/"): t for k, t in tensors.items() if k.startswith("delta/")},
            _bare(self.optimiser),
        )
        self._changed()
        self.best = {k.removeprefix("best/"): t for k, t in tensors.items() if k.startswith("best/")}
        ckpt.restore_optimiser(_bare(self.optimiser), self.params, tensors, state["optimiser"])
        ckpt.restore_random(tensors, state["random"])
        self.state = Trained(**{**state["trained"], "validation": [tuple(v) for v in state["trained"]["validation"]]})
        self.best_value, self.stale, self.bad = state["best_value"], state["stale"], state["bad"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.first = self.state.resumed_at = state["step"]


def _bare(optimiser: Any) -> torch.optim.Optimizer:
    return getattr(optimiser, "optimizer", optimiser)


def _optimiser(delta: Delta, config: TrainConfig, one_pass: bool = True) -> torch.optim.Optimizer:
    """AdamW; a method may multiply the rate or the weight decay of a tensor (LoRA+, gates that must not decay).

    No group holds tensors of two parts, so that a method can slow its own. `one_pass` updates all tensors in one kernel,
    which takes over the skipping of overflowed steps from the loss scaler: not for fp16, where the loop must know of it.
    """
    groups: dict[tuple[float, float, int], list[nn.Parameter]] = {}
    for i, part in enumerate(delta.parts):
        ratios = part.method.learning_rates() if hasattr(part.method, "learning_rates") else {}
        decays = part.method.weight_decays() if hasattr(part.method, "weight_decays") else {}
        base_lr = default_lr(part.method) if config.lr is None else config.lr
        for _, name, t in part.items():
            if t.requires_grad:
                key = (base_lr * ratios.get(name, 1.0), config.weight_decay * decays.get(name, 1.0), i)
                groups.setdefault(key, []).append(t)
    listed = [{"params": ps, "lr": lr, "peak": lr, "weight_decay": wd} for (lr, wd, _), ps in sorted(groups.items())]
    where = {p.device.type for g in listed for p in g["params"]}
    return torch.optim.AdamW(listed, betas=config.betas, fused=(one_pass and where <= {"cpu", "cuda"}) or None)


def steps_of(task: Task, config: TrainConfig) -> int:
    """The optimiser steps of a run."""
    return config.steps or max(1, math.ceil(config.epochs * len(task.plan(config.batch_size, config.seed, 0))))


def default_lr(method: Any) -> float:
    """The learning rate a method asks for in `recipe()`, else 1e-3 (small deltas want large steps)."""
    return float(method.recipe().get("lr", 1e-3)) if hasattr(method, "recipe") else 1e-3


@torch.no_grad()
def mean_loss(base: Base, task: Task | None, config: TrainConfig) -> float:
    """The loss of a task per unit, in eval mode, under whatever is in use."""
    assert task is not None
    total, units = 0.0, 0
    for indices in task.plan(config.batch_size, 0, 1):
        batch = task.batch(indices, 1)
        total += float(task.objective.loss(base, moved(batch, base.device)))
        units += task.objective.count(batch)
    return total / max(1, units)


def _load(delta: Delta, values: Mapping[str, Tensor], optimiser: torch.optim.Optimizer | None = None) -> None:
    """Set the delta's tensors; those of a method that changes shapes in mid-run take the shape they had."""
    with torch.no_grad():
        for part in delta.parts:
            for path, name, t in list(part.items()):
                key = f"{part.name}/{path}/{name}"
                if key not in values:
                    raise TrainingError(f"the checkpoint lacks tensor {key!r}")
                # A tensor read from a file may lie at any address, and products round by the alignment of what they read.
                value = values[key].to(t.device, copy=True)
                if value.shape == t.shape:
                    t.copy_(value)
                elif not (hasattr(part.method, "after_step") or hasattr(part.method, "before_step")):
                    got, want = tuple(value.shape), tuple(t.shape)
                    raise TrainingError(f"in the checkpoint, tensor {key!r} has shape {got}, not {want}")
                elif optimiser is not None:
                    Now(part, 0, 0, 0.0, optimiser).replace(path, name, value)
                else:
                    part.put(path, name, value, trainable=t.requires_grad)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"step:{seed}:{step}:{rank}".encode()).digest()[:8], "big") >> 1


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, int | float | str | bool) else json.dumps(v) for k, v in values.items()}
