# SPDX-License-Identifier: Apache-2.0
"""The same API from several replicas, through Ray Serve: each has the whole base, and requests go where their delta is.

A door takes the HTTP requests, reads which model they name, and hands them to a replica; Ray Serve's model multiplexing
prefers one that has the delta in memory. A replica is the application of `api` with an engine of its own, spoken to in
ASGI messages, so whatever one server answers, a replica answers. A delta that a replica is known for is pinned there
until Ray lets it go for others.

The admin plane is not there: each replica has a registry of its own, filled when it starts. Needs `tunesmith[ray]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Ray listens on every interface unless it is told, before its first import, that this machine is all there is.
if "ray" not in sys.modules and not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from tunesmith.core.errors import ResourceError, TunesmithError
from tunesmith.serve.access import Access
from tunesmith.serve.service import problem

KNOWN_FOR = 64  # deltas a replica stays known for
LOOPBACK = "127.0.0.1"
STORE = 100 << 20  # bytes of Ray's object store; requests and answers pass through it in small pieces
LOOK = 10.0  # seconds between two looks whether a replica is well


@dataclass(frozen=True)
class Settings:
    """What a replica is made from; everything can be sent to another machine, which needs the same folders."""

    model: str
    deltas: str
    device: str = "auto"
    cells: int = 16384
    requests: int = 64
    queue: int = 256
    policy: str = "fcfs"
    first_token: float | None = None
    guess: int | None = None
    memory: int = 1 << 30
    body: int = 1 << 20
    drain: float = 30.0  # seconds for requests under way when a replica ends
    keys: dict[str, list[str] | None] = field(default_factory=dict)


class Replica:
    """One base with its deltas, behind ASGI messages."""

    def __init__(self, settings: Settings) -> None:
        from tunesmith.models.open import load
        from tunesmith.serve.api import create
        from tunesmith.serve.encoder import Encoder
        from tunesmith.serve.engine import Engine
        from tunesmith.serve.library import Library
        from tunesmith.serve.worker import Worker

        s = settings
        base = load(s.model, device=s.device)
        self.library = Library(base, s.memory)
        root = Path(s.deltas)
        if root.is_dir():
            self.library.scan(root)
        engine: Engine | None = None
        if base.family == "causal-lm":
            engine = Engine(
                base, self.library, cells=s.cells, requests=s.requests, policy=s.policy, first_token=s.first_token,
                guess=s.guess,
            )  # fmt: skip
        self.worker = Worker(engine, Encoder(base, self.library), queue=s.queue)
        access = Access({k: None if v is None else frozenset(v) for k, v in s.keys.items()})
        self.app = create(base, self.worker, access=access, root=root, body_limit=s.body)

    @serve.multiplexed(max_num_models_per_replica=KNOWN_FOR)
    async def known(self, name: str) -> Pin:
        """The delta in memory for as long as Ray counts on it. Raises what keeps it from being served."""

        def pin() -> None:
            self.library.release(self.library.acquire(name))
            self.library.pin(name)

        await asyncio.wrap_future(self.worker.order(pin))
        return Pin(self, name)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The ASGI messages the application answers to a request; leaving early is the caller going away."""
        name = serve.get_multiplexed_model_id()
        if name in self.library.entries:
            with contextlib.suppress(TunesmithError):  # the application says what is wrong with it
                await self.known(name)
        me = serve.get_replica_context().replica_id.unique_id.encode()
        gone, sent = asyncio.Event(), asyncio.Queue[Message | None]()
        given = False

        async def receive() -> Message:
            nonlocal given
            if given:
                await gone.wait()
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def run() -> None:
            try:
                await self.app(scope, receive, sent.put)
            finally:
                await sent.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], (b"x-replica", me)]}
                yield message
            await task
        finally:
            gone.set()
            if not task.done():
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def check_health(self) -> None:
        """Ray replaces a replica whose engine has stopped."""
        if not self.worker.alive:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        worker = getattr(self, "worker", None)
        if worker is not None:
            worker.stop()


class Pin:
    """That a replica is known for a delta; it is let go with this object."""

    def __init__(self, replica: Replica, name: str) -> None:
        self.replica, self.name = replica, name

    def __del__(self) -> None:
        def unpin() -> None:
            with contextlib.suppress(TunesmithError):  # it may be gone by now
                self.replica.library.pin(self.name, on=False)

        with contextlib.suppress(TunesmithError):
            self.replica.worker.order(unpin)


class Door:
    """Hands each request to the replica that Ray chooses for the model it names."""

    def __init__(self, replicas: Any, limit: int) -> None:
        self.replicas, self.limit = replicas, limit

    async def __call__(self, request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self.limit:
                return problem(
                    413, f"a request may have at most {self.limit:,} bytes", "invalid_request_error", code="too_large"
                )
        path = request.url.path
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "",
            "method": request.method, "path": path, "raw_path": path.encode(),
            "query_string": request.url.query.encode(), "headers": [tuple(h) for h in request.headers.raw],
            "client": None, "server": None,
        }  # fmt: skip
        handle = self.replicas.options(stream=True, multiplexed_model_id=model_named(path, bytes(body)))
        answer = handle.answer.remote(scope, bytes(body))
        try:
            start = await anext(answer)
        except BaseException:
            answer.cancel()
            raise
        response = StreamingResponse(_pieces(answer), status_code=start["status"])
        response.raw_headers = [(bytes(k), bytes(v)) for k, v in start["headers"]]
        return response


async def _pieces(answer: Any) -> AsyncIterator[bytes]:
    try:
        async for message in answer:
            if message.get("body"):
                yield message["body"]
    finally:
        answer.cancel()  # of no effect where all has come


def model_named(path: str, body: bytes) -> str:
    """The model a request names, "" for one that names none."""
    if path.startswith("/v1/models/"):
        return path.removeprefix("/v1/models/")
    try:
        found = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return ""
    name = found.get("model") if isinstance(found, dict) else None
    return name if isinstance(name, str) and len(name) <= 512 and name.isprintable() else ""


def application(settings: Settings, *, replicas: int = 2, cpus: float = 1.0) -> Any:
    """The Ray Serve application: one door, and `replicas` that hold `cpus` each (a GPU each where the device is CUDA)."""
    gpus = {"num_gpus": 1} if settings.device.startswith("cuda") else {}
    behind = serve.deployment(
        name="replica", num_replicas=replicas, max_ongoing_requests=settings.requests + settings.queue,
        ray_actor_options={"num_cpus": cpus, **gpus}, health_check_period_s=LOOK,
        graceful_shutdown_timeout_s=settings.drain,
    )(Replica)  # fmt: skip
    door = serve.deployment(
        name="tunesmith", num_replicas=1, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}
    )(Door)
    return door.bind(behind.bind(settings), settings.body)


@contextmanager
def running(settings: Settings, host: str, port: int, *, replicas: int, cpus: float = 1.0) -> Iterator[Any]:
    """The application served on `host`:`port` for the block, on the Ray cluster at hand or on one of this machine alone.

    Gives the handle of the door. A cluster that is started here listens on this machine only, and ends with the block.
    """
    import ray

    began, alone = not ray.is_initialized(), not os.environ.get("RAY_ADDRESS")
    if began and alone and ray.util.get_node_ip_address() != LOOPBACK:
        raise ResourceError(
            "a cluster of Ray's would listen on every interface of this machine", where="ray",
            hint="import tunesmith.serve.cluster before ray, or start a cluster yourself and set RAY_ADDRESS",
        )  # fmt: skip
    if began:
        ray.init(log_to_driver=False, **({"include_dashboard": False, "object_store_memory": STORE} if alone else {}))
    try:
        serve.start(http_options={"host": host, "port": port})
        yield serve.run(application(settings, replicas=replicas, cpus=cpus), name="tunesmith")
    finally:
        serve.shutdown()
        if began:
            ray.shutdown()
