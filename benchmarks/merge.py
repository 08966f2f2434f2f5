# SPDX-License-Identifier: Apache-2.0
"""The same merge of model folders through mergekit, and through Tunesmith.

    python benchmarks/merge.py --peer-python /path/to/env/bin/python     an environment that has mergekit
    python benchmarks/merge.py --create-peer FOLDER                      make one (pip; the same torch as here)
    python benchmarks/merge.py ... --rows linear-135m --repeats 1        one row, once
    python benchmarks/merge.py ... --json --out benchmarks/merge.json    rows {work, ours, peer, speed_ratio, ...}

Rows: the linear mean and TIES of two 135M checkpoints (smollm2-135m-instruct plus seeded noise, bf16), and of two
synthetic sharded 1.5B checkpoints (seeded random values in the shapes of Qwen2-1.5B, bf16). Inputs are made in a folder
of their own and removed at the end. A quick run does the mean of the small ones, once.

Each run is a process of its own, ours and the peer's in turn, with the same number of threads. Seconds are those of the
merge call, without the start of Python and the imports, which favours neither. Memory is the peak resident size of the
process (Linux: VmHWM), pages of mapped files included. `speed_ratio` is the peer's seconds over ours, `memory_ratio` our
memory over the peer's, of medians. `agreement` compares the two results: the largest difference and the share of
differing entries.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Goal, Results, chosen, facts, in_turn, judged, medians, options, process, say

GOALS = (Goal("speed_ratio", at_least=2.5), Goal("memory_ratio", at_most=0.5))
DENSITY = 0.2
ROWS = ("linear-135m", "ties-135m", "linear-1.5b", "ties-1.5b")


# The workers: each runs in a process of its own and prints one line of JSON


def ours(job: dict[str, Any]) -> dict[str, Any]:
    import time

    import torch

    torch.set_num_threads(job["threads"])
    from tunesmith.compose.stream import merge_folders
    from tunesmith.core.memory import peak_memory

    started = time.perf_counter()
    if job["how"] == "linear":  # the mean of two models is the first plus half the difference: two models are read
        merge_folders(job["a"], [job["b"]], "task-arithmetic", [0.5], job["out"])
    else:
        merge_folders(job["base"], [job["a"], job["b"]], f"ties:density={DENSITY}", [1.0, 1.0], job["out"])
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_memory": peak_memory(torch.device("cpu"))}


# Runs with the peer's Python, which has mergekit and no tunesmith
PEER = """
import json, sys, time
import torch
job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
import mergekit.merge_methods
models = [{"model": job[k], "parameters": {"weight": 1.0, "density": job["density"]}} for k in ("a", "b")]
config = {"merge_method": job["how"], "models": models, "dtype": "bfloat16"}
if job["how"] == "linear":
    models = [{"model": m["model"], "parameters": {"weight": 1.0}} for m in models]
    config["models"] = models
else:
    config["base_model"] = job["base"]
    config["parameters"] = {"normalize": True}
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, num_threads=job["threads"])
started = time.perf_counter()
run_merge(MergeConfiguration.model_validate(config), job["out"], options=options)
seconds = time.perf_counter() - started
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM:"))
print(json.dumps({"seconds": seconds, "peak_memory": peak}))
"""


def measured(command: list[str], out: Path, threads: int) -> dict[str, Any]:
    """Seconds and peak resident bytes as the worker reports them. The peer sees nothing of this repository."""
    shutil.rmtree(out, ignore_errors=True)
    return process(command, threads=threads, source=command[1] != "-c")


# The inputs


def small(place: Path) -> dict[str, str]:
    """smollm2-135m-instruct in bf16, and two checkpoints with seeded noise of a hundredth of each tensor's spread."""
    import torch

    import tunesmith as ts

    base = ts.load("smollm2-135m-instruct", dtype="bfloat16", device="cpu")
    names = {}
    for label, seed in (("base", None), ("a", 1), ("b", 2)):
        g = torch.Generator().manual_seed(seed or 0)
        model = ts.load("smollm2-135m-instruct", dtype="bfloat16", device="cpu").model if seed else base.model
        if seed:
            with torch.no_grad():
                for p in model.parameters():
                    noise = torch.randn(p.shape, generator=g) * float(p.float().std()) * 0.01
                    p.copy_((p.float() + noise).to(p.dtype))
        model.save_pretrained(place / label)
        names[label] = str(place / label)
    return names


def large(place: Path) -> dict[str, str]:
    """Three sharded checkpoints in the shapes of Qwen2-1.5B, written tensor by tensor."""
    import torch

    from tunesmith.core.tensorfile import TensorWriter, nbytes_of

    hidden, inner, layers, vocabulary, kv = 1536, 8960, 28, 151936, 256
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": vocabulary,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "max_position_embeddings": 32768, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        for n, rows in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[f"{at}self_attn.{n}_proj.weight"] = (rows, hidden)
            shapes[f"{at}self_attn.{n}_proj.bias"] = (rows,)
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes |= {f"{at}mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    shards: list[list[str]] = [[]]
    room = limit = 1_000_000_000
    for n, shape in shapes.items():
        size = nbytes_of(torch.bfloat16, shape)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(n)
        room -= size
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for label in ("base", "a", "b"):
        (place / label).mkdir()
        (place / label / "config.json").write_text(json.dumps(config))
        total = sum(nbytes_of(torch.bfloat16, s) for s in shapes.values())
        table = {n: f for f, some in zip(files, shards, strict=True) for n in some}
        index = {"metadata": {"total_size": total}, "weight_map": table}
        (place / label / "model.safetensors.index.json").write_text(json.dumps(index))
        for f, some in zip(files, shards, strict=True):
            with TensorWriter(place / label / f, [(n, torch.bfloat16, shapes[n]) for n in some]) as writer:
                for n in some:
                    writer.put(n, _values(n, shapes[n], label))
    return {label: str(place / label) for label in ("base", "a", "b")}


def _values(name: str, shape: tuple[int, ...], label: str) -> Any:
    import zlib

    import torch

    def draw(key: str, scale: float) -> Any:
        g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        return torch.randn(shape, generator=g) * scale

    value = draw(name, 0.02)
    return (value if label == "base" else value + draw(f"{name}/{label}", 0.0005)).to(torch.bfloat16)


def agreement(one: Path, other: Path) -> dict[str, float]:
    """How far two model folders are apart, tensor by tensor."""

    from tunesmith.compose.folders import ModelFolder

    a, b = ModelFolder(one), ModelFolder(other)
    largest, differing, total = 0.0, 0, 0
    for n in a.tensors:
        if n not in b.tensors:
            continue  # the peer may leave a tied head out, or write one
        gap = (a.read(n).float() - b.read(n).float()).abs()
        largest, differing, total = (
            max(largest, float(gap.max())),
            differing + int((gap > 0).sum()),
            total + gap.numel(),
        )
    return {"largest_difference": largest, "share_differing": differing / max(total, 1), "entries": total}


# The comparison


def compared(work: str, inputs: dict[str, str], place: Path, peer: str, runs: int, threads: int) -> dict[str, Any]:
    how = work.split("-")[0]
    outs = {side: place / f"out-{side}" for side in ("ours", "peer")}
    jobs = {side: json.dumps({**inputs, "how": how, "out": str(out), "threads": threads, "density": DENSITY})
            for side, out in outs.items()}  # fmt: skip
    commands = {"ours": [sys.executable, __file__, "--worker", jobs["ours"]], "peer": [peer, "-c", PEER, jobs["peer"]]}
    sides = in_turn(tuple(outs), lambda s, _: measured(commands[s], outs[s], threads), runs, say=say)
    row: dict[str, Any] = {"work": work, **{side: {**medians(found), "runs": found} for side, found in sides.items()}}
    row["speed_ratio"] = row["peer"]["seconds"] / row["ours"]["seconds"]
    row["memory_ratio"] = row["ours"]["peak_memory"] / row["peer"]["peak_memory"]
    row["agreement"] = agreement(outs["ours"], outs["peer"])
    for out in outs.values():
        shutil.rmtree(out, ignore_errors=True)
    return judged(row, GOALS)


def create_peer(folder: Path) -> str:
    """A virtual environment with mergekit and the torch of this one; returns its Python."""
    import importlib.metadata

    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        torch = f"torch=={importlib.metadata.version('torch')}"
        subprocess.run([str(python), "-m", "pip", "install", "-q", torch, "mergekit"], check=True)
    return str(python)


def versions(peer: str) -> dict[str, str]:
    """Of the peer's environment."""
    code = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('mergekit', 'torch')}))"
    found: dict[str, str] = json.loads(
        subprocess.run([peer, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    return found


def rows(args: argparse.Namespace, wanted: list[str], peer: str) -> Iterator[dict[str, Any]]:
    for size, make in (("135m", small), ("1.5b", large)):
        works = [w for w in wanted if w.endswith(size)]
        if not works:
            continue
        with tempfile.TemporaryDirectory(prefix="tunesmith-merge-", dir=args.dir) as folder:
            place = Path(folder)
            inputs = make(place)
            for work in works:
                say(work)
                yield compared(work, inputs, place, peer, args.repeats, args.threads)


def main() -> None:
    parser = options(__doc__, ROWS)
    parser.add_argument("--peer-python", help="the Python of an environment that has mergekit")
    parser.add_argument("--create-peer", type=Path, metavar="FOLDER", help="make such an environment here")
    parser.add_argument("--dir", help="where the inputs are made: 25 GB for all rows")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(ours(json.loads(args.worker))))
        return
    wanted = chosen(parser, args.rows, ROWS)
    if args.quick:
        wanted, args.repeats = wanted[:1], 1
    if not args.peer_python and not args.create_peer:
        parser.error("give --peer-python or --create-peer")
    peer = args.peer_python or create_peer(args.create_peer)
    about = {**facts(("transformers", "safetensors", "tunesmith")), "peer_versions": versions(peer)}
    results, lines = Results(args, about), []
    for r in rows(args, wanted, peer):
        results.add(r)
        a, b = r["ours"], r["peer"]
        lines.append(
            f"{r['work']:12}  ours {a['seconds']:7.2f} s {a['peak_memory'] / 2**20:7.0f} MiB   peer {b['seconds']:7.2f} s "
            f"{b['peak_memory'] / 2**20:7.0f} MiB   speed x{r['speed_ratio']:.2f}  memory x{r['memory_ratio']:.2f}  "
            f"{'met' if r['met'] else 'NOT met'}   differing entries {r['agreement']['share_differing']:.2%}"
        )
    results.finish("\n".join(lines))


if __name__ == "__main__":
    main()
