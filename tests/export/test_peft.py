# SPDX-License-Identifier: Apache-2.0
"""Exchange with the installed PEFT, both ways: the outputs are the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import BaseMismatch, DeltaError, UsageError
from tunesmith.export.peft import nearest_lora, read_peft, write_peft

pytest.importorskip("peft")

from peft_cases import CASES, Case, from_peft, jiggled, net, to_peft


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_an_adapter_of_pefts_does_here_what_it_does_there(case: Case, tmp_path: Path) -> None:
    gap, effect = from_peft(case, tmp_path / "adapter")
    assert effect > 1e-3
    assert gap < 1e-5


@pytest.mark.parametrize("case", [c for c in CASES if c.ours() is not None], ids=lambda c: c.name)
def test_a_delta_does_in_peft_what_it_does_here(case: Case, tmp_path: Path) -> None:
    gap, effect = to_peft(case, tmp_path / "adapter")
    assert effect > 1e-3
    assert gap < 1e-5


def saved(tmp_path: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def lora(rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        "base_model.model.fc1.lora_A.weight": torch.ones(rank, 8),
        "base_model.model.fc1.lora_B.weight": torch.ones(12, rank),
    }


@pytest.mark.parametrize(
    ("config", "tensors", "error", "words"),
    [
        ({"peft_type": "LORRA"}, lora(), UsageError, "LORA"),
        ({"peft_type": "POLY"}, lora(), UsageError, "POLY"),
        ({"peft_type": "LORA", "use_alora": True}, lora(), UsageError, "use_alora"),
        ({"peft_type": "LORA"}, {**lora(), "base_model.model.fc1.odd": torch.ones(1)}, UsageError, "fc1.odd"),
        ({"peft_type": "LORA"}, {"base_model.model.fc9.lora_A.weight": torch.ones(2, 8)}, DeltaError, "lora_B"),
        ({"peft_type": "LORA", "r": "two"}, lora(), DeltaError, "number"),
        ({"peft_type": "LORA", "alpha_pattern": {"(": 2}}, lora(), DeltaError, "pattern"),
        ({"peft_type": "LORA", "use_dora": True}, lora(), DeltaError, "lora_magnitude_vector"),
        ({"peft_type": "LORA", "init_lora_weights": "corda"}, lora(), UsageError, "path_initial_model"),
        ({"peft_type": "LORA"}, {k.replace("fc1", "fc9"): v for k, v in lora().items()}, BaseMismatch, "fc9"),
        ({"peft_type": "LORA"}, {**lora(), "base_model.model.fc1.lora_A.weight": torch.ones(2, 9)}, DeltaError, "shape"),
        ({"peft_type": "LORA"}, {k: v * float("nan") for k, v in lora().items()}, DeltaError, "finite"),
        ({"peft_type": "OFT"}, {"base_model.model.a.oft_R.weight": torch.ones(9, 6)}, UsageError, "convolution"),
        ({"peft_type": "SHIRA", "r": 1}, {"base_model.model.fc1.shira_weight": torch.ones(2), "base_model.model.fc1.shira_indices": torch.tensor([[0, 40], [0, 0]], dtype=torch.int32)}, DeltaError, "outside"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, {"prompt_embeddings": torch.ones(3, 8)}, DeltaError, "vectors"),
    ],
)  # fmt: skip
def test_what_cannot_be_represented_is_named(
    config: dict[str, object], tensors: dict[str, torch.Tensor], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as found:
        read_peft(saved(tmp_path / "a", config, tensors), net())
    assert words in f"{found.value} {getattr(found.value, 'hint', '')}"


def test_pickles_and_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="adapter_config"):
        read_peft(tmp_path, net())
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(DeltaError) as found:
        read_peft(tmp_path, net())
    assert "pickle" in str(found.value.hint)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(DeltaError, match="cannot be read"):
        read_peft(tmp_path, net())


def test_a_read_adapter_is_a_delta_like_any_other(tmp_path: Path) -> None:
    base = net()
    delta = read_peft(saved(tmp_path / "a", {"peft_type": "LORA", "r": 2, "lora_alpha": 4}, lora()), base, name="old")
    assert delta.trainable_parameters == 2 * (8 + 12)
    assert delta.provenance["imported"]["type"] == "LORA"
    delta.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d", base)
    with base.using(delta):
        one = base.probe_outputs()
    with base.using(again):
        assert torch.equal(base.probe_outputs(), one)
    assert torch.allclose(base.merged(delta).probe_outputs(), one, atol=1e-5)


def test_a_method_that_peft_lacks_is_named_and_the_nearest_lora_offered(tmp_path: Path) -> None:
    base = net()
    delta = Delta.create(base, ts.Full(targets="fc1,fc2"))
    jiggled(delta)
    with pytest.raises(UsageError) as found:
        write_peft(delta, base, tmp_path / "a")
    assert "nearest_lora" in str(found.value.hint)
    errors = [nearest_lora(base, delta, r).error for r in (1, 4, 8)]
    assert errors[0] > errors[1] > errors[2]
    fit = nearest_lora(base, delta, 8)  # both layers have a side of 8
    assert fit.error < 1e-5
    assert set(fit.lost) == {"fc1.bias", "fc2.bias"}
    weights = Delta.create(base, ts.Full(targets="fc1,fc2", bias=False))
    jiggled(weights)
    fit = nearest_lora(base, weights, 3)
    S = torch.linalg.svdvals(weights.parts[0].tensors("fc1")["weight"])
    assert fit.errors["fc1"] == pytest.approx(float((S[3:].square().sum() / S.square().sum()).sqrt()), rel=1e-3)
    write_peft(fit.delta, base, tmp_path / "a")
    back = read_peft(tmp_path / "a", base)
    with base.using(fit.delta):
        want = base.probe_outputs()
    with base.using(back):
        assert torch.allclose(base.probe_outputs(), want, atol=1e-6)


def test_a_delta_of_several_parts_is_written_one_part_at_a_time(tmp_path: Path) -> None:
    base = net()
    delta = Delta.create(base, ts.LoRA(targets="fc1"), ts.NormTuning())
    with pytest.raises(UsageError, match="lora, norm-tuning"):
        write_peft(delta, base, tmp_path / "a")
    write_peft(delta, base, tmp_path / "a", part="lora")
    assert list(read_peft(tmp_path / "a", base).parts[0].kind_of) == ["fc1"]


def test_targets_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    import peft

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.inner = nn.Linear(4, 4), nn.Sequential()
            self.inner.add_module("fc", nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(torch.tanh(self.fc(x)))

    torch.manual_seed(0)
    base = Base(Two().eval(), example={"x": torch.randn(2, 4)})
    delta = Delta.create(base, ts.LoRA(rank=2, targets="re:^fc$"))
    jiggled(delta)
    write_peft(delta, base, tmp_path / "a")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), str(tmp_path / "a")).eval()
    with base.using(delta):
        assert torch.allclose(model(**base.probe()), base.probe_outputs(), atol=1e-6)


def test_prefixes_on_learned_positions_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    base = Base(model, family="causal-lm")
    with pytest.raises(UsageError, match="learned positions"):
        write_peft(Delta.create(base, ts.PrefixTuning(tokens=2)), base, tmp_path / "a")
