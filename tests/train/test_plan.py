# SPDX-License-Identifier: Apache-2.0
"""The plan before loading: counts are exact, memory moves the right way, and a run that does not fit is refused."""

from __future__ import annotations

import dataclasses

import pytest

import tunesmith as ts
from tunesmith.core.errors import ResourceError, UsageError
from tunesmith.train.plan import Plan, plan

ROWS = [
    {"prompt": f"question number {i} about the weather", "response": "it will rain " * (1 + i % 4)} for i in range(24)
]
MODEL = "smollm2-135m-instruct"
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def plain() -> Plan:
    return plan(MODEL, ROWS, method="lora:rank=8", batch_size=8, epochs=2)


def test_counts_are_exact(plain: Plan) -> None:
    # sum of r (in + out) over q, k, v, o, gate, up, down of 30 blocks
    per_block = 8 * ((576 + 576) + 2 * (576 + 192) + (576 + 576) + 3 * (576 + 1536))
    assert plain.trainable == 30 * per_block
    assert plain.total == 134_515_008
    assert plain.steps == 2 * 3
    assert sum(r["sites"] for r in plain.rows) == 210
    assert sum(r["trainable"] for r in plain.rows) == plain.trainable


def test_memory_moves_the_right_way(plain: Plan) -> None:
    small = plan(MODEL, ROWS, method="lora:rank=8", batch_size=8, micro_batch=2)
    full = plan(MODEL, ROWS, method="full", batch_size=8)
    saved = plan(MODEL, ROWS, method="lora:rank=8", batch_size=8, gradient_checkpointing=True)
    assert small.memory["train"] < plain.memory["train"] < full.memory["train"]
    assert saved.memory["train"] < plain.memory["train"]
    assert all(p.memory["train"] > 4 * 134_515_008 for p in (plain, small, full, saved))


def test_rows_of_unlike_lengths_need_more_room() -> None:
    long, short = {"prompt": "why", "response": "rain " * 60}, {"prompt": "why", "response": "rain"}
    even, mixed = (plan(MODEL, rows, method="lora:rank=8", batch_size=1) for rows in ([long] * 4, [long, short] * 2))
    assert even.memory["train"] < mixed.memory["train"] and even.memory["load"] == mixed.memory["load"]


def test_a_run_that_does_not_fit_is_refused_with_what_to_do(plain: Plan) -> None:
    tight = dataclasses.replace(plain, available=plain.peak - 1)
    assert not tight.fits
    with pytest.raises(ResourceError, match="micro_batch"):
        tight.require()
    dataclasses.replace(plain, available=plain.peak).require()


def test_mistakes_are_found_before_loading() -> None:
    with pytest.raises(UsageError, match="q_proj|did you mean"):
        plan(MODEL, ROWS, method='lora:targets="q_prj"')
    with pytest.raises(UsageError, match="batch_size"):
        plan(MODEL, ROWS, batchsize=4)


def test_encoders_get_a_head_and_vision_models_a_plan() -> None:
    rows = [{"text": f"sentence {i}", "label": "ab"[i % 2]} for i in range(8)]
    assert plan("minilm-l6", rows).methods == ["lora", "head"]
    assert ts.plan("minilm-l6", rows, method="bitfit").methods == ["bitfit", "head"]
