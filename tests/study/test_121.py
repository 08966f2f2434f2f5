# SPDX-License-Identifier: Apache-2.0
"""Study 121 at toy size: arms at equal bits, tables and Fisher weights carried to the upper blocks, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study
from tunesmith.study.spec import Context

FOLDER = Path(__file__).parents[2] / "studies" / "121-lq-lora"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def parts(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".parts")


def test_a_smoke_run_fills_every_arm_and_budget_at_its_bits(study: Any, parts: Any, tmp_path: Path) -> None:
    result = run_study(study, smoke=True, out=tmp_path)
    raw = result["raw"]
    assert {arm: len(rows) for arm, rows in raw["arms"].items()} == dict.fromkeys(study.arms, 2)
    for arm in study.arms:
        assert set(raw["quality"][arm]) == set(parts.LABELS)
        assert len(raw["tuning"][arm]["trials"]) == 2
    for label in ("2.5", "4"):
        bits = {arm: raw["quality"][arm][label]["bits"] for arm in study.arms}
        assert all(b <= bits["qlora"] + 1e-9 for b in bits.values())
        assert bits["qlora"] == bits["loftq"] == bits["lq-uniform"]
    assert {len(v["losses"]) for by in raw["quality"].values() for v in by.values()} == {6}
    assert all(row["before"] > 0 and row["lr"] in (5e-4, 2e-3) for rows in raw["arms"].values() for row in rows)


def test_budgets_and_formats_are_those_of_the_card(parts: Any) -> None:
    assert parts.BUDGETS["2.5"] == 2.50390625 and parts.BUDGETS["4"] == 4.1259765625
    names = {label: (parts.uniform(label).bits, parts.uniform(label).block) for label in parts.LABELS}
    assert names == {"2.5": (2, 16), "2.75": (2, 16), "3": (2, 16), "4": (4, 64)}
    assert len(parts.CHOICES) == 6


def test_what_is_known_of_the_whole_model_is_found_for_its_upper_blocks(parts: Any) -> None:
    from tunesmith.study.worlds.language import gsm8k_top

    ctx = Context(True, [0], Path("."), None)  # type: ignore[arg-type]
    world = gsm8k_top(ctx, blocks=2, train=8, dev=2, test=2, general=0)
    w = parts.whole(ctx, 2, 2, 2, 1, 1)
    table = parts.table_of(parts.measure_table(w, False))
    assert len(table) == 4 * 7 and all(list(row) == parts.CHOICES for row in table.values())
    top = parts.at_top(world, table, 2, 4)
    for path, row in top.items():
        assert row is table[path.replace("layers.0.", "model.layers.2.").replace("layers.1.", "model.layers.3.")]
    assert len(top) == 14
    F = parts.at_top(world, w.fisher, 2, 4)
    for path, f in F.items():
        assert tuple(f.shape) == world.base.sites.of(path, "linear").shape and float(f.min()) >= 0


def test_every_split_is_nearer_to_the_model_than_rounding_alone(parts: Any) -> None:
    ctx = Context(True, [0], Path("."), None)  # type: ignore[arg-type]
    w = parts.whole(ctx, 2, 2, 6, 4, 1)

    def error(arm: str) -> float:
        base, delta = parts.split(w.base, arm, "2.5", w, table={})
        total = 0.0
        for path in delta.parts[0].kind_of:
            t = delta.parts[0].tensors(path)
            update = delta.parts[0].method.update(base.sites.of(path, "linear"), t).dense().detach()
            W = w.base.sites.of(path, "linear").params()["weight"]
            total += float((W - base.modules[path].dense_weight() - update).square().sum())
        return total

    errors = {arm: error(arm) for arm in ("qlora", "loftq", "lq-uniform", "lq-ilp")}
    assert errors["lq-uniform"] < errors["qlora"] and errors["loftq"] < errors["qlora"]
    assert errors["lq-ilp"] < errors["qlora"]


def _raw(
    tuned: float = -0.1, ilp: float = -0.1, fisher: float = -0.1, wobble: float = 0.01, spread: float = 0.02
) -> dict[str, Any]:
    shift = {"qlora": 0.0, "loftq": -0.02, "lq-uniform": -0.05, "lq-ilp": tuned, "lq-ilp-fisher": tuned}
    arms = {
        arm: [{"seed": s, "metric": 2.0 + d + (wobble * (s - 1) if arm == "lq-ilp" else 0.0)} for s in range(3)]
        for arm, d in shift.items()
    }
    base = [3.0 + 0.01 * i for i in range(40)]

    def items(value: float) -> dict[str, Any]:
        return {"losses": [b + value + spread * (-1) ** i for i, b in enumerate(base)]}

    start = {"qlora": 0.3, "loftq": 0.2, "lq-uniform": 0.1, "lq-ilp": 0.1 + ilp, "lq-ilp-fisher": 0.1 + ilp + fisher}
    labels = ("2.5", "2.75", "3", "4")
    quality = {arm: {label: items(v) for label in labels} for arm, v in start.items()}
    for i in range(0, 40, 4):  # differences that vary from item to item
        quality["lq-ilp"]["2.5"]["losses"][i] += spread
    quality["none"] = {"16": items(0.0)}
    return {"arms": arms, "quality": quality, "budgets": dict.fromkeys(labels, 0.0), "tuned_at": "2.5"}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (_raw(), "reproduced"),
        (_raw(tuned=0.05), "not reproduced"),
        (_raw(ilp=0.1), "inconclusive"),
        (_raw(fisher=0.1), "inconclusive"),
        (_raw(wobble=0.2), "inconclusive"),
        (_raw(tuned=-0.001, wobble=0.001), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, raw: dict[str, Any], label: str) -> None:
    found = study.verdict(raw)
    assert found.label == label and set(found.statistics["components"]) == {
        "fine-tuning", "integer programme", "Fisher weights",
    }  # fmt: skip
