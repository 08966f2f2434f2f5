# SPDX-License-Identifier: Apache-2.0
"""Where the time of one training step goes, the peer's and ours, by kind of operation.

    python benchmarks/profile_train.py                      a table for each work
    python benchmarks/profile_train.py --works lora,full    some of them
    python benchmarks/profile_train.py --out FILE --json    works {work, step, rows {kind, peer, ours}}, milliseconds

lora: r=8 on all linear layers of SmolLM2-135M in bf16, 4 rows of 256 tokens, every token supervised; the peer is PEFT.
full: all weights of it on the same rows; the peer holds them in fp32 and multiplies under autocast, as Trainer does with bf16.
minilm: LoRA r=8 and a head on MiniLM-L6 under autocast, 32 rows of 16 tokens; the peer is PEFT. A step is forward, backward,
clipping and AdamW.

`step` is the processor time of a whole step without the profiler: the median over the steps after the second, in all
processes of a side, which run in turn. The rows come from one more step under torch's profiler, an operation with the time
spent in itself. Profiling slows small operations down and counts waiting, so there the shares matter, not the sums.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure

RANK, VOCABULARY, CLASSES, STEPS, REPEATS = 8, 49152, 77, 6, 2
SHAPES = {"lora": (4, 256), "full": (4, 256), "minilm": (32, 16)}  # rows, tokens
OTHER = "python and bookkeeping"
SIDES = ("peer", "ours")
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "linear", "matmul", "baddbmm", "addmm_"),
    "attention": ("scaled_dot_product",),
    "softmax and loss": ("softmax", "logsumexp", "nll_loss", "exp", "log", "amax", "cross_entropy", "gather", "scatter"),
    "casts and copies": ("copy_", "_to_copy", "to", "clone", "contiguous", "cat", "index", "slice_backward"),
    "fills": ("fill_", "zero_", "zeros", "ones", "new_zeros", "zeros_like", "ones_like"),
    "optimiser": ("AdamW", "_fused_adamw", "lerp", "addcdiv", "addcmul", "sqrt"),
    "elementwise": (
        "mul", "add", "sub", "div", "pow", "rsqrt", "mean", "sum", "silu", "neg", "sigmoid", "where", "rsub", "cos", "sin",
        "masked_fill",
    ),
}  # fmt: skip


def kind_of(name: str) -> str:
    """The row of the table an operation belongs to."""
    plain = name.removeprefix("aten::").rstrip("_")
    for kind, names in KINDS.items():
        if any(
            plain == n.rstrip("_") or plain.startswith((n + "_", "_" + n)) or (len(n) > 6 and n in plain) for n in names
        ):
            return kind
    return OTHER


def peer_model(work: str, base: Any) -> Any:
    """What the peer trains, in train mode."""
    import train_peers
    from peft import get_peft_model

    if work == "minilm":
        adapted = SimpleNamespace(model="minilm-l6", method=f"lora:rank={RANK},alpha={2 * RANK}")
        return train_peers.encoder({"classes": CLASSES}, adapted, True).train()
    if work == "full":
        return base.model.float().requires_grad_(True).train()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(base.model, train_peers.lora(RANK, 2 * RANK, targets, "CAUSAL_LM")).train()


def peer_steps(work: str, base: Any, batch: dict[str, Any], between: Callable[[int], None]) -> None:
    """Steps of the peer's model with its own loss; `between(n)` is called after each."""
    import torch

    model = peer_model(work, base)
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=1e-4, fused=True)
    for n in range(1, STEPS + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=work != "lora"):
            loss = model(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        between(n)


def our_steps(work: str, base: Any, batch: dict[str, Any], between: Callable[[int], None]) -> None:
    """The same through the public loop."""
    from tunesmith.core import method as methods
    from tunesmith.core.delta import Delta
    from tunesmith.core.objective import get_objective
    from tunesmith.train.config import TrainConfig
    from tunesmith.train.loop import fit
    from tunesmith.train.tasks import RowTask

    rows = [
        {"input_ids": row, "labels": label}
        for row, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ]
    task = RowTask(rows, get_objective("classification" if work == "minilm" else "sft")(), pad_to=None)
    chosen = [methods.parse("full" if work == "full" else f"lora:rank={RANK},alpha={2 * RANK}")]
    if work == "minilm":
        chosen.append(methods.build("head", {"classes": CLASSES}))
    delta = Delta.create(base, *chosen, seed=0)
    config = TrainConfig(
        steps=STEPS, batch_size=len(rows), lr=1e-4, schedule="constant", warmup=0.0, precision="bf16"
    )  # fmt: skip
    fit(base, delta, task, config, progress=False, on_step=lambda n, loss: between(n))


def profiled(work: str, side: str) -> dict[str, Any]:
    """Milliseconds of processor time of the plain steps, and of the last step by kind."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import tunesmith as ts

    torch.manual_seed(0)
    ids = torch.randint(1000, VOCABULARY if work != "minilm" else 30000, SHAPES[work])
    labels = torch.randint(0, CLASSES, (len(ids),)) if work == "minilm" else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    encoder = work == "minilm"
    base = ts.load("minilm-l6" if encoder else "smollm2-135m-instruct", dtype="float32" if encoder else "bfloat16")
    watch = profile(activities=[ProfilerActivity.CPU])
    marks: list[float] = []

    def between(n: int) -> None:
        marks.append(time.process_time())
        if n == STEPS - 1:
            watch.start()
        elif n == STEPS:
            watch.stop()

    (peer_steps if side == "peer" else our_steps)(work, base, batch, between)
    found = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in watch.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e3
    plain = [1e3 * (b - a) for a, b in itertools.pairwise(marks[1:-1])]
    return {"steps": plain, "kinds": found, "peak_memory": measure.peak_resident()}


def compared(work: str, threads: int, repeats: int) -> dict[str, Any]:
    """Both sides in turn; the shares are those of the last process of each."""
    command = [sys.executable, __file__, "--worker"]
    runs = measure.in_turn(
        SIDES, lambda side, _: measure.process([*command, f"{work}:{side}"], threads=threads), repeats
    )
    step = {s: round(statistics.median(t for r in runs[s] for t in r["steps"]), 1) for s in SIDES}
    last = {s: runs[s][-1]["kinds"] for s in SIDES}
    rows = [{"kind": k, **{s: round(last[s][k], 1) for s in SIDES}} for k in last["ours"]]
    rows.append({"kind": "all", **{s: round(sum(last[s].values()), 1) for s in SIDES}})
    memory = {s: max(r["peak_memory"] for r in runs[s]) for s in SIDES}
    return {"work": work, "shape": SHAPES[work], "step": step, "ratio": round(step["peer"] / step["ours"], 3),
            "peak_memory": memory, "rows": rows}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", metavar="A,B", help=f"some of: {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"processes of each side (default {REPEATS})")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default 1: times add up)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write them with their environment here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure.answer(profiled(*args.worker.split(":")))
        return
    works = measure.chosen(parser, args.works, list(SHAPES))
    about = measure.facts(("transformers", "peft"))
    whole = {"command": " ".join(["python", *sys.argv]), **about, "threads": args.threads, "repeats": args.repeats}
    whole["works"] = [compared(work, args.threads, args.repeats) for work in works]
    if args.out:
        args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(whole))
        return
    for found in whole["works"]:
        print(
            f"\n{found['work']}: a step takes {found['step']['peer']:.0f} ms (peer), {found['step']['ours']:.0f} (ours)"
        )
        print(f"{'under the profiler, ms':26}{'peer':>10}{'ours':>10}")
        for row in found["rows"]:
            print(f"{row['kind']:26}{row['peer']:10.0f}{row['ours']:10.0f}")


if __name__ == "__main__":
    main()
