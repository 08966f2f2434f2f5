# SPDX-License-Identifier: Apache-2.0
"""Two replicas behind one door, through Ray Serve: the same answers as one server, and each delta where it is held."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from byte_tokenizer import byte_tokenizer
from serve_cases import moved, tiny_llama
from serve_http import asked

from tunesmith.core.base import Base
from tunesmith.deltas import LoRA
from tunesmith.models.open import load
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library

# before ray itself: it says that this machine is all there is
cluster = pytest.importorskip("tunesmith.serve.cluster", exc_type=ImportError)


class Cluster:
    def __init__(self, url: str, base: Base, shelf: Path) -> None:
        self.url, self.base, self.shelf = url, base, shelf

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    import ray

    if ray.util.get_node_ip_address() != cluster.LOOPBACK:
        pytest.skip("ray was imported before and would listen on every interface")
    place = tmp_path_factory.mktemp("cluster")
    tiny_llama(vocab_size=300, max_position_embeddings=512, eos_token_id=None, bos_token_id=None).model.save_pretrained(
        place / "base"
    )
    byte_tokenizer().save_pretrained(place / "base")
    base = load(str(place / "base"), device="cpu")
    for i in range(6):
        moved(base, LoRA(rank=2), seed=i, name=f"d{i}").save(place / "deltas" / f"d{i}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    settings = cluster.Settings(str(place / "base"), str(place / "deltas"), device="cpu", cells=4000)
    with cluster.running(settings, "127.0.0.1", port, replicas=2, cpus=0.1):
        yield Cluster(f"http://127.0.0.1:{port}", base, place / "deltas")


def test_answers_are_those_of_one_server_and_streams_stream(two: Cluster) -> None:
    base, name = two.base, two.base.name
    engine = Engine(base, Library(base, 1 << 30), cells=4000)
    engine.library.scan(two.shelf)
    assert {m.id for m in two.client().models.list()} == {name, *(f"d{i}" for i in range(6))}
    texts = {}
    for model in (name, "d0", "d3"):
        whole = asked(two.client(), model, max_tokens=20).choices[0].message.content
        chunks = list(asked(two.client(), model, max_tokens=20, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole and len(chunks) > 5
        texts[model] = whole
    assert len(set(texts.values())) == 3


def test_a_delta_goes_to_the_replica_that_holds_it(two: Cluster) -> None:
    homes: dict[str, set[str]] = {}
    for _ in range(4):
        for i in range(6):
            answer = httpx.post(
                f"{two.url}/v1/completions", json={"model": f"d{i}", "prompt": "x", "max_tokens": 2}, timeout=60
            )
            assert answer.status_code == 200
            homes.setdefault(f"d{i}", set()).add(answer.headers["x-replica"])
    assert all(len(found) == 1 for found in homes.values()), homes  # once held, it stays where it is
    assert len(set.union(*homes.values())) == 2  # and both replicas hold some


def test_errors_pass_through_the_door(two: Cluster) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'd9'"):
        asked(two.client(), "d9")
    with pytest.raises(openai.BadRequestError, match="more than the model's 512"):
        asked(two.client(), "d0", max_tokens=5000)
    assert httpx.post(f"{two.url}/v1/completions", content=b"{", timeout=60).status_code == 400
    huge = {"model": "d0", "prompt": "x" * (1 << 20)}
    assert httpx.post(f"{two.url}/v1/completions", json=huge, timeout=60).status_code == 413
    assert httpx.get(f"{two.url}/health", timeout=60).json() == {"status": "ok"}


def test_a_caller_that_leaves_frees_its_replica(two: Cluster) -> None:
    stream = asked(two.client(), "d1", max_tokens=480, stream=True)
    next(iter(stream))
    stream.response.close()
    until, last = time.monotonic() + 30, {}
    while time.monotonic() < until:
        answer = httpx.get(f"{two.url}/metrics", timeout=60)
        last[answer.headers["x-replica"]] = answer.text
        idle = all("tunesmith_running_requests 0\n" in text for text in last.values())
        if idle and len(last) == 2 and any('reason="cancelled"' in text for text in last.values()):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(last)
    assert asked(two.client(), "d1", max_tokens=5).choices[0].message.content
