# SPDX-License-Identifier: Apache-2.0
"""The delta: an ordered list of parts, each one method with its tensors at the sites it touches.

Kinds of entries and how they are held:

    additive            a weight-carrier part whose method returns an `Update` (dense, sparse, low-rank, Kronecker, rows)
    function of W       a weight-carrier part whose method rewrites parameters; parts act in the order of the list
    absolute, buffers   rewrites that ignore the old value, also of buffers such as batch-norm statistics
    structure           hidden, side and output parts that add rows, repeat blocks, add encoders or heads
    tokens and layout   `layout`, plain data: template, stop tokens, mode tokens, normalisation constants
    programs of use     output parts that run member parts (`auto=False`) at strengths they compute
    bundle              parts that carry a `scope`
    lineage             `provenance["lineage"]`: digests of the deltas it was trained on
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.core import method as methods
from tunesmith.core.errors import DeltaError, UsageError, nearest
from tunesmith.core.sites import Site

if TYPE_CHECKING:
    from tunesmith.core.base import Base
    from tunesmith.core.sample import Sample

SHARED = ""


def site_seed(seed: int, path: str) -> int:
    """A seed for one site that depends on nothing else, so that adding a site leaves the others as they were."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "big") >> 1


def tensor_bytes(t: Tensor) -> bytes:
    """The raw bytes of a tensor, whatever its dtype."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


class Part(nn.Module):
    """One method at its sites. Tensors are parameters named `path:name`, shared ones `:name`."""

    def __init__(
        self,
        method: Any,
        sites: Iterable[tuple[str, str]],
        *,
        name: str = "",
        scope: str = "",
        auto: bool = True,
        alias: Mapping[str, str] | None = None,
        tied: str = "both",
    ) -> None:
        super().__init__()
        self.method, self.info = method, methods.info_of(method)
        self.kind_of = dict(sites)
        self.name, self.scope, self.auto, self.tied = name or self.info.name, scope, auto, tied
        self.alias = dict(alias or {})
        self._index: dict[str, dict[str, str]] = {path: {} for path in [SHARED, *self.kind_of]}

    def put(self, path: str, name: str, value: Tensor, *, trainable: bool) -> None:
        """Register one tensor of a site (`""` is shared by all). Replaces an earlier one of that name."""
        if path not in self._index:
            raise DeltaError(f"tensor {name!r} belongs to no site of part {self.name!r}", where=path)
        key = f"{path}:{name}".replace(".", "/")
        trains = trainable and value.is_floating_point()
        # in the order of memory that a file gives back: another one may round products otherwise
        self._parameters[key] = nn.Parameter(value.detach().contiguous(), requires_grad=trains)
        self._index[path][name] = key

    def tensors(self, path: str) -> dict[str, Tensor]:
        """The tensors at a site, aliases resolved, shared ones included."""
        path = self.alias.get(path, path)
        own = {n: self._parameters[k] for n, k in self._index[SHARED].items()}
        own.update((n, self._parameters[k]) for n, k in self._index[path].items())
        return own  # type: ignore[return-value]

    def parameter(self, path: str, name: str) -> nn.Parameter:
        """The tensor stored at a site (`""` for a shared one)."""
        return self._parameters[self._index[path][name]]  # type: ignore[return-value]

    def items(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(path, name, tensor) of everything stored, shared first."""
        for path, names in self._index.items():
            for name, key in names.items():
                yield path, name, self._parameters[key]  # type: ignore[misc]

    @property
    def paths(self) -> list[str]:
        """Every module path this part acts on, tied partners included."""
        return [*self.kind_of, *self.alias]

    def drop(self, path: str, name: str) -> None:
        """Remove one tensor, for methods that bake or prune."""
        del self._parameters[self._index[path].pop(name)]

    def extra_repr(self) -> str:
        return f"{self.info.name}, {len(self.kind_of)} sites"


class Delta(nn.Module):
    """A named, portable, reversible change to a base. Trainable, saved, merged, served and undone as one thing."""

    def __init__(self, name: str, parts: Iterable[Part], *, provenance: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.name = name
        self.parts: list[Part] = nn.ModuleList(parts)  # type: ignore[assignment]  # it behaves as the list it holds
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.layout: dict[str, Any] = {}
        self.digest_checked: Any = None  # the base this delta was last found to fit
        names = [p.name for p in self.parts]
        if len(set(names)) != len(names):
            raise UsageError(f"delta {name!r} has two parts with one name", hint=f"names: {names}")

    @classmethod
    def create(
        cls,
        base: Base,
        *methods_: Any,
        name: str = "delta",
        seed: int = 0,
        tied: str = "both",
        sample: Sample | None = None,
    ) -> Delta:
        """A fresh delta for `base`, initialised from `seed`.

        Args:
            methods_: method instances (`LoRA(rank=8)`), applied in order.
            sample: data for the methods that learn their start from it (`ts.tune` passes its training data).
            tied: what to do where a target's weight shares storage with another: "both" changes both sides, "untie"
                changes the named side only and a merge unties them, "error" refuses.
        Raises UsageError for targets that match nothing or sites the method cannot use.
        """
        if not methods_:
            raise UsageError("a delta needs at least one method", hint="for example Delta.create(base, LoRA(rank=8))")
        parts: list[Part] = []
        for m in methods_:
            label = methods.info_of(m).name
            same = sum(p.info.name == label for p in parts)
            unique = label if not same else f"{label}-{same + 1}"
            given = sample
            if sample is not None and methods.observes(m):
                others = tuple(o for o in methods_ if o is not m and not methods.observes(o))
                given = replace(sample, companions=others)
            parts.append(make_part(base, m, seed=seed + len(parts), name=unique, tied=tied, sample=given))
        facts: dict[str, Any] = {"base": base.fingerprint.to_dict(), "seeds": {"init": seed}, "untrained": True}
        if base.source.get("derived"):
            facts["derived"] = base.source["derived"]  # how to make the base again, or why that needs its files
        if sample is not None and sample.context:
            facts["context"] = dict(sample.context)
        return cls(name, parts, provenance=facts)

    @classmethod
    def bundle(cls, name: str, members: Mapping[str, Delta]) -> Delta:
        """Several deltas under one name, each within a scope; `scoped` takes one out again.

        The bundle needs every parent that a member needs and that is no member itself. Raises UsageError for no
        members, or members of different bases.
        """
        if not members:
            raise UsageError(f"bundle {name!r} has no members", hint='Delta.bundle("name", {"scope": delta})')
        made_for = {s: (d.provenance.get("base") or {}).get("digest") for s, d in members.items()}
        if len(set(made_for.values())) > 1:
            raise UsageError(f"the members of bundle {name!r} were made for different bases", hint=str(made_for))
        parts = []
        for scope, delta in members.items():
            for p in delta.parts:
                copied = clone_part(p)
                copied.name, copied.scope = f"{scope}.{p.name}", scope
                parts.append(copied)
        inside = {d.digest for d in members.values()}
        needs = {p["digest"]: p for d in members.values() for p in d.provenance.get("lineage") or []}
        out = cls(name, parts, provenance=next(iter(members.values())).provenance)
        out.provenance["lineage"] = [p for digest, p in needs.items() if digest not in inside]
        out.layout = {"scopes": {s: dict(d.layout) for s, d in members.items()}}
        return out

    @classmethod
    def between(cls, base: Base, other: Base, *, name: str = "", exact: bool = False, outside: str = "error") -> Delta:
        """What makes `other` of `base`, two models of one shape: every difference, held dense in a `full` part.

        base + delta gives the other's tensors bit for bit where both are bf16 or fp16 and the sum in fp32 rounds back,
        and within one fp32 ulp of the larger of both entries elsewhere; with `exact` a tensor that does not come back is
        held in fp64, which brings it back. Tied weights are one change. Running statistics of norms are taken, integer
        counters are not. `provenance["between"]` has a fingerprint of the other end, the share of entries that are
        exactly zero (in half precision small updates vanish), the share that does not come back bit for bit, and what
        was `left`: with `outside="leave"` tensors that lie in no layer, such as class tokens.
        Raises BaseMismatch for other shapes (a grown vocabulary, say), UsageError for equal models, or tensors that
        differ and no delta can change.
        """
        from tunesmith.core.between import between

        return between(base, other, name=name, exact=exact, outside=outside)

    def scoped(self, scope: str) -> Delta:
        """The member of a bundle under `scope`, sharing its tensors."""
        scopes = {p.scope for p in self.parts}
        if scope not in scopes:
            raise UsageError(f"delta {self.name!r} has no scope {scope!r}", hint=nearest(scope, scopes))
        out = Delta(f"{self.name}/{scope}", [p for p in self.parts if p.scope == scope], provenance=self.provenance)
        out.layout = dict(self.layout.get("scopes", {}).get(scope, {}))
        return out

    def part(self, name: str) -> Part:
        """The part called `name`. Raises UsageError naming the nearest."""
        for p in self.parts:
            if p.name == name:
                return p
        raise UsageError(f"delta {self.name!r} has no part {name!r}", hint=nearest(name, [p.name for p in self.parts]))

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(`part/site/tensor`, tensor) of everything stored."""
        for p in self.parts:
            for path, name, tensor in p.items():
                yield f"{p.name}/{path}/{name}", tensor

    def at(self, strength: float) -> View:
        """This delta at a strength: 0 is the base, 1 is as trained."""
        return View(self, float(strength))

    def off(self) -> AbstractContextManager[None]:
        """Within this block every base runs without this delta: the reference model, with no copy."""
        from tunesmith.core.apply import switched_off

        return switched_off(self)

    @property
    def trainable_parameters(self) -> int:
        return sum(t.numel() for _, t in self.items() if t.requires_grad)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self.items())

    @property
    def digest(self) -> str:
        """sha256 over methods, options that are not the default, sites and tensor bytes."""
        h = hashlib.sha256()
        for p in self.parts:
            h.update(repr((p.name, p.info.name, methods.chosen(p.method), sorted(p.kind_of))).encode())
        for key, t in self.items():
            h.update(f"{key}:{t.dtype}:{tuple(t.shape)}".encode())
            h.update(tensor_bytes(t))
        return h.hexdigest()

    def save(self, folder: str | Path) -> Any:
        """Write `delta.json`, `delta.safetensors` and a card; see `store.save`."""
        from tunesmith.core.store import save

        return save(self, folder)

    @classmethod
    def load(cls, folder: str | Path, base: Base | None = None) -> Delta:
        """Read a saved delta, checked against `base` when given; see `store.load`."""
        from tunesmith.core.store import load

        return load(folder, base)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload to the Hugging Face hub; see `hub.push`."""
        from tunesmith.core.hub import push

        return push(self, repo_id, **kwargs)

    @classmethod
    def from_hub(cls, repo_id: str, base: Base | None = None, **kwargs: Any) -> Delta:
        """Download from the Hugging Face hub; see `hub.pull`."""
        from tunesmith.core.hub import pull

        return pull(repo_id, base, **kwargs)


@dataclass(frozen=True)
class View:
    """A delta at a strength."""

    delta: Delta
    strength: float = 1.0


def as_view(value: Delta | View) -> View:
    """A delta or view as a view. Raises UsageError for anything else and for a strength that is not finite."""
    if isinstance(value, Delta):
        return View(value)
    if not isinstance(value, View):
        raise UsageError(f"expected a Delta, got {type(value).__name__}")
    if value.strength != value.strength or abs(value.strength) == float("inf"):
        raise UsageError(f"strength must be finite, got {value.strength}")
    return value


def clone_part(part: Part, *, trainable: bool | None = None) -> Part:
    """A copy of a part with its own tensors."""
    out = Part(
        part.method, part.kind_of.items(), name=part.name, scope=part.scope, auto=part.auto, alias=part.alias,
        tied=part.tied,
    )  # fmt: skip
    for path, name, t in part.items():
        out.put(path, name, t.clone(), trainable=t.requires_grad if trainable is None else trainable)
    return out


def make_part(
    base: Base,
    method: Any,
    *,
    seed: int = 0,
    name: str = "",
    tied: str = "both",
    auto: bool = True,
    sample: Sample | None = None,
) -> Part:
    """A method's part on a base: targets selected, ties decided, tensors initialised and calibrated.

    A method with `among` says which of its targets get a part; one with `observe` first sees `sample`, and a site it says
    nothing of gets no part. Raises UsageError for a target that matches nothing, a site the method refuses, or a missing
    sample.
    """
    info = methods.info_of(method)
    chosen = base.sites.select(getattr(method, "targets", "model"), info.kinds)
    fits = getattr(method, "fits", None)
    if fits is not None:
        refused = [(s, why) for s in chosen if (why := fits(s))]
        if refused:
            shown = "; ".join(f"{s.path}: {why}" for s, why in refused[:3])
            raise UsageError(f"{info.name} cannot attach to {len(refused)} of its targets", where=shown)
    if hasattr(method, "check"):
        method.check(chosen)
    chosen, alias = _resolve_ties(method, info, chosen, tied)
    if hasattr(method, "among"):
        chosen = method.among(chosen)
        alias = {other: path for other, path in alias.items() if path in {s.path for s in chosen}}
        if not chosen:
            raise UsageError(f"{info.name} chose none of its targets", hint="a larger share leaves some")
    seen: Mapping[str, Any] | None = None
    if methods.observes(method):
        if sample is None:
            hint = "use ts.tune, or pass sample=Sample(...) to Delta.create"
            raise UsageError(f"{info.name} learns its start from data and was given none", hint=hint)
        seen = method.observe(base, chosen, replace(sample, seed=seed))
        chosen = [s for s in chosen if s.path in seen]
        alias = {other: path for other, path in alias.items() if path in seen}
        if not chosen:
            raise UsageError(f"{info.name} found no site worth changing in the data it was given")
    part = Part(method, [(s.path, s.kind) for s in chosen], name=name, alias=alias, tied=tied, auto=auto)
    frozen = _never_trains(method)

    def fill(path: str, tensors: Mapping[str, Tensor]) -> None:
        for key, value in tensors.items():
            part.put(path, key, value.to(base.device), trainable=key not in frozen)

    if hasattr(method, "shared"):
        fill(SHARED, method.shared(chosen, torch.Generator().manual_seed(site_seed(seed, SHARED))))
    placed = method.place(chosen) if hasattr(method, "place") else {}
    for s in chosen:
        tensors = method.init(s, torch.Generator().manual_seed(site_seed(seed, s.path)))
        tensors = {**tensors, **placed.get(s.path, {})}
        if seen is not None:
            tensors = method.calibrate(s, tensors, s.params(), seen[s.path])
        elif hasattr(method, "calibrate"):
            tensors = method.calibrate(s, tensors, s.params())
        fill(s.path, tensors)
    return part


def _never_trains(method: Any) -> set[str]:
    """Names of tensors that stay as they are, or are written by the method's own hooks alone."""
    return {n for hook in ("frozen", "books") if hasattr(method, hook) for n in getattr(method, hook)()}


def _resolve_ties(
    method: Any, info: methods.MethodInfo, chosen: list[Site], tied: str
) -> tuple[list[Site], dict[str, str]]:
    """Decide up front what happens where a weight is shared by storage; see `Delta.create`."""
    if tied not in ("both", "untie", "error"):
        raise UsageError(f"unknown choice tied={tied!r}", hint=nearest(tied, ("both", "untie", "error")))
    touches = method.touches() if hasattr(method, "touches") else ("weight",)
    alias: dict[str, str] = {}
    if info.carrier != "weight" or "weight" not in touches:
        return chosen, alias
    kept: list[Site] = []
    for s in chosen:
        if s.path in alias:
            continue
        kept.append(s)
        if s.tied and tied == "error":
            raise UsageError(f"its weight is tied to {', '.join(s.tied)}", where=s.path, hint="tied='both' or 'untie'")
        if s.tied and tied == "both":
            alias.update({other: s.path for other in s.tied})
    return kept, alias


def bake(base: Base, delta: Delta) -> None:
    """Replace parts whose tensors are made by a network (or need something only training needs) by what is used.

    A method with `bake(site, t) -> tensors` also has `baked() -> method`, the one those tensors belong to, or
    `baked_as(found) -> method` where that depends on them (`found` maps each site's path to its tensors). A site without
    tensors is left out, and a part without sites with it. Raises DeltaError where nothing would be left of the delta.
    """
    kept: list[Part] = []
    for part in delta.parts:
        method = part.method
        if not hasattr(method, "bake"):
            kept.append(part)
            continue
        found = {p: method.bake(base.sites.of(p, kind), part.tensors(p)) for p, kind in part.kind_of.items()}
        used = [(path, kind) for path, kind in part.kind_of.items() if found[path]]
        if not used:
            continue
        became = method.baked_as(found) if hasattr(method, "baked_as") else method.baked()
        made = Part(
            became, used, name=part.name, scope=part.scope, auto=part.auto,
            alias={o: p for o, p in part.alias.items() if found[p]}, tied=part.tied,
        )  # fmt: skip
        frozen = _never_trains(became)
        for path, tensors in found.items():
            for name, value in tensors.items():
                made.put(path, name, value, trainable=name not in frozen)
        kept.append(made)
    if not kept:
        hint = "prune less: a smaller threshold, or a larger budget"
        raise DeltaError("nothing is left of it once what has no effect is dropped", where=delta.name, hint=hint)
    delta.parts = nn.ModuleList(kept)  # type: ignore[assignment]
