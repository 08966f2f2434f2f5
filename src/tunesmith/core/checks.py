# SPDX-License-Identifier: Apache-2.0
"""The laws every method must keep, public so that anybody can test a method of their own.

    from tunesmith.checks import check_delta
    check_delta(MyMethod)

runs each law on every toy base the method can attach to and raises `LawBroken` naming the law, the base and the
numbers. A method may declare `expected={"law": "reason"}`; such a law is run all the same, and a declaration that fails
on no base is an error. `check_delta(method, bases=[base])` runs the laws on real models.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import BaseMismatch, TunesmithError, UsageError
from tunesmith.core.sample import probe_sample
from tunesmith.core.toys import toys
from tunesmith.core.trace import primary

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 5e-3}


class LawBroken(AssertionError):
    """A method that does not keep a law, or declares falsely."""


@dataclass(frozen=True)
class LawResult:
    """`status` is "kept" or "declared" (an expected failure, see `detail`)."""

    law: str
    base: str
    status: str
    detail: str = ""


def fresh_delta(base: Base, method: Any, seed: int = 0) -> Delta:
    """A delta of one method, set up on the base's probe where the method learns its start from data."""
    sample = probe_sample(base) if methods.observes(method) else None
    return Delta.create(base, method, name="check", seed=seed, sample=sample)


@dataclass
class Case:
    """One method on one base with a delta whose tensors were moved away from their initial values.

    `noise` is the size of that move; deep models need a small one, or rounding drowns what a law compares.
    """

    method: Any
    base: Base
    noise: float = 0.2

    @property
    def info(self) -> methods.MethodInfo:
        return methods.info_of(self.method)

    def fresh(self, seed: int = 0) -> Delta:
        return fresh_delta(self.base, self.method, seed)

    def moved(self, seed: int = 0) -> Delta:
        delta = self.fresh(seed)
        g = torch.Generator().manual_seed(1000 + seed)
        with torch.no_grad():
            for _, t in delta.items():
                if t.requires_grad:
                    t.add_(self.noise * torch.randn(t.shape, generator=g, dtype=t.dtype))
        return delta

    def out(self) -> Tensor:
        return self.base.probe_outputs()

    def rows(self, deltas: list[Any]) -> Tensor:
        """Outputs with one delta for each row of the probe."""
        inputs = self.base.probe()
        with torch.no_grad():
            args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
            out = primary(self.base(*args, deltas=deltas, **kwargs))  # type: ignore[misc]
        assert out is not None
        return out

    def near(self, a: Tensor, b: Tensor, what: str, factor: float = 1.0) -> None:
        a, b = a.detach(), b.detach()
        scale = max(1.0, float(b.abs().max()))
        gap = float((a - b).abs().max()) / scale
        if not gap <= TOLERANCE[self.base.dtype] * factor:
            raise LawBroken(f"{what}: relative gap {gap:.2e}")

    def same(self, a: Tensor, b: Tensor, what: str) -> None:
        if a.shape != b.shape or not torch.equal(a, b):
            gap = float((a - b).abs().max()) if a.shape == b.shape else f"shapes {tuple(a.shape)}, {tuple(b.shape)}"
            raise LawBroken(f"{what}: not bit-identical ({gap})")


def undo_is_exact(c: Case) -> None:
    """1. After a delta is taken off, tensors, outputs, flags and module attributes are as before."""
    before, digest = c.out(), c.base.digest()
    attributes = {p: set(m.__dict__) for p, m in c.base.modules.items()}
    delta = c.moved()
    with c.base.using(delta):
        changed = c.out()
    if changed.shape == before.shape and torch.equal(changed, before):
        raise LawBroken("the delta has no effect, so its undo proves nothing")
    try:
        with c.base.using(delta):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    c.same(c.out(), before, "outputs after undo")
    if c.base.digest() != digest:
        raise LawBroken("weights changed")
    if {p: set(m.__dict__) for p, m in c.base.modules.items()} != attributes:
        raise LawBroken("a module kept an attribute")


def zero_is_nothing(c: Case) -> None:
    """2. Strength 0 is the base bit for bit; a fresh delta is the identity unless declared otherwise."""
    before = c.out()
    with c.base.using(c.moved().at(0)):
        c.same(c.out(), before, "strength 0")
    if c.info.identity_at_init:
        with c.base.using(c.fresh()):
            c.near(c.out(), before, "fresh delta", 0.1)


def one_is_itself(c: Case) -> None:
    """3. Strength 1 is the delta itself; a linear method moves its merged weights in proportion."""
    delta = c.moved()
    with c.base.using(delta):
        whole = c.out()
    with c.base.using(delta.at(1)):
        c.same(c.out(), whole, "strength 1")
    if c.info.strength == "linear" and c.info.mergeable:
        base_w, one, half = (
            dict(b.model.named_parameters()) for b in (c.base, c.base.merged(delta), c.base.merged(delta.at(0.5)))
        )
        held = {f"{x.path}.weight": x.params()["weight"] for x in c.base.sites.all() if x.held}  # dense once merged
        for name, w in one.items():
            old = base_w.get(name, held.get(name, torch.zeros_like(w)))
            c.near(half[name], old + 0.5 * (w - old), f"strength 0.5 of {name}")
    if c.info.mergeable and c.info.merge == "exact" and c.info.strength == "linear":
        with c.base.using(delta.at(0.5)):
            applied = c.out()
        c.near(c.base.merged(delta.at(0.5)).probe_outputs(), applied, "strength 0.5, merged against applied")


def merge_equals_apply(c: Case) -> None:
    """4. Merged weights give the applied outputs, and not the base's; a method that cannot merge says so."""
    delta = c.moved()
    if not c.info.mergeable:
        try:
            c.base.merged(delta)
        except UsageError:
            return
        raise LawBroken("declared live-only, but merged without an error")
    before, digest = c.out(), c.base.digest()
    with c.base.using(delta):
        applied = c.out()
    merged = c.base.merged(delta)
    c.near(merged.probe_outputs(), applied, "merged against applied", 1 if c.info.merge == "exact" else 100)
    if torch.equal(merged.probe_outputs(), before):
        raise LawBroken("the merged model equals the base")
    if c.base.digest() != digest:
        raise LawBroken("merging changed the base")


def save_load_same(c: Case) -> None:
    """5. Saved and loaded, a delta gives the same outputs; another base is refused by name."""
    delta = c.moved()
    with c.base.using(delta):
        before = c.out()
    with tempfile.TemporaryDirectory() as folder:
        delta.save(Path(folder) / "d")
        loaded = Delta.load(Path(folder) / "d", c.base)
    if loaded.digest != delta.digest:
        raise LawBroken("the digest changed on the way through the file")
    with c.base.using(loaded):
        c.same(c.out(), before, "outputs after save and load")
    other = _with_another_tensor(c.base)
    try:
        with other.using(loaded):
            pass
    except BaseMismatch as e:
        if not any(name in str(e) for name in c.base.fingerprint.tensors):
            raise LawBroken("the refusal names no tensor") from None
    else:
        raise LawBroken("a base with other weights was accepted")


def _with_another_tensor(base: Base) -> Base:
    """The base with the values of its largest tensor turned round, everything else shared with it."""
    model = base.merged().model
    owner, name = max(
        ((m, n) for m in model.modules() for n, p in m._parameters.items() if p is not None),
        key=lambda mn: mn[0]._parameters[mn[1]].numel(),  # type: ignore[union-attr]
    )
    owner._parameters[name] = torch.nn.Parameter(-owner._parameters[name].detach(), requires_grad=False)  # type: ignore
    return Base(model, example=base.probe(), name=base.name, family=base.family)


def rows_are_independent(c: Case) -> None:
    """6. A batch in which each row has another delta, or none, equals one row at a time; threads do not mix."""
    a, b = c.moved(0), c.moved(1)
    n = c.out().shape[0]
    mixed = [a, None, b, a.at(0)]
    for start in range(0, len(mixed), max(n, 2)):
        given = [mixed[(start + i) % len(mixed)] for i in range(n)]
        together = c.rows(given)
        for i, d in enumerate(given):
            with c.base.using(d):
                alone = c.out()
            c.near(together[i], alone[i], f"row {i}")
    expected: dict[int, Tensor] = {}
    for i, d in enumerate((a, b)):
        with c.base.using(d):
            expected[i] = c.out()
    if torch.equal(expected[0], expected[1]):
        raise LawBroken("two deltas with other tensors give one output: a row sees the tensors of another")
    wrong: list[str] = []
    gate = threading.Barrier(2)

    def work(i: int, d: Delta) -> None:
        with c.base.using(d):
            gate.wait()
            for _ in range(3):
                if not torch.allclose(c.out(), expected[i], atol=1e-5):
                    wrong.append(f"thread {i} saw another delta")
            gate.wait()

    threads = [threading.Thread(target=work, args=(i, d)) for i, d in enumerate((a, b))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if wrong:
        raise LawBroken(wrong[0])


def same_seed_same_delta(c: Case) -> None:
    """7. The same seed gives the same tensors bit for bit, whatever the global random state."""
    torch.manual_seed(1)
    first = c.fresh(3).digest
    torch.manual_seed(2)
    if c.fresh(3).digest != first:
        raise LawBroken("two deltas from one seed differ")


def only_declared_trains(c: Case) -> None:
    """8. After a step every trainable tensor moved, no frozen one did, and the base has no gradient."""
    delta, digest = c.moved(), c.base.digest()
    trained = {k: t for k, t in delta.items() if t.requires_grad}
    if not trained:
        raise LawBroken("nothing trains")
    old = {k: t.detach().clone() for k, t in delta.items()}
    step = torch.optim.SGD(list(trained.values()), lr=1.0)
    inputs = c.base.probe()
    with c.base.frozen(), c.base.using(delta):
        out = primary(c.base.model(**inputs) if isinstance(inputs, Mapping) else c.base.model(*inputs))  # type: ignore
        assert out is not None
        g = torch.Generator().manual_seed(5)
        ((out * torch.randn(out.shape, generator=g)).sum() + out.square().sum()).backward()
    step.step()
    for key, t in delta.items():
        moved = not torch.equal(t, old[key])
        if moved != t.requires_grad:
            raise LawBroken(f"{key} {'moved though frozen' if moved else 'did not move'}")
    if c.base.digest() != digest or any(p.grad is not None for p in c.base.model.parameters()):
        raise LawBroken("the base took part in training")


def nothing_is_skipped(c: Case) -> None:
    """9. An unknown option or a target that matches nothing is an error that offers a choice."""
    cls = type(c.method)
    try:
        cls(no_such_option=1)
    except UsageError:
        pass
    else:
        raise LawBroken("an unknown option was accepted")
    options = methods.config(c.method)
    if "targets" not in options:
        return
    try:
        fresh_delta(c.base, cls(**{**options, "targets": options["targets"] + ",no_such_target"}))
    except UsageError as e:
        if e.hint is None:
            raise LawBroken("an unmatched target gives no hint") from None
    else:
        raise LawBroken("a target that matches nothing was skipped")


def proof_has_numbers(c: Case) -> None:
    """10. The one-line proof of a delta names bound tensors, effect, bytes and digest."""
    from tunesmith.core.store import proof

    delta = c.moved()
    line = proof(delta, c.base)
    if "\n" in line or delta.digest[:12] not in line or not any(ch.isdigit() for ch in line):
        raise LawBroken(f"not a proof: {line!r}")


LAWS: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (
        undo_is_exact, zero_is_nothing, one_is_itself, merge_equals_apply, save_load_same, rows_are_independent,
        same_seed_same_delta, only_declared_trains, nothing_is_skipped, proof_has_numbers,
    )
}  # fmt: skip


def cases(method: Any, bases: Iterable[Base] | None = None, noise: float = 0.2) -> list[Case]:
    """The toy bases (or the given ones) that a method class or instance can attach to. Raises LawBroken for none."""
    instance = method
    if isinstance(method, type):
        instance = method.toy() if hasattr(method, "toy") else method()
    found, why = [], []
    for base in bases if bases is not None else toys():
        try:
            fresh_delta(base, instance)
        except UsageError as e:
            why.append(f"{base.name}: {e}")
            continue
        found.append(Case(instance, base, noise))
    if not found:
        raise LawBroken("attaches to no base: " + "; ".join(why))
    return found


def check_law(law: str, case: Case) -> LawResult:
    """One law on one case; a law declared not to hold is run too and is "kept" or "declared" as it turns out.

    Raises LawBroken unless kept or declared.
    """
    declared = case.info.expected.get(law)
    try:
        LAWS[law](case)
    except (LawBroken, TunesmithError) as e:
        if declared:
            return LawResult(law, case.base.name, "declared", declared)
        raise LawBroken(f"{case.info.name} breaks {law} on {case.base.name}: {e}") from e
    return LawResult(law, case.base.name, "kept")


def check_delta(method: Any, bases: Iterable[Base] | None = None, noise: float = 0.2) -> list[LawResult]:
    """Run all laws for a method class (its `toy()`) or instance on the toy bases, or on `bases`.

    `noise` is how far the tensors are moved from their first values; a real model of many layers needs about 0.02.
    Returns one result per law and base. Raises LawBroken at the first law broken, and for a law that is declared not to
    hold although it holds on every base.
    """
    found = cases(method, list(bases) if bases is not None else None, noise)
    info = found[0].info
    unknown = set(info.expected) - set(LAWS)
    if unknown:
        raise LawBroken(f"{info.name} declares unknown laws {sorted(unknown)}")
    results = [check_law(law, c) for c in found for law in LAWS]
    for law in info.expected:
        if not any(r.law == law and r.status == "declared" for r in results):
            raise LawBroken(f"{info.name} declares that it breaks {law}, but it keeps it on every base")
    return results
