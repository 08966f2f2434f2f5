# SPDX-License-Identifier: Apache-2.0
"""The laws over every registered combiner, on low-rank, sparse, dense, Kronecker and mixed sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compose_cases import FORMS, dense, form, gap

import tunesmith as ts
from tunesmith.compose import DeltaChanges, merge
from tunesmith.core.algebra import Dense, Update
from tunesmith.core.base import Base
from tunesmith.core.combine import COMBINERS, Place, combined
from tunesmith.core.delta import Delta
from tunesmith.core.registry import Info, option
from tunesmith.core.toys import toys

ALL = COMBINERS.all()
LAWS = ("one is itself", "order", "linear", "zero weight", "saved")
BASE = toys()[0]
NEAR = 2e-6
each = pytest.mark.parametrize("info", ALL, ids=lambda i: i.name)
every_form = pytest.mark.parametrize("which", FORMS)


def sources(info: Info, which: str, base: Base = BASE) -> list[Delta]:
    return form(base, which)[: info.facts.get("most")]


def test_the_registry_is_what_the_package_exports() -> None:
    names = {i.cls.__name__ for i in ALL}
    assert names <= set(ts.compose.__all__) and len(names) == len(ALL)
    for info in ALL:
        assert info.paper and info.summary
        assert set(info.facts.get("expected", {})) <= set(LAWS)
        assert info.facts.get("linear") or "linear" in info.facts["expected"], "say whether it is linear"


@each
@every_form
def test_one_is_itself(info: Info, which: str) -> None:
    """With the options at which it drops nothing, one source of weight 1 comes back."""
    delta = form(BASE, which)[0]
    made = merge(BASE, [delta], info.cls(**info.facts["whole"]))
    if "one is itself" in info.facts.get("expected", {}) and not info.facts["whole"]:
        assert gap(dense(BASE, made), dense(BASE, delta)) > NEAR, "it is declared not to hold"
    else:
        assert gap(dense(BASE, made), dense(BASE, delta)) < NEAR


@each
@every_form
def test_order_does_not_matter(info: Info, which: str) -> None:
    deltas = sources(info, which)
    weights = [1.0, 0.5, 2.0, 1.5][: len(deltas)]
    if info.name == "model-stock":
        weights = [1.0] * len(deltas)
    one = merge(BASE, deltas, info.name, weights, seed=3)
    other = merge(BASE, deltas[::-1], info.name, weights[::-1], seed=3)
    differs = gap(dense(BASE, one), dense(BASE, other)) >= NEAR
    assert differs == ("order" in info.facts.get("expected", {})), info.name


@each
def test_linear_in_the_changes_as_declared(info: Info) -> None:
    """The second difference of combine(a + s c, b) in s is zero, or is not where the combiner says so."""
    a, b = form(BASE, "dense")
    c = form(BASE, "mixed")[0]
    moved = [merge(BASE, [a, c], "task-arithmetic", [1.0, s], name="moved") for s in (1e-3, 1.0, 2.0 - 1e-3)]
    steps = [dense(BASE, merge(BASE, [m, b], info.name)) for m in moved]
    zero = torch.zeros(())
    keys = {k for s in steps for k in s}
    x, y, z = ({k: s.get(k, [zero])[0] for k in keys} for s in steps)
    bent = max(float((x[k] - 2 * y[k] + z[k]).abs().max()) for k in keys)
    size = max(float(t.abs().max()) for t in y.values())
    assert (bent / size < NEAR) == bool(info.facts.get("linear")), f"{info.name}: second difference {bent / size:.1e}"


class Densely:
    """The same changes as plain fp64 matrices."""

    def __init__(self, changes: DeltaChanges) -> None:
        self.changes, self.names = changes, changes.names

    def places(self) -> Iterator[Place]:
        for p in self.changes.places():
            yield replace(p, base=lambda p=p: p.base().double())

    def at(self, place: Place) -> list[Update | None]:
        return [None if u is None else Dense(u.dense().double()) for u in self.changes.at(place)]


@each
@every_form
def test_the_form_of_a_change_does_not_matter(info: Info, which: str) -> None:
    """Factors, entries and products give what dense fp64 matrices give."""
    changes = DeltaChanges(BASE, sources(info, which))
    weights = [1.0] * len(changes.names)
    how = info.cls()
    lazily, densely = (
        {p.key: u.dense().double() for p, u in combined(how, c, weights, seed=2)} for c in (changes, Densely(changes))
    )
    size = max(float(t.abs().max()) for t in densely.values())
    assert set(lazily) == set(densely)
    assert all(float((lazily[k] - t).abs().max()) < NEAR * size for k, t in densely.items())
    if hasattr(how, "coefficients"):
        c = how.coefficients(weights)
        for key, rows in dense(BASE, *sources(info, which)).items():
            want = sum(x * t for x, t in zip(c, rows, strict=True))
            assert float((densely[key] - want).abs().max()) < 1e-12


@each
@every_form
def test_zero_weight_is_nothing(info: Info, which: str) -> None:
    deltas = sources(info, which)
    with_it = merge(BASE, deltas, info.name, [1.0] * (len(deltas) - 1) + [0.0], seed=1)
    without = merge(BASE, deltas[:-1], info.name, seed=1)
    assert with_it.digest == without.digest


@each
@every_form
def test_saves_loads_merges_and_undoes_like_any_other(info: Info, which: str, tmp_path: Path) -> None:
    before, digest = BASE.probe_outputs(), BASE.digest()
    made = merge(BASE, sources(info, which), info.name, seed=5)
    made.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d", BASE)
    assert again.digest == made.digest and again.provenance["composed"] == made.provenance["composed"]
    with BASE.using(made):
        out = BASE.probe_outputs()
    with BASE.using(again):
        assert torch.equal(BASE.probe_outputs(), out)
    merged = BASE.merged(made).probe_outputs()
    assert float((merged - out).abs().max()) < 2e-5 * max(1.0, float(out.abs().max()))
    assert not torch.equal(out, before) and torch.equal(BASE.probe_outputs(), before) and BASE.digest() == digest


@each
def test_the_sources_are_left_as_they_were_and_the_seed_decides(info: Info) -> None:
    deltas = sources(info, "mixed")
    digests = [d.digest for d in deltas]
    one, two = (merge(BASE, deltas, info.name, seed=4) for _ in range(2))
    assert one.digest == two.digest and [d.digest for d in deltas] == digests
    facts = one.provenance["composed"]
    assert facts["combiner"] == info.name and facts["seed"] == 4
    assert [s["digest"] for s in facts["sources"]] == digests
    drawn = info.name.startswith(("dare", "della"))
    assert (merge(BASE, deltas, info.name, seed=5).digest != one.digest) == drawn


@pytest.mark.parametrize("at", range(4), ids=[b.name for b in toys()])
@pytest.mark.parametrize("name", ["linear", "ties", "pcb", "breadcrumbs", "karcher"])
def test_every_toy_base(at: int, name: str) -> None:
    """Convolutions, norms, embeddings and ties: one dense and one low-rank source."""
    base = toys()[at]
    low = Delta.create(base, ts.LoRA(rank=2, targets="all-weights"), name="low", seed=1)
    plain = Delta.create(base, ts.Full(), name="plain", seed=2)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for d in (low, plain):
            for _, t in d.items():
                t.add_(0.1 * torch.randn(t.shape, generator=g))
    made = merge(base, [low, plain], name)
    with base.using(made):
        live = base.probe_outputs()
    assert float((base.merged(made).probe_outputs() - live).abs().max()) < 1e-4 * max(1.0, float(live.abs().max()))


def test_a_combiner_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registering is enough: it merges by name, and a wrong option names the right one."""
    monkeypatch.setattr(COMBINERS, "_known", dict(COMBINERS._known))

    @ts.compose.COMBINERS.register("loudest", paper="none")
    class Loudest:
        """The first change alone."""

        gain: float = option(1.0, "what it is scaled by")

        def combine(self, at, changes, weights, now):  # type: ignore[no-untyped-def]
            return None if changes[0] is None else changes[0].scaled(self.gain)

    deltas = form(BASE, "low-rank")
    made = merge(BASE, deltas, "loudest:gain=2")
    assert gap(dense(BASE, made), dense(BASE, deltas[0].at(2))) < NEAR
    with pytest.raises(ts.TunesmithError, match="gain"):
        merge(BASE, deltas, "loudest:gian=2")
