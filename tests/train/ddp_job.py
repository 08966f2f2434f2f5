# SPDX-License-Identifier: Apache-2.0
"""What each process of the two-process test runs: short trainings; the main process writes the numbers.

Eleven rows in batches of five: steps whose rows do not divide by two, and one of a single row.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tunesmith as ts
from tunesmith.core.delta import Delta
from tunesmith.core.toys import toys
from tunesmith.deltas import BitFit, DoRA, Full, LoRA, SoRA
from tunesmith.objectives import SFT
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.processes import is_main, world
from tunesmith.train.sharding import wanted
from tunesmith.train.tasks import RowTask


def rows(n: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    ids = [[rng.randrange(37) for _ in range(rng.randrange(3, 9))] for _ in range(n)]
    return [{"input_ids": x, "labels": [-100, *x[1:]]} for x in ids]


def sums(delta: Delta) -> list[float]:
    return [float((t.detach().double() * torch.arange(1, t.numel() + 1).view_as(t)).sum()) for _, t in delta.items()]


def text(out: Path, *methods: Any, **settings: Any) -> dict[str, Any]:
    base = toys()[0]
    base.model.double()
    before, classes = base.digest(), [type(m) for m in base.model.modules()]
    delta = Delta.create(base, *methods, seed=1).double()
    config = TrainConfig(
        steps=7, batch_size=5, lr=1e-2, precision="fp32", evaluate_every=3, checkpoint_every=2, **settings
    )
    done = fit(
        base, delta, RowTask(rows(11, 0), SFT()), config, validation=RowTask(rows(4, 1), SFT()), out=out, progress=False
    )
    logged = sum('"loss"' in line for line in (out / "log.jsonl").read_text().splitlines()) if is_main() else 0
    undone = base.digest() == before and [type(m) for m in base.model.modules()] == classes
    return {
        "losses": done.losses, "sums": sums(delta), "validation": [v for _, v in done.validation], "logged": logged,
        "undone": undone,
    }  # fmt: skip


def module(out: Path) -> dict[str, Any]:
    """The same through `tune` on a plain module."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(12, 4)
    batches = [(x[i : i + 3], x[i : i + 3, :2]) for i in range(0, 12, 3)]
    run = ts.tune(
        net, batches, loss=lambda y, b: nn.functional.mse_loss(y, b[1]), method="lora:rank=2", out=out, epochs=2,
        lr=1e-2, progress=False, precision="fp32",
    )  # fmt: skip
    logged = sum('"loss"' in line for line in (out / "log.jsonl").read_text().splitlines()) if is_main() else 0
    return {"losses": run.trained.losses, "sums": sums(run.delta), "validation": [], "logged": logged, "undone": True}


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    result: dict[str, Any] = {"world": world(), "sharded": wanted()}
    result["rows"] = text(where / "rows", LoRA(rank=2), BitFit())
    result["micro"] = text(where / "micro", LoRA(rank=2), BitFit(), micro_batch=2)
    result["rewritten"] = text(where / "rewritten", Full(targets="all-linear"), weight_decay=0.1)
    result["directions"] = text(where / "directions", DoRA(rank=2))
    result["projected"] = text(where / "projected", SoRA(rank=2))
    result["module"] = module(where / "module")
    if is_main():
        (where / "result.json").write_text(json.dumps(result))
