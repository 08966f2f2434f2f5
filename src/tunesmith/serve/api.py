# SPDX-License-Identifier: Apache-2.0
"""The OpenAI-compatible HTTP API over a worker: models, chat and completions, health, metrics, an admin plane.

A request names a delta (or the base) as its model. Errors have OpenAI's form. The admin plane is there only when it has a
token of its own. Nothing here holds state but counters.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from tunesmith.core.base import Base
from tunesmith.core.errors import DataError, DeltaError, ResourceError, TunesmithError, UsageError, nearest
from tunesmith.data.layout import layout_from, stop_ids_for
from tunesmith.data.templates import TemplateInfo, prompt_ids
from tunesmith.serve import engine
from tunesmith.serve.access import Access, BodyLimit
from tunesmith.serve.constrain import Rule, Schemas
from tunesmith.serve.metrics import exposition
from tunesmith.serve.sampling import Chosen
from tunesmith.serve.schema import ChatRequest, CompletionRequest, LoadRequest, PinRequest
from tunesmith.serve.text import Writer
from tunesmith.serve.worker import Busy, Draining, Worker

log = logging.getLogger("tunesmith.serve")
DEFAULT_TOKENS = 256


class Answer:
    """One answer as it is written: pieces of text with the log probabilities of their tokens, reason and counts."""

    def __init__(self, tokenizer: Any, stops: list[str], logprobs: bool) -> None:
        self.writer, self.tokenizer, self.wanted = Writer(tokenizer, stops), tokenizer, logprobs
        self.tokens, self.reason = 0, "length"
        self._pending: list[Chosen] = []

    def take(self, event: engine.Event) -> tuple[str, list[Chosen]] | None:
        """The next piece of text and the tokens since the last, or None. Raises the event's error."""
        if event.error is not None:
            raise event.error
        text = ""
        if event.chosen is not None:
            self.tokens += 1
            self._pending.append(event.chosen)
            text = self.writer.push(event.chosen.token)
        if event.reason is not None:
            self.reason = event.reason
            text += self.writer.finish()
        if self.writer.stopped:
            self.reason = "stop"
        if not text and not (self.wanted and event.reason is not None and self._pending):
            return None
        tokens, self._pending = self._pending, []
        return text, tokens

    @property
    def over(self) -> bool:
        return self.writer.stopped

    def spelled(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class Service:
    """What the routes share: the base, the worker, who may use what."""

    def __init__(self, base: Base, worker: Worker, access: Access, root: Path | None) -> None:
        self.base, self.worker, self.access, self.root = base, worker, access, root
        self.started = int(time.time())
        self.schemas = Schemas(base.tokenizer)
        self._layouts: dict[str, TemplateInfo] = {}

    def layout(self, name: str | None) -> TemplateInfo:
        """The chat layout of a delta, or of the base."""
        entry = None if name is None else self.worker.engine.library.find(name)
        key = "" if entry is None else entry.digest
        if key not in self._layouts:
            self._layouts[key] = layout_from(self.base, {} if entry is None else entry.layout)
        return self._layouts[key]

    def delta(self, model: str) -> str | None:
        """The delta a request means, None for the base. Raises UsageError naming the nearest model."""
        if model == self.base.name:
            return None
        known = self.worker.engine.library.entries.copy()
        if model not in known:
            raise UsageError(f"there is no model {model!r}", hint=nearest(model, [self.base.name, *known]))
        return model

    def describe(self, name: str | None) -> dict[str, Any]:
        """A model as `/v1/models` lists it."""
        base = self.base.fingerprint.digest
        if name is None:
            return {"id": self.base.name, "object": "model", "created": self.started, "owned_by": "tunesmith", "kind": "base",
                    "fingerprint": base}  # fmt: skip
        e = self.worker.engine.library.entries[name]
        metrics = e.provenance.get("metrics")
        return {
            "id": name, "object": "model", "created": self.started, "owned_by": "tunesmith", "kind": "delta",
            "parent": self.base.name, "base_fingerprint": base, "fingerprint": e.digest, "methods": list(e.methods),
            "bytes": e.nbytes, "metrics": metrics if isinstance(metrics, dict) else None,
        }  # fmt: skip

    def request(
        self, body: ChatRequest | CompletionRequest, prompt: list[int], most: int | None, logprobs: int,
        rule: Rule | None = None,
    ) -> engine.Request:  # fmt: skip
        delta = self.delta(body.model)
        info = self.layout(delta)
        id = f"{'chatcmpl' if isinstance(body, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}"
        room = self.worker.engine.longest - len(prompt)
        new = min(most or DEFAULT_TOKENS, room) if most is None else most
        return engine.Request(
            id, tuple(prompt), max(1, new), delta, body.sampling(uuid.UUID(id.rpartition("-")[2]).int % 2**63, logprobs),
            frozenset(stop_ids_for(self.base, info)), time.monotonic(), rule,
        )  # fmt: skip


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
    app = FastAPI(title="Tunesmith", version="1", openapi_url="/openapi.json")
    app.add_middleware(BodyLimit, limit=body_limit)
    app.state.service = service
    _errors(app)
    _models(app, service)
    _writing(app, service)
    _operation(app, service)
    if service.access.admin is not None:
        _admin(app, service)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(TunesmithError)
    async def ours(_: Request, error: TunesmithError) -> Response:
        return failure(error)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), "invalid_request_error", headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"] if p != "body")
        message = str(first["msg"])
        if first["type"] == "extra_forbidden":
            known = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
            message = f"this server knows no such field; {nearest(where, known)}"
        return problem(400, f"{where}: {message}" if where else message, "invalid_request_error", param=where or None)


def problem(
    status: int, message: str, kind: str, *, code: str | None = None, param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:  # fmt: skip
    """An error in OpenAI's form."""
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers=headers)


def failure(error: TunesmithError) -> JSONResponse:
    """The response for one of our errors."""
    if isinstance(error, Busy):
        return problem(
            429, str(error), "rate_limit_error", code="queue_full", headers={"Retry-After": str(error.seconds)}
        )
    if isinstance(error, Draining):
        return problem(503, str(error), "server_error", code="draining", headers={"Retry-After": "5"})
    if isinstance(error, ResourceError) and "too late" in error.what:
        return problem(503, str(error), "server_error", code="too_late", headers={"Retry-After": "5"})
    if isinstance(error, UsageError) and ("no model" in error.what or "no delta" in error.what):
        return problem(404, str(error), "invalid_request_error", code="model_not_found", param="model")
    if isinstance(error, UsageError | DataError):
        return problem(400, str(error), "invalid_request_error", param=error.where)
    if isinstance(error, DeltaError):
        return problem(422, str(error), "invalid_request_error", code="delta_refused", param="model")
    if isinstance(error, ResourceError) and "do not fit" in error.what:
        return problem(400, str(error), "invalid_request_error", code="context_length_exceeded")
    return problem(500, str(error), "server_error")


def _models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models(key: str = Depends(service.access.require)) -> dict[str, Any]:
        names = [None, *sorted(service.worker.engine.library.entries.copy())]
        return {"object": "list", "data": [service.describe(n) for n in names if service.access.may(key, n)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, key: str = Depends(service.access.require)) -> dict[str, Any]:
        delta = service.delta(name)
        service.access.check(key, delta)
        return service.describe(delta)


def _writing(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request, key: str = Depends(service.access.require)) -> Response:
        delta = service.delta(body.model)
        service.access.check(key, delta)
        info = service.layout(delta)
        messages = [m.plain() for m in body.messages]
        prompt = prompt_ids(messages, service.base.tokenizer, info.system, info.template)
        many = (body.top_logprobs or 0) if body.logprobs else 0
        schema = body.response_format.schema_wanted() if body.response_format is not None else None
        rule = None if schema is None else await asyncio.to_thread(service.schemas.rule, schema)
        made = service.request(body, prompt, body.max_completion_tokens or body.max_tokens, many, rule)
        return await _respond(service, request, body, made, _Chat(service, body, made))

    @app.post("/v1/completions")
    async def completions(
        body: CompletionRequest, request: Request, key: str = Depends(service.access.require)
    ) -> Response:
        service.access.check(key, service.delta(body.model))
        if isinstance(body.prompt, str):
            prompt = [int(i) for i in service.base.tokenizer(body.prompt)["input_ids"]]
        else:
            prompt = body.prompt
        made = service.request(body, prompt, body.max_tokens or 16, body.logprobs or 0)
        return await _respond(service, request, body, made, _Completion(service, body, made))


class _Shape:
    """How an endpoint spells answers; `piece` and `whole` give choices."""

    def __init__(self, service: Service, body: Any, made: engine.Request) -> None:
        self.answer = Answer(service.base.tokenizer, body.stops(), bool(body.logprobs))
        self.head = {"id": made.id, "created": int(time.time()), "model": body.model}
        self.logprobs = bool(body.logprobs)

    def usage(self, made: engine.Request) -> dict[str, int]:
        n, new = len(made.prompt), self.answer.tokens
        return {"prompt_tokens": n, "completion_tokens": new, "total_tokens": n + new}


class _Chat(_Shape):
    chunk, whole_name = "chat.completion.chunk", "chat.completion"

    def piece(self, text: str, tokens: list[Chosen], reason: str | None, first: bool = False) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        return {"index": 0, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def whole(self, text: str, tokens: list[Chosen], reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, tokens: list[Chosen]) -> dict[str, Any] | None:
        def one(token: int, logprob: float) -> dict[str, Any]:
            text = self.answer.spelled(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        if not self.logprobs:
            return None
        rows = [{**one(c.token, c.logprob), "top_logprobs": [one(t, p) for t, p in c.others]} for c in tokens]
        return {"content": rows, "refusal": None}


class _Completion(_Shape):
    chunk = whole_name = "text_completion"

    def piece(self, text: str, tokens: list[Chosen], reason: str | None, first: bool = False) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def whole(self, text: str, tokens: list[Chosen], reason: str) -> dict[str, Any]:
        return self.piece(text, tokens, reason)

    def _logprobs(self, tokens: list[Chosen]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        spell = self.answer.spelled
        return {
            "tokens": [spell(c.token) for c in tokens], "token_logprobs": [c.logprob for c in tokens],
            "top_logprobs": [{spell(t): p for t, p in c.others} for c in tokens], "text_offset": [],
        }  # fmt: skip


async def _respond(
    service: Service, request: Request, body: Any, made: engine.Request, shape: _Chat | _Completion
) -> Response:
    began = time.monotonic()
    events = service.worker.serve(made)
    if body.stream:
        # The first event is waited for, so that a refusal is a status and not a broken stream.
        head = await anext(events)
        if head.error is not None:
            await events.aclose()
            raise head.error
        lines = _stream(events, head, body, made, shape)
        return StreamingResponse(_logged(lines, made, shape, began), media_type="text/event-stream")
    text, tokens = "", []
    async with aclosing(events):
        async for event in events:
            piece = shape.answer.take(event)
            if piece is not None:
                text, tokens = text + piece[0], tokens + piece[1]
            if shape.answer.over or await request.is_disconnected():
                break
    _log(made, shape, began)
    choice = shape.whole(text, tokens, shape.answer.reason)
    return JSONResponse({**shape.head, "object": shape.whole_name, "choices": [choice], "usage": shape.usage(made)})


async def _stream(
    events: AsyncIterator[engine.Event], head: engine.Event, body: Any, made: engine.Request, shape: _Chat | _Completion
) -> AsyncIterator[str]:
    def line(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**shape.head, 'object': shape.chunk, 'choices': choices, **more})}\n\n"

    first, event = True, head
    try:
        while True:
            piece = shape.answer.take(event)
            if piece is not None or first:
                text, tokens = piece or ("", [])
                yield line([shape.piece(text, tokens, None, first)])
                first = False
            if event.reason is not None or shape.answer.over:
                break
            event = await anext(events)
        yield line([shape.piece("", [], shape.answer.reason)])
        if body.stream_options is not None and body.stream_options.include_usage:
            yield line([], usage=shape.usage(made))
    except TunesmithError as error:
        yield f"data: {bytes(failure(error).body).decode()}\n\n"
    finally:
        await events.aclose()  # type: ignore[attr-defined]
    yield "data: [DONE]\n\n"


async def _logged(
    lines: AsyncIterator[str], made: engine.Request, shape: _Chat | _Completion, began: float
) -> AsyncIterator[str]:
    try:
        async with aclosing(lines) as stream:  # type: ignore[type-var]
            async for line in stream:
                yield line
    finally:
        _log(made, shape, began)


def _log(made: engine.Request, shape: _Chat | _Completion, began: float) -> None:
    """One structured line a request, without anything of its text."""
    row = {"id": made.id, "model": shape.head["model"], "reason": shape.answer.reason, **shape.usage(made),
           "seconds": round(time.monotonic() - began, 4)}  # fmt: skip
    log.info(json.dumps(row))


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

    @app.get("/metrics")
    async def metrics(_: str = Depends(service.access.require)) -> Response:
        return PlainTextResponse(exposition(service.worker), media_type="text/plain; version=0.0.4")


def _admin(app: FastAPI, service: Service) -> None:
    library = service.worker.engine.library

    async def ordered(what: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(service.worker.order(what))

    @app.post("/admin/deltas", dependencies=[Depends(service.access.require_admin)])
    async def load(body: LoadRequest) -> dict[str, Any]:
        if service.root is None:
            raise UsageError("deltas cannot be loaded: the server was started without a folder", where="folder")
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
        return service.describe(body.name)

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
