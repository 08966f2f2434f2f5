# SPDX-License-Identifier: Apache-2.0
"""Changes of one base by deltas in memory, one tensor at a time and each in its own form."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from tunesmith.core.algebra import Dense, Update, wide
from tunesmith.core.apply import Application
from tunesmith.core.base import Base
from tunesmith.core.carriers import Action, touched
from tunesmith.core.changes import additive, changes_at
from tunesmith.core.combine import Place
from tunesmith.core.delta import Delta, Part, View, as_view
from tunesmith.core.errors import UsageError
from tunesmith.core.sites import Site


class DeltaChanges:
    """What each of several deltas adds to the tensors of `base`.

    Additive parts keep their form (low-rank, sparse, Kronecker, rows, dense), several at one site give a `Sum` in their
    order, and strengths of views count. Where a part is a function of the weight, the change is the dense difference
    that folding makes. A tensor that tied layers share is one place, unless a source changes one of them alone.

    Args:
        base: what the deltas were made for.
        deltas: deltas, or deltas at a strength.
        aside: ids of parts to leave out, because somebody else sees to them.
    Raises BaseMismatch for a delta of another base, UsageError for a part that cannot be merged into weights.
    """

    def __init__(self, base: Base, deltas: Sequence[Delta | View], aside: Collection[int] = ()) -> None:
        self.base, self.views = base, [as_view(d) for d in deltas]
        self.names = unique_names(self.views)
        for view in self.views:
            if view.delta.provenance.get("base"):
                base.fingerprint.require_same(view.delta.provenance["base"], view.delta.name)
            for part in view.delta.parts:
                if id(part) not in aside:
                    _require_mergeable(view, part)
        plans = [Application(base, (v,)).plan for v in self.views]
        self._plans = [
            {path: kept for path, actions in plan.items() if (kept := [a for a in actions if id(a.part) not in aside])}
            for plan in plans
        ]
        self._changed: dict[tuple[int, str], tuple[str, ...]] = {}
        self._depth = depths(base)
        self._heads = {s.path for s in base.sites.role("head")}
        for view, plan in zip(self.views, self._plans, strict=True):
            parents = view.delta.provenance.get("lineage")
            for path, actions in plan.items() if parents else ():
                if not all(additive(a) for a in actions):
                    hint = "merge the deltas it was trained on into the base first (base.merged)"
                    what = f"{view.delta.name!r} changes it as a function of a weight that other deltas made"
                    raise UsageError(what, where=path, hint=hint)

    def places(self) -> Iterator[Place]:
        """Every tensor that a delta changes, by site in the order of the base."""
        paths = {p for plan in self._plans for p in plan}
        done: set[str] = set()
        for path in self.base.sites:
            if path not in paths:
                continue
            site = self._site(path)
            names = dict.fromkeys(n for i in range(len(self.views)) for n in self._names(i, path))
            shapes = {n: tuple(t.shape) for n, t in site.params().items() if n in names}
            for name in names:
                if name == "weight" and path in done:
                    continue
                tied = self._tied(site) if name == "weight" else ()
                done.update(tied)
                at, of = self._depth.get(path, (None, 1))
                yield Place(
                    path, name, shapes[name], site.kind, at, of, tied,
                    base=lambda site=site, name=name: wide(site.params()[name].detach()),
                    head=lambda site=site: bool(self._heads & {site.path, *site.tied}),
                )  # fmt: skip

    @torch.no_grad()
    def at(self, place: Place) -> list[Update | None]:
        """The change of each delta at one place."""
        out: list[Update | None] = []
        for i, plan in enumerate(self._plans):
            known = place.name in self._names(i, place.path)
            out.append(_changes(plan[place.path])[place.name] if known else None)
        return out

    def _site(self, path: str) -> Site:
        return next(plan[path][0].site for plan in self._plans if path in plan)

    def _names(self, source: int, path: str) -> tuple[str, ...]:
        """The parameters at `path` that a source changes. Functions of the weight are folded once to know."""
        if path not in self._plans[source]:
            return ()
        if (source, path) not in self._changed:
            self._changed[source, path] = tuple(_changes(self._plans[source][path]))
        return self._changed[source, path]

    def _tied(self, site: Site) -> tuple[str, ...]:
        """The other paths of a tied weight, where every source that changes one changes all of them alike."""
        group = (site.path, *site.tied)
        if not site.tied:
            return ()
        for i, plan in enumerate(self._plans):
            moved = [p for p in group if "weight" in self._names(i, p)]
            acting = [[a.part for a in plan[p] if "weight" in touched(a)] for p in moved]
            alike = len({tuple(map(id, parts)) for parts in acting}) == 1
            shared = alike and all(len({part.alias.get(p, p) for p in moved}) == 1 for part in acting[0])
            if moved and (len(moved) < len(group) or not shared):
                return ()
        return site.tied


def unique_names(views: Sequence[View]) -> list[str]:
    """A name for each source that does not depend on the order, except between sources that are equal."""
    out: list[str] = []
    for v in views:
        strength = "" if v.strength == 1 else f"@{v.strength:g}"
        name = f"{v.delta.name}:{v.delta.digest[:16]}{strength}"
        same = sum(o.split("#")[0] == name for o in out)
        out.append(f"{name}#{same + 1}" if same else name)
    return out


def depths(base: Base) -> dict[str, tuple[int | None, int]]:
    """(depth, of) of every path: the number of its block within its stack, (None, 1) outside blocks.

    Stacks are counted apart, as in an encoder and a decoder. Where nothing repeats, depth is the order of execution.
    """
    blocks = [s.path for s in base.sites.all() if s.kind == "block"]
    if not blocks:
        return {s.path: (s.depth, s.of) for s in base.sites.all() if s.kind not in ("model", "attention")}
    stacks: dict[str, list[str]] = {}
    for b in blocks:
        stacks.setdefault(b.rpartition(".")[0], []).append(b)
    at = {b: (i, len(stack)) for stack in stacks.values() for i, b in enumerate(stack)}
    out: dict[str, tuple[int | None, int]] = {}
    for path in base.sites:
        inside = [b for b in blocks if path == b or path.startswith(b + ".")]
        out[path] = at[max(inside, key=len)] if inside else (None, 1)
    return out


def _require_mergeable(view: View, part: Part) -> None:
    where = f"{view.delta.name!r}, part {part.name!r}"
    if not part.auto:
        hint = "a program runs it at strengths of its own; merge the deltas it was made from"
        raise UsageError(f"{part.info.name} here is no change of weights", where=where, hint=hint)
    if part.info.carrier not in ("weight", "hidden") or not part.info.mergeable:
        hint = (
            "a linear combination takes such parts where every delta has the same one, with the same options and sites"
        )
        raise UsageError(f"{part.info.name} cannot be merged: {part.info.merge}", where=where, hint=hint)


def _changes(actions: list[Action]) -> dict[str, Update]:
    """The change of each parameter of one site by the parts acting there. Raises UsageError for what cannot be combined."""
    have = actions[0].site.params()
    found = changes_at(actions)
    for name in [n for n, u in found.items() if n in have and isinstance(u, Dense) and not bool(u.value.any())]:
        del found[name]
    for name in found:
        if name not in have:
            hint = "merge deltas whose parts of this kind are alike, or give the layer a bias"
            what = f"{actions[-1].part.info.name} adds a {name} that the layer lacks"
            raise UsageError(what, where=actions[0].site.path, hint=hint)
        if not have[name].is_floating_point():
            raise UsageError(
                "an integer entry changes, and integers cannot be combined", where=f"{actions[0].site.path}.{name}"
            )
    return found
