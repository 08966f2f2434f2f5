# SPDX-License-Identifier: Apache-2.0
"""Study 069 at toy size: the trace, servers that write the same tokens, the padded buffer, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.serve.engine import Engine
from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "069-s-lora"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def servers(module: Any) -> Any:
    return import_module(module.__package__ + ".servers")


@pytest.fixture(scope="module")
def trace(module: Any) -> Any:
    return import_module(module.__package__ + ".trace")


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    for rows in raw["arms"].values():
        assert [r["seed"] for r in rows] == [0, 1] and all(r["metric"] > 0 and r["batch"] >= 1 for r in rows)
    written = {arm: [r["tokens"] for r in rows] for arm, rows in raw["arms"].items()}
    assert len({tuple(w) for w in written.values()}) == 1, "every server writes the whole trace"
    assert raw["exact"]["alone differs"] == raw["exact"]["merged differs"] == 0 < raw["exact"]["tokens"]


def test_the_trace_is_the_generators(module: Any, trace: Any) -> None:
    shape = module.FULL.shape()
    many, few = (trace.asks(n, shape, 1000, 3) for n in (64, 4))
    assert len(many) == 80 and [a.prompt for a in many] == [a.prompt for a in few]
    assert [a.adapter // 16 for a in many] == [a.adapter for a in few], "floor(N U) of one U"
    assert {len(a.prompt) for a in many} <= set(range(8, 65)) and {a.new for a in many} <= set(range(8, 33))
    assert len({a.adapter for a in many}) > 30 and 1 < many[-1].arrived < 4
    assert [a.arrived for a in many] == sorted(a.arrived for a in many)
    assert trace.asks(64, shape, 1000, 4) != many


def test_all_servers_write_the_same_tokens(module: Any, servers: Any, trace: Any) -> None:
    base = trace.toy()
    deltas = trace.deltas(base, (1, 2, 4, 2))
    asks = trace.asks(4, trace.Lengths(6, 1e6, (3, 6), (3, 6)), 64, 0)
    merged = servers.Merged(base, deltas)
    library, wide = servers.library_of(base, deltas), servers.library_of(base, deltas)
    servers.padded(wide, 4)
    assert all(len(A) == 4 for n in wide.entries for A, _ in wide.acquire(n).low.values())
    for a in asks:
        want = Engine(base, library, cells=2000).generate([servers.request(a, f"d{a.adapter}")])
        merged.switch(a.adapter)
        plain = Engine(merged.own, servers.library_of(merged.own, []), cells=2000)
        assert plain.generate([servers.request(a, None)]) == want
        assert Engine(base, wide, cells=2000).generate([servers.request(a, f"d{a.adapter}")]) == want
    for path in base.modules:
        if path.endswith("q_proj"):
            want_weight = base.merged(deltas[asks[-1].adapter]).modules[path].weight
            torch.testing.assert_close(merged.own.modules[path].weight, want_weight)


def test_one_adapter_has_the_server_to_itself(servers: Any, trace: Any) -> None:
    base = trace.toy()
    deltas = trace.deltas(base, (1, 1, 1))
    asks = trace.asks(3, trace.Lengths(9, 1e6, (3, 5), (2, 4)), 64, 1)
    engine = Engine(base, servers.library_of(base, deltas), cells=4000)
    seen: list[set[int]] = []
    step = engine.step

    def watch() -> Any:
        events = step()
        seen.append({asks[int(i)].adapter for i in engine.live})
        return events

    engine.step = watch  # type: ignore[method-assign]
    turns: list[int] = []
    out = servers.one_adapter_at_a_time(engine, asks, lambda a: f"d{a.adapter}", turns.append)
    assert max(map(len, seen)) == 1 and len(turns) >= len({a.adapter for a in asks})
    assert out.tokens == sum(a.new for a in asks) and len(out.waits) == len(asks)


def test_the_padded_buffer_is_split_as_is_best_for_it(servers: Any, trace: Any) -> None:
    asks = trace.asks(16, trace.Lengths(40, 1e6, (8, 20), (8, 20)), 64, 0)
    assert servers.best_buffer(asks, 10**6, 100, 32, (1, 4, 16)) == 16, "with room for all, the most slots"
    assert servers.best_buffer(asks, 1000, 200, 32, (1, 2, 4, 5)) == 4, "five slots would leave no cache"


def made_up(
    one: float = 10, merged: float = 12, few: float = 50, padded: float = 8, fast: float = 45
) -> dict[str, Any]:
    def rows(metric: float, batch: float = 20) -> list[dict[str, Any]]:
        return [{"seed": s, "metric": metric + 0.1 * s, "batch": batch + s, "first token": 1.0} for s in range(3)]

    arms = {
        "together, 64": rows(fast), "one at a time, 64": rows(one), "merged, 64": rows(merged),
        "padded, 64": rows(30, padded), "together, 4": rows(few), "together, 1": rows(50), "merged, 1": rows(60),
    }  # fmt: skip
    return {"arms": arms, "exact": {"tokens": 9, "alone differs": 0, "merged differs": 0}}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (made_up(), "reproduced"),
        (made_up(merged=30), "inconclusive"),
        (made_up(few=70), "inconclusive"),
        (made_up(padded=25), "inconclusive"),
        (made_up(one=46), "not reproduced"),
    ],
)
def test_verdict(study: Any, raw: dict[str, Any], label: str) -> None:
    found = study.verdict(raw)
    assert found.label == label
    assert found.statistics["one adapter, merged / together"]["mean"] > 1
