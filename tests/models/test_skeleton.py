# SPDX-License-Identifier: Apache-2.0
"""A base without weights has the sites and counts of the real one, and takes no memory for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tunesmith as ts
from tunesmith.core.delta import Delta
from tunesmith.core.errors import ResourceError, UsageError
from tunesmith.derive import Factorise, Quantise, Sparsify, derive, save_derived
from tunesmith.models.skeleton import skeleton
from tunesmith.train.plan import LOADED, OVERHEAD, _memory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_sites_and_counts_are_those_of_the_loaded_model(folder: Path) -> None:
    thin, real = skeleton(str(folder)), ts.load(str(folder))
    assert all(p.device.type == "meta" for p in thin.model.parameters())
    described = [[(s.path, s.kind, s.role, s.shape, s.heads) for s in b.sites.all()] for b in (thin, real)]
    assert described[0] == described[1]
    for method in (ts.LoRA(rank=2), ts.SSF(), ts.PrefixTuning(tokens=3), ts.DoRA(rank=2)):
        assert Delta.create(thin, method).trainable_parameters == Delta.create(real, method).trainable_parameters


@pytest.mark.parametrize(
    "recipe", [Factorise(ratio=2.0), Quantise(bits=(4,)), Sparsify(share=0.5)], ids=["factored", "packed", "sparse"]
)
def test_a_derived_folder_has_the_forms_of_its_layers(folder: Path, tmp_path: Path, recipe: Any) -> None:
    place = save_derived(derive(ts.load(folder), recipe), tmp_path / "derived")
    thin, real = skeleton(place), ts.load(place)
    assert all(t.device.type == "meta" for t in thin.model.state_dict().values())
    sizes = [{k: (t.shape, t.dtype) for k, t in b.model.state_dict().items()} for b in (thin, real)]
    assert sizes[0] == sizes[1] and thin.name == real.name and thin.source["derived"] == real.source["derived"]
    described = [[(s.path, s.kind, s.role, s.shape, s.heads) for s in b.sites.all()] for b in (thin, real)]
    assert described[0] == described[1]
    rank2 = [Delta.create(b, ts.LoRA(rank=2)).trainable_parameters for b in (thin, real)]
    assert rank2[0] == rank2[1]


def test_a_plan_counts_packed_weights_as_they_are_held(tmp_path: Path) -> None:
    from model_folders import llama

    folder = llama(tmp_path / "wide", hidden_size=64, intermediate_size=256)
    packed = save_derived(derive(ts.load(folder), Quantise(bits=(4,))), tmp_path / "packed")
    planned = {}
    for place in (folder, packed):
        base = ts.load(place)
        planned[place] = _memory(skeleton(place), Delta.create(base, ts.LoRA(rank=2)), 0.0)
        held = sum(t.numel() * t.element_size() for t in [*base.model.parameters(), *base.model.buffers()])
        assert planned[place]["load"] - OVERHEAD == round(held * LOADED)
    assert planned[packed]["load"] - OVERHEAD < 0.4 * (planned[folder]["load"] - OVERHEAD)


def test_a_delta_made_on_a_skeleton_does_not_fit_the_real_model(folder: Path) -> None:
    delta = Delta.create(skeleton(str(folder)), ts.LoRA(rank=2))
    with pytest.raises(ts.TunesmithError), ts.load(str(folder)).using(delta):
        pass


def test_unknown_names_and_an_unreachable_hub_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="smolm"):
        skeleton("smolm2-135m-instruct")
    monkeypatch.setattr("tunesmith.models.load._hub_answers", lambda: False)
    with pytest.raises(ResourceError, match="cannot be reached"):
        skeleton("nobody/no-such-model")
