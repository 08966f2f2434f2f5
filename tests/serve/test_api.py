# SPDX-License-Identifier: Apache-2.0
"""The API, over a real socket, with the real OpenAI client."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from serve_cases import moved
from serve_http import Served, asked

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.deltas import LoRA
from tunesmith.serve.access import Access

ADMIN, ALL, ONE = "admin-token-0123456789", "key-for-all-0123456789", "key-for-d0-0123456789"


def test_models_are_listed_with_fingerprints(served: Served) -> None:
    found = {m.id: m for m in served.client().models.list()}
    assert set(found) == {"tiny", "d0", "d1", "d2", "d3", "blank"}
    one: Any = found["d1"]
    assert one.fingerprint == served.library.entries["d1"].digest and one.methods == ["lora"] and one.parent == "tiny"
    assert served.client().models.retrieve("d1").id == "d1"


def test_a_chat_is_what_the_base_writes_under_the_delta(served: Served, base: Base) -> None:
    answer = asked(served.client())
    ids = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello there"}], add_generation_prompt=True, return_dict=False
    )
    want = list(ids)
    delta = Delta.load(served.library.entries["d0"].folder, base)
    with torch.no_grad(), base.using(delta):
        for _ in range(12):
            want.append(int(base.model(input_ids=torch.tensor([want])).logits[0, -1].argmax()))
    text = base.tokenizer.decode(want[len(ids) :], skip_special_tokens=True)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    assert asked(served.client(), "tiny").choices[0].message.content != text


def test_a_stream_is_the_same_text_in_pieces(served: Served) -> None:
    whole = asked(served.client(), "d1", max_tokens=20).choices[0].message.content
    stream = asked(served.client(), "d1", max_tokens=20, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 20


def test_stop_strings_and_seeds(served: Served) -> None:
    client = served.client()
    whole = asked(client, "d2", max_tokens=30).choices[0].message.content
    stop = whole[6:8]
    cut = asked(client, "d2", max_tokens=30, stop=[stop])
    assert cut.choices[0].message.content == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"
    hot = [asked(client, "d2", temperature=1.5, seed=s).choices[0].message.content for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert served.settled()


def test_log_probabilities_come_with_their_tokens(served: Served) -> None:
    found = asked(served.client(), logprobs=True, top_logprobs=3, max_tokens=5).choices[0].logprobs.content
    assert len(found) == 5
    for row in found:
        assert len(row.top_logprobs) == 3 and row.top_logprobs[0].logprob == row.logprob <= 0


def test_completions_take_text_and_tokens(served: Served, base: Base) -> None:
    client = served.client()
    ids = base.tokenizer("two plus")["input_ids"]
    texts = {
        client.completions.create(model="d0", prompt=p, max_tokens=6, temperature=0).choices[0].text
        for p in ("two plus", ids)
    }
    assert len(texts) == 1 and texts != {""}


def test_32_streams_under_many_deltas_are_each_what_they_are_alone(served: Served) -> None:
    texts = [f"question {i}" for i in range(32)]
    models = ["d0", "d1", "d2", "d3", "tiny"]
    alone = [asked(served.client(), models[i % 5], t).choices[0].message.content for i, t in enumerate(texts[:10])]
    got: dict[int, str] = {}

    def run(i: int) -> None:
        chunks = asked(served.client(), models[i % 5], texts[i], stream=True)
        got[i] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(32)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert len(got) == 32 and [got[i] for i in range(10)] == alone
    assert served.settled()


def test_a_client_that_goes_away_frees_its_cells(served: Served) -> None:
    before = served.worker.counts.ends.get("cancelled", 0)
    stream = asked(served.client(), max_tokens=400, stream=True)
    next(iter(stream))
    stream.response.close()
    assert served.settled()
    assert served.worker.counts.ends["cancelled"] == before + 1
    with pytest.raises(httpx.TimeoutException):
        body = {"model": "d0", "messages": [{"role": "user", "content": "x"}], "max_tokens": 450, "temperature": 0}
        httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=0.15)
    assert served.settled()


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        ({"model": "d9"}, 404, "no model 'd9'"),
        ({"model": "blank"}, 422, "every change it makes is zero"),
        ({"temprature": 1}, 400, "temperature"),
        ({"n": 2}, 400, "n"),
        ({"temperature": 3}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 5000}, 400, "more than the model's 512"),
        ({"stop": [""]}, 400, "stop strings"),
        ({"logit_bias": {"900": 1}}, 400, "no token 900"),
        ({"messages": [{"role": "user", "content": "x" * 30_000}]}, 413, "20,000 bytes"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"),
    ],
)  # fmt: skip
def test_bad_requests_are_told_what_is_wrong(served: Served, change: dict[str, Any], status: int, text: str) -> None:
    body = {"model": "d0", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **change}
    for stream in (False, True):
        answer = httpx.post(f"{served.url}/v1/chat/completions", json={**body, "stream": stream}, timeout=20)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert text in error["message"] and error["type"]
    assert served.settled()


def test_bodies_that_are_no_json_are_refused(served: Served) -> None:
    for content in (b"", b"{", b"\xff\xfe", b"[]", b'"x"', b'{"model": 1}', b"nul", b"9" * 5000):
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{served.url}/v1/chat/completions", content=content, headers=headers, timeout=20)
        assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_health_and_metrics(served: Served) -> None:
    asked(served.client())
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/ready").json() == {"ready": True}
    text = httpx.get(f"{served.url}/metrics").text
    rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(rows["tunesmith_requests_total"]) >= 1 and int(rows["tunesmith_cells"]) == 6000
    assert httpx.get(f"{served.url}/admin/stat").status_code == 404


def test_logs_hold_no_text(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tunesmith.serve"):
        answer = asked(served.client(), text="my secret words").choices[0].message.content
    rows = [r.getMessage() for r in caplog.records if r.name == "tunesmith.serve"]
    assert rows and json.loads(rows[-1])["completion_tokens"] == 12
    assert not any("secret" in r or answer in r for r in rows)


def test_keys_open_what_they_are_for(base: Base, root: Path) -> None:
    access = Access({ALL: None, ONE: frozenset({"d0"})}, admin=ADMIN)
    made = Served(base, root, access=access)
    try:
        with pytest.raises(openai.AuthenticationError):
            asked(made.client("wrong-key-0123456789"))
        assert {m.id for m in made.client(ONE).models.list()} == {"tiny", "d0"}
        assert asked(made.client(ONE), "d0").choices
        with pytest.raises(openai.PermissionDeniedError, match="not for 'd1'"):
            asked(made.client(ONE), "d1")
        assert asked(made.client(ALL), "d1").choices
        assert httpx.get(f"{made.url}/metrics").status_code == 401
        assert httpx.get(f"{made.url}/health").status_code == 200
        assert httpx.get(f"{made.url}/admin/stat", headers={"authorization": f"Bearer {ALL}"}).status_code == 401
    finally:
        made.close()


def test_the_admin_plane_loads_pins_and_unloads(base: Base, root: Path, tmp_path: Path) -> None:
    made = Served(base, tmp_path, access=Access(admin=ADMIN))
    moved(base, LoRA(rank=2), seed=9, name="new").save(tmp_path / "late")
    Delta.create(base, LoRA(rank=2), name="blank").save(tmp_path / "blank")
    send = httpx.Client(base_url=made.url, headers={"authorization": f"Bearer {ADMIN}"}, timeout=20)
    try:
        assert send.get("/admin/stat").json()["deltas"] == 0
        assert send.post("/admin/deltas", json={"name": "late", "folder": "late"}).json()["kind"] == "delta"
        assert asked(made.client(), "late").choices
        assert send.post("/admin/pin/late", json={"on": True}).json()["pinned"] is True
        refused = send.post("/admin/deltas", json={"name": "blank", "folder": "blank"})
        assert refused.status_code == 422 and "zero" in refused.json()["error"]["message"]
        outside = send.post("/admin/deltas", json={"name": "x", "folder": "../../etc"})
        assert outside.status_code == 400 and "outside" in outside.json()["error"]["message"]
        odd = send.post("/admin/deltas", json={"name": "x", "folder": "a\0b"})
        assert odd.status_code == 400 and "folder" in odd.json()["error"]["message"]
        assert send.delete("/admin/deltas/late").json()["deleted"] is True
        assert send.delete("/admin/deltas/late").status_code == 404
        with pytest.raises(openai.NotFoundError):
            asked(made.client(), "late")
    finally:
        made.close()


def test_overload_says_when_to_come_again(base: Base, root: Path) -> None:
    made = Served(base, root, queue=2, requests=1)
    try:
        codes: list[int] = []

        def run() -> None:
            body = {"model": "d0", "messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "temperature": 0}
            answer = httpx.post(f"{made.url}/v1/chat/completions", json=body, timeout=60)
            codes.append(answer.status_code)
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1

        threads = [threading.Thread(target=run) for _ in range(12)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(timeout=60)
        assert set(codes) == {200, 429} and made.settled()
    finally:
        made.close()


def test_a_stopped_engine_is_seen(base: Base, root: Path) -> None:
    made = Served(base, root)
    made.worker.stop()
    try:
        assert httpx.get(f"{made.url}/ready").status_code == 503
        body = {"model": "d0", "messages": [{"role": "user", "content": "x"}]}
        assert httpx.post(f"{made.url}/v1/chat/completions", json=body, timeout=10).status_code in (500, 503)
    finally:
        made.close()
