# SPDX-License-Identifier: Apache-2.0
"""What the routes of the API share: who is served what, errors in OpenAI's form, one line of log a request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from tunesmith.core.base import Base
from tunesmith.core.errors import DataError, DeltaError, ResourceError, TunesmithError, UsageError, nearest
from tunesmith.data.layout import layout_from
from tunesmith.data.templates import TemplateInfo
from tunesmith.serve.access import Access
from tunesmith.serve.constrain import Schemas
from tunesmith.serve.encoder import HEAD
from tunesmith.serve.library import Entry
from tunesmith.serve.worker import Busy, Draining, Failed, Worker

log = logging.getLogger("tunesmith.serve")
KEPT = 1024  # chat layouts kept ready
LOOK = 0.25  # seconds between two looks whether a caller is still there


class Service:
    """What the routes share: the base, the worker, who may use what."""

    def __init__(self, base: Base, worker: Worker, access: Access, root: Path | None) -> None:
        self.base, self.worker, self.access, self.root = base, worker, access, root
        self.started = int(time.time())
        self.schemas = Schemas(base.tokenizer)
        self._layouts: OrderedDict[str, TemplateInfo] = OrderedDict()

    def layout(self, entry: Entry | None) -> TemplateInfo:
        """The chat layout of a delta, or of the base."""
        key = "" if entry is None else entry.digest
        found = self._layouts.pop(key, None) or layout_from(self.base, {} if entry is None else entry.layout)
        self._layouts[key] = found
        while len(self._layouts) > KEPT:
            self._layouts.popitem(last=False)
        return found

    def entry(self, model: str, key: str) -> Entry | None:
        """What a request means by `model`: a delta as it is now, None for the base.

        Raises UsageError naming the nearest model the caller may use, 403 for one that is not for its key.
        """
        if model == self.base.name:
            return None
        entries = self.worker.library.entries.copy()
        if model not in entries:
            mine = [n for n in entries if self.access.may(key, n)]
            raise UsageError(f"there is no model {model!r}", hint=nearest(model, [self.base.name, *mine]))
        self.access.check(key, model)
        return self.worker.library.find(model)

    def does(self, entry: Entry | None) -> str:
        """What a model is for: "chat", "embeddings" or "classify"."""
        if entry is not None:
            head = HEAD in entry.methods
        else:
            head = str(self.base.source.get("task", "")).endswith("classification")
        return "classify" if head else "chat" if self.base.family == "causal-lm" else "embeddings"

    def describe(self, entry: Entry | None) -> dict[str, Any]:
        """A model as `/v1/models` lists it."""
        base = self.base.fingerprint.digest
        common = {"object": "model", "created": self.started, "owned_by": "tunesmith", "serves": self.does(entry)}
        if entry is None:
            return {"id": self.base.name, **common, "kind": "base", "fingerprint": base}
        metrics = entry.provenance.get("metrics")
        return {
            "id": entry.name, **common, "kind": "delta", "parent": self.base.name, "base_fingerprint": base,
            "fingerprint": entry.digest, "methods": list(entry.methods), "bytes": entry.nbytes,
            "metrics": metrics if isinstance(metrics, dict) else None,
        }  # fmt: skip


async def while_there(events: AsyncGenerator[Any, None], request: Request) -> AsyncIterator[Any]:
    """The events, as long as the caller is there to hear of them."""
    async with aclosing(events):
        while True:
            task = asyncio.ensure_future(anext(events))
            try:
                while not (await asyncio.wait({task}, timeout=LOOK))[0]:
                    if await request.is_disconnected():
                        return
                try:
                    event = task.result()
                except StopAsyncIteration:
                    return
            finally:
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            yield event


def log_request(id: str, model: str, reason: str, usage: dict[str, int], began: float) -> None:
    """One structured line a request, without anything of its text."""
    log.info(
        json.dumps({"id": id, "model": model, "reason": reason, **usage, "seconds": round(time.monotonic() - began, 4)})
    )


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
    if isinstance(error, Failed) and error.memory:
        return problem(503, str(error), "server_error", code="out_of_memory", headers={"Retry-After": "5"})
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
