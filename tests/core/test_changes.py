# SPDX-License-Identifier: Apache-2.0
"""What deltas do to parameters: equal to merging, each tensor once, the base untouched."""

from __future__ import annotations

import pytest
import torch

import tunesmith as ts
from tunesmith.core.algebra import Dense, LowRank, Sum
from tunesmith.core.base import Base
from tunesmith.core.changes import changes, elsewhere
from tunesmith.core.delta import Delta
from tunesmith.core.errors import BaseMismatch, UsageError
from tunesmith.core.method import methods
from tunesmith.core.sample import probe_sample
from tunesmith.core.toys import toys


def moved(base: Base, *methods_: object, seed: int = 0) -> Delta:
    delta = Delta.create(base, *methods_, seed=seed)
    g = torch.Generator().manual_seed(seed)
    for _, t in delta.items():
        if t.requires_grad:
            t.data += 0.1 * torch.randn(t.shape, generator=g)
    return delta


def as_merged(base: Base, *deltas: object) -> dict[str, torch.Tensor]:
    before, after = base.model.state_dict(), base.merged(*deltas).model.state_dict()
    was = {k: before.get(k, torch.zeros_like(v)) for k, v in after.items()}  # a layer may gain a bias
    return {k: v.double() - was[k].double() for k, v in after.items() if not torch.equal(v, was[k])}


# Tests register toy methods of their own, which are here or not by the order of collecting.
OURS = [i for i in methods() if i.cls.__module__.startswith("tunesmith.")]


@pytest.mark.parametrize("name", [i.name for i in OURS if i.mergeable and i.carrier in ("weight", "hidden")])
def test_they_are_what_merging_does_for_every_method_that_merges(name: str) -> None:
    info = next(i for i in methods() if i.name == name)
    for base in toys():
        if base.name == "toy-tied-lm":
            continue
        try:
            delta = Delta.create(base, info.cls.toy(), sample=probe_sample(base))
        except UsageError:
            continue
        for _, t in delta.items():
            if t.requires_grad:
                t.data += 0.05 * torch.randn(t.shape)
        digest = base.digest()
        wanted = as_merged(base, delta)
        found = {c.key: c.update.dense().double() for c in changes(base, delta)}
        assert set(wanted) <= set(found)
        for key, change in found.items():
            torch.testing.assert_close(change, wanted.get(key, torch.zeros_like(change)), atol=2e-5, rtol=1e-4)
        assert base.digest() == digest
        return
    pytest.skip("no toy base fits the method alone")


def test_additive_parts_stay_lazy_and_strengths_count() -> None:
    base = toys()[0]
    a, b = moved(base, ts.LoRA(rank=2), seed=1), moved(base, ts.LoRA(rank=3), seed=2)
    one = {c.key: c.update for c in changes(base, a)}
    assert all(isinstance(u, LowRank) and not u.B.requires_grad for u in one.values())
    both = {c.key: c.update for c in changes(base, a.at(0.5), b)}
    assert all(isinstance(u, Sum) for u in both.values())
    key = "layers.0.attention.q.weight"
    other = {c.key: c.update for c in changes(base, b)}[key]
    torch.testing.assert_close(both[key].dense(), 0.5 * one[key].dense() + other.dense())
    assert [c.key for c in changes(base, a)] == [k for k in base.model.state_dict() if k in one]
    assert not list(changes(base, a.at(0)))


def test_sites_can_be_chosen_and_before_is_the_base() -> None:
    base = toys()[0]
    delta = moved(base, ts.LoRA(rank=2))
    (only,) = changes(base, delta, only=lambda s: s.path == "layers.1.up")
    assert only.key == "layers.1.up.weight" and torch.equal(only.before(), base.modules["layers.1.up"].weight)


def test_a_tied_weight_comes_once() -> None:
    base = toys()[1]
    both = moved(base, ts.LoRA(rank=2, targets="embed"))
    assert [c.key for c in changes(base, both)] == ["embed.weight"]
    untied = Delta.create(base, ts.LoRA(rank=2, targets="head"), tied="untie")
    assert [c.key for c in changes(base, untied)] == ["head.weight"]


def test_functions_of_the_weight_are_dense_differences_also_in_half_precision() -> None:
    base = toys()[0]
    base.model.bfloat16()
    delta = moved(base, ts.DoRA(rank=2, targets="layers.0.up"))
    (one,) = changes(base, delta)
    assert isinstance(one.update, Dense) and one.update.dense().dtype == torch.float32
    assert float(one.update.dense().abs().max()) > 0


def test_parts_that_are_no_parameters_are_refused_or_named() -> None:
    base = toys()[0]
    delta = moved(base, ts.LoRA(rank=2, targets="q"), ts.PrefixTuning(tokens=2))
    assert list(elsewhere(base, delta)) == ["prefix-tuning"]
    with pytest.raises(UsageError, match="prefix-tuning.*no change of a parameter"):
        list(changes(base, delta))
    assert len(list(changes(base, delta, strict=False))) == 2


def test_a_delta_of_another_base_is_refused() -> None:
    delta = moved(toys(1)[0], ts.LoRA(rank=2))
    with pytest.raises(BaseMismatch):
        list(changes(toys(0)[0], delta))


def test_depth_of_every_parameter() -> None:
    base = toys()[0]
    sites = base.sites
    assert sites.depth_of("layers.1.attention.q.weight") == 1 and sites.depth_of("layers.0.norm1.bias") == 0
    assert sites.depth_of("embed.weight") == 0 and sites.depth_of("head.weight") == 1
    assert sites.depth_of("layers.1.something_new") == 1
    assert sites.block_of("layers.1.up.weight") == "layers.1" and sites.block_of("head.weight") is None
    for name, _ in base.model.named_parameters():
        assert sites.depth_of(name) == sites[name.rpartition(".")[0]].depth
    with pytest.raises(UsageError, match="no module around"):
        sites.depth_of("layerz.1.up.weight")
