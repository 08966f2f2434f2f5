# SPDX-License-Identifier: Apache-2.0
"""A tiny language model on disk, data for it, a saved delta, and a way to run command lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.cli.main import main


@dataclass(frozen=True)
class Ran:
    """What one command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The JSON on standard output, which must hold nothing else."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        return json.loads(lines[0])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command line in this process: `run("show", "x").code`."""

    def call(*args: object) -> Ran:
        capsys.readouterr()
        code = main([str(a) for a in args])
        found = capsys.readouterr()
        return Ran(code, found.out, found.err)

    return call


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of its own for every test."""
    place = tmp_path / "registry"
    monkeypatch.setenv("TUNESMITH_HOME", str(place))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TUNESMITH_DEBUG", raising=False)
    return place


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-layer Llama with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3, bos_token_id=None, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts with answers."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{i} plus {i}?", "response": f"{2 * i}"} for i in range(12)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


@pytest.fixture(scope="session")
def saved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a delta on the tiny model, moved away from the identity."""
    import tunesmith
    from tunesmith.core.store import save

    base = tunesmith.load(tiny, device="cpu")
    delta = tunesmith.Delta.create(base, tunesmith.LoRA(rank=2), name="moved", seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(0.2 * torch.randn(t.shape, generator=generator))
    folder = tmp_path_factory.mktemp("deltas") / "moved"
    save(delta, folder, base=base)
    return folder
