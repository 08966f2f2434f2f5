# SPDX-License-Identifier: Apache-2.0
"""However a batch is split, packed, recomputed or spread over processes, training takes the same path."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.data import PackedRow
from tunesmith.deltas import BitFit, LoRA
from tunesmith.objectives import SFT
from tunesmith.train.tasks import PackedTask

METHODS = (LoRA(rank=2), BitFit())


def llama(dropout: float = 0.0) -> Base:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, attention_dropout=dropout, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Base(LlamaForCausalLM(config), family="causal-lm")


def close(a: Any, b: Any, tolerance: float) -> None:
    (done_a, delta_a), (done_b, delta_b) = a, b
    assert done_a.losses == pytest.approx(done_b.losses, rel=tolerance, abs=tolerance)
    for (key, x), (_, y) in zip(delta_a.items(), delta_b.items(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("micro", [2, 1, 5])
def test_micro_batches_take_the_path_of_the_whole_batch(trained: Any, lm: Any, micro: int) -> None:
    """Rows have unlike numbers of supervised tokens, so a mean of means would show."""
    double = torch.float64
    make = lambda: lm(dtype=double)  # noqa: E731
    whole = trained(*METHODS, base=make(), steps=6)
    split = trained(*METHODS, base=make(), steps=6, micro_batch=micro)
    close(whole, split, 1e-9)
    assert len(set(whole[0].losses)) == 6


def test_packed_rows_take_the_path_of_unpacked_ones(trained: Any, token_rows: Any) -> None:
    rows = token_rows(12)
    groups = [PackedRow(tuple(range(i, i + 3)), tuple(rows[i : i + 3])) for i in range(0, 12, 3)]
    loose = trained(LoRA(rank=2), base=llama(), rows=rows, batch_size=12, steps=5, clip=1e3)
    tight = trained(LoRA(rank=2), base=llama(), task=PackedTask(groups, SFT()), batch_size=4, steps=5, clip=1e3)
    close(loose, tight, 1e-5)


def test_a_leaking_mask_would_show(trained: Any, token_rows: Any) -> None:
    """The control of the test above: one long row instead of three apart gives other losses."""
    rows = token_rows(12)
    joined = [{k: [t for r in rows[i : i + 3] for t in r[k]] for k in ("input_ids", "labels")} for i in range(0, 12, 3)]
    loose, _ = trained(LoRA(rank=2), base=llama(), rows=rows, batch_size=12, steps=1)
    leaky, _ = trained(LoRA(rank=2), base=llama(), rows=joined, batch_size=4, steps=1)
    assert abs(loose.losses[0] - leaky.losses[0]) > 1e-3


def test_gradient_checkpointing_changes_nothing(trained: Any, token_rows: Any) -> None:
    rows, base = token_rows(12), llama(dropout=0.2)
    plain = trained(LoRA(rank=2), base=llama(dropout=0.2), rows=rows, steps=4)
    again = trained(LoRA(rank=2), base=base, rows=rows, steps=4, gradient_checkpointing=True)
    close(plain, again, 1e-6)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in base.model.modules())


def test_gradient_checkpointing_needs_a_model_that_has_it(trained: Any) -> None:
    with pytest.raises(UsageError, match="no gradient checkpointing"):
        trained(*METHODS, gradient_checkpointing=True)


def test_bf16_autocast_trains_near_fp32(trained: Any) -> None:
    full, _ = trained(*METHODS, steps=6)
    half, delta = trained(*METHODS, steps=6, precision="bf16")
    assert half.losses != full.losses
    assert half.losses == pytest.approx(full.losses, rel=0.05)
    assert {t.dtype for _, t in delta.items()} == {torch.float32}


def test_two_runs_of_one_process_may_differ_in_precision(trained: Any) -> None:
    """Accelerate keeps one state per process; fp16 on CPU is refused by us, and what follows is not touched by it."""
    first, _ = trained(*METHODS, steps=2)
    with pytest.raises(UsageError, match="fp16 is for CUDA"):
        trained(*METHODS, steps=2, precision="fp16")
    trained(*METHODS, steps=2, precision="bf16")
    again, _ = trained(*METHODS, steps=2)
    assert again.losses == first.losses


def test_a_stale_accelerate_state_is_dropped() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from tunesmith.train.processes import accelerator

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(mixed_precision="bf16", cpu=True)
        assert accelerator(torch.device("cpu"), False, None, None).mixed_precision == "no"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def two_processes() -> list[dict[str, str]]:
    """What a launcher gives its processes."""
    shared = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    return [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]


def test_two_processes_take_the_path_of_one(tmp_path: Path) -> None:
    """With the base whole in each (DDP), and with the base in shards (FSDP2)."""
    job = Path(__file__).with_name("ddp_job.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    jobs = [("one", {})]
    jobs += [("whole", extra) for extra in two_processes()]
    jobs += [("shards", {**extra, "ACCELERATE_USE_FSDP": "true"}) for extra in two_processes()]
    started = []
    for name, extra in jobs:
        command = [sys.executable, str(job), str(tmp_path / name)]
        started.append(subprocess.Popen(command, env={**env, **extra}, stderr=subprocess.PIPE, text=True))
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()
    one, *others = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "whole", "shards"))
    assert one.pop("world") == 1
    assert [two.pop("sharded") for two in (one, *others)] == [False, False, True]
    for two in others:
        assert two.pop("world") == 2
        for name, run in one.items():
            assert two[name]["losses"] == pytest.approx(run["losses"], rel=1e-6), name
            assert two[name]["sums"] == pytest.approx(run["sums"], rel=1e-5, abs=1e-6), name
            assert two[name]["validation"] == pytest.approx(run["validation"], rel=1e-6), name
            assert two[name]["logged"] == len(run["losses"]), name
            assert two[name]["undone"], name
    assert one["rows"]["losses"] == pytest.approx(one["micro"]["losses"], rel=1e-6)
    assert sum(one["module"]["losses"][:4]) > sum(one["module"]["losses"][4:])
