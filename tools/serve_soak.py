# SPDX-License-Identifier: Apache-2.0
"""Hours of a server's life in minutes: mixed load on toy servers, with memory and the pool watched.

    python tools/serve_soak.py --requests 36000            as many as an hour of ten a second
    python tools/serve_soak.py --requests 36000 --minutes 4   and no longer than this

Callers ask for chats, streams, schemas, completions, embeddings and classes of deltas that come, change and go, leave in the
middle, and send what is refused. Prints a line of numbers at every sample: requests, RSS, free cells, held deltas. At the
end nothing may be held, the pool's books must add up, and RSS must be flat: the median of the last third of the samples at
most --growth MiB above that of the middle third. Exits 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from serve_toy import ADMIN, fill, moved, reader, serve, writer
from tunesmith.deltas import LoRA

DELTAS, CALLERS = 24, 12
SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"],
    "additionalProperties": False,
}  # fmt: skip


class Soak:
    """The load and what it saw."""

    def __init__(self, write: Any, read: Any, root: Path, seed: int) -> None:
        self.write, self.read, self.root, self.rng = write, read, root, random.Random(seed)
        self.codes, self.sent, self.wrong = Counter[str](), 0, list[str]()

    def body(self) -> tuple[str, str, dict[str, Any]]:
        """A server, a path and what to send there."""
        rng, model = self.rng, f"d{self.rng.randrange(DELTAS - 1)}"
        text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randrange(1, 60)))
        chat = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": rng.randrange(1, 24)}
        kind = rng.randrange(12)
        if kind < 5:
            return self.write.url, "/v1/chat/completions", {**chat, "stream": kind < 3, "seed": kind}
        if kind == 5:
            named = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
            return self.write.url, "/v1/chat/completions", {**chat, "max_tokens": 60, "response_format": named}
        if kind == 6:
            return self.write.url, "/v1/completions", {"model": "writer", "prompt": text, "max_tokens": 8}
        if kind < 9:
            return self.read.url, "/v1/embeddings", {"model": model, "input": [text[:40]] * rng.randrange(1, 6)}
        if kind == 9:
            return self.read.url, "/v1/classify", {"model": f"d{DELTAS - 1}", "input": text[:40]}
        odd = [{"model": "nobody"}, {**chat, "temperature": 9}, {**chat, "max_tokens": 9999}, {"messages": 5}]
        return self.write.url, "/v1/chat/completions", rng.choice(odd)

    async def caller(self, client: httpx.AsyncClient, until: float, requests: int) -> None:
        while self.sent < requests and time.monotonic() < until:
            self.sent += 1
            url, path, body = self.body()
            leaves = self.rng.random() < 0.05
            try:
                async with client.stream("POST", url + path, json=body, timeout=0.01 if leaves else 60) as answer:
                    async for _ in answer.aiter_bytes():
                        if leaves:
                            break
                self.codes[str(answer.status_code)] += 1
                if answer.status_code >= 500:
                    self.wrong.append(f"{path}: {answer.status_code}")
            except httpx.HTTPError as error:
                self.codes["left" if leaves else type(error).__name__] += 1
                if not leaves:
                    self.wrong.append(f"{path}: {error!r}")

    async def operator(self, client: httpx.AsyncClient, until: float, requests: int) -> None:
        """Deltas are written anew, loaded, pinned and unloaded, all the time."""
        i, headers = 0, {"authorization": f"Bearer {ADMIN}"}
        while self.sent < requests and time.monotonic() < until:
            i += 1
            name = f"d{i % 5}"
            await asyncio.to_thread(
                lambda n=name, s=i: moved(self.write.base, LoRA(rank=1 + s % 4), seed=s, name=n).save(self.root / n)
            )
            for method, path, body in (
                ("POST", f"/admin/pin/{name}", {"on": bool(i % 2)}),
                ("POST", "/admin/deltas", {"name": "guest", "folder": "d7"}),
                ("DELETE", "/admin/deltas/guest", None),
            ):
                try:
                    answer = await client.request(method, self.write.url + path, json=body, headers=headers)
                    if answer.status_code >= 300:
                        self.wrong.append(f"{path}: {answer.text}")
                except httpx.HTTPError as error:
                    self.wrong.append(f"{path}: {error!r}")
                await asyncio.sleep(0.1)


def sample(soak: Soak, began: float) -> dict[str, Any]:
    now = soak.write.worker.statistics()
    row = {
        "seconds": round(time.monotonic() - began, 1), "requests": soak.sent,
        "rss_mib": round(psutil.Process().memory_info().rss / 2**20, 1), "cells_free": now["cells_free"],
        "running": now["running"], "waiting": now["waiting"], "held": now["deltas_held"], "loads": now["loads"],
        "evictions": now["evictions"],
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


async def run(soak: Soak, args: argparse.Namespace) -> list[dict[str, Any]]:
    began, rows = time.monotonic(), []
    until = began + 60 * args.minutes
    limits = httpx.Limits(max_connections=CALLERS + 4)
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:
        load = [asyncio.ensure_future(soak.caller(client, until, args.requests)) for _ in range(CALLERS)]
        load.append(asyncio.ensure_future(soak.operator(client, until, args.requests)))
        while not all(t.done() for t in load):
            await asyncio.wait(load, timeout=args.every)
            rows.append(sample(soak, began))
        await asyncio.gather(*load)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--requests", type=int, default=36_000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--growth", type=float, default=24.0, help="MiB that RSS may grow")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        roots = {}
        for base in (writer(), reader()):
            roots[base.name] = root = Path(place) / base.name
            root.mkdir()
            fill(base, root, DELTAS)
            roots[base.name] = serve(base, root)
        write, read = roots["writer"], roots["reader"]
        write.library.budget = read.library.budget = 60_000  # a few deltas, so that they come and go
        soak = Soak(write, read, Path(place) / "writer", args.seed)
        rows = asyncio.run(run(soak, args))
        free = write.settled() and read.settled()
        write.worker.engine.pool.check()
        gc.collect()
        write.close()
        read.close()
    third = max(1, len(rows) // 3)
    rss = [r["rss_mib"] for r in rows]
    growth = statistics.median(rss[-third:]) - statistics.median(rss[third : 2 * third] or rss)
    good = free and not soak.wrong and growth <= args.growth
    print(json.dumps({
        "requests": soak.sent, "answers": dict(soak.codes), "everything_free": free, "rss_growth_mib": round(growth, 1),
        "wrong": soak.wrong[:20], "good": good,
    }, indent=2))  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
