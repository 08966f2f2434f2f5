# SPDX-License-Identifier: Apache-2.0
"""The decoder in another order of products: the model's logits, with any cut of the tokens and any mix of deltas."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from serve_cases import moved, tiny_llama
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys
from tunesmith.deltas import IA3, SSF, BitFit, Bone, DoRA, Full, LoRA, NormTuning, SHiRA
from tunesmith.serve import decoder as module
from tunesmith.serve.cache import Cache, Span
from tunesmith.serve.decoder import Decoder
from tunesmith.serve.mixed import Mixture, resident
from tunesmith.serve.products import FORMS


def want(base: Base, ids: list[int], delta: Delta | None) -> Tensor:
    with torch.no_grad(), base.using(delta):
        return base.model(input_ids=torch.tensor([ids])).logits[0]


def caches(d: Decoder, cells: int) -> Cache:
    return d.cache(cells)


def tokens(n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(67) for _ in range(n)]


def test_it_is_found_by_structure_and_proved(llama: Base) -> None:
    d = Decoder.find(llama)
    assert (d.heads, d.kv_heads, d.head_dim) == (4, 2, 8)
    assert len(d.layers) == 2 and d.layers[1].down == "model.layers.1.mlp.down_proj"
    assert not any("forward" in m.__dict__ for m in llama.model.modules())


def test_heads_of_another_size_and_biases_are_fine() -> None:
    d = Decoder.find(tiny_llama(head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=False))
    assert d.head_dim == 16


def test_what_is_no_llama_is_refused_with_the_reason() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    with pytest.raises(UsageError, match="role 'q'"):
        Decoder.find(Base(model, family="causal-lm"))
    with pytest.raises(UsageError, match="no decoder of text"):
        Decoder.find(toys()[0] if toys()[0].family != "causal-lm" else Base(torch.nn.Linear(2, 2)))


def test_a_model_that_computes_something_else_is_refused() -> None:
    base = tiny_llama()
    head: Any = base.model.lm_head
    handle = head.register_forward_hook(lambda m, a, y: 30 * torch.tanh(y / 30))
    with pytest.raises(UsageError, match="its logits differ"):
        Decoder.find(base)
    handle.remove()


def test_any_cut_of_a_prompt_gives_the_logits_of_the_whole(llama: Base) -> None:
    d, ids = Decoder.find(llama), tokens(11, 0)
    for cuts in ([11], [1] * 11, [4, 1, 6], [3, 5, 2, 1]):
        cells = torch.randperm(40, generator=torch.Generator().manual_seed(len(cuts)))[:11]
        cache, done, got = caches(d, 40), 0, []
        with torch.no_grad():
            for n in cuts:
                view = cache.view([Span(cells[: done + n], done, n)])
                h = d(torch.tensor(ids[done : done + n]), view, Mixture.none(n))
                got.append(d.logits(h, Mixture.none(n)))
                done += n
        assert torch.allclose(torch.cat(got), want(llama, ids, None), atol=2e-4)


MIXED: list[tuple[str, list[Any]]] = [
    ("low-rank of several ranks", [LoRA(rank=2), None, LoRA(rank=5), LoRA(rank=2, targets="q,v"), LoRA(rank=1)]),
    ("rank patterns and embeddings", [LoRA(rank=2, rank_pattern={"q_proj": 4}), LoRA(rank=3, targets="embeddings")]),
    ("all kinds", [IA3(), None, BitFit(targets="biases"), SHiRA(), DoRA(rank=2), Bone(block=4), LoRA(rank=2)]),
    ("whole layers, norms and affine", [Full(targets="all-linear"), NormTuning(), SSF(), LoRA(rank=2), None]),
]


@pytest.mark.parametrize(("what", "methods"), MIXED, ids=[w for w, _ in MIXED])
def test_a_mixed_batch_is_one_request_at_a_time(what: str, methods: list[Any]) -> None:
    base = tiny_llama(attention_bias=True)
    d = Decoder.find(base)
    deltas = [None if m is None else moved(base, m, seed=i) for i, m in enumerate(methods)]
    ready = [None if x is None else resident(base, x) for x in deltas]
    texts = [tokens(4 + 2 * i, i) for i in range(len(deltas))]
    order = torch.randperm(320, generator=torch.Generator().manual_seed(1)).split(40)
    cache = caches(d, 320)
    with torch.no_grad():
        # read all but the last two tokens together, then decode two steps together
        got = [[] for _ in texts]
        for lo, hi in [(0, -2), (-2, -1), (-1, None)]:
            spans, flat, mix, at = [], [], [], 0
            for ids, cells, r in zip(texts, order, ready, strict=False):
                new = ids[lo:hi]
                old = 0 if lo == 0 else len(ids) + lo
                spans.append(Span(cells[: old + len(new)], old, len(new)))
                flat += new
                mix.append((r, at, at + len(new)))
                at += len(new)
            h = d(torch.tensor(flat), cache.view(spans), Mixture(mix))
            z = d.logits(h, Mixture(mix))
            for rows, (_, a, b) in zip(got, mix, strict=True):
                rows.append(z[a:b])
    for ids, delta, rows in zip(texts, deltas, got, strict=True):
        alone = want(base, ids, delta)
        assert torch.allclose(torch.cat(rows), alone, atol=3e-4 * float(alone.abs().max())), what
        if delta is not None:
            assert not torch.allclose(alone, want(base, ids, None), atol=1e-2)  # it bites
    merged = want(base.merged(deltas[0]), texts[0], None)
    assert torch.allclose(torch.cat(got[0]), merged, atol=3e-4 * float(merged.abs().max()))


def test_rows_of_one_delta_share_its_factors_and_longer_spans_stay_right(llama: Base) -> None:
    d, delta = Decoder.find(llama), moved(llama, LoRA(rank=3))
    r = resident(llama, delta)
    texts = [tokens(6, 1), tokens(6, 2), tokens(6, 3)]
    cache, cells = caches(d, 30), torch.arange(30).split(6)
    spans = [Span(c, 0, 6) for c in cells[:3]]
    mix = Mixture([(r, 0, 6), (r, 6, 12), (r, 12, 18)])
    assert len(mix.spans) == 1
    with torch.no_grad():
        z = d.logits(d(torch.tensor([t for ids in texts for t in ids]), cache.view(spans), mix), mix)
    for i, ids in enumerate(texts):
        assert torch.allclose(z[6 * i : 6 * i + 6], want(llama, ids, delta), atol=2e-4)


def test_spans_must_agree_with_their_cells() -> None:
    with pytest.raises(UsageError, match="3 cells for 1 cached and 1 new"):
        Span(torch.arange(3), 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_products_is_proved(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "choose", lambda layers: form)
    base = tiny_llama(attention_bias=True, mlp_bias=True)
    base.model.to(dtype)
    if form == "packed" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch packs nothing")
    assert Decoder.find(base).form == form


def test_a_change_of_the_head_reaches_a_row_whose_prompt_was_long(llama: Base) -> None:
    from tunesmith.serve.stacks import Stacks

    base = tiny_llama(tie_word_embeddings=False)
    d, delta = Decoder.find(base), moved(base, LoRA(rank=2, targets="head"))
    r, ids = resident(base, delta), tokens(9, 4)
    stacks = Stacks(d.groups)  # nothing was settled: the prompt is long, its last token alone asks for logits
    with torch.no_grad():
        h = d(torch.tensor(ids), d.cache(9).view([Span(torch.arange(9), 0, 9)]), Mixture([(r, 0, 9)], stacks))
        z = d.logits(h[-1:], Mixture([(r, 0, 1)], stacks))
    assert torch.allclose(z[0], want(base, ids, delta)[-1], atol=2e-4)
    assert not torch.allclose(z[0], want(base, ids, None)[-1], atol=1e-2)
