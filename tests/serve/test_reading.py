# SPDX-License-Identifier: Apache-2.0
"""Embeddings and classes over a real socket: what the model itself gives, under the delta that was named."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from serve_cases import moved
from serve_http import Served, asked
from transformers import BertConfig, BertModel

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.deltas import IA3, Head, LoRA
from tunesmith.serve.access import Access
from tunesmith.serve.encoder import Encoder, Reading
from tunesmith.serve.library import Library

TEXTS = ["two plus two", "hello there world", "x", "how are you? " * 3]
LABELS = ["sad", "glad", "neither"]


def tiny_bert(**sentence: Any) -> Base:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=310, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    source = {"task": "encoder", "sentence": {"pooling": "mean", "normalize": True, "max_length": 48, **sentence}}
    return Base(model, tokenizer=byte_tokenizer(), name="bert", family="encoder", source=source)


@pytest.fixture(scope="module")
def encoder() -> Base:
    return tiny_bert()


@pytest.fixture(scope="module")
def shelf(encoder: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("readers")
    for i, method in enumerate((LoRA(rank=2), LoRA(rank=3), IA3())):
        moved(encoder, method, seed=i, size=0.5, name=f"e{i}").save(root / f"e{i}")
    for name, kind in (("mood", "classification"), ("amount", "regression")):
        made = moved(encoder, LoRA(rank=2), Head(classes=3), seed=7, size=0.5, name=name)
        made.layout.update({"kind": kind, "labels": LABELS, "max_length": 40})
        made.save(root / name)
    return root


@pytest.fixture(scope="module")
def readers(encoder: Base, shelf: Path) -> Iterator[Served]:
    made = Served(encoder, shelf)
    yield made
    made.close()


def embedded(base: Base, text: str, delta: Delta | None = None) -> torch.Tensor:
    """One text by itself: the mean of its tokens' last states, at length one."""
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    with torch.no_grad(), base.using(delta):
        h = base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0)
    return h / h.norm()


def vectors(answer: Any) -> torch.Tensor:
    assert [d.index for d in answer.data] == list(range(len(answer.data)))
    found = [d.embedding for d in answer.data]  # text where the caller asked for base64 itself
    rows = [np.frombuffer(base64.b64decode(v), "<f4").copy() if isinstance(v, str) else np.array(v) for v in found]
    return torch.from_numpy(np.stack(rows)).float()


def test_a_batch_is_each_text_by_itself_under_its_delta(readers: Served, encoder: Base, shelf: Path) -> None:
    client = readers.client()
    for name in ("bert", "e0", "e1", "e2"):
        delta = None if name == "bert" else Delta.load(shelf / name, encoder)
        want = torch.stack([embedded(encoder, t, delta) for t in TEXTS])
        for form in ("float", "base64", openai.NOT_GIVEN):
            got = client.embeddings.create(model=name, input=TEXTS, encoding_format=form)  # type: ignore[arg-type]
            torch.testing.assert_close(vectors(got), want, atol=1e-5, rtol=0)
        assert got.usage.prompt_tokens == sum(len(encoder.tokenizer(t)["input_ids"]) for t in TEXTS)
        if delta is not None:
            plain = torch.stack([embedded(encoder, t) for t in TEXTS])
            assert float((want - plain).abs().max()) > 1e-2  # the delta says something else than the base


def test_text_list_and_tokens_are_one(readers: Served, encoder: Base) -> None:
    ids = encoder.tokenizer(TEXTS[0])["input_ids"]
    given: list[Any] = [TEXTS[0], [TEXTS[0]], ids, [ids]]
    found = [vectors(readers.client().embeddings.create(model="e0", input=g)) for g in given]
    for v in found[1:]:
        assert torch.equal(v, found[0])


def test_many_callers_under_many_deltas_get_their_own(readers: Served, encoder: Base, shelf: Path) -> None:
    deltas = {n: Delta.load(shelf / n, encoder) for n in ("e0", "e1", "e2")} | {"bert": None}
    got: dict[int, torch.Tensor] = {}
    jobs = [(list(deltas)[i % 4], [f"text {i} {j} " * (1 + j % 3) for j in range(5)]) for i in range(24)]

    def run(i: int) -> None:
        got[i] = vectors(readers.client().embeddings.create(model=jobs[i][0], input=jobs[i][1]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    for i, (name, texts) in enumerate(jobs):
        want = torch.stack([embedded(encoder, t, deltas[name]) for t in texts])
        torch.testing.assert_close(got[i], want, atol=1e-5, rtol=0)
    assert readers.settled()


def test_classes_come_with_labels_and_probabilities(readers: Served, encoder: Base, shelf: Path) -> None:
    delta = Delta.load(shelf / "mood", encoder)
    answer = httpx.post(f"{readers.url}/v1/classify", json={"model": "mood", "input": TEXTS}, timeout=20).json()
    assert answer["labels"] == LABELS and [d["index"] for d in answer["data"]] == [0, 1, 2, 3]
    for text, row in zip(TEXTS, answer["data"], strict=True):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        with torch.no_grad(), encoder.using(delta):
            p = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"][0].softmax(-1)
        torch.testing.assert_close(torch.tensor(row["probs"]), p, atol=1e-5, rtol=0)
        assert row["label"] == LABELS[int(p.argmax())] and row["num_classes"] == 3
    assert len({d["label"] for d in answer["data"]}) > 1
    pair = {"model": "mood", "input": ["two", "three"], "input_pair": ["plus", "four"]}
    assert len(httpx.post(f"{readers.url}/v1/classify", json=pair, timeout=20).json()["data"]) == 2


def test_models_say_what_they_are_for(readers: Served) -> None:
    found: Any = {m.id: m for m in readers.client().models.list()}
    assert found["bert"].serves == found["e0"].serves == "embeddings" and found["mood"].serves == "classify"


@pytest.mark.parametrize(
    ("where", "change", "status", "text"),
    [
        ("embeddings", {"model": "e9"}, 404, "no model 'e9'"),
        ("embeddings", {"model": "mood"}, 400, "POST /v1/classify"),
        ("embeddings", {"input": []}, 400, "input"),
        ("embeddings", {"input": [["a"]]}, 400, "input"),
        ("embeddings", {"input": [[999]]}, 400, "from 0 to 309"),
        ("embeddings", {"input": ""}, 400, "nothing to read"),
        ("embeddings", {"input": ["fine", "z" * 60]}, 400, "text 1 has 60 tokens, more than the 48"),
        ("embeddings", {"dimensions": 8}, 400, "24 dimensions"),
        ("embeddings", {"encoding_format": "int8"}, 400, "encoding_format"),
        ("embeddings", {"inputs": "x"}, 400, "input"),
        ("classify", {"model": "e0"}, 400, "no head"),
        ("classify", {"model": "bert"}, 400, "no classifier"),
        ("classify", {"model": "amount"}, 400, "regression"),
        ("classify", {"model": "mood", "input": "z" * 45}, 400, "more than the 40"),
        ("classify", {"model": "mood", "input": ["a", "b"], "input_pair": "c"}, 400, "2 texts and 1"),
        ("completions", {"input": None, "prompt": "x"}, 400, "writes no text"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(
    readers: Served, where: str, change: dict[str, Any], status: int, text: str
) -> None:
    body = {k: v for k, v in {"model": "e0", "input": "hello", **change}.items() if v is not None}
    answer = httpx.post(f"{readers.url}/v1/{where}", json=body, timeout=20)
    assert answer.status_code == status and text in answer.json()["error"]["message"], answer.text
    assert readers.settled()


def test_a_text_is_cut_only_where_that_is_asked_for(readers: Served) -> None:
    body = {"model": "e1", "input": ["z" * 60, "z" * 48], "truncate": True}
    rows = httpx.post(f"{readers.url}/v1/embeddings", json=body, timeout=20).json()["data"]
    torch.testing.assert_close(
        torch.tensor(rows[0]["embedding"]), torch.tensor(rows[1]["embedding"]), atol=1e-6, rtol=0
    )


def test_a_causal_base_classifies_beside_writing(base: Base, tmp_path: Path) -> None:
    head = moved(base, LoRA(rank=2), Head(classes=3), size=0.5, name="mood")
    head.save(tmp_path / "mood")
    made = Served(base, tmp_path)
    try:
        stream = asked(made.client(), "tiny", max_tokens=60, stream=True)
        rows = httpx.post(f"{made.url}/v1/classify", json={"model": "mood", "input": TEXTS}, timeout=20).json()["data"]
        assert sum(1 for c in stream if c.choices) > 1
        for text, row in zip(TEXTS, rows, strict=True):
            ids = torch.tensor([base.tokenizer(text)["input_ids"]])
            with torch.no_grad(), base.using(head):
                p = base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].softmax(-1)
            torch.testing.assert_close(torch.tensor(row["probs"]), p, atol=1e-5, rtol=0)
            assert row["label"] == str(int(p.argmax()))  # without names classes go by number
        with pytest.raises(openai.BadRequestError, match="POST /v1/classify"):
            asked(made.client(), "mood")
        with pytest.raises(openai.BadRequestError, match="no encoder"):
            made.client().embeddings.create(model="tiny", input="x")
    finally:
        made.close()


def test_keys_are_for_named_deltas(encoder: Base, shelf: Path) -> None:
    key = "key-for-e0-0123456789"
    made = Served(encoder, shelf, access=Access({key: frozenset({"e0"})}))
    try:
        assert made.client(key).embeddings.create(model="e0", input="x").data
        with pytest.raises(openai.PermissionDeniedError):
            made.client(key).embeddings.create(model="e1", input="x")
        with pytest.raises(openai.NotFoundError) as error:
            made.client(key).embeddings.create(model="e", input="x")
        assert "e1" not in error.value.message  # a hint names no delta that the key is not for
    finally:
        made.close()


@pytest.mark.parametrize("tokens", [8, 50, 100_000])
def test_batches_keep_within_the_limit_and_the_order(encoder: Base, shelf: Path, tokens: int) -> None:
    library = Library(encoder, 1 << 30)
    library.scan(shelf)
    engine, sizes = Encoder(encoder, library, tokens=tokens), []
    rows = tuple({"input_ids": [i + 1] * (1 + i % 9)} for i in range(40))
    engine.submit(Reading("a", rows, "embed"))
    engine.submit(Reading("b", rows[:7], "embed", "e0"))
    read = encoder.model.forward

    def watched(**batch: Any) -> Any:
        sizes.append(batch["attention_mask"].sum(1).max() * len(batch["input_ids"]))
        return read(**batch)

    encoder.model.forward = watched
    found = {}
    try:
        while not engine.idle:
            found |= {o.id: o.vectors for o in engine.step()}
    finally:
        del encoder.model.forward
    assert max(sizes) <= max(tokens, 9) and len(sizes) >= 2
    delta = Delta.load(shelf / "e0", encoder)
    for id, n, under in (("a", 40, None), ("b", 7, delta)):
        assert found[id].shape == (n, 24)
        for row, v in zip(rows, found[id], strict=False):
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad(), encoder.using(under):
                h = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0)
            torch.testing.assert_close(v, h / h.norm(), atol=1e-5, rtol=0)


def test_a_reading_that_fails_does_not_disturb_the_others(encoder: Base, shelf: Path) -> None:
    library = Library(encoder, 1 << 30)
    library.scan(shelf)
    engine = Encoder(encoder, library)
    rows = ({"input_ids": [1, 2, 3]},)
    for name in ("e0", "e1"):
        engine.submit(Reading(name, rows, "embed", name))
    library.remove("e0")
    found = {o.id: o for o in engine.step()}
    assert found["e0"].error is not None and "no delta 'e0'" in str(found["e0"].error)
    assert found["e1"].vectors is not None and engine.idle
    engine.submit(Reading("gone", rows, "embed", "e1"))
    assert engine.cancel("gone") and engine.idle and not engine.cancel("gone")


@pytest.mark.parametrize("pooling", ["cls", "max", "lasttoken", "mean_sqrt_len_tokens"])
def test_pooling_is_what_the_models_files_say(pooling: str) -> None:
    base = tiny_bert(pooling=pooling, normalize=False)
    engine = Encoder(base, Library(base, 1))
    rows = ({"input_ids": [5, 6, 7]}, {"input_ids": [9]})
    engine.submit(Reading("a", rows, "embed"))
    got = engine.step()[0].vectors
    for row, v in zip(rows, got, strict=True):
        with torch.no_grad():
            h = base.model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0]
        want = {"cls": h[0], "max": h.amax(0), "lasttoken": h[-1], "mean_sqrt_len_tokens": h.sum(0) / len(h) ** 0.5}
        torch.testing.assert_close(v, want[pooling], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{"pooling": "weightedmean"}, {"other": ["Dense"]}])
def test_what_the_model_needs_and_is_not_there_is_refused(change: dict[str, Any]) -> None:
    base = tiny_bert(**change)
    with pytest.raises(UsageError, match="weightedmean|Dense"):
        Encoder(base, Library(base, 1)).submit(Reading("a", ({"input_ids": [1]},), "embed"))
