# SPDX-License-Identifier: Apache-2.0
"""Layers in another form are linear sites: the laws hold on packed and factored bases for the methods we have."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.checks import LAWS, Case, cases, check_law
from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.held import is_held
from tunesmith.core.toys import toys
from tunesmith.derive import factorise, quantise

OURS = [i.name for i in methods.methods() if i.cls.__module__.startswith("tunesmith.deltas.")]
WHOLE = ("lora", "dora", "full", "bitfit", "ia3")
QUICK = ("undo_is_exact", "merge_equals_apply", "save_load_same")


@cache
def derived(form: str) -> Base:
    lm = toys()[0]
    return quantise(lm) if form == "packed" else factorise(lm, 1.5)


@cache
def case(name: str, form: str) -> Case:
    return cases(methods.get(name).cls, [derived(form)])[0]


@pytest.mark.parametrize("form", ["packed", "factored"])
@pytest.mark.parametrize("name", WHOLE)
def test_every_law(name: str, form: str) -> None:
    for law in LAWS:
        assert check_law(law, case(name, form)).status == "kept"


@pytest.mark.parametrize("name", [n for n in OURS if n not in WHOLE])
def test_every_method_attaches_to_packed_layers(name: str) -> None:
    found = case(name, "packed")
    for law in QUICK:
        assert check_law(law, found).status == ("declared" if law in found.info.expected else "kept")


class _Twice(nn.Module):
    """A linear layer of a user's own: W = 2 V."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = 4, 3, None
        self.V = nn.Parameter(torch.randn(3, 4))

    def dense_weight(self) -> Tensor:
        return 2 * self.V

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense_weight().T


def test_a_foreign_module_that_says_its_dense_weight_is_a_linear_site() -> None:
    model = nn.Sequential(_Twice(), nn.Tanh(), nn.Linear(3, 2))
    base = Base(model, example=(torch.randn(5, 4),))
    assert is_held(model[0]) and not is_held(model[2]) and not is_held(model[1])
    site = base.sites["0"]
    assert (site.kind, site.shape, site.held, site.has_bias) == ("linear", (3, 4), True, False)
    torch.testing.assert_close(site.params()["weight"], 2 * model[0].V)
    for method in (ts.LoRA(rank=2, targets="0"), ts.DoRA(rank=2, targets="0")):
        for law in LAWS:
            assert check_law(law, Case(method, base)).status == "kept"
    alone = Base(_Twice(), example=(torch.randn(5, 4),))
    delta = ts.Delta.create(alone, ts.LoRA(rank=2, targets="re:^$"))
    assert type(alone.merged(delta).model) is nn.Linear


def test_parts_of_a_layer_are_in_no_group_and_are_named_alone() -> None:
    base = derived("factored")
    for group in ("all-linear", "everything", "attention", "mlp", "all-weights"):
        assert not any(s.inside for s in base.sites.select(group, ("linear",)))
    assert [s.path for s in base.sites.select("layers.0.gate", ("linear",))] == ["layers.0.gate"]
    assert [s.path for s in base.sites.select("*gate*", ("linear",))] == ["layers.0.gate", "layers.1.gate"]
    assert [s.inside for s in base.sites.select("layers.0.gate.first", ("linear",))] == ["layers.0.gate"]
    assert len(base.sites.select("first", ("linear",))) == sum(is_held(m) for m in base.model.modules())


def test_a_layer_and_its_parts_are_not_changed_at_once() -> None:
    base = derived("factored")
    whole = ts.Delta.create(base, ts.LoRA(rank=2, targets="gate"), name="whole")
    parts = ts.Delta.create(base, ts.Full(targets="first"), name="parts")
    with pytest.raises(UsageError, match="another part acts"), base.using(whole, parts):
        pass
    with pytest.raises(UsageError, match="another part acts"):
        base.merged(parts, whole)
    bias = ts.Delta.create(base, ts.BitFit(targets="gate"), name="bias")
    with torch.no_grad():
        for d in (bias, parts):
            for _, t in d.items():
                t.normal_(std=0.1)
    with base.using(parts, bias):
        applied = base.probe_outputs()
    torch.testing.assert_close(base.merged(parts, bias).probe_outputs(), applied, atol=1e-5, rtol=1e-5)
