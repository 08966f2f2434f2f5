# SPDX-License-Identifier: Apache-2.0
"""What is recommended, from which evidence, and that thin evidence is called thin."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tunesmith.arena.compare import run_compare
from tunesmith.arena.recommend import recommended, study_rates
from tunesmith.arena.report import load_comparison
from tunesmith.core.base import Base
from tunesmith.core.errors import ResourceError
from tunesmith.data import Dataset, read


@pytest.fixture(scope="module")
def compared(encoder: Base, topics: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry") / "compare-topics"
    run_compare(
        encoder,
        topics,
        methods="lora:rank=2,head",
        out=folder,
        budget=600,
        epochs=1,
        precision="fp32",
        seeds=1,
        lrs=[3e-2],
    )
    return folder.parent


def study(folder: Path, name: str, raw: dict[str, Any], arms: list[str]) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "result.json").write_text(json.dumps({"arms": arms, "raw": raw, "verdict": "reproduced"}))


def test_a_comparison_on_the_same_data_and_base_decides(encoder: Base, topics: Dataset, compared: Path) -> None:
    advice = recommended(encoder, topics, registry=compared)
    told = load_comparison(compared / "compare-topics")["recommendation"]
    assert advice.strength == "strong" and advice.lr == told["lr"] == 3e-2
    assert advice.method == told["method"].partition(":")[0]
    assert advice.epochs == pytest.approx(1, abs=0.2) and advice.settings["batch_size"] == 8
    assert str(compared) in advice.evidence[0].where and told["reason"] in advice.evidence[0].says


def test_other_data_is_weaker_evidence_and_another_base_weaker_still(
    encoder: Base, writer: Base, topics: Dataset, compared: Path
) -> None:
    other = topics.take(30)
    some = recommended(encoder, other, registry=compared)
    assert some.strength == "some" and "another set of data" in " ".join(some.doubts)
    like = Base(encoder.model, tokenizer=encoder.tokenizer, example=encoder.probe(), name="other", family="encoder")
    thin = recommended(like, other, registry=compared)
    assert thin.strength == "thin" and "another base" in " ".join(thin.doubts)
    none = recommended(writer, topics, registry=compared)
    assert none.strength == "none", "a comparison of encoders says nothing of a language model"


def test_without_evidence_the_defaults_are_called_defaults(encoder: Base, topics: Dataset, tmp_path: Path) -> None:
    advice = recommended(encoder, topics, registry=tmp_path)
    assert (advice.method, advice.strength, advice.evidence) == ("lora", "none", [])
    assert advice.options == {"rank": 4} and advice.spec == "lora:rank=4", "few rows, half the rank"
    assert "not a finding" in advice.doubts[0] and "no committed studies are installed" in " ".join(advice.doubts)
    many = read(
        [{"text": f"{r['text']} {i}", "label": topics.labels[r["label"]]} for i in range(4) for r in topics.rows]
    )
    assert recommended(encoder, many, registry=tmp_path).options == {}


def test_studies_give_learning_rates(encoder: Base, topics: Dataset, tmp_path: Path) -> None:
    place = tmp_path / "studies"
    study(
        place,
        "001-a",
        {
            "arms": {"lora": [{"seed": 0, "metric": 1}]},
            "tuning": {"lora": {"0": {"lr": 1e-3, "trials": [{"lr": 9.0}]}}},
        },
        ["lora"],
    )
    study(
        place,
        "002-b",
        {"arms": {"lora rank 4": [{"seed": 0, "lr": 1e-2}], "lora-fa": [{"lr": 5.0}]}},
        ["lora rank 4", "lora-fa"],
    )
    study(place, "003-c", {"arms": {"bone": [{"lr": 7.0}]}}, ["bone"])
    (place / "004-d").mkdir()
    (place / "004-d" / "result.json").write_text("{broken")
    assert [(f.parent.name, r) for f, r, _ in study_rates(place, "lora")] == [("001-a", [1e-3]), ("002-b", [1e-2])]
    advice = recommended(encoder, topics, registry=tmp_path / "none", studies=place)
    assert advice.strength == "thin" and advice.lr == pytest.approx(math.sqrt(1e-5), rel=1e-2)
    assert [e.where for e in advice.evidence] == ["001-a", "002-b"]
    assert study_rates(None, "lora") == [] == study_rates(tmp_path / "nowhere", "lora")


def test_memory_and_time_are_kept_to(encoder: Base, topics: Dataset, tmp_path: Path) -> None:
    free = recommended(encoder, topics, registry=tmp_path, memory=1 << 40)
    assert "micro_batch" not in free.settings and free.plan["peak"] < 1 << 40
    with pytest.raises(ResourceError, match="one row at a time"):
        recommended(encoder, topics, registry=tmp_path, memory=1000)
    quick = recommended(encoder, topics, registry=tmp_path, seconds=free.plan["minutes"] * 60 / 10)
    assert quick.epochs < free.epochs / 5 and "the time allows" in " ".join(quick.doubts)
    assert quick.plan["steps"] < free.plan["steps"]


def test_a_recommendation_that_beat_no_control_is_doubted(
    encoder: Base, topics: Dataset, compared: Path, tmp_path: Path
) -> None:
    found = load_comparison(compared / "compare-topics")
    found["recommendation"]["convincing"] = False
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "compare.json").write_text(json.dumps(found))
    advice = recommended(encoder, topics, registry=tmp_path)
    assert "not shown to beat every control" in " ".join(advice.doubts)
