# SPDX-License-Identifier: Apache-2.0
"""The server process: uvicorn around the application, and how it ends.

At the first SIGTERM or SIGINT new requests are refused with 503 and those under way go on; when they are done, or when
their time is up, the server ends, and whoever is still there is told so. A second signal ends it at once.
"""

from __future__ import annotations

import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from tunesmith.serve.worker import Worker

KEEP = 75  # seconds a connection may idle: longer than clients keep one, so that it is not closed as they use it again
LAST_WORDS = 5  # seconds for callers to read how their request ended


class Listener(uvicorn.Server):
    """A uvicorn server that drains its worker first; `seconds` is the most this may take."""

    def __init__(self, config: uvicorn.Config, worker: Worker, seconds: float) -> None:
        super().__init__(config)
        self.worker, self.seconds = worker, seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.worker.draining:
            super().handle_exit(sig, frame)
            return

        def end() -> None:
            if not self.worker.drain(self.seconds):
                self.worker.stop()  # tells those who are left
            super(Listener, self).handle_exit(sig, frame)

        threading.Thread(target=end, name="tunesmith-drain", daemon=True).start()


def listener(app: FastAPI, worker: Worker, host: str, port: int, drain: float) -> Listener:
    """The server for an application; `run` blocks until it has ended."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="info",
        access_log=False,
        timeout_keep_alive=KEEP,
        timeout_graceful_shutdown=LAST_WORDS,
    )
    return Listener(config, worker, drain)
