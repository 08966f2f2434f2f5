# SPDX-License-Identifier: Apache-2.0
"""The difference of two model folders as a delta."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import llama, tuned

import tunesmith
from tunesmith.compose.between import between_folders, nearest_product
from tunesmith.core.base import Base
from tunesmith.core.errors import BaseMismatch, UsageError
from tunesmith.core.store import save


@torch.no_grad()
def logits(base: Base) -> torch.Tensor:
    return base.model(input_ids=torch.tensor([[1, 5, 9, 40, 3]])).logits


def opened(folder: Path) -> Base:
    return tunesmith.load(folder, dtype="fp32", device="cpu")


@pytest.mark.parametrize("ties", [False, True])
def test_base_plus_difference_gives_the_second_model(tmp_path: Path, ties: bool) -> None:
    a = llama(tmp_path / "a", tie_word_embeddings=ties)
    b = tuned(tmp_path / "b", a)
    found = between_folders(a, b, tmp_path / "d")
    base = opened(a)
    before = logits(base)
    delta = tunesmith.Delta.load(tmp_path / "d", base)
    with base.using(delta):
        applied = logits(base)
    want = logits(opened(b))
    assert torch.allclose(applied, want, atol=1e-5) and not torch.allclose(applied, before, atol=1e-2)
    assert torch.equal(logits(base), before)
    assert torch.allclose(logits(base.merged(delta)), want, atol=1e-5)
    assert found.gap < 1e-6 and found.error == 0.0 and delta.digest == found.saved.digest
    assert delta.provenance["base"]["digest"] == base.fingerprint.digest
    assert bool(delta.parts[0].alias) == ties


def test_the_folder_is_what_save_would_write(tmp_path: Path) -> None:
    a = llama(tmp_path / "a")
    between_folders(a, tuned(tmp_path / "b", a), tmp_path / "d")
    base = opened(a)
    delta = tunesmith.Delta.load(tmp_path / "d", base)
    save(delta, tmp_path / "again", base=base)
    mine, theirs = (json.loads((tmp_path / n / "delta.json").read_text()) for n in ("d", "again"))
    for key in ("parts", "tensors", "digest", "layout"):
        assert mine[key] == theirs[key]


def test_it_is_refused_on_another_base(tmp_path: Path) -> None:
    a = llama(tmp_path / "a")
    b = tuned(tmp_path / "b", a)
    between_folders(a, b, tmp_path / "d")
    with pytest.raises(BaseMismatch):
        tunesmith.Delta.load(tmp_path / "d", opened(b))


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_low_rank_is_the_truncated_svd(tmp_path: Path, rank: int) -> None:
    a = llama(tmp_path / "a")
    b = tuned(tmp_path / "b", a)
    found = between_folders(a, b, tmp_path / "d", rank=rank)
    base, other = opened(a), opened(b)
    delta = tunesmith.Delta.load(tmp_path / "d", base)
    merged = base.merged(delta)
    lost = total = 0.0
    for n, w in base.model.state_dict().items():
        D = (other.model.state_dict()[n] - w).double()
        got = (merged.model.state_dict()[n] - w).double()
        total += float(D.pow(2).sum())
        if D.dim() == 1 or min(D.shape) <= rank:
            assert torch.allclose(got, D, atol=1e-6), n
            continue
        U, S, V = torch.linalg.svd(D, full_matrices=False)
        want = (U[:, :rank] * S[:rank]) @ V[:rank]
        assert torch.allclose(got, want, atol=1e-5), n
        error = float((S[rank:].pow(2).sum() / S.pow(2).sum()).sqrt())
        assert found.errors[n.removesuffix(".weight")] == pytest.approx(error, rel=1e-4)
        lost += float(S[rank:].pow(2).sum())
    assert found.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_a_difference_of_low_rank_is_found_exactly(tmp_path: Path) -> None:
    a = llama(tmp_path / "a")
    base = opened(a)
    delta = tunesmith.Delta.create(base, tunesmith.LoRA(rank=2), seed=1)
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(0.2 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0)))
    base.merged(delta).model.save_pretrained(tmp_path / "b")
    found = between_folders(a, tmp_path / "b", tmp_path / "d", rank=2)
    assert found.error < 1e-3 and found.sites == {"lora": 14}  # only what differs has a site
    back = tunesmith.Delta.load(tmp_path / "d", base)
    with base.using(delta):
        want = logits(base)
    with base.using(back):
        assert torch.allclose(logits(base), want, atol=1e-4)


def test_biases_go_beside_the_low_rank_part(tmp_path: Path) -> None:
    a = llama(tmp_path / "a", attention_bias=True)
    b = tuned(tmp_path / "b", a)
    found = between_folders(a, b, tmp_path / "d", rank=15)
    assert found.sites["bitfit"] > 0
    base = opened(a)
    merged = base.merged(tunesmith.Delta.load(tmp_path / "d", base)).model.state_dict()
    for n, t in opened(b).model.state_dict().items():
        if n.endswith("bias"):
            assert torch.allclose(merged[n], t, atol=1e-6)


def test_a_transposed_layer_and_an_encoder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt = GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(gpt).save_pretrained(tmp_path / "a")
    bert = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(bert).save_pretrained(tmp_path / "c")
    for one in ("a", "c"):
        source = tmp_path / one
        from transformers import AutoModel, AutoModelForCausalLM

        auto = AutoModelForCausalLM if one == "a" else AutoModel
        model = auto.from_pretrained(source)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(tmp_path / f"{one}-tuned")
        for rank in (None, 2):
            between_folders(source, tmp_path / f"{one}-tuned", tmp_path / f"{one}-{rank}", rank)
        base = opened(source)
        merged = base.merged(tunesmith.Delta.load(tmp_path / f"{one}-None", base)).model.state_dict()
        for n, t in opened(tmp_path / f"{one}-tuned").model.state_dict().items():
            assert torch.allclose(merged[n], t, atol=1e-6), n
        tunesmith.Delta.load(tmp_path / f"{one}-2", base)


def test_what_cannot_be_a_difference_is_refused(tmp_path: Path) -> None:
    a = llama(tmp_path / "a")
    with pytest.raises(UsageError, match="are equal"):
        between_folders(a, a, tmp_path / "d")
    with pytest.raises(UsageError, match="rank must be at least 1"):
        between_folders(a, tuned(tmp_path / "b", a), tmp_path / "d", rank=0)
    with pytest.raises(UsageError, match="has shape"):
        between_folders(a, llama(tmp_path / "wide", vocab_size=64), tmp_path / "d")
    tied = llama(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UsageError, match=r"'lm_head.weight' and 'model.embed_tokens.weight' differ"):
        between_folders(tied, a, tmp_path / "d")
    with pytest.raises(UsageError, match=r"no tensor for 'lm_head.weight'"):
        between_folders(a, tied, tmp_path / "d")
    config = json.loads((a / "config.json").read_text())
    (a / "config.json").write_text(json.dumps({**config, "architectures": ["Nothing"]}))
    with pytest.raises(UsageError, match="not one of transformers"):
        between_folders(a, tmp_path / "b", tmp_path / "d")
    assert not (tmp_path / "d").exists()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_the_nearest_product_equals_the_svd(m: int, n: int, r: int, seed: int) -> None:
    r = min(r, m, n)
    D = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    B, A, lost = nearest_product(D, r)
    U, S, V = torch.linalg.svd(D, full_matrices=False)
    assert torch.allclose(B @ A, (U[:, :r] * S[:r]) @ V[:r], atol=1e-8)
    assert lost == pytest.approx(float(S[r:].pow(2).sum()), abs=1e-9)
