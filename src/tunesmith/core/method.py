# SPDX-License-Identifier: Apache-2.0
"""Registration of methods: one frozen dataclass is the config, the command-line schema, the docs and the file header.

A method class declares annotated fields with `option(...)` and the functions of its carrier:

    weight   `update(site, t) -> Update` (an additive change) or `rewrite(site, t, params) -> params` (a function of W),
             the latter optionally with `forward(site, t, x, call) -> y`, the same written with `call` alone
    hidden   `forward(site, t, x, call) -> y`, optionally `merge(site, t, params) -> params`
    prompt   `attend(site, t, call) -> call` over attention inputs, or `model(site, t, call, inputs) -> output`
    side     `forward(site, t, x, call, memo) -> y`, with `memo` a dict that lives for one forward pass of the base
    output   `model(site, t, call, inputs) -> output`

and `init(site, generator) -> tensors`. `t` maps tensor names to tensors; shared tensors appear in it beside the site's
own. Optional: `shared(sites, generator)`, `place(sites) -> {path: tensors}` (values of tensors that `init` made and that
depend on all sites), `calibrate(site, t, params)`, `bake(site, t)`, `penalty(site, t)` (a scalar added to the loss),
`differences(site, t) -> {name: Update}` (for a rewrite that only adds: what it adds to each parameter),
`among(sites)` (which of the targets get a part), `observe(base, sites, sample)` (what is learnt from data before
`calibrate`) with `observes() -> bool` where options decide whether it is, `before_step(part, now)` and
`after_step(part, now)` (gradients and tensors changed in place, or replaced through `now`), `learning_rates()` and
`weight_decays()` (factors by tensor name), `frozen()` (names that never train), `books()` (names of tensors that its own
hooks write), `toy()`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, dataclass_transform

from tunesmith.core.errors import UsageError, nearest

CARRIERS = ("weight", "hidden", "prompt", "side", "output")
_REQUIRED = {
    "weight": ("update", "rewrite"),
    "hidden": ("forward",),
    "prompt": ("attend", "model"),
    "side": ("forward",),
    "output": ("model",),
}
C = TypeVar("C", bound=type)


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A field of a method: default, one help line, and its range (`low`..`high` inclusive) or `choices`."""
    meta = {"help": help, "low": low, "high": high, "choices": choices}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of a method; `expected` maps a law to the reason it is declared not to hold."""

    name: str
    cls: type
    carrier: str
    paper: str
    kinds: tuple[str, ...]
    merge: str
    identity_at_init: bool
    strength: str
    expected: Mapping[str, str]

    @property
    def summary(self) -> str:
        return (self.cls.__doc__ or "").strip().split("\n")[0]

    @property
    def mergeable(self) -> bool:
        return self.merge in ("exact", "approximate")

    @property
    def capabilities(self) -> tuple[str, ...]:
        out = [f"merge:{self.merge}" if self.mergeable else "live-only"]
        out.append("identity-init" if self.identity_at_init else "perturbs-at-init")
        out.append(f"strength:{self.strength}")
        return tuple(out)


_REGISTRY: dict[str, MethodInfo] = {}


@dataclass_transform(frozen_default=True, field_specifiers=(option,))
def register(
    name: str,
    *,
    carrier: str,
    paper: str = "",
    kinds: tuple[str, ...] = ("linear",),
    merge: str = "exact",
    identity_at_init: bool = True,
    strength: str = "linear",
    expected: Mapping[str, str] | None = None,
) -> Callable[[C], C]:
    """Class decorator: turns the class into a frozen dataclass with checked fields and enters it in the registry.

    `kinds` are the site kinds the method attaches to, `merge` is "exact", "approximate" or a reason why it cannot,
    `strength` is "linear" (scales the change), "blend" (interpolates outputs or weights) or "on-off".
    """
    if carrier not in CARRIERS:
        raise UsageError(f"unknown carrier {carrier!r}", hint=nearest(carrier, CARRIERS))

    def wrap(cls: C) -> C:
        if name in _REGISTRY and _REGISTRY[name].cls.__module__ != cls.__module__:
            raise UsageError(f"method {name!r} is registered twice", where=cls.__module__)
        if not any(hasattr(cls, f) for f in _REQUIRED[carrier]):
            needs = " or ".join(_REQUIRED[carrier])
            raise UsageError(f"method {name!r} with carrier {carrier!r} must define {needs}", where=cls.__module__)
        made: Any = dataclasses.dataclass(frozen=True)(cls)
        check_arguments(made, name)
        info = MethodInfo(name, made, carrier, paper, kinds, merge, identity_at_init, strength, expected or {})
        _REGISTRY[name] = info
        made.info = info
        return typing.cast(C, made)

    return wrap


def check_arguments(cls: type, name: str) -> None:
    """Make an unknown or ill-typed argument an error that names the nearest valid choice."""
    plain = cls.__init__  # type: ignore[misc]
    fields = dataclasses.fields(cls)
    known = [f.name for f in fields]

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for key in kwargs:
            if key not in known:
                raise UsageError(f"{name} has no option {key!r}", hint=nearest(key, known))
        plain(self, *args, **kwargs)
        types_ = typing.get_type_hints(cls)
        for field in fields:
            _check_value(name, field, getattr(self, field.name), types_[field.name])

    cls.__init__ = init  # type: ignore[misc]


def _check_value(owner: str, field: dataclasses.Field[Any], value: Any, want: Any) -> None:
    where = f"{owner}.{field.name}"
    allowed = typing.get_args(want) if isinstance(want, types.UnionType) else (want,)
    plain = tuple(typing.get_origin(a) or a for a in allowed)
    accepts = tuple({*plain, int} if float in plain else plain)
    if not isinstance(value, accepts) or (isinstance(value, bool) and bool not in accepts):
        names = " or ".join(getattr(a, "__name__", str(a)) for a in plain)
        raise UsageError(f"must be {names}, got {value!r}", where=where, hint=field.metadata.get("help"))
    low, high, choices = (field.metadata.get(k) for k in ("low", "high", "choices"))
    if choices is not None and value not in choices:
        raise UsageError(f"{value!r} is not a choice", where=where, hint=nearest(str(value), map(str, choices)))
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if (low is not None and value < low) or (high is not None and value > high) or value != value:
        span = f"{'-inf' if low is None else low} .. {'inf' if high is None else high}"
        raise UsageError(f"{value!r} is outside {span}", where=where, hint=field.metadata.get("help"))


def info_of(method: Any) -> MethodInfo:
    """The registry record of a method instance or class. Raises UsageError for anything else."""
    found = getattr(method, "info", None)
    if not isinstance(found, MethodInfo):
        raise UsageError(f"{method!r} is not a registered method", hint="write a class with @register(...)")
    return found


def observes(method: Any) -> bool:
    """Whether a method learns its start from data: it has `observe`, and its `observes()`, where it has one, agrees."""
    return hasattr(method, "observe") and (not hasattr(method, "observes") or bool(method.observes()))


def load_methods() -> None:
    """Register the methods that come with the package (the registry alone knows the folder by name)."""
    importlib.import_module("tunesmith.deltas")


def get(name: str) -> MethodInfo:
    """The record registered under `name`. Raises UsageError naming the nearest."""
    if name not in _REGISTRY:
        load_methods()
    if name not in _REGISTRY:
        raise UsageError(f"unknown method {name!r}", hint=nearest(name, _REGISTRY))
    return _REGISTRY[name]


def build(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """A method instance from its registered name and a plain dict (as in delta.json or on the command line)."""
    return get(name).cls(**dict(options or {}))


def parse(text: str) -> Any:
    """A method from `name` or `name:key=value,key=value`, values in JSON or bare words."""
    name, options = split_options(text, "method")
    return get(name).cls(**options)


def split_options(text: str, what: str) -> tuple[str, dict[str, Any]]:
    """The name and the options in `name:key=value,key=value`. Raises UsageError for anything else."""
    import json

    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for clause in filter(None, (c.strip() for c in _split_commas(rest))):
        key, eq, value = clause.partition("=")
        if not eq:
            raise UsageError(f"expected key=value, got {clause!r}", where=f"{what} {text!r}")
        try:
            options[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[key.strip()] = value.strip()
    return name.strip(), options


def _split_commas(text: str) -> Iterator[str]:
    """Split at commas that are outside brackets and quotes and start a new `key=`."""
    depth, quoted, start = 0, False, 0
    for i, ch in enumerate(text):
        if ch == '"':
            quoted = not quoted
        elif not quoted:
            depth += ch in "[{"
            depth -= ch in "]}"
            if ch == "," and depth == 0 and "=" in text[i + 1 :].split(",", 1)[0]:
                yield text[start:i]
                start = i + 1
    yield text[start:]


def methods() -> list[MethodInfo]:
    """All registered methods, sorted by carrier and name."""
    load_methods()
    return sorted(_REGISTRY.values(), key=lambda m: (CARRIERS.index(m.carrier), m.name))


def config(method: Any) -> dict[str, Any]:
    """The plain dict of a method's options."""
    return dataclasses.asdict(method)


def chosen(method: Any) -> list[tuple[str, Any]]:
    """The options that are not at their default, sorted: a later option with a default leaves this as it was."""
    default = {row["name"]: row["default"] for row in schema(type(method))}
    return sorted((k, v) for k, v in config(method).items() if v != default[k])


def schema(cls: type) -> list[dict[str, Any]]:
    """Name, type, default, help and range of every option of a method class."""
    hints = typing.get_type_hints(cls)
    rows = []
    for f in dataclasses.fields(cls):
        made: Any = f.default_factory
        default = f.default if f.default is not dataclasses.MISSING else made()
        kind = getattr(hints[f.name], "__name__", str(hints[f.name]))
        rows.append({"name": f.name, "type": kind, "default": default, **f.metadata})
    return rows
