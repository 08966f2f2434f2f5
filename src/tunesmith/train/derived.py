# SPDX-License-Identifier: Apache-2.0
"""Methods that first make a new base: the recipe is run, its result kept beside the run, and what trains starts there.

`tune(method="lq-lora:rank=16")` derives a base (here: packed layers), saves it under `base` in the run's folder, and trains
on it what the recipe says (here: a LoRA that starts at the error of packing, kept in `base/start`). The delta belongs to that
base, which opens by its folder as any other does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.derive import RECIPES, derive_with, is_recipe, trainable_recipes
from tunesmith.core.derived_store import load_derived, save_derived
from tunesmith.core.errors import UsageError, nearest
from tunesmith.train.config import TrainConfig
from tunesmith.train.prepare import START, Prepared
from tunesmith.train.processes import world
from tunesmith.train.sample import sample_of

FOLDER = "base"
ROWS = 256  # that a recipe may look at


def parse_method(text: str) -> Any:
    """A method, or a recipe that says what trains on its result, from `name:key=value,...`. Raises UsageError."""
    name = text.partition(":")[0].strip()
    known = {i.name for i in trainable_recipes()}
    if name in known:
        return RECIPES.parse(text)
    if name not in {i.name for i in methods.methods()} and name in {i.name for i in RECIPES.all()}:
        hint = f"derive a base with it in Python; --method takes {', '.join(sorted(known))}"
        raise UsageError(f"the recipe {name!r} does not say what trains on its result", where="method", hint=hint)
    if name not in {i.name for i in methods.methods()}:
        raise UsageError(f"unknown method {name!r}", hint=nearest(name, [*known, *(i.name for i in methods.methods())]))
    return methods.parse(text)


def parted(method: Any) -> tuple[Any, Any]:
    """(recipe or None, the other methods as they were given). Raises UsageError for a recipe that is not the first."""
    given = [] if method is None else list(method) if isinstance(method, list | tuple) else [method]
    made = [parse_method(m) if isinstance(m, str) else m for m in given]
    recipes = [m for m in made if is_recipe(m)]
    if not recipes:
        return None, method
    if len(recipes) > 1 or not is_recipe(made[0]):
        raise UsageError("only one recipe can be named, before any method", where="method")
    if not hasattr(recipes[0], "trains"):
        known = ", ".join(i.name for i in trainable_recipes())
        raise UsageError(
            f"the recipe {recipes[0].info.name!r} says not what trains", where="method", hint=f"one of {known}"
        )
    return recipes[0], made[1:]


def derived_base(
    base: Base, how: Any, rest: list[Any], prepared: Prepared, config: TrainConfig, folder: Path
) -> tuple[Base, list[Any]]:
    """The derived base, kept in `folder/base`, and the methods that train on it: `rest` instead of the recipe's own.

    A recipe that looks at data sees at most 256 training rows, one at a time. Raises UsageError where `rest` is given to a
    recipe whose start is its own.
    """
    if rest and hasattr(how, "begin"):
        raise UsageError(f"{how.info.name} brings its own start, so no other method fits", where="method")
    if world() > 1:
        hint = "make the base with one process (--steps 1 --no-receipt), then train on runs/NAME/base with several"
        raise UsageError("a recipe is run by one process", where="method", hint=hint)
    sample = None
    if hasattr(how, "observes") and how.observes():
        one = dataclasses.replace(config, batch_size=1)
        sample = sample_of(prepared.task, one, batches=ROWS)
        head = () if prepared.head is None else (methods.build("head", prepared.head),)
        sample = dataclasses.replace(sample, companions=head, seed=config.seed)
    made, extra = derive_with(base, how, sample)
    chosen = rest or how.trains(made, extra)
    place = save_derived(made, folder / FOLDER)
    if hasattr(how, "begin"):
        with torch.no_grad():
            start = Delta.create(made, *chosen, name=START, seed=config.seed)
            how.begin(start, extra)
        start.save(place / START)
    return load_derived(place, base), chosen
