# SPDX-License-Identifier: Apache-2.0
"""Intruder dimensions: leading singular vectors of the changed weight that resemble none of the base's.

    W0 = U0 S0 V0^T, W1 = W0 + D = U1 S1 V1^T        fp32
    m_j = max_i |<u1_j, u0_i>|        over all base vectors, j = 1..k largest of W1
    u1_j is an intruder if m_j < eps

k 10 and eps 0.5 as published. The published code reads left vectors only; with `side="auto"` the side is read on which
the base's vectors span the whole space (left where out <= in), since on the other one m_j can be low for a trivial reason.
Where base singular values are nearly equal their vectors turn freely, so a second score measures u1_j against the space
of all base vectors whose singular value is within `group` of the best match's: `by_space`.

`dampened` scales what was found, W1(lam) = W1 + (lam - 1) sum_j s1_j u1_j v1_j^T, as a delta of its own.

Shuttleworth, Andreas, Torralba and Sharma 2024, arXiv 2410.21228.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.algebra import Update
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, Part, View, clone_part
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding, option, probe
from tunesmith.core.sample import Sample
from tunesmith.core.spectrum import SVD, svd_of
from tunesmith.inspect.places import EVERY, TARGETS, before_after, left_out, matrices, place

SIDES = ("auto", "left", "right")


@dataclass(frozen=True)
class Matched:
    """How well each leading vector of W1 is known to W0: m [k], by_space [k] in 0..1, the side, whether it spans."""

    m: Tensor
    by_space: Tensor
    side: str
    spans: bool


def similarity(W0: SVD, W1: SVD, side: str = "left") -> Tensor:
    """|U1^T U0| [r, r] (or of the right vectors): row j says which base vectors u1_j resembles."""
    return (W1.U.T @ W0.U).abs() if side == "left" else (W1.Vh @ W0.Vh.T).abs()


@torch.no_grad()
def match(W0: SVD, W1: SVD, k: int = 10, side: str = "auto", group: float = 0.05) -> Matched:
    """Scores of the k leading vectors of W1; see the module. Raises UsageError for an unknown side."""
    if side not in SIDES:
        raise UsageError(f"unknown side {side!r}", hint=f"choices: {', '.join(SIDES)}")
    spans = {"left": W0.U.shape[1] == W0.U.shape[0], "right": W0.Vh.shape[0] == W0.Vh.shape[1]}
    if side == "auto":
        side = "left" if spans["left"] else "right"
    cos = similarity(W0, W1.leading(k), side)  # [k, r]
    m, best = cos.max(1)
    near = (W0.S[None] - W0.S[best][:, None]).abs() <= group * W0.S[best][:, None]  # [k, r]
    return Matched(m, (cos.square() * near).sum(1).sqrt(), side, spans[side])


@torch.no_grad()
def overlap(a: Update, b: Update, k: int = 10) -> float:
    """||U_a^T U_b||_F^2 / k of the k leading left vectors of two changes of one tensor (fewer where one has fewer)."""
    Ua, Ub = svd_of(a).U[:, :k], svd_of(b).U[:, :k]
    return float((Ua.T.double() @ Ub.double()).square().sum()) / min(Ua.shape[1], Ub.shape[1])


@probe("intruders", paper="2410.21228", data=False)
class Intruders:
    """Count leading singular vectors of the changed weights that resemble none of the base's."""

    k: int = option(10, "leading singular vectors of each changed matrix", low=1, high=4096)
    eps: float = option(0.5, "a vector below this cosine to every base vector is an intruder", low=0.0, high=1.0)
    side: str = option("auto", "which singular vectors: the side that spans, or as named", choices=SIDES)
    group: float = option(0.05, "base singular values within this share count as equal in by_space", low=0.0, high=1.0)
    targets: str = option("", TARGETS)
    every: int = option(1, EVERY, low=1, high=10000)

    @torch.no_grad()
    def measure(self, base: Base, delta: Delta | View, sample: Sample | None = None) -> Finding:
        """One row a matrix. Raises UsageError where the delta changes none."""
        rows = []
        for c in matrices(base, delta, self.targets, self.every):
            W0, W1 = before_after(c)
            found = match(W0, SVD(*torch.linalg.svd(W1, full_matrices=False)), self.k, self.side, self.group)
            rows.append({
                **place(c),
                "intruders": int((found.m < self.eps).sum()),
                "by_space": int((found.by_space < self.eps).sum()),
                "at": (found.m < self.eps).nonzero().flatten().tolist(),
                "m": [min(v, 1.0) for v in found.m.tolist()],
                "side": found.side,
                "spans": found.spans,
            })  # fmt: skip
        total, strict = sum(r["intruders"] for r in rows), sum(r["by_space"] for r in rows)
        most = max(rows, key=lambda r: r["intruders"])
        values: dict[str, Any] = {
            "intruders": total, "by_space": strict, "matrices": len(rows),
            "matrices_with": sum(r["intruders"] > 0 for r in rows),
            "per_matrix": total / len(rows), "most_at": most["tensor"] if total else None,
        }  # fmt: skip
        text = (
            f"{total} intruder dimensions among the {self.k} leading vectors of {len(rows)} matrices "
            f"(eps {self.eps:g}); {strict} counting spaces of near-equal singular values as one"
        )
        blind = sorted({r["tensor"] for r in rows if not r["spans"]})
        facts = {"k": self.k, "eps": self.eps, "does_not_span": blind} if blind else {"k": self.k, "eps": self.eps}
        return Finding("intruders", text, values, rows, {**facts, **left_out(base, delta)})


def find_intruders(base: Base, delta: Delta, how: Intruders | None = None) -> dict[str, list[int]]:
    """Which leading components of each changed matrix are intruders, by site path; sites without any are left out."""
    found = (how or Intruders()).measure(base, delta)
    return {str(r["path"]): r["at"] for r in found.rows if r["at"]}


@torch.no_grad()
def dampened(base: Base, delta: Delta, components: Mapping[str, Sequence[int]], lam: float = 0.7) -> Delta:
    """The delta with those singular components of its changed matrices scaled by `lam`.

    `components` maps site paths to component numbers, largest first (`find_intruders` gives the intruders). What is
    taken off is a low-rank part of its own after the delta's, so merging, saving and undoing work as ever; lam = 1 or no
    components give a copy of the delta. Raises UsageError for lam outside 0..1, a site whose matrix the delta does not
    change, or one where another part acts after its weights.
    """
    if not 0 <= lam <= 1:
        raise UsageError(f"lam must be in 0..1, got {lam}", hint="0 removes the components, 1 leaves them")
    out = Delta(delta.name, [clone_part(p) for p in delta.parts], provenance=delta.provenance)
    out.provenance.pop("effect", None)
    out.layout = dict(delta.layout)
    wanted = {p: list(js) for p, js in components.items() if len(js)}
    if not wanted or lam == 1:
        return out
    for p in delta.parts:
        late = [s for s in p.paths if s in wanted and p.info.carrier != "weight"]
        if late:
            raise UsageError(f"{p.name} acts there after the weights, so its components are not theirs", where=late[0])
    r = max(len(js) for js in wanted.values())
    made: dict[str, dict[str, Tensor]] = {}
    kinds: list[tuple[str, str]] = []
    for c in matrices(base, delta, ",".join(f"re:^{_escaped(p)}$" for p in wanted)):
        js = wanted[c.site.path]
        U, S, Vh = torch.linalg.svd(before_after(c)[1], full_matrices=False)
        if max(js) >= len(S) or min(js) < 0:
            raise UsageError(f"there is no component {max(js)}: the matrix has {len(S)}", where=c.key)
        B, A = U.new_zeros(len(U), r), U.new_zeros(r, Vh.shape[1])
        B[:, : len(js)], A[: len(js)] = U[:, js] * ((lam - 1) * S[js]), Vh[js]
        made[c.site.path] = {"A": A, "B": B}
        kinds.append((c.site.path, c.site.kind))
    absent = sorted(set(wanted) - set(made))
    if absent:
        raise UsageError("the delta does not change this matrix", where=absent[0])
    alias = {o: p for part in delta.parts for o, p in part.alias.items() if p in made}
    lora = methods.build("lora", {"rank": r, "alpha": float(r), "targets": ",".join(made)})
    name = next(
        f"dampened{i or ''}"
        for i in range(len(delta.parts) + 1)
        if f"dampened{i or ''}" not in {p.name for p in delta.parts}
    )
    part = Part(lora, kinds, name=name, alias=alias)
    for path, tensors in made.items():
        for key, value in tensors.items():
            part.put(path, key, value, trainable=True)
    out.parts.append(part)
    return out


def _escaped(path: str) -> str:
    """A path as a pattern without commas, which separate targets."""
    return "".join(ch if ch.isalnum() or ch == "_" else "." for ch in path)
