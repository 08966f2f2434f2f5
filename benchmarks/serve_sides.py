# SPDX-License-Identifier: Apache-2.0
"""The two sides of `benchmarks/serve.py`. Each job runs in a process of its own and prints one line of JSON.

python benchmarks/serve_sides.py '{"job": "decode", "side": "ours", "folder": "...", ...}'
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import answer, peak_resident
from serve_prompts import PROMPTS

TARGETS = "q,k,v,o"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
Job = dict[str, Any]
JOBS: dict[tuple[str, str], Callable[[Job], dict[str, Any]]] = {}


def job(name: str, side: str) -> Callable[[Callable[[Job], dict[str, Any]]], Callable[[Job], dict[str, Any]]]:
    def keep(f: Callable[[Job], dict[str, Any]]) -> Callable[[Job], dict[str, Any]]:
        JOBS[name, side] = f
        return f

    return keep


def base(job: Job) -> Any:
    import tunesmith as ts

    return ts.load(job["model"], dtype=job["dtype"], device="cpu")


def engine(job: Job, base: Any, **settings: Any) -> Any:
    from tunesmith.serve.engine import Engine
    from tunesmith.serve.library import Library

    library = Library(base, 4 << 30)
    if job.get("folder"):
        refused = library.scan(job["folder"])
        assert not refused, refused[0]
    return Engine(base, library, **{"cells": 16384, "requests": 32, **settings})


def request(i: int, n: int, new: int, delta: str | None, vocabulary: int, arrived: float = 0.0) -> Any:
    from tunesmith.serve.requests import Request
    from tunesmith.serve.sampling import Sampling

    rng = random.Random(i)
    prompt = tuple(rng.randrange(vocabulary) for _ in range(n))
    return Request(f"r{i}", prompt, new, delta, Sampling(temperature=0), arrived=arrived)


# Stocking: the deltas all jobs share


@job("stock", "ours")
def stock(job: Job) -> dict[str, Any]:
    """Saves `count` random LoRAs of the ranks given, in turn, and `fillers` that can be registered but not read.

    A filler is a saved delta's own header with another name and digest beside a link to its tensors: what registering
    reads is of full size, and no two are one.
    """
    import torch

    import tunesmith as ts
    from tunesmith.core.delta import Delta
    from tunesmith.core.header import HEADER, TENSORS, encode

    b, folder, names = base(job), Path(job["folder"]), []
    for i in range(job["count"]):
        rank = job["ranks"][i % len(job["ranks"])]
        delta = Delta.create(b, ts.LoRA(rank=rank, alpha=2.0 * rank, targets=TARGETS), seed=i, name=f"d{i:05d}")
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for _, t in delta.items():
                t.copy_(job.get("size", 0.02) * torch.randn(t.shape, generator=g))
        delta.provenance["base"] = b.fingerprint.to_dict()
        delta.save(folder / delta.name)
        names.append(delta.name)
    source = folder / names[0]
    head = json.loads((source / HEADER).read_text())
    for i in range(job.get("fillers", 0)):
        name = f"filler{i:05d}"
        (folder / name).mkdir()
        (folder / name / TENSORS).hardlink_to(source / TENSORS)
        other = {**head, "name": name, "digest": hashlib.sha256(name.encode()).hexdigest()}
        (folder / name / HEADER).write_bytes(encode(other))
    return {"names": names}


# Decoding, many rows


@job("decode", "ours")
def decode_ours(job: Job) -> dict[str, Any]:
    b = base(job)
    e = engine(job, b, cells=job["rows"] * (job["prompt"] + job["warm"] + job["steps"] + 8) + 16384)
    names = sorted(e.library.entries)[: job["rows"]] if job["deltas"] else [None] * job["rows"]
    new = job["warm"] + job["steps"] + 1
    answers: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        e.submit(request(i, job["prompt"], new, name, e.vocabulary))
    for _ in _steps(e, answers):
        if len(answers) == job["rows"] and min(len(a) for a in answers.values()) > job["warm"]:
            break
    before, started = sum(len(a) for a in answers.values()), time.perf_counter()
    for _ in _steps(e, answers):
        pass
    seconds = time.perf_counter() - started
    tokens = sum(len(a) for a in answers.values()) - before
    return {
        "tokens_per_second": tokens / seconds,
        "peak_memory": peak_resident(),
        "answers": _first(answers, job["rows"]),
    }


def _steps(e: Any, answers: dict[str, list[int]]) -> Iterator[None]:
    while not e.idle:
        for event in e.step():
            if event.error is not None:
                raise event.error
            if event.chosen is not None:
                answers.setdefault(event.id, []).append(event.chosen.token)
        yield


def _first(answers: dict[str, list[int]], rows: int) -> list[list[int]]:
    return [answers[f"r{i}"][:8] for i in range(rows)]


@job("decode", "peer")
def decode_peer(job: Job) -> dict[str, Any]:
    """PEFT, rows of one batch under adapters of their own: prompts read together, then greedy steps with its cache.

    The loop is the plain one: no padding (all prompts are of one length), no sampling code, no stopping test.
    """
    import torch

    b = base(job)
    names = sorted(p.name for p in Path(job["folder"]).iterdir())[: job["rows"]] if job["deltas"] else []
    model = peft_model(b, job["folder"], names) if names else b.model.eval()
    more = {"adapter_names": names} if names else {}
    prompts = [request(i, job["prompt"], 1, None, b.model.config.vocab_size).prompt for i in range(job["rows"])]
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        out = model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1, **more)
        for step in range(job["warm"] + job["steps"] + 1):
            if step == job["warm"] + 1:
                started = time.perf_counter()
            tokens = out.logits[:, -1].argmax(-1)
            for a, t in zip(answers, tokens.tolist(), strict=True):
                a.append(t)
            out = model(input_ids=tokens[:, None], past_key_values=out.past_key_values, use_cache=True, **more)
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": job["rows"] * job["steps"] / seconds, "peak_memory": peak_resident(),
        "answers": [a[:8] for a in answers],
    }  # fmt: skip


def peft_model(b: Any, folder: str, names: list[str]) -> Any:
    """The base with the saved deltas as PEFT adapters of the same numbers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tunesmith.core import store

    model: Any = None
    for name in names:
        part = store.load(Path(folder) / name).part("lora")
        rank = part.method.rank
        config = LoraConfig(r=rank, lora_alpha=int(part.method.alpha), target_modules=MODULES, task_type="CAUSAL_LM")
        if model is None:
            model = get_peft_model(b.model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        with torch.no_grad():
            for path, module in model.base_model.model.named_modules():
                if path in part.kind_of and hasattr(module, "lora_A"):
                    module.lora_A[name].weight.copy_(part.tensors(path)["A"])
                    module.lora_B[name].weight.copy_(part.tensors(path)["B"])
    return model.to(b.dtype).eval()


# One stream


@job("single", "ours")
def single_ours(job: Job) -> dict[str, Any]:
    b = base(job)
    e = engine(job, b, guess=job["guess"])
    name = sorted(e.library.entries)[0]
    rates, steps, tokens = [], 0, 0
    for turn, ids in enumerate(asked(b, job["turns"])):
        answers: dict[str, list[int]] = {}
        started = time.perf_counter()
        e.submit(replace(request(turn, 1, job["new"], name, e.vocabulary), prompt=tuple(ids)))
        steps += sum(1 for _ in _steps(e, answers))
        rates.append(job["new"] / (time.perf_counter() - started))
        tokens += len(answers[f"r{turn}"])
    held = e.library.acquire(name)
    read = sum(t.numel() * t.element_size() for n, t in b.model.named_parameters() if "embed" not in n)
    head = b.model.get_output_embeddings().weight
    if "embed" in next((n for n, t in b.model.named_parameters() if t is head), ""):
        read += head.numel() * head.element_size()  # tied: read once a token as the head, a row of it as embedding
    limit = bandwidth() / (read + held.view.delta.nbytes)
    best = overall(rates)
    return {"tokens_per_second": best, "peak_memory": peak_resident(), "limit_tokens_per_second": limit,
            "share_of_limit": best / limit, "tokens_per_step": tokens / steps,
            "guesses_right": e.right / e.guessed if e.guessed else None}  # fmt: skip


def asked(b: Any, turns: int) -> Iterator[list[int]]:
    """The prompts of the single stream as token numbers, the first of them twice: it warms up."""
    for text in (PROMPTS[0], *PROMPTS[:turns]):
        chat = [{"role": "user", "content": text}]
        yield list(b.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])


def overall(rates: list[float]) -> float:
    """Tokens a second over all prompts but the first, which warms up; each writes as many."""
    return len(rates[1:]) / sum(1 / r for r in rates[1:])


@job("single", "peer")
def single_peer(job: Job) -> dict[str, Any]:
    """transformers generate on the model with the delta merged into it: no adapter costs it anything.

    With `lookup` it guesses as well, so many tokens at a time (`prompt_lookup_num_tokens`).
    """
    import torch

    from tunesmith.core import store

    b = base(job)
    name = sorted(p.name for p in Path(job["folder"]).iterdir())[0]
    model = b.merged(store.load(Path(job["folder"]) / name, b)).model.eval()
    rates, more = [], {"prompt_lookup_num_tokens": job["lookup"]} if job["lookup"] else {}
    for prompt in asked(b, job["turns"]):
        ids = torch.tensor([prompt])
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["new"], min_new_tokens=job["new"],
                do_sample=False, pad_token_id=0, **more,
            )  # fmt: skip
        rates.append((out.shape[1] - ids.shape[1]) / (time.perf_counter() - started))
    return {"tokens_per_second": overall(rates), "peak_memory": peak_resident()}


def bandwidth() -> float:
    """Bytes a second that this process reads from memory with all its threads: the best of several passes over 512 MiB."""
    import torch

    block, best = torch.ones(1 << 27), 0.0
    matrix, vector = block.view(1 << 13, -1), torch.ones(1 << 14)
    for read in (block.sum, lambda: torch.mv(matrix, vector), lambda: torch.dot(block, block)):
        for _ in range(4):
            started = time.perf_counter()
            read()
            best = max(best, block.numel() * 4 / (time.perf_counter() - started))
    return best


# The trace of card 069


def trace(n: int, deltas: list[str], seed: int, vocabulary: int) -> list[Any]:
    """`n` requests: delta floor(N U) with U uniform, prompts 8-64 and answers 8-32 tokens."""
    rng = random.Random(seed)
    return [
        request(i, rng.randrange(8, 65), rng.randrange(8, 33), deltas[int(len(deltas) * rng.random())], vocabulary)
        for i in range(n)
    ]


@job("trace", "ours")
def trace_ours(job: Job) -> dict[str, Any]:
    """All requests wait from the start (saturating); reading the deltas from disk is part of the time."""
    e = engine(job, base(job))
    for name in sorted(e.library.entries)[job["registered"] :]:
        e.library.remove(name)
    registered = len(e.library.entries)
    requests = trace(job["requests"], sorted(e.library.entries)[: job["used"]], job["seed"], e.vocabulary)
    e.generate([request(10**6, 16, 4, None, e.vocabulary)])  # warm
    answers: dict[str, list[int]] = {}
    started = time.perf_counter()
    for r in requests:
        e.submit(r)
    for _ in _steps(e, answers):
        pass
    seconds = time.perf_counter() - started
    tokens = sum(len(a) for a in answers.values())
    return {
        "tokens_per_second": tokens / seconds, "requests_per_second": len(requests) / seconds, "peak_memory": peak_resident(),
        "registered": registered, "loads": e.library.loads, "used": len({r.delta for r in requests}),
    }  # fmt: skip


# Registering and activating


@job("register", "ours")
def register_ours(job: Job) -> dict[str, Any]:
    """Seconds to register every delta of a folder, and milliseconds to make cold ones ready, with few and all known."""
    from tunesmith.serve.library import Library

    b = base(job)
    b.sites.all()  # found once for the base, whatever is registered
    b.fingerprint  # noqa: B018
    library = Library(b, 4 << 30)
    started = time.perf_counter()
    refused = library.scan(job["folder"])
    seconds = time.perf_counter() - started
    assert not refused, refused[:1]
    cold = {}
    whole = dict(library.entries)
    real = [n for n in sorted(whole) if n.startswith("d")]
    for known in (job["few"], len(whole)):
        library = Library(b, 4 << 30)
        library.entries = dict(list(whole.items())[:known])
        times = []
        for name in real:
            started = time.perf_counter()
            library.acquire(name)
            times.append(1000 * (time.perf_counter() - started))
        cold[known] = sorted(times)
    few, many = cold[job["few"]], cold[len(whole)]
    return {
        "seconds": seconds, "deltas": len(whole), "per_second": len(whole) / seconds, "peak_memory": peak_resident(),
        "cold_ms": many[len(many) // 2], "cold_ms_worst": many[-1], "cold_ms_few": few[len(few) // 2],
        "flatness": many[len(many) // 2] / few[len(few) // 2],
    }  # fmt: skip


@job("register", "peer")
def register_peer(job: Job) -> dict[str, Any]:
    """PEFT's `load_adapter` of one folder under `count` names; it reads the tensors each time, as it has no other way."""
    import tempfile

    b = base(job)
    names = sorted(p.name for p in Path(job["folder"]).iterdir() if p.name.startswith("d"))
    model = peft_model(b, job["folder"], names[:1])
    times = []
    with tempfile.TemporaryDirectory(prefix="tunesmith-peft-") as place:
        model.save_pretrained(place)
        saved = next(Path(place).rglob("adapter_config.json")).parent
        for i in range(job["count"]):
            started = time.perf_counter()
            model.load_adapter(str(saved), adapter_name=f"a{i}")
            times.append(time.perf_counter() - started)
    return {
        "seconds": sum(times), "deltas": job["count"], "per_second": job["count"] / sum(times), "peak_memory": peak_resident(),
        "cold_ms": 1000 * times[-1], "cold_ms_few": 1000 * times[0],
    }  # fmt: skip


# First tokens under load


@job("load", "ours")
def load_ours(job: Job) -> dict[str, Any]:
    """Requests that come at `rate` a second for `seconds` (gamma gaps, shape 1), served until all have ended."""
    from tunesmith.serve.admission import attainment, satisfaction

    target = job["target"]
    e = engine(job, base(job), first_token=target if job["policy"] == "abort" else None)
    names = sorted(e.library.entries)[: job["used"]]
    e.generate([request(10**6 + i, 16, 2, n, e.vocabulary) for i, n in enumerate(names)])  # warm, deltas held
    rng, at, arrivals = random.Random(job["seed"]), 0.0, []
    while at < job["seconds"]:
        arrivals.append(at)
        at += rng.gammavariate(1.0, 1.0 / job["rate"])
    asked = trace(len(arrivals), names, job["seed"], e.vocabulary)
    first: dict[str, float | None] = {r.id: None for r in asked}
    ends: dict[str, int] = {}
    came: dict[str, float] = {}
    wrong = 0
    started, k = time.monotonic(), 0
    while k < len(asked) or not e.idle:
        now = time.monotonic()
        while k < len(asked) and arrivals[k] <= now - started:
            came[asked[k].id] = started + arrivals[k]
            e.submit(type(asked[k])(**{**vars(asked[k]), "arrived": started + arrivals[k]}))
            k += 1
        if e.idle:
            time.sleep(max(0.0, started + arrivals[k] - now))
            continue
        for event in e.step():
            if event.chosen is not None and first[event.id] is None:
                first[event.id] = time.monotonic() - came[event.id]
            if event.reason is not None:
                ends[event.reason] = ends.get(event.reason, 0) + 1
                wrong += event.error is not None and "come too late" not in str(event.error)
        e.pool.check()
    waits = sorted(t for t in first.values() if t is not None)
    return {
        "rate": job["rate"], "requests": len(asked), "served": ends.get("length", 0), "failures": wrong,
        "p50": waits[len(waits) // 2], "p95": waits[int(0.95 * (len(waits) - 1))], "peak_memory": peak_resident(),
        "attainment": attainment(list(first.values()), target), "satisfaction": satisfaction(list(first.values()), target),
        "tokens_per_second": sum(r.new for r in asked if first[r.id] is not None) / (time.monotonic() - started),
    }  # fmt: skip


def main() -> None:
    import torch

    given: Job = json.loads(sys.argv[2])
    torch.set_num_threads(given["threads"])
    answer(JOBS[given["job"], given["side"]](given))


if __name__ == "__main__":
    main()
