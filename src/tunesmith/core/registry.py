# SPDX-License-Identifier: Apache-2.0
"""Registries of the families beside methods: recipes of bases, combiners of deltas, probes that inspect them.

As with methods, a class with annotated fields made by `option(...)` is the configuration, the command-line schema and
the docs; registering turns it into a frozen dataclass whose arguments are checked.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

from tunesmith.core.errors import UsageError, nearest
from tunesmith.core.method import check_arguments, config, option, schema, split_options

__all__ = ["Info", "Registry", "config", "option", "schema"]

C = TypeVar("C", bound=type)


@dataclasses.dataclass(frozen=True)
class Info:
    """What a registry knows of an entry: `facts` are what its family declares of it beside name and paper."""

    name: str
    cls: type
    paper: str
    facts: dict[str, Any]

    @property
    def summary(self) -> str:
        return (self.cls.__doc__ or "").strip().split("\n")[0]


class Registry:
    """Entries of one family by name.

    Args:
        what: what an entry is called in messages, such as "combiner".
        folder: the package whose import registers the ones that come with Tunesmith.
        needs: the function an entry must define.
    """

    def __init__(self, what: str, folder: str, needs: str) -> None:
        self.what, self.folder, self.needs = what, folder, needs
        self._known: dict[str, Info] = {}

    @dataclass_transform(frozen_default=True, field_specifiers=(option,))
    def register(self, name: str, *, paper: str = "", **facts: Any) -> Callable[[C], C]:
        """Class decorator: a frozen dataclass with checked fields, known under `name`. Raises UsageError."""

        def wrap(cls: C) -> C:
            if name in self._known and self._known[name].cls.__module__ != cls.__module__:
                raise UsageError(f"{self.what} {name!r} is registered twice", where=cls.__module__)
            if not hasattr(cls, self.needs):
                raise UsageError(f"{self.what} {name!r} must define {self.needs}", where=cls.__module__)
            made: Any = dataclasses.dataclass(frozen=True)(cls)
            check_arguments(made, name)
            made.info = self._known[name] = Info(name, made, paper, facts)
            return typing.cast(C, made)

        return wrap

    def get(self, name: str) -> Info:
        """The record of `name`. Raises UsageError naming the nearest."""
        if name not in self._known:
            importlib.import_module(self.folder)
        if name not in self._known:
            raise UsageError(f"unknown {self.what} {name!r}", hint=nearest(name, self._known))
        return self._known[name]

    def parse(self, text: str) -> Any:
        """An instance from `name` or `name:key=value,key=value`, values in JSON or bare words.

        An option of several values takes a list, or one value by itself.
        """
        from tunesmith.core.expected import retyped

        name, options = split_options(text, self.what)
        cls = self.get(name).cls
        several = {r["name"] for r in schema(cls) if isinstance(r["default"], tuple)}
        alone = {k: [v] if k in several and not isinstance(v, list) else v for k, v in options.items()}
        return cls(**retyped(cls, alone))

    def all(self) -> list[Info]:
        """Every entry by name."""
        importlib.import_module(self.folder)
        return sorted(self._known.values(), key=lambda i: i.name)
