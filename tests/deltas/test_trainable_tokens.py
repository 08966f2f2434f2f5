# SPDX-License-Identifier: Apache-2.0
"""Trainable tokens against PEFT, its rows, ties and errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tunesmith.core.algebra import Rows
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.deltas import TrainableTokens

peft = pytest.importorskip("peft")
TOKENS = [31, 4, 17]


@pytest.fixture
def tied_llama(llama) -> LlamaForCausalLM:
    config = copy.deepcopy(llama.config)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model.eval()


def peft_with(model: nn.Module, delta: Delta, **options: object) -> nn.Module:
    """PEFT's model with the rows E[token] + d of the delta."""
    made = peft.get_peft_model(copy.deepcopy(model), peft.TrainableTokensConfig(token_indices=TOKENS, **options)).eval()
    (path,) = delta.parts[0].kind_of
    t = delta.parts[0].tensors(path)
    changed = (Base(model).sites[path].module.weight.detach().index_add(0, t["rows"], t["d"].detach()))[TOKENS]
    layers = [m for m in made.modules() if hasattr(m, "trainable_tokens_delta")]
    assert layers
    with torch.no_grad():
        for layer in layers:
            layer.trainable_tokens_delta["default"].copy_(changed)
    return made


@pytest.mark.parametrize("name", ["llama", "tied_llama", "gpt2", "bert"])
def test_equals_peft(name, request, ids, moved, undone) -> None:
    model = request.getfixturevalue(name)
    ids[:, :3] = torch.tensor(TOKENS)
    base = Base(model)
    delta = moved(base, TrainableTokens(tokens=TOKENS))
    want = peft_with(model, delta)
    assert delta.trainable_parameters == sum(p.numel() for p in want.parameters() if p.requires_grad) == 3 * 16
    out = undone(base, delta, input_ids=ids)
    with torch.no_grad():
        torch.testing.assert_close(out, want(input_ids=ids)[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(base.merged(delta).model(input_ids=ids)[0], out, atol=1e-5, rtol=0)
        assert (out - model(input_ids=ids)[0]).abs().max() > 1e-3


def test_only_the_rows_move(llama, moved) -> None:
    base = Base(llama)
    after = base.merged(moved(base, TrainableTokens(tokens=TOKENS))).model
    changed = (after.model.embed_tokens.weight != llama.model.embed_tokens.weight).any(1).nonzero().flatten()
    assert changed.tolist() == sorted(TOKENS)
    assert torch.equal(after.lm_head.weight, llama.lm_head.weight)


def test_other_texts_are_the_base_bit_for_bit(llama, moved) -> None:
    base = Base(llama)
    delta = moved(base, TrainableTokens(tokens=TOKENS))
    without = torch.tensor([[1, 2, 3, 5, 49, 0, 30, 32]])
    with torch.no_grad():
        plain = llama(input_ids=without)[0]
        with base.using(delta):
            assert torch.equal(llama(input_ids=without)[0], plain)


def test_untied_changes_the_input_alone(tied_llama, moved, ids) -> None:
    base = Base(tied_llama)
    delta = Delta.create(base, TrainableTokens(tokens=TOKENS), tied="untie")
    with torch.no_grad():
        delta.parts[0].parameter("model.embed_tokens", "d").add_(1.0)
    after = base.merged(delta).model
    assert torch.equal(after.lm_head.weight, tied_llama.lm_head.weight)
    assert not torch.equal(after.model.embed_tokens.weight, tied_llama.lm_head.weight)


def test_position_tables_are_not_the_token_table(gpt2, bert) -> None:
    assert list(Delta.create(Base(gpt2), TrainableTokens(tokens=[40])).parts[0].kind_of) == ["transformer.wte"]
    assert list(Delta.create(Base(bert), TrainableTokens(tokens=[40])).parts[0].kind_of) == [
        "embeddings.word_embeddings"
    ]
    named = Delta.create(Base(gpt2), TrainableTokens(tokens=[3], targets="wpe"))
    assert list(named.parts[0].kind_of) == ["transformer.wpe"]


def test_rows_gather_scatter_and_gradients() -> None:
    torch.manual_seed(0)
    table, head = nn.Embedding(9, 4), nn.Linear(4, 9)
    base = Base(nn.ModuleDict({"table": table, "head": head}))
    values = torch.randn(3, 4, requires_grad=True)
    rows = Rows(torch.tensor([0, 5, 8]), values, (9, 4))
    x, h = torch.tensor([[0, 1, 5], [8, 8, 7]]), torch.randn(2, 3, 4)
    for site, given in ((base.sites["table"], x), (base.sites["head"], h)):
        full = rows.dense().detach().requires_grad_()
        want = nn.functional.embedding(given, full) if given is x else nn.functional.linear(given, full)
        got = rows.apply(given, site)
        torch.testing.assert_close(got, want)
        weights = torch.randn_like(want)
        (got * weights).sum().backward()
        (want * weights).sum().backward()
        torch.testing.assert_close(values.grad, full.grad[[0, 5, 8]])
        values.grad = None
    torch.testing.assert_close(rows.scaled(0.5).dense(), 0.5 * rows.dense())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "no tokens"),
        ({"tokens": [3, 3]}, "repeats"),
        ({"tokens": [-1]}, "no id"),
        ({"tokens": [2.5]}, "no id"),
        ({"tokens": [50]}, "beyond the 50 rows"),
    ],
)
def test_errors(llama, options, text) -> None:
    with pytest.raises(UsageError, match=text):
        Delta.create(Base(llama), TrainableTokens(**options))


def test_several_tables_without_a_named_input_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) + self.b(x))

    base = Base(Two(), example=(torch.ones(1, 3, dtype=torch.int64),))
    with pytest.raises(UsageError, match="which of 2"):
        Delta.create(base, TrainableTokens(tokens=[1]))
    assert Delta.create(base, TrainableTokens(tokens=[1], targets="b")).parts[0].paths == ["b"]
