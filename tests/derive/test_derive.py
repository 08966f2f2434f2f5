# SPDX-License-Identifier: Apache-2.0
"""Derived bases as such: records, digests, repetition, files, and deltas bound to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.derive import RECIPES, Made, derive, recipe
from tunesmith.core.errors import BaseMismatch, DeltaError, UsageError
from tunesmith.core.fingerprint import Fingerprint
from tunesmith.core.toys import ToyLM, toys
from tunesmith.derive import (
    LQ,
    Densify,
    Factorise,
    LoftQ,
    Quantise,
    Schedule,
    Sparsify,
    again,
    load_derived,
    lq_lora,
    quantise,
    records,
    save_derived,
    sparsify,
    train_own,
)  # fmt: skip

EACH: list[Any] = [
    Factorise(ratio=1.5), Sparsify(share=0.5, seed=2), Quantise(), Quantise(bits=(2, 4), budget=3.4), LQ(rank=2, bits=(2, 4), block=(16,), budget=3.5),
    LoftQ(rank=2),
]  # fmt: skip


def names(value: Any) -> str:
    return value.info.name if hasattr(value, "info") else str(value)


@pytest.mark.parametrize("how", EACH, ids=names)
def test_the_record_says_how_and_the_same_recipe_gives_the_same_base(lm: Base, how: Any) -> None:
    before = lm.digest(), lm.fingerprint.digest
    one, two = derive(lm, how), derive(toys()[0], how)
    (record,) = one.source["derived"]
    assert record["recipe"] == how.info.name and record["parent"] == lm.fingerprint.digest
    assert record["options"].keys() == {f for f in type(how).__dataclass_fields__}
    assert records(two) == [record] and two.digest() == one.digest()
    assert one.fingerprint.digest == two.fingerprint.digest != lm.fingerprint.digest
    assert (lm.digest(), Fingerprint.from_dict(lm.fingerprint.to_dict()).digest) == before
    assert not lm.source.get("derived")
    json.dumps(record)
    repeated = again(toys()[0], json.loads(json.dumps(records(one))))
    assert repeated.digest() == one.digest()
    assert derive(toys(seed=1)[0], how).source["derived"][0]["digest"] != record["digest"]


def test_another_parent_is_refused(lm: Base) -> None:
    steps = records(quantise(lm))
    with pytest.raises(BaseMismatch, match="was run on"):
        again(toys(seed=1)[0], steps)
    with pytest.raises(BaseMismatch, match="was run on"):
        again(quantise(lm), steps)


def test_bases_are_derived_from_derived_ones(lm: Base) -> None:
    base = derive(derive(lm, Factorise(ratio=1.5)), Sparsify(share=0.5, targets="first"))
    one, two = records(base)
    assert (one["recipe"], two["recipe"]) == ("factorise", "sparsify") and one["parent"] == lm.fingerprint.digest
    assert two["parent"] == derive(lm, Factorise(ratio=1.5)).fingerprint.digest
    packed = quantise(base, targets="re:(first|second)$", block=16)
    assert torch.isfinite(packed.probe_outputs()).all()
    assert again(toys()[0], records(packed)).digest() == packed.digest()


def test_what_training_or_data_made_is_not_repeated_but_loaded(lm: Base, tmp_path: Path) -> None:
    ids = lm.probe()["input_ids"]  # type: ignore[index,call-overload]
    trained = train_own(
        sparsify(lm, 0.5), lambda i: ids, lambda m, b: m(b)["logits"].square().mean(), Schedule(3, 1e-2)
    ).base
    with pytest.raises(UsageError, match="cannot be run again: training"):
        again(lm, records(trained))
    save_derived(trained, tmp_path / "t")
    back = load_derived(tmp_path / "t", lm)
    assert back.digest() == trained.digest() and records(back) == records(trained)
    assert lm.digest() == toys()[0].digest(), "loading leaves the parent's tensors alone"


@pytest.mark.parametrize("how", EACH, ids=names)
def test_files_hold_what_differs_and_give_the_base_back(lm: Base, how: Any, tmp_path: Path) -> None:
    base = derive(lm, how)
    place = save_derived(base, tmp_path / "b")
    stored = load_file(place / "derived.safetensors")
    assert not any(k.startswith(("embed", "norm", "head")) for k in stored)
    back = load_derived(place, toys()[0])
    assert back.digest() == base.digest() and back.fingerprint.digest == base.fingerprint.digest
    assert torch.equal(back.probe_outputs(), base.probe_outputs()) and records(back) == records(base)
    again_saved = save_derived(back, place)
    assert again_saved == place and sorted(p.name for p in place.iterdir()) == ["derived.json", "derived.safetensors"]


def test_a_derived_base_opens_by_its_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    base = ts.load(tmp_path / "model", dtype="fp32")
    packed, delta = lq_lora(base, rank=2, budget=0, bits=4, block=16)
    save_derived(packed, tmp_path / "packed")
    delta.save(tmp_path / "delta")
    opened = ts.load(tmp_path / "packed")
    loaded = ts.Delta.load(tmp_path / "delta", opened)
    with opened.using(loaded), packed.using(delta):
        assert torch.equal(opened.probe_outputs(), packed.probe_outputs())
    half = ts.load(tmp_path / "packed", dtype="bf16")
    assert half.probe_outputs().dtype == torch.bfloat16


def test_a_delta_belongs_to_its_derived_base(lm: Base, tmp_path: Path) -> None:
    packed, delta = lq_lora(lm, rank=2, budget=0, bits=4, block=16)
    assert delta.provenance["derived"] == records(packed)
    delta.save(tmp_path / "d")
    for other in (lm, quantise(lm), lq_lora(lm, rank=2, budget=0, bits=3, block=16)[0]):
        with pytest.raises(BaseMismatch):
            ts.Delta.load(tmp_path / "d", other)
    again_made = again(lm, ts.Delta.load(tmp_path / "d").provenance["derived"])
    loaded = ts.Delta.load(tmp_path / "d", again_made)
    assert loaded.digest == delta.digest


def test_damaged_files_are_refused(lm: Base, tmp_path: Path) -> None:
    place = save_derived(quantise(lm), tmp_path / "b")
    with pytest.raises(BaseMismatch):
        load_derived(place, toys(seed=1)[0])
    head, tensors = (place / "derived.json").read_text(), load_file(place / "derived.safetensors")

    def broken(text: str | None = None, change: dict[str, torch.Tensor] | None = None) -> None:
        (place / "derived.json").write_text(head if text is None else text)
        save_file({**tensors, **(change or {})}, place / "derived.safetensors", metadata={"format": "pt"})
        with pytest.raises(DeltaError):
            load_derived(place, lm)

    some = next(iter(tensors))
    broken(change={some: tensors[some].clone().zero_()})
    broken(change={"extra": torch.zeros(1)})
    broken("{}")
    broken(head.replace("quantised", "unheard-of"))
    broken(head.replace('"layers.0.attention.q"', '"layers.9.attention.q"'))
    (place / "derived.safetensors").unlink()
    with pytest.raises(DeltaError):
        load_derived(place, lm)


def test_saving_refuses_what_it_must(lm: Base, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not derived"):
        save_derived(lm, tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else"):
        save_derived(quantise(lm), tmp_path / "full")


def test_recipes_are_known_and_checked(lm: Base) -> None:
    assert {r.name for r in RECIPES.all()} >= {"densify", "factorise", "loftq", "lq-lora", "quantise", "sparsify"}
    with pytest.raises(UsageError, match="factorise"):
        RECIPES.get("factorize")
    with pytest.raises(UsageError, match="ratio"):
        Factorise(ration=2.0)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="outside"):
        Sparsify(share=1.0)
    with pytest.raises(UsageError, match="not a recipe"):
        derive(lm, ts.LoRA())
    with pytest.raises(UsageError, match="no mask"):
        derive(lm, Densify())
    with pytest.raises(UsageError, match="must define make"):
        recipe("empty")(type("Empty", (), {}))


def test_a_recipe_of_the_user_s_own(lm: Base) -> None:
    @recipe("halve-head")
    class Halve:
        """Half the output layer."""

        by: float = ts.option(2.0, "divisor", low=1.0, high=10.0)

        def make(self, base: Base, sample: Any) -> Made:
            from tunesmith.core.held import dense_layer

            return Made({"head": dense_layer(base.modules["head"].weight / self.by, None)})

    half = derive(lm, Halve(by=4.0))  # type: ignore[call-arg]
    torch.testing.assert_close(half.probe_outputs(), lm.probe_outputs() / 4)
    assert isinstance(half.model, ToyLM) and half.source["derived"][0]["options"] == {"by": 4.0}
