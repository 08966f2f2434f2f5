# SPDX-License-Identifier: Apache-2.0
"""A training step without numbers: what it would compute, move and hold, from the code that will really run.

The model, the delta and a real batch become fake tensors (shapes and formats, no memory) and one forward and backward
pass is made with them. Every operation on the way is counted: its arithmetic, the bytes it reads and writes, and the
memory that is alive after it. So a plan follows the training code, whatever it does, and knows no architecture.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tunesmith.core.apply import Answer, answering, sharing_copy
from tunesmith.core.base import Base
from tunesmith.core.carriers import first_tensor
from tunesmith.core.delta import Delta
from tunesmith.core.sites import SiteMap
from tunesmith.models.precision import parse
from tunesmith.train.cached import Cut
from tunesmith.train.config import TrainConfig
from tunesmith.train.modes import recomputing, training_mode
from tunesmith.train.tasks import Task

aten = torch.ops.aten
LARGE = 1 << 22  # bytes of a result from which memory is mostly fresh


@dataclass
class Rehearsal:
    """One step, forward and backward, of one batch of `tokens` positions, padding included (rows, for other data).

    `held` is the most memory alive at once beside weights, delta and batch, in bytes; gradients of what trains are in
    it. `products` counts matrix products and convolutions by (kind, dtype, operations, bytes), the kind being "matrix",
    "conv", "depthwise" or "attention"; `moved` are the bytes that all other operations read and write, by name and by
    whether their result is large; `calls` is the number of both.
    """

    tokens: int
    held: float = 0.0
    products: dict[tuple[str, torch.dtype, float, int], float] = field(default_factory=lambda: defaultdict(float))
    moved: dict[tuple[str, bool], float] = field(default_factory=lambda: defaultdict(float))
    calls: float = 0.0

    @property
    def flops(self) -> float:
        return sum(f * n for (_, _, f, _), n in self.products.items())

    def beyond(self, less: Rehearsal, times: int) -> Rehearsal:
        """This one and `times` its difference from one with a block less."""
        made = Rehearsal(self.tokens, self.held + times * (self.held - less.held))
        made.calls = self.calls + times * (self.calls - less.calls)
        for mine, theirs, to in (
            (self.products, less.products, made.products), (self.moved, less.moved, made.moved),
        ):  # fmt: skip
            for key in {*mine, *theirs}:
                n, without = mine.get(key, 0.0), theirs.get(key, 0.0)  # type: ignore[call-overload]
                to[key] = n + times * (n - without)  # type: ignore[index]
        return made


def rehearse(
    base: Base, delta: Delta, task: Task, indices: list[int], config: TrainConfig, cut: Cut | None = None
) -> Rehearsal:
    """One step of `task` on the examples `indices`; with `cut`, one that takes its prefix from kept features.

    `base` and `delta` are left as they are. Of many equal blocks two are run, and the others are counted as the second.
    Raises what the training code raises on tensors without values: where it decides by them, other than by masks of
    supervised tokens, it cannot be rehearsed.
    """
    alike = _alike(base, delta)
    if cut is not None or len(alike) < 4:
        return _step(base, delta, task, indices, config, [], cut)
    one, two = (_step(base, delta, task, indices, config, alike[n:]) for n in (1, 2))
    return two.beyond(one, len(alike) - 2)


def positions(task: Task, indices: Sequence[int]) -> int:
    """The size of a batch: token positions, padding included, or rows."""
    lengths = getattr(task, "lengths", [1])
    return _size(task.batch(indices, 0)) if max(lengths) > 1 else len(indices)


def _alike(base: Base, delta: Delta) -> list[str]:
    """The largest group of blocks that are equal in shape and in what the delta does to them."""
    groups: dict[Any, list[str]] = {}
    reached = False
    for site in base.sites.all():
        if site.kind != "block":
            continue
        acts = []
        for part in delta.parts:
            for path in part.paths:
                if path == site.path or path.startswith(site.path + "."):
                    shapes = sorted((n, tuple(t.shape), t.requires_grad) for n, t in part.tensors(path).items())
                    acts.append((part.name, path.removeprefix(site.path), tuple(shapes)))
        reached = reached or bool(acts)  # from here on a backward pass runs through the blocks
        shapes = tuple((n, tuple(p.shape)) for n, p in site.module.named_parameters())
        groups.setdefault((type(site.module), shapes, tuple(acts), reached), []).append(site.path)
    return max(groups.values(), key=len, default=[])


def _step(
    base: Base, delta: Delta, task: Task, indices: list[int], config: TrainConfig, left_out: list[str],
    cut: Cut | None = None,
) -> Rehearsal:  # fmt: skip
    batch = task.batch(indices, 0)
    watch = _Watch(Rehearsal(_size(batch)), max(1, task.objective.count(batch)))
    half = parse(config.precision, "cpu") == torch.bfloat16 and base.dtype == torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        twin, change = _faked_base(base), _faked_delta(delta)
        stack.enter_context(training_mode(twin, change))
        if config.gradient_checkpointing:
            stack.enter_context(recomputing(twin))
        stack.enter_context(twin.using(change, check=False))
        stack.enter_context(answering(twin, {p: _hand_on for p in left_out}))
        inputs = _faked(batch)

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                return task.objective.loss(twin, inputs)

        if cut is not None:
            stack.enter_context(answering(twin, _kept(twin, cut, loss, watch.kept)))
        with watch:
            value = loss()
            if value.requires_grad:
                value.backward()
    return watch.found


def _kept(twin: Base, cut: Cut, loss: Callable[[], Tensor], kept: int) -> dict[str, Answer]:
    """Answers for a pass from kept features, in the shapes that one ordinary pass shows."""
    seen: list[Any] = []

    def see(inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        seen.append(inner(*args, **kwargs))
        return seen[-1]

    with torch.no_grad(), answering(twin, {cut.last: see}), _Watch(Rehearsal(0), kept):
        loss()
    return {**{p: _hand_on for p in cut.skipped}, cut.last: lambda *_: seen[-1]}


def _hand_on(inner: Any, args: Any, kwargs: Any) -> Any:
    return first_tensor(args, kwargs)[0]


def _size(batch: Mapping[str, Any]) -> int:
    """Positions in a batch of token rows, padding included; rows otherwise."""
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor):
        return int(ids.numel())
    return max((int(t.shape[0]) for t in batch.values() if isinstance(t, Tensor) and t.dim()), default=1)


def _empty(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")


def _faked(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _empty(value)
    if isinstance(value, Mapping):
        return {k: _faked(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_faked(v) for v in value)
    return value


def _faked_base(base: Base) -> Base:
    """The module tree with fake tensors, ties kept, and the sites that are known of the base."""
    model = sharing_copy(base.model)
    seen: dict[int, Any] = {}
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = seen.setdefault(id(p), nn.Parameter(_empty(p), requires_grad=False))
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = seen.setdefault(id(b), _empty(b))
    twin = Base(model, tokenizer=base.tokenizer, name=base.name, family=base.family, source=base.source)
    modules, sites = dict(model.named_modules()), base.sites
    twin.__dict__["sites"] = SiteMap(
        [replace(s, module=modules[s.path]) for s in sites.all()], sites.trace, sites.problem, sites.depths
    )
    return twin


def _faked_delta(delta: Delta) -> Delta:
    made = deepcopy(delta)
    for part in made.parts:
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(_empty(p), requires_grad=p.requires_grad)
    return made


class _Watch(TorchDispatchMode):
    """Counts every operation, and answers for those whose result depends on values."""

    def __init__(self, found: Rehearsal, kept: int) -> None:
        super().__init__()
        self.found, self.kept, self.alive = found, kept, 0.0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.decided(func, args)
        if out is None:
            out = func(*args, **kwargs)
        made, given = list(_tensors(out)), list(_tensors((args, kwargs)))
        before = {_storage(t) for t in given}
        fresh = [t for t in made if _storage(t) not in before]
        if fresh or func._schema.is_mutable:
            self.count(func, args, kwargs, out, given, made)
        for t in fresh:
            self.hold(t)
        return out

    def decided(self, func: Any, args: Any) -> Any:
        """A masked choice keeps as many entries as are supervised; a mask is never full."""
        if func is aten.index.Tensor and any(_is_mask(i) for i in args[1]):
            x, mask = args[0], next(i for i in args[1] if _is_mask(i))
            lead = args[1].index(mask)
            shape = (*x.shape[:lead], min(self.kept, mask.numel()), *x.shape[lead + mask.dim() :])
            return x.new_empty(shape)
        if func in (aten.index_put.default, aten.index_put_.default) and any(_is_mask(i) for i in args[1]):
            return args[0] if func is aten.index_put_.default else torch.empty_like(args[0])
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else None  # "is all well with these values?"
        return None

    def count(self, func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], made: list[Tensor]) -> None:
        size = sum(_bytes(t) for t in given) + sum(_bytes(t) for t in made)
        self.found.calls += 1
        rule = flop_registry.get(func._overloadpacket)
        if rule is not None:
            wide = next((t.dtype for t in given if t.is_floating_point()), torch.float32)
            self.found.products[_product(func, args), wide, float(rule(*args, **kwargs, out_val=out)), size] += 1
            return
        if func is aten.embedding.default:
            size = 2 * sum(_bytes(t) for t in made)  # not the whole table
        self.found.moved[func._overloadpacket.__name__, max(map(_bytes, made), default=0) > LARGE] += size

    def hold(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = id(storage)
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.alive += self.sizes[key]
        self.found.held = max(self.found.held, self.alive)
        weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.alive -= self.sizes.pop(key, 0)


def _product(func: Any, args: Any) -> str:
    name = func._overloadpacket.__name__
    if "convolution" in name:
        weight = args[2] if "backward" in name else args[1]
        return "depthwise" if weight.shape[1] == 1 and weight.shape[0] > 1 else "conv"
    return "attention" if "attention" in name else "matrix"


def _is_mask(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dtype == torch.bool


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _tensors(v)
