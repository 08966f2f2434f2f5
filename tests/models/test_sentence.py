# SPDX-License-Identifier: Apache-2.0
"""What sentence-transformers' files beside a model say, in the old form and the new, and when they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.errors import UsageError
from tunesmith.models.open import load
from tunesmith.models.sentence import folder_reader, sentence_layout
from tunesmith.serve.encoder import Encoder, Reading
from tunesmith.serve.library import Library

NAMES = ("Transformer", "Pooling", "Normalize")


def folder(tmp_path: Path, pooling: dict[str, Any], names: tuple[str, ...] = NAMES) -> Path:
    rows = [{"idx": i, "path": f"{i}_{n}", "type": f"sentence_transformers.models.{n}"} for i, n in enumerate(names)]
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 17}))
    return tmp_path


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode": ["cls", "max"]}, "cls+max"),
        ({}, "none"),
    ],
)
def test_pooling_in_both_forms(tmp_path: Path, pooling: dict[str, Any], name: str) -> None:
    made = sentence_layout(folder_reader(folder(tmp_path, pooling)))
    assert made == {"pooling": name, "normalize": True, "max_length": 17, "other": []}


def test_layers_that_are_neither_are_named(tmp_path: Path) -> None:
    made = sentence_layout(folder_reader(folder(tmp_path, {}, ("Transformer", "Pooling", "Dense"))))
    assert made is not None and made["other"] == ["Dense"] and made["normalize"] is False


def test_another_model_has_none(tmp_path: Path) -> None:
    assert sentence_layout(folder_reader(tmp_path)) is None


@pytest.mark.parametrize("text", ["{", "[1]", '[{"type": "x"}]', "5"])
def test_damaged_files_are_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(UsageError, match="cannot be read"):
        sentence_layout(folder_reader(tmp_path))


@pytest.mark.real
def test_minilm_pools_and_normalises_as_its_files_say() -> None:
    base = load("minilm-l6")
    assert base.source["sentence"] == {"pooling": "mean", "normalize": True, "max_length": 256, "other": []}
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell sharply today."]
    engine = Encoder(base, Library(base, 1))
    engine.submit(Reading("a", tuple({"input_ids": ids} for ids in base.tokenizer(texts)["input_ids"]), "embed"))
    v = engine.step()[0].vectors
    torch.testing.assert_close(v.norm(dim=1), torch.ones(3))
    assert float(v[0] @ v[1]) > 0.5 > 0.2 > float(v[0] @ v[2])
