# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a server: damaged, removed and rewritten deltas, short memory, callers that leave, its own end."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from serve_cases import moved
from serve_http import Served, asked

from tunesmith.core.base import Base
from tunesmith.core.errors import ResourceError
from tunesmith.deltas import IA3, LoRA
from tunesmith.serve import library as library_module
from tunesmith.serve.encoder import Encoder
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.requests import Request
from tunesmith.serve.sampling import Sampling
from tunesmith.serve.worker import Worker

GREEDY = Sampling(temperature=0)


def said(client: openai.OpenAI, model: str, **more: Any) -> str:
    return str(asked(client, model, **more).choices[0].message.content)


@pytest.fixture
def shelf(base: Base, tmp_path: Path) -> Path:
    for i in range(3):
        moved(base, LoRA(rank=2), seed=i, name=f"d{i}").save(tmp_path / f"d{i}")
    return tmp_path


def damage_tensors(folder: Path) -> None:
    data = bytearray((folder / "delta.safetensors").read_bytes())
    data[-5] ^= 0xFF
    (folder / "delta.safetensors").write_bytes(bytes(data))


def cut_tensors(folder: Path) -> None:
    data = (folder / "delta.safetensors").read_bytes()
    (folder / "delta.safetensors").write_bytes(data[: len(data) // 2])


def damage_header(folder: Path) -> None:
    (folder / "delta.json").write_bytes(b'{"half": ')


def lose_tensors(folder: Path) -> None:
    (folder / "delta.safetensors").unlink()


@pytest.mark.parametrize("damage", [damage_tensors, cut_tensors, damage_header, lose_tensors])
def test_a_delta_damaged_on_disk_is_refused_and_mended(base: Base, shelf: Path, damage: Callable[[Path], None]) -> None:
    made = Served(base, shelf)
    try:
        fine = said(made.client(), "d1")
        damage(shelf / "d0")
        for stream in (False, True):
            with pytest.raises(openai.UnprocessableEntityError) as error:
                asked(made.client(), "d0", stream=stream)
            assert error.value.code == "delta_refused" and "d0" in error.value.message
        assert said(made.client(), "d1") == fine and made.settled()
        shutil.rmtree(shelf / "d0")
        moved(base, LoRA(rank=2), seed=0, name="d0").save(shelf / "d0")
        alone = Engine(base, made.library, cells=6000)
        assert said(made.client(), "d0") and alone.free == 6000
    finally:
        made.close()


def test_a_delta_removed_from_disk_finishes_what_runs_and_is_refused_then(base: Base, shelf: Path) -> None:
    made = Served(base, shelf)
    try:
        whole = said(made.client(), "d0", max_tokens=60)
        stream = asked(made.client(), "d0", max_tokens=60, stream=True)
        text = next(iter(stream)).choices[0].delta.content
        shutil.rmtree(shelf / "d0")
        text += "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
        assert text == whole
        with pytest.raises(openai.UnprocessableEntityError, match="gone"):
            asked(made.client(), "d0")
        assert {m.id for m in made.client().models.list()} >= {"d0", "d1"} and made.settled()
    finally:
        made.close()


def test_a_delta_written_anew_drops_no_request_and_mixes_no_answer(base: Base, shelf: Path) -> None:
    made = Served(base, shelf)
    versions = [moved(base, LoRA(rank=2), seed=s, name="d0") for s in (0, 50)]
    try:
        known = []
        for v in versions:
            v.save(shelf / "d0")
            known.append(said(made.client(), "d0", max_tokens=30))
        assert known[0] != known[1]
        got: list[str] = []
        stop = threading.Event()

        def ask() -> None:
            client = made.client()
            while not stop.is_set():
                got.append(said(client, "d0", max_tokens=30))

        callers = [threading.Thread(target=ask) for _ in range(4)]
        for t in callers:
            t.start()
        for i in range(12):
            versions[i % 2].save(shelf / "d0")
            time.sleep(0.05)
        stop.set()
        for t in callers:
            t.join(timeout=60)
        assert set(got) <= set(known) and len(got) >= 4
        versions[0].save(shelf / "d0")
        assert said(made.client(), "d0", max_tokens=30) == known[0] and made.settled()
    finally:
        made.close()


def test_a_delta_written_anew_as_its_request_joins_is_counted_again(
    base: Base, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(base, 1 << 30)
    library.scan(shelf)
    engine, real, late = Engine(base, library, cells=2000), Library.acquire, [99, 50]
    new = moved(base, LoRA(rank=3), seed=99, name="d0")

    def acquire(self: Library, name: str) -> Any:
        if late:  # the file changes between the count of cells and the reading, twice
            moved(base, LoRA(rank=3), seed=late.pop(), name="d0").save(shelf / "d0")
        return real(self, name)

    monkeypatch.setattr(Library, "acquire", acquire)
    request = Request("a", (1, 2, 3), 8, "d0", GREEDY)
    got = engine.generate([request])["a"]
    monkeypatch.undo()
    other = Library(base, 1 << 30)
    other.add(new, "d0")
    assert got == Engine(base, other, cells=2000).generate([request])["a"]
    assert engine.pool.free == 2000 and not late
    engine.pool.check()


def test_a_pin_follows_the_delta_it_was_set_on(base: Base, shelf: Path) -> None:
    library = Library(base, 1)
    library.scan(shelf)
    library.pin("d0")
    for seed in (0, 50):
        moved(base, LoRA(rank=2), seed=seed, name="d0").save(shelf / "d0")
        library.release(library.acquire("d0"))
    assert library.held == [library.find("d0").digest]  # the version that is no more was let go
    library.pin("d0", on=False)
    assert not library.held


def test_more_deltas_in_use_than_memory_is_for_are_right_and_let_go(base: Base, shelf: Path) -> None:
    made = Served(base, shelf)
    try:
        alone = {n: said(made.client(), n) for n in ("d0", "d1", "d2")}
        made.library.budget = 1
        got: dict[int, tuple[str, str]] = {}

        def run(i: int) -> None:
            got[i] = (f"d{i % 3}", said(made.client(), f"d{i % 3}"))

        threads = [threading.Thread(target=run, args=(i,)) for i in range(12)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(timeout=60)
        assert len(got) == 12 and all(text == alone[name] for name, text in got.values())
        assert made.settled() and made.library.held_bytes == 0 and made.library.evictions > 0
    finally:
        made.close()


def test_no_memory_for_a_delta_costs_its_requests_only(
    base: Base, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Served(base, shelf)
    real = library_module.store.load

    def short(folder: Path, *more: Any) -> Any:
        if folder.name == "d0":
            raise MemoryError
        if folder.name == "d1":
            raise RuntimeError("the method's own code")
        return real(folder, *more)

    monkeypatch.setattr(library_module.store, "load", short)
    try:
        with pytest.raises(openai.InternalServerError, match="no memory"):
            asked(made.client(), "d0")
        with pytest.raises(openai.UnprocessableEntityError, match="cannot be prepared"):
            asked(made.client(), "d1")
        assert said(made.client(), "d2") and made.settled()
    finally:
        made.close()


@pytest.mark.parametrize(("error", "code"), [(MemoryError(), "out_of_memory"), (ValueError("odd"), None)])
def test_a_step_that_fails_costs_what_was_in_it_and_not_the_server(
    base: Base, shelf: Path, error: Any, code: Any
) -> None:
    made = Served(base, shelf)
    engine = made.worker.engine
    assert engine is not None and engine.decoder is not None
    want = said(made.client(), "d0")
    real, failing = engine.decoder, threading.Event()

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def __call__(self, *args: Any) -> Any:
            if failing.is_set():
                failing.clear()
                raise error
            return real(*args)

    engine.decoder = Failing()  # type: ignore[assignment]
    try:
        stream = asked(made.client(), "d1", max_tokens=300, stream=True)
        next(iter(stream))
        failing.set()
        with pytest.raises(openai.APIError) as raised:
            list(stream)
        assert raised.value.code == code
        assert made.settled() and said(made.client(), "d0") == want
        assert httpx.get(f"{made.url}/health").status_code == 200
    finally:
        made.close()


def test_callers_that_leave_while_they_wait_leave_nothing(base: Base, shelf: Path) -> None:
    made = Served(base, shelf, requests=1, queue=64)
    body = {"model": "d0", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "temperature": 0}
    try:
        first = threading.Thread(target=lambda: httpx.post(f"{made.url}/v1/chat/completions", json=body, timeout=60))
        first.start()
        for stream in (False, True) * 3:
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{made.url}/v1/chat/completions", json={**body, "stream": stream}, timeout=0.02)
        first.join(timeout=60)
        assert made.settled() and said(made.client(), "d1")
    finally:
        made.close()


def test_an_order_whose_giver_left_does_not_stop_the_engine(base: Base) -> None:
    library = Library(base, 1 << 30)
    library.add(moved(base, IA3(), name="d"), "d")
    worker = Worker(Engine(base, library, cells=500), Encoder(base, library))

    async def leave() -> int:
        async def one(i: int) -> None:
            async for _ in worker.serve(Request(f"r{i}", (1, 2, 3), 50, "d", GREEDY)):
                pass

        tasks = [asyncio.ensure_future(one(i)) for i in range(40)]
        for i, t in enumerate(tasks):
            await asyncio.sleep(0.001 * (i % 3))
            t.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        events = [e async for e in worker.serve(Request("last", (1, 2, 3), 5, "d", GREEDY))]
        return len(events) if all(isinstance(f, asyncio.CancelledError) for f in found) else -1

    assert asyncio.run(leave()) == 5
    assert worker.alive and worker.idle and worker.engine is not None and worker.engine.free == 500
    worker.stop()


def test_draining_finishes_what_runs_and_refuses_what_comes(base: Base, shelf: Path) -> None:
    made = Served(base, shelf)
    try:
        whole = said(made.client(), "d0", max_tokens=80)
        stream = asked(made.client(), "d0", max_tokens=80, stream=True)
        text = next(iter(stream)).choices[0].delta.content
        draining = threading.Thread(target=made.worker.drain, args=(30,))
        draining.start()
        while not made.worker.draining:
            time.sleep(0.005)
        body = {"model": "d1", "messages": [{"role": "user", "content": "x"}]}
        refused = httpx.post(f"{made.url}/v1/chat/completions", json=body, timeout=20)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{made.url}/ready").status_code == 503
        text += "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
        draining.join(timeout=30)
        assert text == whole and not draining.is_alive()
    finally:
        made.close()


def test_whoever_is_left_when_time_is_up_is_told(base: Base, shelf: Path) -> None:
    made = Served(base, shelf)
    try:
        stream = asked(made.client(), "d0", max_tokens=400, stream=True)
        next(iter(stream))
        assert made.worker.drain(0.01) is False
        made.worker.stop()
        with pytest.raises(openai.APIError, match="going down"):
            list(stream)
    finally:
        made.close()


def test_what_killed_writers_left_is_no_delta_and_loses_none(base: Base, shelf: Path) -> None:
    (shelf / "d0").rename(shelf / ".d0.aside")  # a save killed between its two renames
    shutil.copytree(shelf / "d1", shelf / ".d1.new-0123456789ab")  # one killed before them
    (shelf / ".d2.new-ba9876543210").mkdir()
    library = Library(base, 1 << 30)
    assert library.scan(shelf) == [] and sorted(library.entries) == ["d0", "d1", "d2"]
    ready = library.acquire("d0")
    assert ready.digest == library.find("d0").digest


def test_a_body_that_does_not_come_is_not_waited_for(base: Base, shelf: Path) -> None:
    from tunesmith.serve.access import BodyLimit

    sent: list[Any] = []

    async def run() -> None:
        async def never() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        async def app(*_: Any) -> None:
            raise AssertionError("the application must not be reached")

        await BodyLimit(app, 100, seconds=0.05)({"type": "http", "headers": []}, never, send)

    asyncio.run(run())
    assert sent[0]["status"] == 408 and json.loads(sent[1]["body"])["error"]["code"] == "timeout"


def test_an_engine_that_has_stopped_says_so(base: Base) -> None:
    worker = Worker(Engine(base, Library(base, 1), cells=100))
    worker.stop()
    with pytest.raises(ResourceError, match="stopped"):
        worker.order(lambda: torch.zeros(1))
