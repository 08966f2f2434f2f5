# SPDX-License-Identifier: Apache-2.0
"""Who may use what: bearer keys, each for all models or for named ones, and a limit on how much a request may send."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.core.errors import UsageError

SHORTEST = 16


@dataclass(frozen=True)
class Access:
    """`keys` maps a key to the models it is for (None: all); without keys everybody may. `admin` opens the admin plane."""

    keys: Mapping[str, frozenset[str] | None] = field(default_factory=dict)
    admin: str | None = None

    def __post_init__(self) -> None:
        for key in (*self.keys, *([self.admin] if self.admin is not None else [])):
            if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise UsageError(f"a key has at least {SHORTEST} printable characters and no space", where="keys")

    @classmethod
    def read(cls, file: Path, admin: str | None = None) -> Access:
        """From a JSON file `{"KEY": null | ["model", ...]}`. Raises UsageError for anything else."""
        try:
            found: Any = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"the keys cannot be read ({error})", where=str(file)) from None
        good = isinstance(found, dict) and all(
            v is None or (isinstance(v, list) and all(isinstance(n, str) for n in v)) for v in found.values()
        )
        if not good or not found:
            raise UsageError('must map keys to null or a list of models, {"KEY": null}', where=str(file))
        return cls({k: None if v is None else frozenset(v) for k, v in found.items()}, admin)

    async def require(self, request: Request) -> str:
        """The caller's key ("" where none is needed). Raises 401."""
        given = _bearer(request)
        if not self.keys:
            return ""
        found = [k for k in self.keys if hmac.compare_digest(k.encode(), given.encode())]
        if not found:
            raise HTTPException(401, "a bearer key is needed", {"WWW-Authenticate": "Bearer"})
        return found[0]

    async def require_admin(self, request: Request) -> None:
        """Raises 401 for anyone but the admin."""
        if self.admin is None or not hmac.compare_digest(self.admin.encode(), _bearer(request).encode()):
            raise HTTPException(401, "the admin token is needed", {"WWW-Authenticate": "Bearer"})

    def may(self, key: str, delta: str | None) -> bool:
        """Whether a key may use a delta; the base is everybody's."""
        allowed = self.keys.get(key)
        return delta is None or allowed is None or delta in allowed

    def check(self, key: str, delta: str | None) -> None:
        """Raises 403."""
        if not self.may(key, delta):
            raise HTTPException(403, f"this key is not for {delta!r}")


def _bearer(request: Request) -> str:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


class BodyLimit:
    """Answers 413 once a request has sent more than `limit` bytes, 408 if it takes longer than `seconds` to send them."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float = 60) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"")
        if said.isdigit() and int(said) > self.limit:
            await self._refuse(send, *self._too_large)
            return
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.limit:
                        await self._refuse(send, *self._too_large)
                        return
        except TimeoutError:
            await self._refuse(send, 408, f"the body did not come within {self.seconds:g} s", "timeout")
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self.app(scope, again, send)

    @property
    def _too_large(self) -> tuple[int, str, str]:
        return 413, f"a request may have at most {self.limit:,} bytes", "too_large"

    async def _refuse(self, send: Send, status: int, text: str, code: str) -> None:
        error = {"message": text, "type": "invalid_request_error", "param": None, "code": code}
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
