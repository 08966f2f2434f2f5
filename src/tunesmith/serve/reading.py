# SPDX-License-Identifier: Apache-2.0
"""The routes that read: embeddings as OpenAI gives them, and classes with their probabilities."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from contextlib import aclosing
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.serve.encoder import Encoder, Reading, Task
from tunesmith.serve.library import Entry
from tunesmith.serve.schema import ClassifyRequest, EmbeddingRequest
from tunesmith.serve.service import Service, log_request, while_there


def add(app: FastAPI, service: Service) -> None:
    """Put the routes on an application."""

    @app.post("/v1/embeddings", response_model=None)
    async def embeddings(
        body: EmbeddingRequest, request: Request, key: str = Depends(service.access.require)
    ) -> Response:
        entry, encoder = service.entry(body.model, key), _encoder(service)
        encoder.check_embeds(entry)
        if body.dimensions not in (None, encoder.hidden):
            raise UsageError(f"an embedding has {encoder.hidden} dimensions, no others are made", where="dimensions")
        rows = await asyncio.to_thread(_rows, service, body.input, None, encoder.limit("embed", entry), body.truncate)
        vectors, usage, _ = await _read(service, request, body.model, entry, "embed", rows)
        spelled = [_base64(v) for v in vectors] if body.encoding_format == "base64" else vectors.tolist()
        data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(spelled)]
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    @app.post("/v1/classify", response_model=None)
    async def classify(body: ClassifyRequest, request: Request, key: str = Depends(service.access.require)) -> Response:
        entry, encoder = service.entry(body.model, key), _encoder(service)
        named = encoder.labels(entry)
        limit = encoder.limit("classify", entry)
        rows = await asyncio.to_thread(_rows, service, body.input, body.input_pair, limit, body.truncate)
        vectors, usage, id = await _read(service, request, body.model, entry, "classify", rows)
        labels = named if len(named) == vectors.shape[1] else [str(i) for i in range(vectors.shape[1])]
        data = [
            {"index": i, "label": labels[max(range(len(p)), key=p.__getitem__)], "probs": p, "num_classes": len(p)}
            for i, p in enumerate(vectors.tolist())
        ]
        head = {"id": id, "object": "list", "created": int(time.time()), "model": body.model}
        return JSONResponse({**head, "labels": labels, "data": data, "usage": usage})


def _encoder(service: Service) -> Encoder:
    if service.worker.encoder is None:
        raise UsageError("this server reads no texts", where="model")
    return service.worker.encoder


async def _read(
    service: Service, request: Request, model: str, entry: Entry | None, task: Task, rows: list[dict[str, list[int]]]
) -> tuple[Tensor, dict[str, int], str]:
    """The vectors of the rows, the usage and the request's id. Raises what went wrong with them."""
    began, id = time.monotonic(), f"{task}-{uuid.uuid4().hex}"
    made = Reading(id, tuple(rows), task, None if entry is None else entry.name)
    usage, outcome = {"prompt_tokens": made.tokens, "total_tokens": made.tokens}, None
    try:
        async with aclosing(while_there(service.worker.serve(made), request)) as events:  # type: ignore[type-var]
            async for outcome in events:
                if outcome.error is not None:
                    raise outcome.error
    finally:
        log_request(id, model, "cancelled" if outcome is None else outcome.reason, usage, began)
    if outcome is None:
        raise UsageError("the caller went away")
    return outcome.vectors, usage, id


def _rows(service: Service, given: Any, pair: Any, limit: int, truncate: bool) -> list[dict[str, list[int]]]:
    """Token ids of texts (or token ids themselves); too long ones are cut where `truncate` says so.

    Raises UsageError for pairs that do not match, and for a pair that would have to be cut.
    """
    tokenizer = service.base.tokenizer
    if isinstance(given, list) and isinstance(given[0], int):
        given = [given]
    texts = given if isinstance(given, list) else [given]
    if not isinstance(texts[0], str):
        return [{"input_ids": [int(i) for i in (row[:limit] if truncate else row)]} for row in texts]
    if pair is None:
        return [{"input_ids": _cut(list(ids), limit, tokenizer) if truncate else list(ids)}
                for ids in tokenizer(texts)["input_ids"]]  # fmt: skip
    pairs = pair if isinstance(pair, list) else [pair]
    if len(pairs) != len(texts):
        raise UsageError(f"there are {len(texts)} texts and {len(pairs)} second ones", where="input_pair")
    got = tokenizer(texts, pairs)
    if truncate and max(len(ids) for ids in got["input_ids"]) > limit:
        raise UsageError(f"a pair of more than {limit} tokens is not cut", where="input_pair", hint="shorten it")
    names = [n for n in ("input_ids", "token_type_ids") if n in got]
    return [{n: list(got[n][i]) for n in names} for i in range(len(texts))]


def _cut(ids: list[int], limit: int, tokenizer: Any) -> list[int]:
    """The first tokens, with the special ones at the end kept."""
    if len(ids) <= limit:
        return ids
    specials, tail = set(tokenizer.all_special_ids), 0
    while tail < min(len(ids), limit) and ids[-1 - tail] in specials:
        tail += 1
    return ids[: limit - tail] + ids[len(ids) - tail :]


def _base64(vector: Tensor) -> str:
    """fp32 numbers, little-endian, as OpenAI's client reads them."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
