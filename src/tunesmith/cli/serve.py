# SPDX-License-Identifier: Apache-2.0
"""`tunesmith serve`: one base, many deltas, an OpenAI-compatible API; `--selftest` proves the batch instead."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.output import Debug, Device, Json, Result, cells, examples, progress_console, table, visible
from tunesmith.cli.places import registry
from tunesmith.core.errors import DeltaError, ResourceError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.core.base import Base
    from tunesmith.serve.library import Library

HELP = examples(
    "tunesmith serve --model smollm2-135m-instruct",
    "tunesmith serve --model smollm2-135m-instruct --deltas runs --keys keys.json --port 8001",
    "tunesmith serve --model minilm-l6",
    "tunesmith serve --model smollm2-135m-instruct --selftest",
)
PROMPTS = ("The weather today is", "My parcel has not come and", "In short, the answer is", "Once there was a")
POLICIES = ("fcfs", "cluster", "fair")


def attach(app: typer.Typer) -> None:
    app.command("serve", epilog=HELP, short_help="Serve a base and many deltas over HTTP")(serve)


def serve(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="The base: a bundled name, a folder or a hub id.")
    ],
    deltas: Annotated[
        Path | None,
        typer.Option("--deltas", metavar="FOLDER", help="Folder of deltas (default: the registry of runs)."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    cells_: Annotated[
        int, typer.Option("--cells", help="Tokens the cache can hold, deltas counted in.", min=64)
    ] = 16384,
    requests: Annotated[int, typer.Option(help="Most requests in a batch.", min=1)] = 64,
    queue: Annotated[int, typer.Option(help="Most requests that wait before others get a 429.", min=1)] = 256,
    policy: Annotated[str, typer.Option(help="Who joins first: fcfs, cluster or fair.")] = "fcfs",
    first_token: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Give up requests whose first token would come later.", min=0.5),
    ] = None,
    guess: Annotated[
        int | None,
        typer.Option(help="Tokens up to which a step is filled with guesses that are checked in it; 0: none.", min=0),
    ] = None,
    memory: Annotated[int, typer.Option(help="MiB of deltas kept in memory.", min=1)] = 1024,
    body: Annotated[int, typer.Option(help="KiB a request may send.", min=1)] = 1024,
    drain: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long requests under way may take after SIGTERM.", min=0)
    ] = 30,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", metavar="FILE", help='JSON of bearer keys: {"KEY": null or ["model", ...]}.'),
    ] = None,
    replicas: Annotated[
        int,
        typer.Option(help="Replicas with a base each, through Ray Serve (tunesmith[ray]); 0 serves without.", min=0),
    ] = 0,
    prove: Annotated[
        bool, typer.Option("--selftest", help="Prove mixed batch = one at a time = merged, and end.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Serve a base and all deltas of a folder: /v1/models, chat/completions, completions, embeddings, classify, /metrics.

    A request names a delta as its model; requests for different deltas run in one batch. Deltas are read when first
    asked for. An encoder gives embeddings, a delta with a head classes. The admin plane (/admin) is there when TUNESMITH_ADMIN_TOKEN is set.
    """
    if policy not in POLICIES:
        raise UsageError(f"unknown policy {policy!r}", where="--policy", hint=f"one of {', '.join(POLICIES)}")
    root = deltas if deltas is not None else registry()
    if deltas is not None and not deltas.is_dir():
        raise UsageError("is no folder", where=str(deltas), hint="give the folder that holds the deltas' folders")
    settings = {"cells": cells_, "requests": requests, "policy": policy, "first_token": first_token, "guess": guess}
    if replicas:
        if prove:
            raise UsageError("the proof needs no replicas", where="--replicas", hint="leave it out")
        asked = {
            "model": model, "deltas": str(root.resolve()), "device": device, "queue": queue, "memory": memory << 20,
            "body": body << 10, **settings,
        }  # fmt: skip
        return _replicated(asked, keys, host, port, replicas, drain)
    from tunesmith.models.open import load
    from tunesmith.serve.library import Library

    base = load(model, device=device, dtype="float32") if prove else load(model, device=device)
    if base.family not in ("causal-lm", "encoder") or base.tokenizer is None:
        hint = "use a causal language model, or an encoder of text"
        raise UsageError(f"a base of family {base.family!r} is not served", where=base.name, hint=hint)
    if prove and base.family != "causal-lm":
        raise UsageError(
            "the proof is about text that is written", where="--selftest", hint="use a causal language model"
        )
    library = Library(base, memory << 20)
    refused = library.scan(root) if root.is_dir() else []
    if prove:
        return _proved(base, library, cells_)
    for place, error in refused:
        progress_console().print(f"not served: {visible(str(place))}: {visible(str(error))}", soft_wrap=True)
    return _run(base, library, root, host, port, settings, queue, body, keys, drain)


def _proved(base: Base, library: Library, cells_: int) -> Result:
    from tunesmith.serve.selftest import selftest

    if not library.entries:
        raise DeltaError("there is no delta to prove", where=str(registry()), hint="tunesmith demo makes one")
    proof = selftest(base, library, [base.tokenizer(p)["input_ids"] for p in PROMPTS], cells=cells_)
    data = {
        k: getattr(proof, k)
        for k in ("requests", "tokens", "deltas", "alone_differs", "merged_differs", "shared", "holds")
    }
    return Result(
        {**data, "live_only": list(proof.live_only)}, str(proof), exit_code=0 if proof.holds else DeltaError.exit_code,
        failure="" if proof.holds else str(proof),
    )  # fmt: skip


def _replicated(asked: dict[str, Any], keys: Path | None, host: str, port: int, replicas: int, drain: float) -> Result:
    """Serve through Ray Serve until a signal comes."""
    import threading

    try:
        from tunesmith.serve import cluster
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"the package {error.name!r} is not installed", hint="pip install 'tunesmith[serve,ray]'"
        ) from None
    from tunesmith.serve.access import Access

    known = {} if keys is None else Access.read(keys).keys
    settings = cluster.Settings(
        **asked, drain=drain, keys={k: None if v is None else sorted(v) for k, v in known.items()}
    )
    ended = threading.Event()
    before = {s: signal.signal(s, lambda *_: ended.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with cluster.running(settings, host, port, replicas=replicas):
            progress_console().print(f"{replicas} replicas on http://{host}:{port}; Ctrl-C ends it", soft_wrap=True)
            while not ended.wait(1.0):
                pass
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    return Result({"replicas": replicas}, f"served with {replicas} replicas")


def _run(
    base: Base, library: Library, root: Path, host: str, port: int, settings: dict[str, Any], queue: int, body: int,
    keys: Path | None, drain: float,
) -> Result:  # fmt: skip
    try:
        from tunesmith.serve.api import create
        from tunesmith.serve.listen import listener
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"the package {error.name!r} is not installed", hint="pip install 'tunesmith[serve]'"
        ) from None
    from tunesmith.serve.access import Access
    from tunesmith.serve.encoder import Encoder
    from tunesmith.serve.engine import Engine
    from tunesmith.serve.worker import Worker

    admin = os.environ.get("TUNESMITH_ADMIN_TOKEN") or None
    access = Access(admin=admin) if keys is None else Access.read(keys, admin)
    engine: Engine | None = None
    if base.family == "causal-lm":
        engine = Engine(base, library, **settings)
    worker = Worker(engine, Encoder(base, library), queue=queue)
    app = create(base, worker, access=access, root=root, body_limit=body << 10)
    server = listener(app, worker, host, port, drain)
    shown = progress_console()
    if engine is not None and engine.why_slow:
        shown.print(f"served by the model's own forward pass, one request at a time: {visible(engine.why_slow)}")
    shown.print(f"{len(library.entries)} deltas on {visible(base.name)}; Ctrl-C ends it", soft_wrap=True)
    # once it has ended, uvicorn sends the signals again to whoever listened before
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run()
    finally:
        worker.stop()
        for s, handler in before.items():
            signal.signal(s, handler)
    c: Any = worker.counts
    if not server.started:
        raise ResourceError(f"cannot listen on {host}:{port}", hint="choose another --port")

    def view(out: Console) -> None:
        rows = table("requests", "tokens", "steps")
        rows.add_row(*cells(str(c.requests), str(c.tokens), str(c.steps)))
        out.print(rows)

    data = {"requests": c.requests, "tokens": c.tokens, "prompt_tokens": c.prompt_tokens, "ends": c.ends}
    left = "" if engine is None else f"; cells free {engine.free}/{engine.pool.cells}"
    return Result(data, f"served {c.requests} requests, {c.tokens} tokens{left}", view)
