# SPDX-License-Identifier: Apache-2.0
"""A tiny encoder and a tiny language model with word tokenizers, and rows that they can learn in seconds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.arena import report
from tunesmith.core.base import Base
from tunesmith.core.toys import ToyLM
from tunesmith.data import Dataset, read

TOPICS = {"fruit": "apple pear plum fig", "tool": "saw drill file awl", "bird": "wren crow owl kite"}
FILLER = ["the", "a", "one", "this", "that", "some"]
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


def _tokenizer() -> Any:
    words = ["<pad>", "<unk>", "<s>", "</s>", "user", "assistant", "system", ":", "yes", "no", *FILLER]
    words += [w for text in TOPICS.values() for w in text.split()]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


class TinyEncoder(torch.nn.Module):
    """Words to vectors, with a norm and two layers; a mean over words tells topics apart."""

    def __init__(self, vocab: int = 40, d: int = 16) -> None:
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(vocab, d), torch.nn.LayerNorm(d)
        self.up, self.down = torch.nn.Linear(d, 24), torch.nn.Linear(24, d)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [B, T] to vectors [B, T, d]."""
        x = self.embed(input_ids)
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def _frozen(model: torch.nn.Module, family: str) -> Base:
    for p in model.parameters():
        p.requires_grad_(False)
    example = {"input_ids": torch.arange(12).reshape(2, 6)}
    return Base(model.eval(), tokenizer=_tokenizer(), example=example, name=f"tiny-{family}", family=family)


@pytest.fixture(scope="module")
def encoder() -> Base:
    torch.manual_seed(0)
    return _frozen(TinyEncoder(), "encoder")


@pytest.fixture(scope="module")
def writer() -> Base:
    torch.manual_seed(0)
    return _frozen(ToyLM(vocab=40), "causal-lm")


def labelled(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentences with one telling word, said three times, in a varying frame."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        label = list(TOPICS)[i % 3]
        frame = [rng.choice(FILLER), rng.choice(FILLER)]
        rows.append({"text": " ".join([*frame, *[rng.choice(TOPICS[label].split())] * 3]), "label": label})
    return rows


@pytest.fixture(scope="module")
def topics() -> Dataset:
    return read(labelled(90))


@pytest.fixture(scope="module")
def chats() -> Dataset:
    """A bird is answered with yes, anything else with no."""
    rows = [{"prompt": r["text"], "response": "yes yes" if r["label"] == "bird" else "no no"} for r in labelled(48, 1)]
    return read(rows)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "registry"))
    # Drawing is slow and has tests of its own, which take it from the module by another name.
    monkeypatch.setattr(report, "picture", lambda result: "<svg/>")
