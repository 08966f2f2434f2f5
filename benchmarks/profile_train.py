# SPDX-License-Identifier: Apache-2.0
"""Where the time of one LoRA step goes: PEFT's and ours, by kind of operation.

    python benchmarks/profile_train.py                      a table
    python benchmarks/profile_train.py --out FILE --json    the rows {kind, peft, ours} in milliseconds of processor time

One step is forward, backward and AdamW of LoRA r=8 on all linear layers of SmolLM2-135M in bf16, 4 rows of 256 tokens,
every token supervised. Each side runs in a process of its own under torch's profiler; an operation counts with the time
spent in itself. Profiling slows small operations down, so the shares matter, not the sums: `benchmarks/train.py` measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

ROWS, LENGTH, RANK, VOCABULARY, STEPS = 4, 256, 8, 49152, 3
OTHER = "python and bookkeeping"
SIDES = ("peft", "ours")
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


def peft_steps(base: Any, ids: Any, between: Callable[[int], None]) -> None:
    """Three steps of PEFT's model with transformers' own loss; `between(n)` is called after each."""
    import torch
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wanted = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base.model, wanted).train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=1e-4)
    for n in range(1, STEPS + 1):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        between(n)


def our_steps(base: Any, ids: Any, between: Callable[[int], None]) -> None:
    """The same through the public loop."""
    import tunesmith as ts
    from tunesmith.core.delta import Delta
    from tunesmith.core.objective import get_objective
    from tunesmith.train.config import TrainConfig
    from tunesmith.train.loop import fit
    from tunesmith.train.tasks import RowTask

    task = RowTask([{"input_ids": row, "labels": row} for row in ids.tolist()], get_objective("sft")())
    delta = Delta.create(base, ts.LoRA(rank=RANK, alpha=2.0 * RANK), seed=0)
    config = TrainConfig(steps=STEPS, batch_size=ROWS, lr=1e-4, schedule="constant", warmup=0.0, precision="bf16")
    fit(base, delta, task, config, progress=False, on_step=lambda n, loss: between(n))


def profiled(side: str) -> dict[str, float]:
    """Milliseconds of processor time of the last step, by kind."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import tunesmith as ts

    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    base = ts.load("smollm2-135m-instruct", dtype="bfloat16")
    watch = profile(activities=[ProfilerActivity.CPU])

    def between(n: int) -> None:
        if n == STEPS - 1:
            watch.start()
        elif n == STEPS:
            watch.stop()

    (peft_steps if side == "peft" else our_steps)(base, ids, between)
    found = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in watch.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of each run (default 1: times add up)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write them with their environment here")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure.answer(profiled(args.worker))
        return
    command = [sys.executable, __file__, "--worker"]
    found = {side: measure.process([*command, side], threads=args.threads) for side in SIDES}
    rows = [{"kind": k, **{side: round(found[side][k], 1) for side in SIDES}} for k in found["ours"]]
    rows.append({"kind": "all", **{side: round(sum(found[side].values()), 1) for side in SIDES}})
    whole = {
        "command": " ".join(["python", *sys.argv]), **measure.facts(("torch", "transformers", "peft")),
        "threads": args.threads, "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(whole))
        return
    print(f"{'ms of processor time':26}{'PEFT':>10}{'ours':>10}")
    for row in rows:
        print(f"{row['kind']:26}{row['peft']:10.0f}{row['ours']:10.0f}")


if __name__ == "__main__":
    main()
