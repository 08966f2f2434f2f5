# SPDX-License-Identifier: Apache-2.0
"""Adapters for vLLM: read by its rules (one rank, one scale, linear layers of the blocks) they are the delta."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from serve_cases import moved, tiny_llama

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import DeltaError, UsageError
from tunesmith.deltas import IA3, BitFit, DoRA, LoRA, PrefixTuning, SHiRA
from tunesmith.export.peft import nearest_lora
from tunesmith.export.vllm import command, limits, write_vllm


@pytest.fixture(scope="module")
def llama() -> Base:
    return tiny_llama()


ALLOWED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def as_vllm_reads_it(base: Base, folder: Path) -> Base:
    """The base with an adapter folded in as vLLM's loader takes it: r and lora_alpha for all, patterns unread."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] >= 1 and isinstance(config["target_modules"], list | str)
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for key, A in tensors.items():
        path, _, word = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        assert word in ("lora_A", "lora_B") and path.rpartition(".")[2] in ALLOWED
        if word == "lora_A":
            B = tensors[key.replace("lora_A", "lora_B")]
            assert len(A) == config["r"] == B.shape[1]
            changes[path] = scale * B @ A
    merged = tiny_llama()
    with torch.no_grad():
        for path, change in changes.items():
            merged.modules[path].weight.add_(change)  # type: ignore[union-attr, operator]
    return merged


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    "methods",
    [
        [LoRA(rank=3, alpha=7)],
        [LoRA(rank=4, rslora=True)],
        [LoRA(rank=2, rank_pattern={"*.q_proj": 5}, alpha_pattern={"*.v_proj": 11})],
        [LoRA(rank=2, targets="*.q_proj"), LoRA(rank=3, targets="*.down_proj")],
    ],
)  # fmt: skip
def test_what_vllm_reads_is_the_delta(llama: Base, tmp_path: Path, methods: list[Any]) -> None:
    delta = moved(llama, *methods, name="one")
    made = write_vllm(delta, llama, tmp_path / "one")
    with llama.using(delta):
        want = llama.probe_outputs()
    assert gap(want, llama.probe_outputs()) > 1e-2
    assert gap(as_vllm_reads_it(llama, tmp_path / "one").probe_outputs(), want) < 1e-4
    assert made.rank == json.loads((tmp_path / "one" / "adapter_config.json").read_text())["r"]


def test_real_peft_reads_it_too(llama: Base, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    delta = moved(llama, LoRA(rank=2, rank_pattern={"*.k_proj": 4}), name="one")
    write_vllm(delta, llama, tmp_path / "one")
    with llama.using(delta):
        want = llama.probe_outputs()
    model = peft.PeftModel.from_pretrained(tiny_llama().model, str(tmp_path / "one")).eval()
    with torch.no_grad():
        got = model(**llama.probe()).logits  # type: ignore[arg-type]
    assert gap(got, want) < 1e-4


@pytest.mark.parametrize(
    ("methods", "why"),
    [
        ([DoRA(rank=2)], "does not support DoRA"),
        ([IA3()], "does not scale activations"),
        ([PrefixTuning(tokens=2)], "holds no prefixes"),
        ([SHiRA()], "shira is no low-rank addition"),
        ([LoRA(rank=2, targets="embeddings")], "does not reach this layer"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_with_the_reason(
    llama: Base, tmp_path: Path, methods: list[Any], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        write_vllm(moved(llama, *methods), llama, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_biases_are_refused() -> None:
    base = tiny_llama(attention_bias=True)
    with pytest.raises(UsageError, match="takes no biases"):
        write_vllm(moved(base, BitFit(targets="biases")), base, Path("never"))


def test_a_rank_beyond_the_limit_can_be_fitted(llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.export.vllm.RANKS", (1, 8))
    delta = moved(llama, LoRA(rank=9), name="wide")
    with pytest.raises(UsageError, match="rank 9 is more than vLLM's 8") as error:
        write_vllm(delta, llama, tmp_path / "a")
    assert "--fit-rank" in str(error.value)
    assert write_vllm(nearest_lora(llama, delta, 8).delta, llama, tmp_path / "a").rank == 8


def test_nothing_and_other_families_are_refused(llama: Base, tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="changes nothing"):
        write_vllm(Delta.create(llama, LoRA(rank=2)), llama, tmp_path / "a")
    other = Base(llama.model, name="other", family="encoder")
    with pytest.raises(UsageError, match="causal language models"):
        write_vllm(moved(llama, LoRA(rank=2)), other, tmp_path / "a")
    with pytest.raises(UsageError, match="--lora-modules"):
        write_vllm(moved(llama, LoRA(rank=2)), llama, tmp_path / "a", name="a=b")


def test_the_command_has_room_for_all(llama: Base, tmp_path: Path) -> None:
    made = [write_vllm(moved(llama, LoRA(rank=r), name=f"d{r}"), llama, tmp_path / f"a folder {r}") for r in (2, 9)]
    assert limits(made) == {"max_lora_rank": 16, "max_loras": 2, "max_cpu_loras": 2}
    line = command(llama, made)
    assert line.startswith("vllm serve tiny-llama --enable-lora --max-lora-rank 16 --max-loras 2 --max-cpu-loras 2")
    assert line.endswith(f"--lora-modules 'd2={tmp_path}/a folder 2' 'd9={tmp_path}/a folder 9'")
