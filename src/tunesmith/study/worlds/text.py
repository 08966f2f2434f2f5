# SPDX-License-Identifier: Apache-2.0
"""MiniLM-L6 with a linear head on a few sentences of each class, with splits for choosing and for reporting.

Sets: `banking77` (77 intents), `clinc150` (150 intents), `clinc150-domains` (the 10 domains those belong to), `ag_news`
(4 topics) and `sst2` (2 moods). Every arm gets the same fresh head (`companions`), pooled over real tokens. The target
is accuracy on the official test split. Retention is the mean cosine between the sentence vectors of the base and of the
adapted model on texts of another set: 1 means that the encoder still says what it said.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.errors import DataError, UsageError, nearest
from tunesmith.core.objective import get_objective
from tunesmith.core.trace import primary
from tunesmith.data import collate, read
from tunesmith.evaluate.drift import cosine, vectors
from tunesmith.models.open import load
from tunesmith.study.fair import assert_disjoint, support_query
from tunesmith.study.spec import Context
from tunesmith.study.worlds.world import Score
from tunesmith.train.modes import measuring
from tunesmith.train.tasks import RowTask

MODEL = "minilm-l6"
SETS = ("banking77", "clinc150", "clinc150-domains", "ag_news", "sst2")
Row = dict[str, Any]


@dataclass
class TextWorld:
    """An encoder with a head to learn; `metric` is accuracy. Rows hold `input_ids` and an int label; `labels` names
    them.
    """

    name: str
    base: Base
    task: RowTask
    held: dict[str, list[Row]]
    labels: list[str]
    batch: int = 32
    precision: str = "auto"
    companions: Sequence[Any] = ()
    higher_is_better: bool = True
    pad: int = 0
    eval_batch: int = 64
    texts: dict[str, list[str]] = field(default_factory=dict)

    def score(self, split: str) -> Score:
        """Accuracy and mean loss on "dev" or "test"."""
        return self.measure(self.held[split])

    def measure(self, rows: Sequence[Row]) -> Score:
        """The same on any rows with labels."""
        logits = self.logits(rows)
        y = torch.tensor([r["labels"] for r in rows])
        right = (logits.argmax(-1) == y).tolist()
        values = {"accuracy": sum(right) / len(right), "loss": float(F.cross_entropy(logits.double(), y))}
        return Score(values["accuracy"], [float(r) for r in right], [1] * len(right), values)

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Logits [n, classes] in fp32 of the model as it stands, in the order of the rows."""
        out = []
        with measuring(self.base, self.precision):
            for batch in self._batches(rows):
                found = primary(self.base.model(**batch))
                assert found is not None
                out.append(found.float())
        return torch.cat(out)[_inverse(_order(rows))]

    def retention(self) -> dict[str, float]:
        """`cosine` to the base's sentence vectors on general text, mean over texts. The head plays no part."""
        found = cosine(self._of_base, self._vectors())
        return {"cosine": sum(found) / len(found)}

    @cached_property
    def _of_base(self) -> Tensor:
        with self.base.without():
            return self._vectors()

    def _vectors(self) -> Tensor:
        with measuring(self.base, self.precision):
            return vectors(self.base, self._batches(self.held["general"]))

    def _batches(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Model inputs, rows by length."""
        order = _order(rows)
        for start in range(0, len(order), self.eval_batch):
            yield inputs_of(collate([rows[i] for i in order[start : start + self.eval_batch]], pad_id=self.pad))


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What the encoder reads of a batch."""
    return {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}


def _order(rows: Sequence[Row]) -> list[int]:
    return sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))


def _inverse(order: Sequence[int]) -> Tensor:
    return torch.argsort(torch.tensor(order))


def few_shot(
    ctx: Context,
    name: str,
    per_class: int,
    seed: int,
    *,
    dev: int = 300,
    test: int = 1000,
    general: int = 200,
    length: int = 64,
    batch: int = 32,
    precision: str = "auto",
    base: Base | None = None,
) -> TextWorld:
    """MiniLM-L6 on `per_class` training rows of each class of the set `name` (see `SETS`), drawn by `seed`.

    At most `dev` rows for choosing come from the same file and never from the training rows (the same ones whatever
    `per_class` is); `test` rows are drawn once from the official test file, the same for every seed. Sentences are cut
    to `length` tokens. `base` reuses a loaded encoder. In a smoke run: a small random encoder, four toy classes, few
    rows.

    Raises UsageError for an unknown set, DataError where a class has too few rows.
    """
    if name not in SETS:
        raise UsageError(f"there is no few-shot set {name!r}", hint=nearest(name, SETS))
    if ctx.smoke:
        base = base or toy_base()
        return _world(name, base, _toy_splits(per_class, seed), [f"class {i}" for i in range(4)], batch, "fp32")
    base = base or load(MODEL, dtype="fp32", device="cpu")
    learn, final = _read(ctx, name, "train"), _read(ctx, name, "test")
    labels = sorted({row["label"] for row in learn})
    y = [row["label"] for row in learn]
    split = support_query(y, per_class, -(-dev // len(labels)), seed)
    shown = random.Random(f"dev:{seed}").sample(split.val, min(dev, len(split.val)))
    assert_disjoint(train=split.support, dev=shown)
    drawn = {
        "train": [learn[i] for i in split.support],
        "dev": [learn[i] for i in sorted(shown)],
        "test": random.Random(f"test:{name}").sample(final, min(test, len(final))),
        "general": _general(ctx, name, general),
    }
    index = {label: i for i, label in enumerate(labels)}
    splits = {k: _encoded(base, rows, index, length) for k, rows in drawn.items()}
    world = _world(name, base, splits, labels, batch, precision)
    world.texts = {k: [r["text"] for r in rows] for k, rows in drawn.items()}
    return world


def _world(
    name: str, base: Base, splits: dict[str, list[Row]], labels: list[str], batch: int, precision: str
) -> TextWorld:
    pad = int(getattr(base.tokenizer, "pad_token_id", 0) or 0)
    task = RowTask(splits["train"], get_objective("classification")(), pad, _with_labels)
    held = {k: rows for k, rows in splits.items() if k != "train"}
    head = methods.build("head", {"classes": len(labels), "pool": "mean"})
    return TextWorld(name, base, task, held, labels, batch, precision, (head,), pad=pad)


def _with_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {**inputs_of(batch), "labels": batch["labels"]}


def _read(ctx: Context, name: str, split: str) -> list[Row]:
    """Rows with a text and a class name; a text that a set repeats is used once."""
    source = name.removesuffix("-domains")
    folder = ctx.data_folder(source)
    assert folder is not None
    path = next((p for e in ("jsonl", "jsonl.gz") if (p := folder / f"{split}.{e}").is_file()), None)
    if path is None:
        raise DataError(f"there is no {split} split", where=str(folder))
    found = read(str(path), format="classification")
    domain: dict[str, str] = {}
    if name.endswith("-domains"):
        listed = json.loads((folder / "domains.json").read_text())  # type: ignore[operator]
        domain = {_plain(intent): d for d, intents in listed.items() for intent in intents}
    rows, seen = [], set()
    for row in found.rows:
        label = str((found.labels or [])[row["label"]])
        key = " ".join(row["text"].split()).casefold()
        if key and key not in seen:
            seen.add(key)
            rows.append({"text": row["text"], "label": domain[_plain(label)] if domain else label})
    return rows


def _plain(intent: str) -> str:
    return intent.replace("_", " ").strip().casefold()


def _general(ctx: Context, name: str, n: int) -> list[Row]:
    other = "sst2" if name == "ag_news" else "ag_news"
    rows = _read(ctx, other, "validation")
    return random.Random("general").sample(rows, min(n, len(rows)))


def _encoded(base: Base, rows: Sequence[Row], index: dict[str, int], length: int) -> list[Row]:
    ids = base.tokenizer([r["text"] for r in rows], truncation=True, max_length=length)["input_ids"]
    return [{"input_ids": list(i), "labels": index.get(r["label"], -1)} for i, r in zip(ids, rows, strict=True)]


def toy_base() -> Base:
    """A small BERT with random weights, for smoke runs and tests."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False).eval()
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.15)
            p.requires_grad_(False)
    return Base(model, name="toy-encoder", family="encoder")


def _toy_splits(per_class: int, seed: int) -> dict[str, list[Row]]:
    """Four classes, each with tokens of its own among noise."""

    def some(split: str, n: int) -> list[Row]:
        rng = random.Random(f"toy:{split}:{seed if split in ('train', 'dev') else 0}")
        rows = []
        for i in range(4 * n):
            own = [4 + 8 * (i % 4) + rng.randrange(3) for _ in range(rng.randint(2, 4))]
            rows.append({"input_ids": [1, *own, rng.randrange(40, 64), 2], "labels": i % 4})
        return rows

    return {"train": some("train", min(per_class, 4)), "dev": some("dev", 2), "test": some("test", 4),
            "general": [{**r, "labels": -1} for r in some("general", 2)]}  # fmt: skip
