# SPDX-License-Identifier: Apache-2.0
"""The routes that write: chat and completions, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.data.layout import stop_ids_for
from tunesmith.data.templates import prompt_ids
from tunesmith.serve import requests
from tunesmith.serve.constrain import Rule
from tunesmith.serve.library import Entry
from tunesmith.serve.sampling import Chosen
from tunesmith.serve.schema import ChatRequest, CompletionRequest
from tunesmith.serve.service import Service, failure, log_request, while_there
from tunesmith.serve.text import Writer

DEFAULT_TOKENS = 256
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


def add(app: FastAPI, service: Service) -> None:
    """Put the routes on an application."""

    @app.post("/v1/chat/completions", response_model=None, responses=STREAMED)
    async def chat(body: ChatRequest, request: Request, key: str = Depends(service.access.require)) -> Response:
        entry = service.entry(body.model, key)
        messages = [m.plain() for m in body.messages]
        info = service.layout(entry)
        prompt = prompt_ids(messages, service.base.tokenizer, info.system, info.template)
        many = (body.top_logprobs or 0) if body.logprobs else None
        schema = body.response_format.schema_wanted() if body.response_format is not None else None
        rule = None if schema is None else await asyncio.to_thread(service.schemas.rule, schema)
        made = _made(service, body, entry, prompt, body.max_completion_tokens or body.max_tokens, many, rule)
        return await _respond(service, request, body, made, _Chat(service, body, made))

    @app.post("/v1/completions", response_model=None, responses=STREAMED)
    async def completions(
        body: CompletionRequest, request: Request, key: str = Depends(service.access.require)
    ) -> Response:
        entry = service.entry(body.model, key)
        if isinstance(body.prompt, str):
            prompt = [int(i) for i in service.base.tokenizer(body.prompt)["input_ids"]]
        else:
            prompt = body.prompt
        made = _made(service, body, entry, prompt, body.max_tokens or 16, body.logprobs or None)
        return await _respond(service, request, body, made, _Completion(service, body, made))


def _made(
    service: Service, body: ChatRequest | CompletionRequest, entry: Entry | None, prompt: list[int], most: int | None,
    logprobs: int | None, rule: Rule | None = None,
) -> requests.Request:  # fmt: skip
    """The engine's request. Raises UsageError for a model that does not write."""
    if service.does(entry) != "chat" or service.worker.engine is None:
        raise UsageError("the model writes no text", where="model", hint=f"POST /v1/{service.does(entry)}")
    id = f"{'chatcmpl' if isinstance(body, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}"
    room = service.worker.engine.longest - len(prompt)
    new = max(1, min(DEFAULT_TOKENS, room)) if most is None else most
    return requests.Request(
        id, tuple(prompt), new, None if entry is None else entry.name,
        body.sampling(uuid.UUID(id.rpartition("-")[2]).int % 2**63, logprobs),
        frozenset(stop_ids_for(service.base, service.layout(entry))), time.monotonic(), rule,
    )  # fmt: skip


class Answer:
    """One answer as it is written: pieces of text with the log probabilities of their tokens, reason and counts."""

    def __init__(self, tokenizer: Any, stops: list[str], logprobs: bool) -> None:
        self.writer, self.tokenizer, self.wanted = Writer(tokenizer, stops), tokenizer, logprobs
        self.tokens, self.reason = 0, "length"
        self._pending: list[Chosen] = []

    def take(self, event: requests.Event) -> tuple[str, list[Chosen]] | None:
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


class _Shape:
    """How an endpoint spells answers; `piece` and `whole` give choices."""

    def __init__(self, service: Service, body: Any, made: requests.Request) -> None:
        self.answer = Answer(service.base.tokenizer, body.stops(), bool(body.logprobs))
        self.head = {"id": made.id, "created": int(time.time()), "model": body.model}
        self.logprobs = bool(body.logprobs)

    def usage(self, made: requests.Request) -> dict[str, int]:
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
        def one(token: int, logprob: float | None) -> dict[str, Any]:
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
    service: Service, request: Request, body: Any, made: requests.Request, shape: _Chat | _Completion
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
    try:
        async with aclosing(while_there(events, request)) as present:
            async for event in present:
                piece = shape.answer.take(event)
                if piece is not None:
                    text, tokens = text + piece[0], tokens + piece[1]
                if shape.answer.over:
                    break
    finally:
        _log(made, shape, began)
    choice = shape.whole(text, tokens, shape.answer.reason)
    return JSONResponse({**shape.head, "object": shape.whole_name, "choices": [choice], "usage": shape.usage(made)})


async def _stream(
    events: AsyncIterator[requests.Event],
    head: requests.Event,
    body: Any,
    made: requests.Request,
    shape: _Chat | _Completion,
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
    lines: AsyncIterator[str], made: requests.Request, shape: _Chat | _Completion, began: float
) -> AsyncIterator[str]:
    try:
        async with aclosing(lines) as stream:  # type: ignore[type-var]
            async for line in stream:
                yield line
    finally:
        _log(made, shape, began)


def _log(made: requests.Request, shape: _Chat | _Completion, began: float) -> None:
    log_request(made.id, shape.head["model"], shape.answer.reason, shape.usage(made), began)
