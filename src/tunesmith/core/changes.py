# SPDX-License-Identifier: Apache-2.0
"""What deltas do to the parameters of a base, tensor by tensor.

`changes` gives the change of every parameter and buffer that a delta touches, lazily where its method is additive and as
one dense difference at a time where it is a function of the weight. Nothing of the base is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tunesmith.core.algebra import Dense, Sum, Update, wide
from tunesmith.core.apply import Application, check_fits
from tunesmith.core.carriers import Action, folded, order, touched
from tunesmith.core.delta import Delta, View, as_view
from tunesmith.core.errors import UsageError
from tunesmith.core.sites import Site

if TYPE_CHECKING:
    from tunesmith.core.base import Base


class Change(NamedTuple):
    """One tensor's change, in canonical orientation; `name` is the parameter or buffer of the site's module."""

    site: Site
    name: str
    update: Update

    @property
    def key(self) -> str:
        """The tensor's name in the base's `state_dict`."""
        return f"{self.site.path}.{self.name}" if self.site.path else self.name

    def before(self) -> Tensor:
        """The base's value, fp32 or wider; zero where the base has no such tensor."""
        old = self.site.params().get(self.name)
        return torch.zeros(self.update.shape) if old is None else wide(old.detach())


def changes(
    base: Base,
    *deltas: Delta | View,
    strict: bool = True,
    only: Callable[[Site], bool] | None = None,
    check: bool = True,
) -> Iterator[Change]:
    """Every tensor that the deltas change together, each once, in the order of the base's modules.

    An additive weight part gives its own `Update` at the view's strength (a `Sum` where several meet), zero ones of a
    fresh delta included; anything else that can be merged gives the dense difference of the folded value, and tensors
    that stay the same are left out. A weight that the delta changes on both sides of a tie comes once, at the side that
    the part names. Tensors are those of the moment and carry no gradient.

    Args:
        strict: raise for parts that act otherwise than on parameters; without, they are left out (see `elsewhere`).
        only: which sites to give; the others are not computed.
        check: refuse a delta of another base or without its parents.
    Raises UsageError for a part that cannot be merged (with `strict`), BaseMismatch for a delta of another base.
    """
    views = tuple(as_view(d) for d in deltas)
    for i, v in enumerate(views):
        if check:
            check_fits(base, v.delta, views[:i])
    beside = {} if not strict else elsewhere(base, *views)
    if beside:
        name, why = next(iter(beside.items()))
        raise UsageError(
            f"part {name!r} is no change of a parameter: {why}", where=views[0].delta.name,
            hint="use a delta whose parts can be merged",
        )  # fmt: skip
    plan = Application(base, views).plan
    rank = {path: i for i, path in enumerate(base.modules)}
    for path in sorted(plan, key=lambda p: rank.get(p, len(rank))):
        actions = [a for a in order(plan[path]) if _reason(a) is None]
        if actions and not _twin(path, actions, plan) and (only is None or only(actions[0].site)):
            yield from _at(actions)


def elsewhere(base: Base, *deltas: Delta | View) -> dict[str, str]:
    """Parts that do not act by changing parameters, each with the reason."""
    plan = Application(base, tuple(as_view(d) for d in deltas)).plan
    found: dict[str, str] = {}
    for actions in plan.values():
        for a in actions:
            why = _reason(a)
            if why is not None:
                found.setdefault(a.part.name, why)
    return found


def _reason(a: Action) -> str | None:
    """Why an action is no change of the parameters of its site, if so."""
    if a.carrier not in ("weight", "hidden") or a.site.kind in ("model", "block", "attention"):
        return f"{a.part.info.name} acts on {a.carrier} at run time"
    return None if a.part.info.mergeable else f"{a.part.info.name} cannot be merged ({a.part.info.merge})"


def _twin(path: str, actions: list[Action], plan: dict[str, list[Action]]) -> bool:
    """Whether this is the other side of a tie whose change is given at the side that the parts name."""
    named = {a.part.alias.get(path) for a in actions}
    if len(named) > 1 or None in named:
        return False
    return [id(a.part) for a in actions] == [id(a.part) for a in order(plan.get(str(named.pop()), []))]


def _at(actions: list[Action]) -> Iterator[Change]:
    for name, update in changes_at(actions).items():
        yield Change(actions[0].site, name, update)


@torch.no_grad()
def changes_at(actions: list[Action]) -> dict[str, Update]:
    """The change of each parameter and buffer of one site by all parts acting there, in their order.

    Parts that add keep their form at their strength (a `Sum` where several meet); with a function of W among them it is
    the dense difference that folding makes, and what stays the same is left out. A tensor that the site lacks counts from
    zero.
    """
    site = actions[0].site
    if all(additive(a) for a in actions):
        terms: dict[str, list[Update]] = {}
        for a in actions:
            for name, update in _added(a).items():
                terms.setdefault(name, []).append(update if a.full else update.scaled(a.number()))
        return {n: t[0] if len(t) == 1 else Sum(tuple(t)) for n, t in terms.items()}
    old = {k: v.detach() for k, v in site.params().items()}
    said = {n for a in actions for n in touched(a)} if all(a.carrier == "weight" for a in actions) else None
    found: dict[str, Update] = {}
    for name, new in folded(actions, old).items():
        was = old.get(name)
        if was is None:
            found[name] = Dense(wide(new.detach()).clone())
        elif new is not was and (said is None or name in said or not torch.equal(wide(new), wide(was))):
            difference = wide(new.detach()).double() - wide(was).double()
            found[name] = Dense(difference.to(wide(new).dtype))
    return found


def additive(a: Action) -> bool:
    """Whether a part adds to parameters, whatever they are: it gives an `update`, or `differences` of several."""
    return a.carrier == "weight" and (hasattr(a.part.method, "update") or hasattr(a.part.method, "differences"))


def _added(a: Action) -> dict[str, Update]:
    method, tensors = a.part.method, {n: t.detach() for n, t in a.tensors.items()}
    if hasattr(method, "update"):
        return {"weight": method.update(a.site, tensors)}
    have = a.site.params()
    return {n: u for n, u in method.differences(a.site, tensors).items() if n in have}  # a tied partner may lack a bias
