# SPDX-License-Identifier: Apache-2.0
"""Study 085 at toy size: texts, supervision, what each arm trains, FLOPs, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.derive import densify, masks, sparsify
from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "085-spdf"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


def sibling(study: Any, name: str) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + "." + name)


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    result = run_study(study, smoke=True, out=tmp_path)
    raw = result["raw"]
    assert {arm: len(rows) for arm, rows in raw["arms"].items()} == dict.fromkeys(study.arms, 2)
    assert set(raw["tuning"]) == set(study.arms) and all(len(t["trials"]) == 2 for t in raw["tuning"].values())
    dense, sparse = (raw["pretrained"][f"large, {s}"][0]["flops"] for s in (0, 75))
    assert 0 < sparse < dense
    shares = {arm: rows[0].get("revived") for arm, rows in raw["arms"].items()}
    assert shares["large, easy, 75% zeros, dense"] > 0.5
    assert shares["large, easy, 75% zeros, sparse"] is None and shares["large, easy, 0% zeros, dense"] is None


def test_rows_say_their_slots_and_no_row_is_in_two_splits(study: Any) -> None:
    texts = sibling(study, "texts")
    splits = texts.easy(60, 10, 20)
    rows = [*splits.train, *splits.dev, *splits.test]
    assert len({r.source for r in rows}) == 90 and [len(splits.train), len(splits.dev), len(splits.test)] == [
        60,
        10,
        20,
    ]
    for r in rows:
        assert r.source[-1] == texts.SPLIT and r.target[-1] == texts.END and len(r.source) + len(r.target) <= 320
        values = dict(p.split(b"=") for p in r.source[:-1].split(b";"))
        said = [r.target[a:b] for a, b in r.slots]
        assert said and all(v in values.values() for v in said)
        assert len(said) == len([k for k in values if k != b"fa"]), "every slot but the family one is said word by word"
    assert texts.easy(60, 10, 20) == splits
    hard = texts.hard(None, 20, 5, 8, 40)
    assert [len(hard.train), len(hard.dev), len(hard.test)] == [20, 5, 8]
    assert all(len(r.source) <= 41 for r in hard.train)


def test_a_title_is_cut_from_the_head_of_its_text(study: Any, tmp_path: Path) -> None:
    import json

    texts = sibling(study, "texts")
    docs = [
        {
            "title": f"the flow past plate {i} .",
            "text": f"the flow past plate {i} . measurements were made in a tunnel {i}",
        }
        for i in range(12)
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for r in texts.hard(tmp_path, 6, 2, 4, 200).train:
        assert r.source.startswith(b"measurements were made") and r.target.startswith(b"the flow past plate")


def test_only_the_answer_is_supervised(study: Any) -> None:
    gpt, texts = sibling(study, "gpt"), sibling(study, "texts")
    row = texts.Row(b"ab" + bytes([texts.SPLIT]), b"xyz" + bytes([texts.END]), ((1, 3),))
    data = gpt.packed([row, texts.Row(b"a" + bytes([texts.SPLIT]), b"q" + bytes([texts.END]))])
    kept = data.labels[0] != -100
    assert data.labels[0][kept].tolist() == [*b"xyz", texts.END]
    assert data.ids[0][kept].tolist() == [texts.SPLIT, *b"xyz"]
    assert [data.labels[0, a:b].tolist() for a, b in data.slots[0]] == [list(b"yz")]


def test_a_batch_holds_each_row_once_an_epoch(study: Any) -> None:
    gpt, texts = sibling(study, "gpt"), sibling(study, "texts")
    data = gpt.packed(texts.easy(12, 1, 1).train)
    at = gpt.shuffled(data, 4, seed=3)
    seen = [tuple(r.tolist()) for i in range(3) for r in torch.nn.functional.pad(at(i)[0], (0, 320))[:, :320]]
    assert len(set(seen)) == 12
    first, again = at(4)[0], at(4)[0]
    assert torch.equal(first, again) and first.shape[0] == 4


def test_the_model_masks_six_matrices_of_each_block_and_counts_by_hand(study: Any) -> None:
    from tunesmith.derive import flops

    gpt = sibling(study, "gpt")
    base = gpt.fresh(2, 16, 2, 32, seed=0)
    sparse = sparsify(base, 0.75)
    assert {p.rsplit(".", 1)[1] for p in masks(sparse)} == {"q", "k", "v", "o", "up", "down"} and len(
        masks(sparse)
    ) == 12
    matrices, scores, head = 2 * 2 * 12 * 16 * 16, 2 * 2 * 32 * 2 * 16, 2 * 256 * 16
    assert flops(base, 32).total == matrices + scores + head
    assert flops(sparse, 32).total == 0.25 * matrices + scores + head
    assert base.model.head.weight is base.model.embed.weight
    stds = {n: float(m.weight.std()) for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert stds["blocks.0.o"] == pytest.approx(0.01, rel=0.15) and stds["blocks.0.q"] == pytest.approx(0.02, rel=0.15)


def test_the_revived_share_is_that_of_the_zeros(study: Any) -> None:
    gpt = sibling(study, "gpt")
    sparse = sparsify(gpt.fresh(1, 16, 2, 32, seed=0), 0.75)
    found = masks(sparse)
    from tunesmith.derive.own import own_copy

    for inside, want in ((True, 0.0), (False, 1.0)):
        end = own_copy(densify(sparse))
        with torch.no_grad():
            for path, m in found.items():
                end.modules[path].weight += (m if inside else ~m).float()
        assert gpt.revived(densify(sparse), end, found) == pytest.approx(want, abs=1e-6)


def _raw(
    study: Any, large: float = 1.0, small: float = 3.0, hard: float = 4.0, sparse: float = 3.0, wobble: float = 0.1
) -> Any:
    module = import_module(study.run.__module__)

    def percent(arm: str) -> float:
        size, task, rest = arm.split(", ", 2)
        if rest.startswith("0%"):
            return 0.0
        if rest.startswith("75") and rest.endswith("sparse"):
            return sparse
        if rest.startswith("75"):
            return hard if task == "hard" else large if size == "large" else small
        return 5.0

    arms = {
        arm: [
            {"seed": s, "metric": 1.0 + percent(arm) / 100 + (wobble / 100 * (s - 1) if percent(arm) else 0)}
            for s in range(3)
        ]
        for arm in module.ARMS
    }
    pre = {f"{size}, {s}": [{"seed": 0, "flops": f}] for size in ("small", "large") for s, f in ((0, 4.0), (75, 2.0))}
    return {"arms": arms, "pretrained": {**pre, "small, None": [{"seed": 0, "flops": 0.0}]}}


@pytest.mark.parametrize(
    ("numbers", "label", "difficulty"),
    [
        ({}, "reproduced", "holds"),
        ({"large": 1.0, "hard": 0.5}, "reproduced", "fails"),
        ({"large": 5.0, "small": 6.0, "sparse": 9.0}, "not reproduced", "fails"),
        ({"sparse": 0.5}, "not reproduced", "holds"),
        ({"small": 0.2}, "not reproduced", "holds"),
        ({"large": 2.05, "small": 6.0, "sparse": 9.0}, "inconclusive", "holds"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, numbers: dict[str, float], label: str, difficulty: str) -> None:
    found = study.verdict(_raw(study, **numbers))
    assert found.label == label and found.statistics["difficulty"] == difficulty
    assert found.statistics["pre-training FLOPs over dense, large, 75"] == 0.5
