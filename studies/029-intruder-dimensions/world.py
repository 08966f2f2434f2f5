# SPDX-License-Identifier: Apache-2.0
"""SST-2 as prompts for the top blocks of SmolLM2, with AG News as what the model knew before."""

from __future__ import annotations

import random
from typing import Any

from tunesmith.core.base import Base
from tunesmith.study.fair import assert_disjoint
from tunesmith.study.spec import Context
from tunesmith.study.worlds.language import IGNORED, MODEL, LanguageWorld, StateTask, TopModel, below, toy_base

WORDS = (" negative", " positive")
Row = dict[str, Any]


def sst2_top(ctx: Context, blocks: int, counts: dict[str, int], length: int, batch: int) -> LanguageWorld:
    """The world; `counts` has rows of train, dev, test and general. The word after the prompt is the only label.

    Training and dev rows are sentences of the training file, test rows those of the test file; no text is in two splits.
    In a smoke run a small random Llama tells even from odd sums.
    """
    if ctx.smoke:
        base, blocks = toy_base(), min(blocks, 2)
        texts = {name: _toy(name, n) for name, n in counts.items()}
    else:
        from tunesmith.models.open import load

        base = load(MODEL, dtype="fp32", device="cpu")
        texts = _rows(ctx, base, counts, length)
    cut = {name: below(base, rows, blocks, precision="fp32") for name, rows in texts.items()}
    tasks = {name: StateTask(cut[name], [list(r["labels"]) for r in rows]) for name, rows in texts.items()}
    top = Base(TopModel(base.model, blocks), tokenizer=base.tokenizer, name=f"{base.name} top {blocks}", family="causal-lm",
               example={"inputs_embeds": tasks["train"].states[0][:16][None]})  # fmt: skip
    top.model.eval()
    held = {k: t for k, t in tasks.items() if k != "train"}
    return LanguageWorld("sst2-top", top, tasks["train"], held, batch, "fp32", texts=texts)


def _rows(ctx: Context, base: Base, counts: dict[str, int], length: int) -> dict[str, list[Row]]:
    from tunesmith.data import read

    folder, news = ctx.data_folder("sst2"), ctx.data_folder("ag_news")
    learn = [r for r in read(str(folder / "train.jsonl.gz")).rows if len(r["text"].split()) >= 6]  # type: ignore[operator]
    final = read(str(folder / "test.jsonl")).rows  # type: ignore[operator]
    known = {r["text"].strip() for r in final}
    learn = [r for r in learn if r["text"].strip() not in known]
    drawn = random.Random("029:train").sample(learn, counts["train"] + counts["dev"])
    test = random.Random("029:test").sample(final, counts["test"])
    parts = {"train": drawn[: counts["train"]], "dev": drawn[counts["train"] :], "test": test}
    assert_disjoint(**{k: sorted({r["text"].strip() for r in rows}) for k, rows in parts.items()})
    made = {k: [_prompt(base, r["text"], r["label"], length) for r in rows] for k, rows in parts.items()}
    plain = [r["text"] for r in read(str(news / "validation.jsonl")).rows]  # type: ignore[operator]
    general = random.Random("029:general").sample(plain, counts["general"])
    ids = [_ids(base, t)[:length] for t in general]
    return {**made, "general": [{"input_ids": i, "labels": list(i)} for i in ids]}


def _ids(base: Base, text: str) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


def _prompt(base: Base, text: str, label: int, length: int) -> Row:
    """The prompt's tokens and the first token of the label's word, the only one supervised."""
    before, after = _ids(base, "Review:"), _ids(base, "\nSentiment:")
    middle = _ids(base, f" {text.strip()}")[: length - len(before) - len(after) - 1]
    ids = [*before, *middle, *after, _ids(base, WORDS[label])[0]]
    return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - 1) + ids[-1:]}


def _toy(name: str, n: int) -> list[Row]:
    rng = random.Random(f"029:{name}")
    rows = []
    for _ in range(n):
        ids = [rng.randrange(16, 64) for _ in range(rng.randint(3, 6))]
        if name == "general":
            rows.append({"input_ids": ids, "labels": list(ids)})
        else:
            rows.append(
                {"input_ids": [*ids, 1, 2 + ids[0] % 2], "labels": [IGNORED] * (len(ids) + 1) + [2 + ids[0] % 2]}
            )
    return rows
