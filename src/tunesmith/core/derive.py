# SPDX-License-Identifier: Apache-2.0
"""Derived bases: a new base made from another one by a recipe, with a record of how. The parent is never changed.

    small = derive(base, Factorise(ratio=2.0))
    small.source["derived"]      # one record for each step: recipe, options, fingerprint of the parent, digest of the result

A recipe is a class decorated with `@recipe(name)`: annotated fields with `option(...)` as in a method, and
`make(base, sample) -> Made`, which gives the modules to put in place of the parent's, by path. Everything else is shared
with the parent. The same recipe on the same parent gives the same digest, so a base can be made again from its records
(`again`), unless data or training went into it; then it is kept as files (`derived_store`).

A recipe that `tune --method` may name also says what is trained on its result: `trains(base, extra) -> methods`, with
`begin(delta, extra)` where that does not start as a fresh delta does, `observes() -> bool` where data goes into it, and
`then(made, parent, sample) -> Base` for a stage that follows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from tunesmith.core.apply import sharing_copy
from tunesmith.core.base import Base
from tunesmith.core.delta import tensor_bytes
from tunesmith.core.errors import BaseMismatch, DeltaError, UsageError
from tunesmith.core.header import plain
from tunesmith.core.held import put_module
from tunesmith.core.registry import Info, Registry
from tunesmith.core.sample import Sample

C = TypeVar("C", bound=type)


@dataclass
class Made:
    """What a recipe gives: modules by path, facts for the record (plain data), and anything that goes with the base.

    Path "" replaces the whole model. `repeatable` is why the recipe cannot be run again to the same result, or None.
    """

    modules: dict[str, nn.Module]
    facts: dict[str, Any] = field(default_factory=dict)
    extra: Any = None
    repeatable: str | None = None


class Recipe(Protocol):
    """What `derive` runs."""

    def make(self, base: Base, sample: Sample | None) -> Made: ...


RECIPES = Registry("recipe", "tunesmith.derive", "make")
recipe = RECIPES.register


def records(base: Base) -> list[dict[str, Any]]:
    """How the base was made from a loaded one, step by step; empty for one that was not derived."""
    return list(base.source.get("derived") or [])


def derive(base: Base, how: Any, sample: Sample | None = None) -> Base:
    """A new base made from `base` by a recipe; see the module. `sample` is data, for recipes that look at some."""
    return derive_with(base, how, sample)[0]


def is_recipe(how: Any) -> bool:
    """Whether `how` is an instance of a registered recipe."""
    return isinstance(getattr(how, "info", None), Info) and hasattr(how, "make")


def trainable_recipes() -> list[Info]:
    """The recipes that `tune --method` may name."""
    return [i for i in RECIPES.all() if hasattr(i.cls, "trains")]


def derive_with(base: Base, how: Any, sample: Sample | None = None) -> tuple[Base, Any]:
    """The derived base and what the recipe made besides it. Raises UsageError for what is no recipe."""
    info = getattr(how, "info", None)
    if not isinstance(info, Info):
        known = ", ".join(r.name for r in RECIPES.all())
        raise UsageError(f"{how!r} is not a recipe", hint=f"one of {known}, each a class of tunesmith.derive")
    made = how.make(base, sample)
    why = made.repeatable or ("data went into it" if sample is not None else None)
    made = dataclasses.replace(made, repeatable=why)
    derived = step(base, made, info.name, dataclasses.asdict(how), info.paper)
    return (how.then(derived, base, sample) if hasattr(how, "then") else derived), made.extra


def step(base: Base, made: Made, name: str, options: Mapping[str, Any], paper: str = "") -> Base:
    """The base with these modules in place of its own, and one more record: for what is no registered recipe."""
    record = {
        "recipe": name, "paper": paper, "options": dict(options), "parent": base.fingerprint.digest,
        "parent_name": base.name, "paths": sorted(made.modules), "facts": made.facts, "not_repeatable": made.repeatable,
    }  # fmt: skip
    model = sharing_copy(base.model)
    for path, module in made.modules.items():
        if path:
            put_module(model, path, module.train(base.modules[path].training))
        else:
            model = module
    digest = changed_digest(model, record)
    steps = [*records(base), plain({**record, "digest": digest}, "the record of the recipe")]
    return Base(
        model, tokenizer=base.tokenizer, example=base._example, name=f"{base.name}/{name}", family=base.family,
        source={**base.source, "derived": steps},
    )  # fmt: skip


def changed(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """The entries of the state dict that belong to the modules at `paths`."""
    heads = tuple(f"{p}." if p else "" for p in paths)
    return {k: t for k, t in model.state_dict().items() if k.startswith(heads) and isinstance(t, Tensor)}


def changed_digest(model: nn.Module, record: Mapping[str, Any]) -> str:
    """sha256 over the parent's fingerprint and every byte of what the recipe put in its place."""
    h = hashlib.sha256(record["parent"].encode())
    for key, t in sorted(changed(model, record["paths"]).items()):
        h.update(f"{key}:{t.dtype}:{tuple(t.shape)}".encode())
        h.update(tensor_bytes(t))
    return h.hexdigest()


def require_parent(base: Base, record: Mapping[str, Any]) -> None:
    """Raise BaseMismatch unless `base` is the one the recipe was run on."""
    if record["parent"] != base.fingerprint.digest:
        raise BaseMismatch(
            f"the recipe {record['recipe']!r} was run on {record['parent_name']!r} ({record['parent'][:12]}), not on "
            f"{base.name!r} ({base.fingerprint.short})",
            hint="give the base it was derived from",
        )


def again(base: Base, steps: Sequence[Mapping[str, Any]]) -> Base:
    """Run recorded recipes on `base`, as `records` of another run gives them.

    Raises BaseMismatch where the parent is another base, UsageError for a step that data or training went into, and
    DeltaError where the result has other bytes than the recorded one (linear algebra may round otherwise on another
    machine).
    """
    for step in steps:
        require_parent(base, step)
        if step.get("not_repeatable"):
            hint = "load the saved base: ts.load(folder)"
            raise UsageError(f"recipe {step['recipe']!r} cannot be run again: {step['not_repeatable']}", hint=hint)
        from tunesmith.core.expected import retyped

        cls = RECIPES.get(step["recipe"]).cls
        base = derive(base, cls(**retyped(cls, step["options"])))
        if records(base)[-1]["digest"] != step["digest"]:
            hint = "load the saved base instead: ts.load(folder)"
            raise DeltaError(f"recipe {step['recipe']!r} gives other bytes here than were recorded", hint=hint)
    return base
