# SPDX-License-Identifier: Apache-2.0
"""The OpenAI-compatible HTTP API over a worker: models, writing, reading, health, metrics, an admin plane.

A request names a delta (or the base) as its model. Errors have OpenAI's form. The admin plane is there only when it has a
token of its own. Nothing here holds state but counters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tunesmith.core.base import Base
from tunesmith.core.errors import TunesmithError, UsageError, nearest
from tunesmith.serve import reading, writing
from tunesmith.serve.access import Access, BodyLimit
from tunesmith.serve.metrics import exposition
from tunesmith.serve.schema import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    LoadRequest,
    PinRequest,
    Problem,
)
from tunesmith.serve.service import Service, failure, problem
from tunesmith.serve.worker import Worker

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest, "/v1/embeddings": EmbeddingRequest,
    "/v1/classify": ClassifyRequest, "/admin/deltas": LoadRequest,
}  # fmt: skip

PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be served; the message says why"},
    401: {"description": "A key is needed"},
    403: {"description": "The key is not for this model"},
    404: {"description": "There is no such model"},
    405: {"description": "There is no such method"},
    408: {"description": "The body did not come in time"},
    413: {"description": "The body is too large"},
    422: {"description": "The delta is refused"},
    429: {"description": "The queue is full; come again after Retry-After seconds"},
    500: {"description": "Something is wrong with the server"},
    503: {"description": "The server is overloaded or going down"},
}


def create(
    base: Base,
    worker: Worker,
    *,
    access: Access | None = None,
    root: Path | None = None,
    body_limit: int = 1 << 20,
) -> FastAPI:
    """The application. `root` is where the admin plane may load deltas from; `body_limit` bytes of a request are read."""
    service = Service(base, worker, access or Access(), root)
    responses = {code: {**about, "model": Problem} for code, about in PROBLEMS.items()}
    app = FastAPI(title="Tunesmith", version="1", openapi_url="/openapi.json", responses=responses)
    app.add_middleware(BodyLimit, limit=body_limit)
    app.state.service = service
    _errors(app)
    _models(app, service)
    writing.add(app, service)
    reading.add(app, service)
    _operation(app, service)
    if service.access.admin is not None:
        _admin(app, service)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(TunesmithError)
    async def ours(_: Request, error: TunesmithError) -> Response:
        return failure(error)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> Response:
        return problem(
            500, f"something is wrong with the server ({type(error).__name__}); its log says what", "server_error"
        )

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), "invalid_request_error", headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"] if p != "body")
        message = str(first["msg"])
        if first["type"] == "extra_forbidden":
            body = BODIES.get(request.url.path)
            message = f"this server knows no such field; {nearest(where, body.model_fields if body else ())}"
        return problem(400, f"{where}: {message}" if where else message, "invalid_request_error", param=where or None)


def _models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models(key: str = Depends(service.access.require)) -> dict[str, Any]:
        entries = service.worker.library.entries.copy()
        shown = [e for n, e in sorted(entries.items()) if service.access.may(key, n)]
        return {"object": "list", "data": [service.describe(e) for e in (None, *shown)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, key: str = Depends(service.access.require)) -> dict[str, Any]:
        return service.describe(service.entry(name, key))


def _operation(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        return JSONResponse(
            {"status": "ok" if service.worker.alive else "failed"}, 200 if service.worker.alive else 500
        )

    @app.get("/ready")
    async def ready() -> Response:
        good = service.worker.alive and not service.worker.draining
        return JSONResponse({"ready": good}, 200 if good else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(_: str = Depends(service.access.require)) -> Response:
        return PlainTextResponse(exposition(service.worker), media_type="text/plain; version=0.0.4")


def _admin(app: FastAPI, service: Service) -> None:
    library = service.worker.library

    async def ordered(what: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(service.worker.order(what))

    @app.post("/admin/deltas", dependencies=[Depends(service.access.require_admin)])
    async def load(body: LoadRequest) -> dict[str, Any]:
        if service.root is None:
            raise UsageError("deltas cannot be loaded: the server was started without a folder", where="folder")
        if "\0" in body.folder:
            raise UsageError("a folder's name has no such character", where="folder")
        place = (service.root / body.folder).resolve()
        if not place.is_relative_to(service.root.resolve()):
            raise UsageError("it lies outside the folder of this server", where="folder")

        def run() -> None:
            library.register(place, body.name)
            try:
                library.release(library.acquire(body.name))  # a delta that cannot be served is refused here
            except TunesmithError:
                library.remove(body.name)
                raise

        await ordered(run)
        return service.describe(library.entries.get(body.name))

    @app.delete("/admin/deltas/{name:path}", dependencies=[Depends(service.access.require_admin)])
    async def unload(name: str) -> dict[str, Any]:
        await ordered(lambda: library.remove(name))
        return {"id": name, "deleted": True}

    @app.post("/admin/pin/{name:path}", dependencies=[Depends(service.access.require_admin)])
    async def pin(name: str, body: PinRequest) -> dict[str, Any]:
        await ordered(lambda: library.pin(name, body.on))
        return {"id": name, "pinned": body.on}

    @app.get("/admin/stat", dependencies=[Depends(service.access.require_admin)])
    async def stat() -> dict[str, Any]:
        found: dict[str, Any] = await ordered(service.worker.statistics)
        return found
