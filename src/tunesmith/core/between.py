# SPDX-License-Identifier: Apache-2.0
"""The difference between two models of one shape as a delta: residuals, task vectors, finished fine-tunings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tunesmith.core.algebra import Dense, Update, wide
from tunesmith.core.assemble import STATISTICS, parts_of
from tunesmith.core.base import Base
from tunesmith.core.combine import Place
from tunesmith.core.delta import Delta
from tunesmith.core.errors import BaseMismatch, UsageError
from tunesmith.core.sites import Site

KINDS = ("linear", "conv1d", "conv2d", "embedding", "norm")


@torch.no_grad()
def between(base: Base, other: Base, *, name: str = "", exact: bool = False, outside: str = "error") -> Delta:
    """`other - base` as a delta of `base`; see `Delta.between`."""
    if outside not in ("error", "leave"):
        raise UsageError(f"unknown choice outside={outside!r}", hint='"error" or "leave"')
    pairs = list(_pairs(base, other))
    left = _outside(base, other, {id(t) for site, _ in pairs for t in _own(site)})
    if left and outside == "error":
        hint = 'outside="leave" leaves them as they are in the base and names them in the provenance'
        raise UsageError(f"differs and lies in no layer that a delta can change: {', '.join(left[:5])}", hint=hint)
    counts = {"entries": 0, "zero": 0, "inexact": 0}
    changes = list(_changes(base, pairs, exact, counts))
    parts = parts_of(base, changes)
    if not parts:
        raise UsageError(f"{base.name!r} and {other.name!r} are the same", hint="give two models that differ")
    facts = {
        "other": {"name": other.name, "digest": other.fingerprint.digest, "dtype": other.fingerprint.dtype},
        "entries": counts["entries"],
        "share_zero": counts["zero"] / counts["entries"],
        "share_inexact": counts["inexact"] / counts["entries"],
        "left": left,
    }
    provenance = {"base": base.fingerprint.to_dict(), "between": facts}
    if base.source.get("derived"):
        provenance["derived"] = base.source["derived"]
    return Delta(name or f"{other.name}-{base.name}", parts, provenance=provenance)


def _pairs(base: Base, other: Base) -> Iterator[tuple[Site, Site]]:
    """Layers with tensors, in both. Raises BaseMismatch for another architecture."""
    mine, theirs = (
        {n: tuple(t.shape) for n, t in b.model.state_dict().items() if isinstance(t, Tensor)} for b in (base, other)
    )
    wrong = [
        f"{n}: {mine.get(n, 'missing')} here, {theirs.get(n, 'missing')} there"
        for n in {**mine, **theirs}
        if mine.get(n) != theirs.get(n)
    ]
    if wrong:
        hint = "rows for new tokens must be added to the base first, in the order of the other's token strings\n    "
        raise BaseMismatch(
            f"{base.name!r} and {other.name!r} are not of one shape", hint=hint + "\n    ".join(wrong[:5])
        )
    for site in base.sites.all():
        if site.kind in KINDS and not site.inside:
            yield site, other.sites.of(site.path, site.kind)


def _own(site: Site) -> list[Tensor]:
    """The tensors of the layer's module, and of those it is made of."""
    return [t for m in site.module.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def _outside(base: Base, other: Base, covered: set[int]) -> list[str]:
    """Names of stored tensors that differ and belong to no layer; counters of integers are left as they are."""
    mine = {n: t for n, t in base.model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    theirs = other.model.state_dict(keep_vars=True)
    return [
        n
        for n, t in mine.items()
        if id(t) not in covered and t.is_floating_point() and not torch.equal(t, theirs[n].to(t))
    ]


def _changes(
    base: Base, pairs: list[tuple[Site, Site]], exact: bool, counts: dict[str, int]
) -> Iterator[tuple[Place, Update]]:
    done: set[str] = set()
    for site, twin in pairs:
        old, new = site.params(), twin.params()
        for n, t in old.items():
            if n == "weight" and site.path in done:
                continue
            if n not in new or n not in ("weight", "bias", *STATISTICS) or not t.is_floating_point():
                if t.is_floating_point() and n in new and not torch.equal(t, new[n].to(t)):
                    raise UsageError("differs and no method holds a change of it", where=f"{site.path}.{n}")
                continue
            # where the other model unties what is tied here, each side has its own change
            tied = site.tied if n == "weight" and set(site.tied) == set(twin.tied) else ()
            done.update(tied)
            a, b = wide(t.detach()), wide(new[n].detach()).to(t.device)
            d = b - a
            counts["entries"] += d.numel()
            counts["zero"] += int((d == 0).sum())
            back = (a + d).to(new[n].dtype) == new[n].detach().to(t.device)
            if exact and not bool(back.all()):
                d = b.double() - a.double()
                back = (a + d).to(new[n].dtype) == new[n].detach().to(t.device)
            counts["inexact"] += int((~back).sum())
            yield Place(site.path, n, tuple(d.shape), site.kind, tied=tied), Dense(d)
