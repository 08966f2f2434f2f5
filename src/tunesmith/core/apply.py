# SPDX-License-Identifier: Apache-2.0
"""Apply deltas to a base and take them off again, leaving the module tree as it was.

While any delta is in use, the modules it touches get a dispatcher as their instance `forward`; when the last one leaves,
the instance attribute is removed again. Which deltas act is read from a context variable, so nested uses, threads and
async tasks each see their own stack, and two stacks can run over one set of frozen weights at the same time.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from tunesmith.core.carriers import MEMO, Action, Strength, first_tensor, order, run, touched
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import BaseMismatch, UsageError

if TYPE_CHECKING:
    from tunesmith.core.base import Base

_ACTIVE: ContextVar[dict[int, Application]] = ContextVar("tunesmith_active", default={})  # noqa: B039 (never mutated)
_EMPTY: list[Action] = []
# (what would have run, args, kwargs) -> output
Answer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Application:
    """A stack of deltas on one base.

    `members` gives strengths to parts that only a program may run; `answers` are modules that do not run as they are,
    each with the function that answers in its place.
    """

    base: Base
    stack: tuple[View, ...]
    members: dict[str, Strength] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    plan: dict[str, list[Action]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for view in self.stack:
            for part in view.delta.parts:
                strength: Strength = view.strength
                if not part.auto:
                    if part.name not in self.members:
                        continue
                    strength = self.members[part.name]
                if isinstance(strength, float | int) and strength == 0:
                    continue  # strength 0 is the base itself, not a sum with zeros
                for path in part.paths:
                    site = self.base.sites.of(path, part.kind_of.get(part.alias.get(path, path), ""))
                    self.plan.setdefault(path, []).append(Action(part, site, strength))
        for path, actions in self.plan.items():
            self.plan[path] = order(actions)
            whole = actions[0].site.inside
            if whole and any(a.carrier == "weight" and "weight" in touched(a) for a in self.plan.get(whole, [])):
                hint = "choose targets of one kind: the whole layers, or their parts"
                raise UsageError(f"a part of {whole}, on whose weight another part acts", where=path, hint=hint)

    def without(self, keep: Callable[[View], bool]) -> Application:
        return Application(self.base, tuple(v for v in self.stack if keep(v)), self.members, self.answers)


class Dispatcher:
    """The instance forward of a touched module: runs what the current stack says, or the module's own forward."""

    def __init__(self, base: Base, path: str, original: Callable[..., Any], had: bool) -> None:
        self.base, self.path, self.original, self.had = base, path, original, had
        self.__wrapped__ = original  # inspect.signature shows the module's own arguments
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        app = current(self.base) if self.users else None  # one that somebody's wrapper kept after its use is inert
        if app is not None and self.path in app.answers:
            return app.answers[self.path](partial(self.ordinary, app), args, kwargs)
        return self.ordinary(app, *args, **kwargs)

    def ordinary(self, app: Application | None, /, *args: Any, **kwargs: Any) -> Any:
        """The module's forward with what acts on it."""
        actions = app.plan.get(self.path, _EMPTY) if app is not None else _EMPTY
        if self.path != "":
            return run(actions, self.original, args, kwargs) if actions else self.original(*args, **kwargs)
        token = MEMO.set({})  # state of side networks lives for one forward pass
        try:
            return run(actions, self.original, args, kwargs)
        finally:
            MEMO.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)  # a copied module runs itself, not the module it was copied from


def current(base: Base) -> Application | None:
    """The stack in force on `base` in this thread or task."""
    return on_model(base.model)


def on_model(model: nn.Module) -> Application | None:
    """The same, found by the model."""
    return _ACTIVE.get().get(id(model))


@contextmanager
def activated(app: Application) -> Iterator[None]:
    """Make `app` the stack in force. Its modules must already be dispatched."""
    token = _ACTIVE.set({**_ACTIVE.get(), id(app.base.model): app})
    try:
        yield
    finally:
        _ACTIVE.reset(token)


class Installed:
    """The dispatchers on one model, counted, so that nested and parallel uses leave nothing behind.

    There is one for each model, however many bases are made of it: two on one module would apply a delta twice.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.on: dict[str, Dispatcher] = {}

    def add(self, base: Base, paths: Iterable[str]) -> None:
        with self.lock:
            for path in paths:
                if path not in self.on:
                    module = base.modules[path]
                    had = "forward" in module.__dict__
                    self.on[path] = Dispatcher(base, path, module.forward, had)
                    module.__dict__["forward"] = self.on[path]
                self.on[path].users += 1

    def remove(self, base: Base, paths: Iterable[str]) -> None:
        """Take off what nobody uses any more. Raises UsageError, once all is off, where another forward was put."""
        foreign: list[str] = []
        with self.lock:
            for path in paths:
                d = self.on[path]
                d.users -= 1
                if d.users:
                    continue
                del self.on[path]
                module = base.modules[path]
                if module.__dict__.get("forward") is not d:
                    foreign.append(path)
                elif d.had:
                    module.__dict__["forward"] = d.original
                else:
                    del module.__dict__["forward"]
        if foreign:
            hint = "wrap or replace a module's forward before a delta is in use, or after"
            raise UsageError("its forward was replaced while a delta was in use", where=", ".join(foreign), hint=hint)


_INSTALLED: WeakKeyDictionary[nn.Module, Installed] = WeakKeyDictionary()
_LOCK = threading.Lock()


def installed(model: nn.Module) -> Installed:
    """The dispatchers of a model, the same for every base made of it."""
    with _LOCK:
        return _INSTALLED.setdefault(model, Installed())


def sharing_copy(model: nn.Module) -> nn.Module:
    """The module tree anew, sharing every tensor, with no dispatcher on it."""
    memo: dict[int, Any] = {}
    for m in model.modules():
        for t in [*m._parameters.values(), *m._buffers.values()]:
            if t is not None:
                memo[id(t)] = t
    out = copy.deepcopy(model, memo)
    strip(out)
    return out


def strip(model: nn.Module) -> None:
    """Remove the instance forwards that copies of dispatched modules carry along: their class's own."""
    for m in model.modules():
        f = m.__dict__.get("forward")
        if getattr(f, "__self__", None) is m and getattr(f, "__func__", None) is type(m).forward:
            del m.__dict__["forward"]


@contextmanager
def using(base: Base, views: tuple[View, ...], *, check: bool = True) -> Iterator[Base]:
    """Stack `views` on what is already in use on `base` for the block. See `Base.using`."""
    above = current(base)
    under = above.stack if above is not None else ()
    if check:
        for i, v in enumerate(views):
            check_fits(base, v.delta, (*under, *views[:i]))
    paths = {p for v in views for part in v.delta.parts for p in part.paths}
    if any(part.info.carrier == "side" for v in views for part in v.delta.parts):
        paths.add("")
    app = replace(above or Application(base, ()), stack=(*under, *views), plan={})
    base.installed.add(base, paths)
    try:
        with activated(app):
            yield base
    finally:
        base.installed.remove(base, paths)


def check_fits(base: Base, delta: Delta, under: tuple[View, ...]) -> None:
    """Refuse a delta made for another base or whose parents are not in use. Raises BaseMismatch."""
    made_for = delta.provenance.get("base")
    if made_for and delta.digest_checked is not base:
        base.fingerprint.require_same(made_for, delta.name)
        delta.digest_checked = base
    parents = delta.provenance.get("lineage") or []
    have = [v.delta.digest for v in under] if parents else []
    for p in parents:
        if p["digest"] not in have:
            raise BaseMismatch(
                f"delta {delta.name!r} was trained on top of {p['name']!r}, which is not in use",
                hint=f"stack it first: base.using({p['name']}, {delta.name}); or pass check=False to go on without it",
            )


@contextmanager
def filtered(base: Base, keep: Callable[[View], bool]) -> Iterator[Base]:
    """Run `base` with part of its stack for the block."""
    above = current(base)
    if above is None:
        yield base
        return
    with activated(above.without(keep)):
        yield base


@contextmanager
def answering(base: Base, answers: Mapping[str, Answer]) -> Iterator[None]:
    """Within the block the modules at these paths do not run: what their function returns is their output."""
    above = current(base) or Application(base, ())
    base.installed.add(base, answers)
    try:
        with activated(replace(above, answers={**above.answers, **answers}, plan={})):
            yield
    finally:
        base.installed.remove(base, answers)


@contextmanager
def passing(base: Base, path: str) -> Iterator[list[Tensor]]:
    """The module at `path` hands its input on for the block, whatever acts on it; gives the list of those inputs."""
    seen: list[Tensor] = []

    def hand_on(_: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        seen.append(first_tensor(args, kwargs)[0])
        return seen[-1]

    with answering(base, {path: hand_on}):
        yield seen


@contextmanager
def switched_off(delta: Delta) -> Iterator[None]:
    """Every base runs without `delta` for the block."""
    now = _ACTIVE.get()
    token = _ACTIVE.set({k: a.without(lambda v: v.delta is not delta) for k, a in now.items()})
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def members(base: Base, strengths: dict[str, Strength]) -> Iterator[None]:
    """Run `base` with member parts (`auto=False`) at the given strengths: what a program of use calls."""
    above = current(base)
    if above is None:
        raise UsageError("member parts run only while their delta is in use")
    known = {p.name for v in above.stack for p in v.delta.parts}
    missing = [n for n in strengths if n not in known]
    if missing:
        raise UsageError(f"no member part {missing[0]!r} in use", hint=f"parts: {sorted(known)}")
    named = [p.name for v in above.stack for p in v.delta.parts if not p.auto and p.name in strengths]
    twice = next((n for n in named if named.count(n) > 1), None)
    if twice is not None:
        raise UsageError(f"two member parts in use are called {twice!r}", hint="give the parts of one of them a prefix")
    with activated(replace(above, members={**above.members, **strengths}, plan={})):
        yield


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` for `torch.utils.checkpoint`: the recomputation sees the stack of the first pass.

    Backward may run in another thread or outside the `using` block, where the context variables are different.
    """
    memo = MEMO.get()  # the state of side networks as it is before the recomputed part, not as it is at the end
    state = None if memo is None else {k: dict(v) for k, v in memo.items()}
    return nullcontext(), _restored(_ACTIVE.get(), state)


@contextmanager
def _restored(apps: dict[int, Application], memo: dict[int, dict[str, Any]] | None) -> Iterator[None]:
    with ExitStack() as stack:
        for app in apps.values():  # the block that installed them may be left by now
            paths = [*app.plan, *app.answers]
            app.base.installed.add(app.base, paths)
            stack.callback(app.base.installed.remove, app.base, paths)
        a, m = _ACTIVE.set(apps), MEMO.set(memo)
        stack.callback(MEMO.reset, m)
        stack.callback(_ACTIVE.reset, a)
        yield
