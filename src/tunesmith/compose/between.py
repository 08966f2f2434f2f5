# SPDX-License-Identifier: Apache-2.0
"""The difference of two model folders as a delta of the first: what fine-tuning did, as something to apply and undo.

    D = W_b - W_a        tensor by tensor, fp32 or wider; held dense, or as the nearest B A of rank r

The nearest matrix of rank r in the Frobenius norm keeps the r largest singular values (Eckart and Young 1936). With
G = D^T D = V S^2 V^T in fp64 it is (D V_r) V_r^T, so only the smaller side of D is decomposed; its relative error is
sqrt(1 - sum_r s_i^2 / ||D||^2). Norms, biases and matrices with no more than r rows or columns stay dense.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.compose.folders import ModelFolder
from tunesmith.core import method as methods
from tunesmith.core.algebra import wide
from tunesmith.core.delta import Part
from tunesmith.core.errors import UsageError, nearest
from tunesmith.core.fingerprint import Fingerprint, sample, settings
from tunesmith.core.sites import WEIGHTED, Site, find_sites
from tunesmith.core.store import Saved
from tunesmith.core.store_stream import PlannedTensor, save_streamed


@dataclass(frozen=True)
class Between:
    """What was written: the saved delta, sites by part, and how well it gives the second model back.

    `largest` is the largest absolute difference of an entry, `gap` the largest |a + delta - b| over what is held dense,
    `errors` the relative Frobenius error of every low-rank tensor and `error` that of all of the difference.
    """

    saved: Saved
    sites: dict[str, int]
    largest: float
    gap: float
    error: float
    errors: dict[str, float] = field(default_factory=dict, repr=False)
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = ", ".join(f"{n} sites {name}" for name, n in self.sites.items())
        fit = f", relative error {self.error:.2%}" if self.errors else f", gap to the second model {self.gap:.1e}"
        return (
            f"{count}; largest difference {self.largest:.3g}{fit}, {self.saved.bytes:,} bytes, {self.saved.digest[:12]}"
        )


def between_folders(
    a: str | os.PathLike[str] | ModelFolder,
    b: str | os.PathLike[str] | ModelFolder,
    out: str | Path,
    rank: int | None = None,
    *,
    name: str | None = None,
) -> Between:
    """Write `b - a` as a delta folder for the base `a`, one tensor at a time.

    Args:
        rank: hold matrices as the nearest product of this rank; None keeps them dense.
        name: of the delta; the folder's by default.
    Raises UsageError for folders of other architectures or shapes, for differences that no site can hold (buffers,
    parameters of the model itself), and for two models that are equal.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"rank must be at least 1, not {rank}")
    first = a if isinstance(a, ModelFolder) else ModelFolder(a)
    second = b if isinstance(b, ModelFolder) else ModelFolder(b)
    try:
        return _Work(first, second, rank).run(Path(out), name)
    finally:
        first.close()
        second.close()


def skeleton_of(folder: ModelFolder) -> nn.Module:
    """The module tree of a transformers folder on the meta device, with no memory behind it. Raises UsageError."""
    import transformers

    names = folder.config.get("architectures") or []
    cls = getattr(transformers, str(names[0]), None) if names else None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        what = f"architecture {names[0]!r} is not one of transformers" if names else "config.json names no architecture"
        raise UsageError(what, where=str(folder.path), hint="code that comes with a model is never run")
    try:
        config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            return cls(config).eval()
    except Exception as e:  # a config is an untrusted file, and the library raises nearly any class on it
        what = f"no model can be made from its config: {type(e).__name__}: {str(e)[:200]}"
        raise UsageError(what, where=str(folder.path)) from None


class _Work:
    """One difference: which tensors differ, which part holds each, and their values."""

    def __init__(self, a: ModelFolder, b: ModelFolder, rank: int | None) -> None:
        self.a, self.b, self.rank = a, b, rank
        self.model = skeleton_of(a)
        self.state = dict(self.model.state_dict(keep_vars=True))
        self.partners: dict[int, list[str]] = {}
        for n, t in self.state.items():
            self.partners.setdefault(id(t), []).append(n)
        for key in ("model_type", "architectures"):
            if a.config.get(key) != b.config.get(key):
                what = f"is another architecture: {key} {b.config.get(key)!r}, not {a.config.get(key)!r}"
                raise UsageError(what, where=str(b.path))
        self.left_out = tuple(sorted({n for f in (a, b) for n in f.tensors} - {self.stored(n, a) for n in self.state}))
        self.changed = {n for n in self.state if self.differs(n)}
        if not self.changed:
            raise UsageError(
                "the two models are equal", where=f"{a.path} and {b.path}", hint="there is nothing to hold"
            )

    def stored(self, name: str, folder: ModelFolder) -> str:
        """The name that a tensor of the model has in a folder: its own, a tied partner's, or without the head's prefix."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '') or '-'}."
        for n in (name, *self.partners[id(self.state[name])]):
            for other in (n, n.removeprefix(prefix), prefix + n):
                if other in folder.tensors:
                    return other
        hint = nearest(name, folder.tensors)
        raise UsageError(
            f"has no tensor for {name!r} of {type(self.model).__name__}", where=str(folder.path), hint=hint
        )

    def differs(self, name: str) -> bool:
        """Whether the folders differ there. Raises UsageError for another shape, or a head that only one of them ties."""
        x, y = self.stored(name, self.a), self.stored(name, self.b)
        own, other = self.a.tensors[x], self.b.tensors[y]
        shape = tuple(self.state[name].shape)
        for f, e in ((self.a, own), (self.b, other)):
            if e.shape != shape:
                what = f"{e.name!r} has shape {list(e.shape)}, the model needs {list(shape)}"
                raise UsageError(what, where=str(f.path), hint="resize both token tables to one vocabulary first")
        group = self.partners[id(self.state[name])]
        for f in (self.a, self.b):
            held = [n for n in group if n in f.tensors]
            for n in held[1:]:
                if not torch.equal(f.read(n), f.read(held[0])):
                    what = f"{n!r} and {held[0]!r} differ, but {self.a.path} ties them"
                    raise UsageError(what, where=str(f.path), hint="untie the first model and save it again")
        left, right = self.a.read(x), self.b.read(y)
        if left.dtype == right.dtype:
            return not torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
        return not torch.equal(wide(left), wide(right)) if left.is_floating_point() else not torch.equal(left, right)

    def difference(self, name: str, *, flip: bool = False) -> tuple[Tensor, float]:
        """b - a in canonical orientation, and the largest |a + (b - a) - b|. Raises UsageError for NaN."""
        left, right = (wide(f.read(self.stored(name, f))) for f in (self.a, self.b))
        change = right - left
        if not bool(torch.isfinite(change).all()):
            raise UsageError("holds NaN or infinity", where=f"{self.a.path} or {self.b.path}: {name}")
        gap = float((left.add_(change)).sub_(right).abs_().max()) if change.numel() else 0.0
        return (change.T.contiguous() if flip else change), gap

    def run(self, out: Path, name: str | None) -> Between:
        parts = self.parts()
        label = name or out.resolve().name
        found = _Found()
        facts = {
            "base": self.fingerprint().to_dict(), "source": {"kind": "folder", "location": str(self.a.path)},
            "between": {
                "first": self.a.name, "second": self.b.name, "first_digest": self.a.digest,
                "second_digest": self.b.digest, "rank": self.rank,
            },
        }  # fmt: skip
        facts["numeric_base"] = {k: facts["base"][k] for k in ("dtype", "quantisation")}
        saved = save_streamed(out, label, [(p, t) for p, t, _ in parts], self.values(parts, found), provenance=facts)
        error = math.sqrt(found.lost / found.total) if found.total else 0.0
        counts = {p.name: len(p.kind_of) for p, _, _ in parts}
        return Between(saved, counts, found.largest, found.gap, error, found.errors, self.left_out)

    def fingerprint(self) -> Fingerprint:
        """The fingerprint that the first model has once loaded."""
        config, quantised = settings(self.model)
        tensors = {n: (tuple(t.shape), sample(self.a.read(self.stored(n, self.a)))) for n, t in self.state.items()}
        dtype = next((e.dtype for e in self.a.tensors.values() if e.dtype.is_floating_point), torch.float32)
        return Fingerprint(self.a.name, config, str(dtype).removeprefix("torch."), quantised, tensors)

    def parts(self) -> list[tuple[Part, list[PlannedTensor], list[Site]]]:
        """The parts that hold every changed tensor: `full`, and with a rank `lora` and `bitfit`. Raises UsageError."""
        sites = [s for s in find_sites(self.model).all() if s.kind in (*WEIGHTED, "norm")]
        first: dict[int, str] = {}
        alias: dict[str, str] = {}
        dense: list[Site] = []
        thin: list[Site] = []
        biased: list[Site] = []
        held: set[str] = set()
        for s in sites:
            names = {n: f"{s.path}.{n}" for n in ("weight", "bias") if f"{s.path}.{n}" in self.state}
            weight = self.state.get(names.get("weight", ""))
            if weight is None:
                continue
            held.update(names.values())
            if first.setdefault(id(weight), s.path) != s.path:
                alias[s.path] = first[id(weight)]
                continue
            moved = {n for n, full in names.items() if full in self.changed}
            if not moved:
                continue
            narrow = self.rank is not None and s.kind in WEIGHTED
            if not narrow or ("weight" in moved and min(s.shape[0], math.prod(s.shape[1:])) <= (self.rank or 0)):
                dense.append(s)
                continue
            if "weight" in moved:
                thin.append(s)
            if "bias" in moved:
                biased.append(s)
        loose = sorted(self.changed - held)
        if loose:
            what = f"{len(loose)} tensors differ that belong to no layer a delta can change, such as {loose[0]!r}"
            raise UsageError(what, where=str(self.b.path), hint="buffers and bare parameters are not held by a delta")
        made = []
        r = self.rank or 1
        for method, options, chosen in (
            ("full", {}, dense), ("lora", {"rank": r, "alpha": float(r), "targets": "everything"}, thin),
            ("bitfit", {}, biased),
        ):  # fmt: skip
            if chosen:
                kept = {s.path for s in chosen}
                some = {o: p for o, p in alias.items() if p in kept} if method != "bitfit" else {}
                part = Part(methods.build(method, options), [(s.path, s.kind) for s in chosen], alias=some)
                made.append((part, [t for s in chosen for t in self.planned(method, s)], chosen))
        return made

    def planned(self, method: str, s: Site) -> list[PlannedTensor]:
        def dtype(n: str) -> torch.dtype:
            kinds = [f.tensors[self.stored(f"{s.path}.{n}", f)].dtype for f in (self.a, self.b)]
            return torch.float64 if torch.float64 in kinds else torch.float32

        if method == "lora":
            r, columns = self.rank or 1, math.prod(s.shape[1:])
            kind = dtype("weight")
            return [
                PlannedTensor(s.path, "A", kind, (r, columns)), PlannedTensor(s.path, "B", kind, (s.shape[0], r))
            ]  # fmt: skip
        names = ("weight", "bias") if method == "full" else ("bias",)
        out = []
        for n in names:
            if f"{s.path}.{n}" in self.state:
                shape = tuple(self.state[f"{s.path}.{n}"].shape)
                turned = shape[::-1] if n == "weight" and s.transposed else shape
                out.append(PlannedTensor(s.path, n, dtype(n), turned))
        return out

    def values(self, parts: list[tuple[Part, list[PlannedTensor], list[Site]]], found: _Found) -> Iterator[Tensor]:
        """The tensors in the planned order."""
        for _, planned, sites in parts:
            at = {s.path: s for s in sites}
            for t in planned:
                s = at[t.path]
                if t.name == "B":
                    continue  # comes with A
                name = "weight" if t.name == "A" else t.name
                change, gap = self.difference(f"{s.path}.{name}", flip=name == "weight" and s.transposed)
                found.largest = max(found.largest, float(change.abs().max()))
                power = float(change.double().pow(2).sum())
                found.total += power
                if t.name != "A":
                    found.gap = max(found.gap, gap)
                    yield change
                    continue
                B, A, lost = nearest_product(change.flatten(1), self.rank or 1)
                found.lost += lost
                found.errors[s.path] = math.sqrt(lost / power)
                yield A.to(t.dtype).contiguous()
                yield B.to(t.dtype).contiguous()


@dataclass
class _Found:
    largest: float = 0.0
    gap: float = 0.0
    total: float = 0.0
    lost: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)


def nearest_product(D: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """B [m, r] and A [r, n] with B A nearest to D [m, n] in the Frobenius norm, and the squared error, in fp64.

    Both factors get the square root of each singular value.
    """
    tall = D.shape[0] >= D.shape[1]
    X: Any = D.double() if tall else D.double().T  # [long, short]
    values, vectors = torch.linalg.eigh(X.T @ X)  # rising
    V = vectors[:, -r:].flip(1)  # [short, r]
    s = values[-r:].flip(0).clamp_min(0).sqrt()
    left = X @ V  # [long, r] = U S
    root = s.sqrt().clamp_min(torch.finfo(torch.float64).tiny ** 0.25)
    lost = max(0.0, float(X.pow(2).sum() - left.pow(2).sum()))
    B, A = left / root, (V * root).T
    return (B, A, lost) if tall else (A.T, B.T, lost)
