# SPDX-License-Identifier: Apache-2.0
"""A server over a real socket, for tests that speak to it with the real OpenAI client."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import openai
import uvicorn

from tunesmith.core.base import Base
from tunesmith.serve.access import Access
from tunesmith.serve.api import create
from tunesmith.serve.encoder import Encoder
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.listen import KEEP
from tunesmith.serve.worker import Worker


class Served:
    """A server on a free port of this machine."""

    def __init__(
        self, base: Base, root: Path, *, access: Access | None = None, queue: int = 64, port: int = 0, **settings: Any
    ) -> None:
        self.base, self.library = base, Library(base, 1 << 30)
        self.library.scan(root)
        writes = base.family == "causal-lm"
        engine = Engine(base, self.library, **{"cells": 6000, **settings}) if writes else None
        self.worker = Worker(engine, Encoder(base, self.library), queue=queue)
        app = create(base, self.worker, access=access, root=root, body_limit=20_000)
        self.server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", timeout_keep_alive=KEEP)
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until = time.monotonic() + 20
        while not self.server.started and time.monotonic() < until:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30, **options)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        self.worker.stop()

    def settled(self) -> bool:
        """Whether everything was freed, within a moment."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            engine = self.worker.engine
            if self.worker.idle and (engine is None or engine.free == engine.pool.cells):
                return True
            time.sleep(0.02)
        return False


def asked(client: openai.OpenAI, model: str = "d0", text: str = "hello there", **more: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 12, **more}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)
