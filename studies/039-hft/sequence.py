# SPDX-License-Identifier: Apache-2.0
"""Four tasks learnt one after another by the upper blocks of SmolLM2, with the lower blocks run once."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.features import features
from tunesmith.models.open import load
from tunesmith.study.spec import Context
from tunesmith.study.worlds.language import IGNORED, MODEL, StateTask, TopModel, below, toy_base
from tunesmith.train.modes import measuring

TASKS = ("ag_news", "clinc150", "sst2", "gsm8k")
SPLITS = ("train", "dev", "test")
ASKED = {"ag_news": ("News: {}\nTopic:", ("World", "Sports", "Business", "Technology")),
         "clinc150": ("Request: {}\nArea:", ("banking", "cards", "kitchen", "home", "car", "travel", "tools", "work", "talk",
                                             "assistant")),
         "sst2": ("Review: {}\nMood:", ("bad", "good"))}  # fmt: skip
AREAS = ("banking", "credit_cards", "kitchen_and_dining", "home", "auto_and_commute", "travel", "utility", "work",
         "small_talk", "meta")  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Rows of each task, lengths in tokens, blocks that train, and lengths of runs."""

    train: int
    dev: int
    test: int
    general: int
    reset_general: int
    length: int
    blocks: int
    steps: int
    batch: int
    draws: int


@dataclass
class Texts:
    """One task: cached states by split, and the token that stands for each class (none for rationales)."""

    splits: dict[str, StateTask]
    classes: list[int]


@dataclass
class Sequence4:
    """The base (upper blocks, norm, head), its tasks, and plain text to see what is forgotten."""

    base: Base
    tasks: dict[str, Texts]
    general: StateTask
    precision: str

    def score(self, base: Base, task: str, split: str) -> float:
        """Percent right: the likeliest class word, or the likeliest next token of a rationale."""
        texts = self.tasks[task]
        right = total = 0
        with measuring(base, self.precision):
            for batch in batches(texts.splits[split]):
                hidden, target, first = supervised(base, batch)
                if texts.classes:
                    hidden, target = hidden[first], target[first]
                logits = base.model.lm_head(hidden).float()  # type: ignore[operator]
                if texts.classes:
                    allowed = torch.tensor(texts.classes)
                    right += int((allowed[logits[:, allowed].argmax(-1)] == target).sum())
                else:
                    right += int((logits.argmax(-1) == target).sum())
                total += len(target)
        return 100 * right / max(1, total)

    def forgotten(self, base: Base, rows: int | None = None) -> float:
        """The mean loss of a token on the plain texts (the first `rows` of them)."""
        task = self.general if rows is None else self.general.subset(range(min(rows, len(self.general))))  # type: ignore[arg-type]
        loss, total = 0.0, 0
        with measuring(base, self.precision):
            for batch in batches(task):
                hidden, target, _ = supervised(base, batch)
                logits = base.model.lm_head(hidden).float()  # type: ignore[operator]
                loss += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
                total += len(target)
        return loss / max(1, total)


def batches(task: StateTask, rows: int = 16) -> list[dict[str, Any]]:
    """All rows in order of length."""
    order = sorted(range(len(task)), key=lambda i: len(task.labels[i]))
    return [task.batch(order[i : i + rows], 0) for i in range(0, len(order), rows)]


def supervised(base: Base, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Head inputs [N, d] and targets [N] at supervised positions, and which of these are the first of their row [N]."""
    labels = batch["labels"][:, 1:]
    keep = labels != IGNORED
    hidden = features(base, {k: v for k, v in batch.items() if k != "labels"})[:, :-1][keep]
    row = keep.nonzero()[:, 0]
    return hidden, labels[keep], torch.cat([torch.ones(1, dtype=torch.bool), row[1:] != row[:-1]])


def build(ctx: Context, sizes: Sizes) -> Sequence4:
    """The real base and tasks, or a small random Llama and toy tasks in a smoke run."""
    precision = "fp32" if ctx.smoke else "auto"
    base = toy_base() if ctx.smoke else load(MODEL, dtype="fp32", device="cpu")
    blocks = min(sizes.blocks, 2) if ctx.smoke else sizes.blocks
    counts = {"train": sizes.train, "dev": sizes.dev, "test": sizes.test}
    tasks: dict[str, Texts] = {}
    for name in TASKS:
        texts, classes = _toy(name, counts) if ctx.smoke else _rows(ctx, base, name, counts, sizes.length)
        tasks[name] = Texts({k: _states(base, rows, blocks, precision) for k, rows in texts.items()}, classes)
    plain = _toy("gsm8k", {"general": sizes.general})[0]["general"] if ctx.smoke else _plain(ctx, base, sizes)
    general = _states(base, [{**r, "labels": list(r["input_ids"])} for r in plain], blocks, precision)
    first = tasks["ag_news"].splits["train"].states[0][:16]
    top = Base(TopModel(base.model, blocks), tokenizer=base.tokenizer, example={"inputs_embeds": first[None]},
               name=f"{base.name} top {blocks}", family="causal-lm")  # fmt: skip
    top.model.eval()
    return Sequence4(top, tasks, general, precision)


def _states(base: Base, rows: Sequence[Mapping[str, Any]], blocks: int, precision: str) -> StateTask:
    return StateTask(below(base, rows, blocks, precision=precision), [list(r["labels"]) for r in rows])


def _jsonl(folder: Path, name: str) -> list[dict[str, Any]]:
    plain = folder / f"{name}.jsonl"
    data = plain.read_bytes() if plain.exists() else gzip.decompress((folder / f"{name}.jsonl.gz").read_bytes())
    return [json.loads(line) for line in data.splitlines() if line]


def _rows(
    ctx: Context, base: Base, name: str, counts: Mapping[str, int], length: int
) -> tuple[dict[str, list[dict[str, Any]]], list[int]]:
    """Encoded rows of a task by split, and its class tokens. Training and dev rows share a file and no row."""
    folder = ctx.data_folder(name)
    assert folder is not None
    tokenizer = base.tokenizer
    held = {"sst2": "validation"}.get(name, "test")
    pools = {"train": _jsonl(folder, "train"), "test": _jsonl(folder, held)}
    prompt, words = ASKED.get(name, ("Question: {}\nAnswer:", ()))
    classes = [tokenizer(" " + word, add_special_tokens=False)["input_ids"][0] for word in words]
    if len(set(classes)) != len(classes):
        raise AssertionError(f"two class words of {name} begin with one token")
    area = (
        {i: k for k, some in json.loads((folder / "domains.json").read_text()).items() for i in some}
        if name == "clinc150"
        else {}
    )

    def encoded(row: Mapping[str, Any]) -> dict[str, Any] | None:
        if name == "gsm8k":
            question, answer = row["prompt"], row["response"]
        else:
            at = AREAS.index(area[row["label"]]) if name == "clinc150" else int(row["label"])
            question, answer = row["text"], words[at]
        ids = tokenizer(prompt.format(question), add_special_tokens=False)["input_ids"]
        said = [*tokenizer(" " + answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if name == "gsm8k":  # few whole rationales are that short: the first tokens of one are a task too
            said = said[: max(24, length - len(ids))]
        if len(ids) + len(said) > length:
            return None
        return {"input_ids": ids + said, "labels": [IGNORED] * len(ids) + said}

    out: dict[str, list[dict[str, Any]]] = {}
    for pool, splits in (("train", ("train", "dev")), ("test", ("test",))):
        rows = list(pools[pool])
        random.Random(f"{name}:{pool}").shuffle(rows)
        usable = (e for r in rows if (e := encoded(r)) is not None)
        for split in splits:
            out[split] = [next(usable) for _ in range(counts[split])]
    return out, classes


def _plain(ctx: Context, base: Base, sizes: Sizes) -> list[dict[str, Any]]:
    """Passages of four novels."""
    folder = ctx.data_folder("books")
    assert folder is not None
    rng = random.Random("plain")
    rows = []
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))]
    while len(rows) < sizes.general:
        text = texts[len(rows) % len(texts)]
        at = rng.randrange(len(text) // 10, len(text) - 1000)
        ids = base.tokenizer(text[at : at + 600], add_special_tokens=False)["input_ids"][1 : sizes.length + 1]
        rows.append({"input_ids": ids})
    return rows


def _toy(name: str, counts: Mapping[str, int]) -> tuple[dict[str, list[dict[str, Any]]], list[int]]:
    """Tokens of which one gives the class away, or counting for the rationales."""
    classes = {"ag_news": 4, "clinc150": 5, "sst2": 2}.get(name, 0)
    out: dict[str, list[dict[str, Any]]] = {}
    for split, n in counts.items():
        rng = random.Random(f"{name}:{split}")
        out[split] = []
        for i in range(n):
            ids = [rng.randrange(24, 64) for _ in range(rng.randint(3, 6))]
            said = [2 + i % classes, 1] if classes else list(range(2, 2 + len(ids)))
            ids = [*ids, 14 + i % classes] if classes else ids
            out[split].append({"input_ids": ids + said, "labels": [IGNORED] * len(ids) + said})
    return out, list(range(2, 2 + classes))
