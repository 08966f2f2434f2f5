# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers models, so that the methods meet real module trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta

VOCAB = 50


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """Grouped-query attention and biases everywhere."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return stirred(LlamaForCausalLM(config))


@pytest.fixture
def bert() -> BertModel:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    return stirred(BertModel(config))


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return stirred(GPT2LMHeadModel(config))


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """The model in eval mode with no parameter at a special value such as zero or one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (3, 8))


@pytest.fixture
def moved() -> Callable[..., Delta]:
    """A delta with every trainable tensor moved by noise."""

    def make(base: Base, *methods: object, size: float = 0.1) -> Delta:
        delta = Delta.create(base, *methods)
        with torch.no_grad():
            for _, t in delta.items():
                if t.requires_grad:
                    t.add_(torch.randn_like(t) * size)
        return delta

    return make


@pytest.fixture
def undone() -> Callable[..., torch.Tensor]:
    """Output of `base` on keyword inputs with a delta, after checking that undoing it leaves no trace."""

    @torch.no_grad()
    def run(base: Base, delta: Delta, **inputs: torch.Tensor) -> torch.Tensor:
        before, digest = first(base.model(**inputs)), base.digest()
        with base.using(delta):
            out = first(base.model(**inputs))
        assert torch.equal(first(base.model(**inputs)), before)
        assert base.digest() == digest
        assert not any("forward" in m.__dict__ for m in base.model.modules())
        return out

    return run


def first(out: object) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.fixture
def same_as_peft(undone: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """Check a delta against a PEFT model that was given its tensors: outputs, merged outputs and merged weights."""

    def check(base: Base, delta: Delta, twin: nn.Module, layers: int, ids: torch.Tensor, merge_atol: float) -> None:
        model: Any = base.model
        assert layers == len(delta.parts[0].kind_of) > 0
        assert delta.trainable_parameters == sum(p.numel() for p in twin.parameters() if p.requires_grad)
        out = undone(base, delta, input_ids=ids)
        with torch.no_grad():
            torch.testing.assert_close(out, twin(input_ids=ids)[0], atol=1e-5, rtol=0)
            assert (out - model(input_ids=ids)[0]).abs().max() > 1e-3
            merged: Any = base.merged(delta).model
            torch.testing.assert_close(merged(input_ids=ids)[0], out, atol=merge_atol, rtol=0)
            whole: Any = twin
            theirs = dict(whole.merge_and_unload().named_parameters())
        for key, p in merged.named_parameters():
            torch.testing.assert_close(p, theirs[key], atol=1e-5, rtol=0)

    return check
