# SPDX-License-Identifier: Apache-2.0
"""Kill a server under load with SIGKILL, start it again on the same folder, and see that nothing is lost or half-written.

    python tools/serve_kill.py --kills 5 --seed 0

While it serves, another process writes its deltas anew and is killed with it. After each kill the folder must hold every
delta, whole, in one of the two versions that were written, and a new server must answer with exactly that version. Prints
JSON; exits 1 if anything was wrong. Children are forked from this process, so that a kill costs no import.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch

from serve_toy import moved, serve, writer
from tunesmith.core import store
from tunesmith.deltas import LoRA
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.requests import Request
from tunesmith.serve.sampling import Sampling

NAMES = ("d0", "d1", "d2")
PROMPT = (5, 6, 7, 8)


def child(what: Callable[[], None]) -> int:
    """Run something in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        what()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def server(root: Path, port: int) -> None:
    made = serve(writer(), root, port=port)
    made.thread.join()


def writing(root: Path) -> None:
    """Save both versions of every delta, over and over."""
    base, i = writer(), 0
    while True:
        i += 1
        for name in NAMES:
            version(base, name, i % 2).save(root / name)


def version(base: Any, name: str, which: int) -> Any:
    return moved(base, LoRA(rank=2), seed=10 * int(name[1:]) + which, name=name)


def answers(base: Any) -> dict[str, dict[str, list[int]]]:
    """What each version of each delta writes: {name: {digest: tokens}}."""
    out: dict[str, dict[str, list[int]]] = {}
    for name in NAMES:
        for which in (0, 1):
            library, delta = Library(base, 1 << 30), version(base, name, which)
            library.add(delta, name)
            request = Request("a", PROMPT, 12, name, Sampling(temperature=0))
            out.setdefault(name, {})[delta.digest] = Engine(base, library, cells=500).generate([request])["a"]
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ready(url: str) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise RuntimeError("the server did not start")


def load(url: str, stop: threading.Event) -> None:
    body = {"model": "d0", "prompt": list(PROMPT), "max_tokens": 60, "stream": True}
    while not stop.is_set():
        try:
            httpx.post(f"{url}/v1/completions", json={**body, "model": random.choice(NAMES)}, timeout=30)
        except httpx.HTTPError:
            time.sleep(0.01)


def check(kills: int, seed: int, work: Path) -> dict[str, Any]:
    """Kill and restart `kills` times on a folder below `work`; the report."""
    rng, base, wrong, saved = random.Random(seed), writer(), list[str](), 0
    root = work / "deltas"
    for name in NAMES:
        version(base, name, 0).save(root / name)
    known = answers(base)
    for i in range(kills + 1):  # the last server only answers
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        serving = child(lambda p=port: server(root, p))  # type: ignore[misc]
        try:
            ready(url)
        except RuntimeError:
            os.kill(serving, signal.SIGKILL)
            os.waitpid(serving, 0)
            raise
        wrong += differences(url, root, known, base)
        if i == kills:
            os.kill(serving, signal.SIGKILL)
            os.waitpid(serving, 0)
            break
        saving = child(lambda: writing(root))  # forked before there are threads
        stop = threading.Event()
        callers = [threading.Thread(target=load, args=(url, stop), daemon=True) for _ in range(3)]
        for t in callers:
            t.start()
        time.sleep(rng.uniform(0.3, 1.5))
        for pid in (serving, saving):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        stop.set()
        for t in callers:
            t.join(timeout=30)
        left = Library(base, 1 << 30)
        wrong += [f"{place}: {error}" for place, error in left.scan(root)]
        wrong += [f"{n} is lost" for n in NAMES if n not in left.entries]
        wrong += [f"{n} is no delta of ours" for n in left.entries if n not in NAMES]
        saved += sum(1 for p in root.iterdir() if p.name.startswith("."))
    return {"kills": kills, "swaps_cut_short": saved, "wrong": wrong, "good": not wrong}


def differences(url: str, root: Path, known: dict[str, dict[str, list[int]]], base: Any) -> list[str]:
    """Where a server that was just started does not answer with the version that lies on disk."""
    out = []
    for name in NAMES:
        digest = store.peek(root / name)["digest"]
        want = base.tokenizer.decode(known[name][digest], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        body = {"model": name, "prompt": list(PROMPT), "max_tokens": 12, "temperature": 0}
        got = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        if "choices" not in got or got["choices"][0]["text"] != want:
            out.append(f"{name}: {got} instead of {want!r}")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        report = check(args.kills, args.seed, Path(place))
    print(json.dumps(report, indent=2))
    return 0 if report["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
