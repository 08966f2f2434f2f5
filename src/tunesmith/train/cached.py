# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen prefix, computed once for each example and kept for the later epochs.

Where everything a delta touches comes late in a forward pass, what comes before (the prefix) gives the same values in
every epoch. `find_cut` names the last module of it from the traced order of execution; `Features` keeps that module's
output for every example, lets it answer from there, and skips the modules before it. A skipped module hands on NaN, so
that a model that reads it past the cut cannot go wrong unnoticed.

The kept values are those of the example's batch in epoch 0, whenever they are computed: the losses of a resumed run are
those of one that was never stopped, and epoch 0 is bit for bit what it is without the cache. In later epochs the batch an
example is in no longer changes the rounding of its features; that is all the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.apply import Answer, answering
from tunesmith.core.base import Base
from tunesmith.core.carriers import first_tensor
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.features import head_of
from tunesmith.core.memory import available_memory
from tunesmith.train.config import TrainConfig
from tunesmith.train.parts import parts_of
from tunesmith.train.processes import world
from tunesmith.train.tasks import Task, moved

SHARE_OF_MEMORY = 0.25  # of what is free at the first step; more goes to a file
WORTH = 0.1  # the share of the base's parameters that must be skipped for the cache to pay
# How far features of one example may lie apart in two batches, relative to the largest: rounding, not another meaning.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


class Refused(Exception):
    """Why features cannot be kept; its text is shown."""


@dataclass(frozen=True)
class Cut:
    """Where the prefix ends: `last` answers from the cache, `skipped` do not run, `inside` are all modules before the cut."""

    last: str
    skipped: tuple[str, ...]
    inside: tuple[str, ...]


def find_cut(base: Base, delta: Delta) -> Cut:
    """The cut of a delta on a base. Raises Refused where there is none, or too little lies before it."""
    traced = base.sites.trace
    if traced is None:
        raise Refused(f"the base could not be traced ({base.sites.problem})")
    order = traced.order
    first = min((_begins(order, path) for path in _touched(base, delta)), default=0)
    done = set(order[:first])
    once = {p for p in done if order.count(p) == 1}
    whole = [p for p in dict.fromkeys(order[:first]) if p in once and not any(a in once for a in _ancestors(p))]
    heavy = [p for p in whole if _reaches(base, p) and any(True for _ in base.modules[p].parameters())]
    if not heavy:
        raise Refused("the delta acts on the first layers already")
    last, skipped = heavy[-1], tuple(heavy[:-1])
    # Embeddings are looked up, not computed.
    saved = sum(m.weight.numel() for p in heavy for m in base.modules[p].modules() if _computes(m))
    everything = sum(m.weight.numel() for m in base.model.modules() if _computes(m))
    if saved < WORTH * everything:
        raise Refused("almost everything comes after the first layer that the delta acts on")
    return Cut(last, skipped, tuple(whole[: whole.index(last) + 1]))


def _touched(base: Base, delta: Delta) -> list[str]:
    """Where the delta acts, by whole blocks; one that changes the model's inputs or reads all blocks acts at once."""
    found = []
    for part in delta.parts:
        for path in part.paths:
            if path:
                found.append(base.sites.block_of(path) or path)
            elif part.info.carrier == "output":  # it reads what the output layer reads
                head = head_of(base.sites)
                found.append(head.path if head is not None else "")
            else:
                raise Refused(f"{part.info.name} acts on the model's inputs or on all of its blocks")
    return found


def _begins(order: Sequence[str], path: str) -> int:
    """The place in the order of finished modules before which everything was done when `path` began."""
    if not path:
        return len(order) - 1
    inside = (i for i, p in enumerate(order) if p == path or p.startswith(path + "."))
    return next(inside, 0)  # a module that did not run in the trace may run anywhere


def _ancestors(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _reaches(base: Base, path: str) -> bool:
    """Whether what the module computes reaches the model's output, as far as the trace tells."""
    aside = base.sites.trace.aside if base.sites.trace else frozenset()
    layers = [s.path for s in base.sites.all() if s.path == path or s.path.startswith(path + ".")]
    layers = [p for p in layers if base.sites[p].kind not in ("block", "attention", "model")]
    return not layers or not all(p in aside for p in layers)


def _computes(m: nn.Module) -> bool:
    return isinstance(getattr(m, "weight", None), Tensor) and m.weight.dim() > 1 and not isinstance(m, nn.Embedding)


def check_deterministic(base: Base, cut: Cut) -> None:
    """Raises Refused naming a module before the cut that draws random numbers or mixes the rows of a batch."""
    for path in cut.inside:
        for name, m in base.modules[path].named_modules(prefix=path):
            if m.training and "Dropout" in type(m).__name__ and getattr(m, "p", 0.0) > 0:
                hint = "cache_features='on' trains without dropout in the frozen part"
                raise Refused(f"{name} drops {m.p:g} of its inputs at random; {hint}")
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None):
                raise Refused(f"{name} normalises by the rows of its batch")


class Prefix:
    """The kept features of a run, or the reason why there are none.

    Raises UsageError where `cache_features="on"` asks for what cannot be had, here or at the first pass that shows it.
    """

    def __init__(
        self, base: Base, delta: Delta, task: Task, config: TrainConfig, epochs: float, out: Path | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:  # fmt: skip
        self._loss, self._device = partial(task.objective.loss, base), base.device
        self._wanted, self._features, self._reason = config.cache_features == "on", None, ""
        try:
            self._features: Features | None = Features(base, delta, task, config, epochs, out, autocast)
        except Refused as e:
            self._drop(e)

    @contextmanager
    def served(self, part: Sequence[int], epoch: int, batch: Any) -> Iterator[None]:
        """One pass over the examples `part`, whose batch on the device is `batch`: from kept features where they are."""
        if self._features is not None and epoch:
            try:
                self._features.ready(self._loss, part, self._device)
            except Refused as e:
                self._drop(e)
        if self._features is None:
            yield
            return
        with self._features.serving(part, epoch, batch):
            yield
        if self._features.refused:
            self._drop(self._features.refused)

    def _drop(self, reason: object) -> None:
        if self._features is not None:
            self._features.close()
        self._features, self._reason = None, str(reason)
        if self._wanted:
            raise UsageError(f"features cannot be kept: {reason}", where="cache_features")

    def close(self) -> str:
        """Drop the files; says what was kept, or why nothing was."""
        if self._features is None:
            return f"no features kept: {self._reason}"
        self._features.close()
        return self._features.note


class _Enough(Exception):
    """The output at the cut is there; the rest of the pass is not needed."""


class Features:
    """The kept outputs of one run; `note` says in words what is kept. Raises Refused where they cannot be, or it would not pay."""

    def __init__(
        self, base: Base, delta: Delta, task: Task, config: TrainConfig, epochs: float, out: Path | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:  # fmt: skip
        if config.cache_features == "off":
            raise Refused("cache_features is off")
        if world() > 1:
            raise Refused("the rows of a batch are spread over several processes")
        if config.gradient_checkpointing:
            raise Refused("gradient checkpointing computes blocks again")
        if epochs <= 1:
            raise Refused("no example is seen twice")
        lengths = getattr(task, "row_lengths", None)
        if lengths is None:
            raise Refused("the batches of a loader may differ from epoch to epoch")
        self.base, self.task, self.autocast, self.out = base, task, autocast, out
        self.cut = find_cut(base, delta)
        if config.cache_features == "on":
            for path in self.cut.inside:
                base.modules[path].eval()  # the run's training mode is put back at its end
        check_deterministic(base, self.cut)
        self.lengths: list[int] = lengths()
        plans = [task.plan(config.batch_size, config.seed, e) for e in (0, 1)]
        cut_up = [[part for b in plan for part in parts_of(task, b, config, base.device)] for plan in plans]
        self.parts, self.later = cut_up[0], cut_up[1][0]  # `later` is what the cache is checked on
        self.home = {i: n for n, part in enumerate(self.parts) for i in part}
        self.rows: dict[int, list[Tensor]] = {}  # by example, one view of the store for each tensor of the output
        self.store: list[_Store] = []
        self.padded: list[bool] = []  # for each tensor: whether its second dimension is the padded length
        self.shape: Any = None
        self.refused = ""
        self.checked = False
        self.note = ""

    @contextmanager
    def serving(self, part: Sequence[int], epoch: int, batch: Mapping[str, Any]) -> Iterator[None]:
        """Within the block the pass over `part` takes its prefix from the cache, or fills it in epoch 0."""
        if epoch == 0:
            with answering(self.base, {self.cut.last: self._recorder(part, batch, stop=False)}):
                yield  # what is wrong with it is said in `refused`: the pass itself is as it would be
            return
        with answering(self.base, self._answers(part, batch)):
            yield

    def ready(self, loss: Callable[[Mapping[str, Any]], Tensor], part: Sequence[int], device: torch.device) -> None:
        """Fill what `part` needs and, at the first call, check the cache. Raises Refused where it does not hold."""
        if not self.checked:
            self._check(loss, device)
            self.checked = True
        self._fill(loss, part, device)

    def _fill(self, loss: Callable[[Mapping[str, Any]], Tensor], part: Sequence[int], device: torch.device) -> None:
        for n in sorted({self.home[i] for i in part if i not in self.rows}):
            batch = moved(self.task.batch(self.parts[n], 0), device)
            recorder = self._recorder(self.parts[n], batch, stop=True)
            with torch.no_grad(), self.autocast(), suppress(_Enough), answering(self.base, {self.cut.last: recorder}):
                loss(batch)
            if self.refused:
                raise Refused(self.refused)

    def _recorder(self, part: Sequence[int], batch: Mapping[str, Any], *, stop: bool) -> Answer:
        state = _random_state(self.base.device)

        def record(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = inner(*args, **kwargs)
            try:
                if not torch.equal(state, _random_state(self.base.device)):
                    raise Refused("random numbers are drawn before the cut")
                self._keep(part, batch, out)
            except Refused as e:
                self.refused = str(e)
            if stop:
                raise _Enough
            return out

        return record

    def _keep(self, part: Sequence[int], batch: Mapping[str, Any], out: Any) -> None:
        leaves: list[Tensor] = []
        self.shape = _map(out, lambda t: leaves.append(t.detach()) or len(leaves) - 1)
        if not leaves:
            raise Refused(f"{self.cut.last} gives no tensor")
        width = _width(batch)
        padded = [width is not None and t.dim() == 3 and t.shape[1] == width for t in leaves]
        if not self.store:
            self.padded = padded
        elif padded != self.padded:
            raise Refused(f"the output of {self.cut.last} changes its form")
        pieces = [self._rows(n, t, part) for n, t in enumerate(leaves)]
        if not self.store:
            self.store = self._allocate([p[0] for p in pieces])
        for n, i in enumerate(part):
            if i not in self.rows:
                self.rows[i] = [s.put(i, p[n]) for s, p in zip(self.store, pieces, strict=True)]

    def _rows(self, n: int, t: Tensor, part: Sequence[int]) -> list[Tensor]:
        """Tensor `n` of the output by example, without padding."""
        if not t.dim() or t.shape[0] != len(part):
            raise Refused(f"the output of {self.cut.last}, of shape {list(t.shape)}, has no row for each example")
        return [row[: self.lengths[i]] if self.padded[n] else row for i, row in zip(part, t, strict=True)]

    def _allocate(self, rows: list[Tensor]) -> list[_Store]:
        """Room for all examples, in memory or in a file. `rows` is one example of each tensor."""
        made = []
        for n, row in enumerate(rows):
            sizes = [prod(row.shape[1:]) * k if self.padded[n] else row.numel() for k in self.lengths]
            made.append(_Store(row.dtype, sizes))
        size = sum(s.nbytes for s in made)
        free = available_memory()
        if free is not None and size > SHARE_OF_MEMORY * free:
            if self.out is None:
                raise Refused(
                    f"{size / 1e9:.1f} GB of features do not fit in memory, and without out= there is no file"
                )
            for n, s in enumerate(made):
                s.to_file(self.out / f"features-{n}.bin")
        where = "in a file" if made[0].path else "in memory"
        self.note = f"features of the frozen layers up to {self.cut.last} are computed once and kept {where}, {size / 1e6:.1f} MB"
        return made

    def _gathered(self, part: Sequence[int], batch: Mapping[str, Any]) -> list[Tensor]:
        """The kept tensors of these examples as a batch, padded with zeros, which the masks of the batch hide."""
        width, out = _width(batch), []
        for n, padded in enumerate(self.padded):
            rows = [self.rows[i][n] for i in part]
            made = rows[0].new_zeros(len(rows), width, rows[0].shape[1]) if padded else torch.stack(rows)
            if padded:
                for place, row in zip(made, rows, strict=True):
                    place[: row.shape[0]] = row
            out.append(made.to(self.base.device))
        return out

    def _answers(self, part: Sequence[int], batch: Mapping[str, Any]) -> dict[str, Answer]:
        leaves = self._gathered(part, batch)
        kept = _map(self.shape, lambda n: leaves[n], of=int)
        return {**{p: _skip for p in self.cut.skipped}, self.cut.last: lambda *_: kept}

    def _check(self, loss: Callable[[Mapping[str, Any]], Tensor], device: torch.device) -> None:
        """Kept rows are what their modules give in another batch, and nothing past the cut reads what was skipped."""
        batch = moved(self.task.batch(self.later, 1), device)
        self._fill(loss, self.later, device)
        found: list[Tensor] = []

        def live(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            _map(inner(*args, **kwargs), lambda t: found.append(t))
            raise _Enough

        with torch.no_grad(), self.autocast():
            with suppress(_Enough), answering(self.base, {self.cut.last: live}):
                loss(batch)
            for n, t in enumerate(found):
                for i, row in zip(self.later, self._rows(n, t, self.later), strict=True):
                    self._compare(i, self.rows[i][n].to(row.device), row)
            answers = self._answers(self.later, batch)
            values = []
            for used in (answers, {self.cut.last: answers[self.cut.last]}):
                with (
                    torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
                    answering(self.base, used),
                ):
                    torch.manual_seed(0)
                    try:
                        values.append(loss(batch))
                    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as e:
                        raise Refused(
                            f"the model does not run without the modules before the cut ({e!r:.100})"
                        ) from None
        if not torch.equal(*values):
            raise Refused("layers after the cut read something from before it")

    def _compare(self, i: int, kept: Tensor, now: Tensor) -> None:
        if kept.shape != now.shape:
            raise Refused(f"the features of row {i} have another shape in another batch")
        if kept.is_floating_point():
            gap, size = (kept.double() - now.double()).abs().max(), now.double().abs().max()
            if not gap <= TOLERANCE.get(kept.dtype, 0.1) * size:
                raise Refused(f"the features of row {i} depend on its batch (by {float(gap / size):.1e} of their size)")
        elif not torch.equal(kept, now):
            raise Refused(f"the features of row {i} depend on its batch")

    def close(self) -> None:
        """Drop the files."""
        for s in self.store:
            s.close()


class _Store:
    """The rows of one output tensor in one block of memory, or of a file that is no part of the results."""

    def __init__(self, dtype: torch.dtype, sizes: Sequence[int]) -> None:
        self.dtype = dtype
        self.starts = [0]
        for size in sizes:
            self.starts.append(self.starts[-1] + size)
        self.path: Path | None = None
        self._flat: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.starts[-1] * torch.empty((), dtype=self.dtype).element_size()

    def to_file(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self.path = path

    def put(self, i: int, row: Tensor) -> Tensor:
        """Keep the row of example `i`; gives it as it lies in the store."""
        if self._flat is None:
            size = self.starts[-1]
            if self.path is None:
                self._flat = torch.empty(size, dtype=self.dtype)
            else:
                self._flat = torch.from_file(str(self.path), shared=True, size=size, dtype=self.dtype)
        start, end = self.starts[i : i + 2]
        if end - start != row.numel():
            raise Refused(f"the features of row {i} have another size than those of the first")
        place = self._flat[start:end].view(row.shape)
        place.copy_(row)
        return place

    def close(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _skip(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """NaN in the shape of the input, without memory; a module that takes no numbers (an embedding) runs."""
    x, _ = first_tensor(args, kwargs)
    return x.new_full((), float("nan")).expand(x.shape) if x.is_floating_point() else inner(*args, **kwargs)


def _width(batch: Mapping[str, Any]) -> int | None:
    """The padded length of a batch of token rows."""
    ids = batch.get("input_ids")
    return int(ids.shape[1]) if isinstance(ids, Tensor) and ids.dim() == 2 else None


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _map(value: Any, fn: Callable[[Any], Any], of: type = Tensor) -> Any:
    """The structure of an output with `fn` of its tensors; objects of other kinds, such as caches, become None."""
    if isinstance(value, of) and not isinstance(value, bool):
        return fn(value)
    if isinstance(value, Mapping):
        made = {k: _map(v, fn, of) for k, v in value.items()}
        return made if type(value) is dict else type(value)(**made)
    if isinstance(value, tuple | list):
        items = [_map(v, fn, of) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return None
