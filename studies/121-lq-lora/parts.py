# SPDX-License-Identifier: Apache-2.0
"""Bases, formats, splits and scores of study 121."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.sample import Sample
from tunesmith.data import encode, read
from tunesmith.derive import Format, fisher_weights, loftq, lq_lora, quantise
from tunesmith.derive.lq import Table
from tunesmith.study.spec import Context
from tunesmith.study.worlds.language import GENERAL_LENGTH, MODEL, LanguageWorld, toy_base
from tunesmith.train.modes import measuring

BITS, BLOCKS, FORMAT = (2, 3, 4), (16, 64), "bf16"
GRID = {"bits": BITS, "block": BLOCKS, "scale_format": FORMAT}
CHOICES = [Format(b, n, 8, 256, FORMAT) for b in BITS for n in BLOCKS]
LABELS = ("2.5", "2.75", "3", "4")
# 2.5 and 4 are the bits of the uniform formats 2/16 and 4/64, so that arms with and without a programme spend the same.
BUDGETS = {"2.5": 2 + 8 / 16 + 16 / (16 * 256), "2.75": 2.75, "3": 3.0, "4": 4 + 8 / 64 + 16 / (64 * 256)}


def uniform(label: str) -> Format:
    """The format of most bits within a budget: what an arm without an integer programme spends."""
    return max((f for f in CHOICES if f.bits_per_weight <= BUDGETS[label] + 1e-9), key=lambda f: f.bits_per_weight)


def budget(base: Base, label: str) -> float:
    """The bits a weight that an arm may spend: exactly those of the uniform format where the budget is made of one."""
    f = uniform(label)
    if abs(f.bits_per_weight - BUDGETS[label]) > 1e-9:
        return BUDGETS[label]
    sites = base.sites.select("all-linear", ("linear",))
    return 8 * sum(f.nbytes(s.shape) for s in sites) / sum(s.shape[0] * s.shape[1] for s in sites)


@dataclass
class Whole:
    """The full model with general text: rows to measure on, and rows for Fisher weights."""

    base: Base
    rows: list[dict[str, Any]]
    sample_rows: list[dict[str, Any]]
    precision: str
    rank: int
    rounds: int
    trial_rounds: int
    tables: dict[bool, Table] = field(default_factory=dict)
    _fisher: dict[str, Tensor] | None = None

    @property
    def fisher(self) -> dict[str, Tensor]:
        """Summed squared gradients of the loss on each sample row, by path."""
        if self._fisher is None:
            sites = self.base.sites.select("all-linear", ("linear",))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision != "fp32"):
                self._fisher = fisher_weights(self.base, sites, text_sample(self.sample_rows))
        return self._fisher


def text_sample(rows: Sequence[Mapping[str, Any]]) -> Sample:
    """One row a batch, with the summed next-token loss."""

    def run(base: Base, row: Any) -> Any:
        return base.model(input_ids=torch.tensor([row["input_ids"]]))

    def loss(base: Base, row: Any) -> Tensor:
        ids = torch.tensor(row["input_ids"])
        return F.cross_entropy(run(base, row).logits[0, :-1].float(), ids[1:], reduction="sum")

    return Sample(lambda: rows, run, loss)


def whole(ctx: Context, items: int, sample: int, rank: int, rounds: int, trial_rounds: int) -> Whole:
    """SmolLM2 with AG News (validation rows to measure on, training rows for Fisher), or a toy in a smoke run."""
    if ctx.smoke:
        rng = random.Random("general")
        rows = [
            {"input_ids": [rng.randrange(16, 64) for _ in range(rng.randint(6, 10))]} for _ in range(items + sample)
        ]
        return Whole(toy_base(), rows[:items], rows[items:], "fp32", rank, rounds, trial_rounds)
    base = ts.load(MODEL, dtype="fp32", device="cpu")
    news = ctx.data_folder("ag_news")
    assert news is not None
    found = [
        encoded(base, str(news / name), n)
        for name, n in (("validation.jsonl", items), ("train.jsonl.gz", sample))
    ]  # fmt: skip
    return Whole(base, found[0], found[1], "auto", rank, rounds, trial_rounds)


def encoded(base: Base, path: str, n: int) -> list[dict[str, Any]]:
    """`n` texts of a file, drawn by a fixed seed, as tokens."""
    rows = [{"text": r["text"]} for r in read(path).rows]
    some = random.Random("general").sample(rows, min(n, len(rows)))
    return encode(read(some), base.tokenizer, max_length=GENERAL_LENGTH, overflow="truncate").rows


@torch.no_grad()
def losses(w: Whole, base: Base, delta: Delta | None, batch: int = 16) -> list[float]:
    """Mean next-token loss of each row, nats."""
    out = [0.0] * len(w.rows)
    order = sorted(range(len(w.rows)), key=lambda i: len(w.rows[i]["input_ids"]))
    with base.using(delta), measuring(base, w.precision):
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            width = max(len(w.rows[i]["input_ids"]) for i in some)
            ids = torch.zeros(len(some), width, dtype=torch.int64)
            mask = torch.zeros(len(some), width, dtype=torch.int64)
            for k, i in enumerate(some):
                n = len(w.rows[i]["input_ids"])
                ids[k, :n], mask[k, :n] = torch.tensor(w.rows[i]["input_ids"]), 1
            logits = base.model(input_ids=ids, attention_mask=mask).logits.float()
            for k, i in enumerate(some):
                n = len(w.rows[i]["input_ids"])
                out[i] = float(F.cross_entropy(logits[k, : n - 1], ids[k, 1:n]))
    return out


def split(
    base: Base,
    arm: str,
    label: str,
    w: Whole,
    *,
    fisher: Mapping[str, Tensor] | None = None,
    table: Table | None = None,
) -> tuple[Base, Delta]:
    """The base and first delta of an arm at a budget. `fisher` and `table` are those of `base`."""
    f, rank = uniform(label), w.rank
    if arm == "qlora":
        packed = quantise(base, bits=f.bits, block=f.block, scale_format=FORMAT)
        return packed, Delta.create(packed, ts.LoRA(rank=rank, alpha=float(rank)), name=arm)
    if arm == "loftq":
        return loftq(base, rank, bits=f.bits, block=f.block, scale_bits=8, scale_format=FORMAT, rounds=5, exact=False)
    if arm == "lq-uniform":
        return lq_lora(base, rank, 0.0, bits=f.bits, block=f.block, scale_format=FORMAT, rounds=w.rounds)
    return lq_lora(
        base, rank, budget(base, label), fisher, table=table, rounds=w.rounds, trial_rounds=w.trial_rounds, **GRID
    )


def facts(base: Base, delta: Delta) -> dict[str, Any]:
    """Bits a weight without and with the low-rank part (in 16 bits), and how often each format was chosen."""
    found = base.source["derived"][-1]["facts"]
    weights = 8 * found["bytes"] / found["bits_per_weight"]
    return {
        "bits": found["bits_per_weight"],
        "bits_with_lora": (8 * found["bytes"] + 16 * delta.trainable_parameters) / weights,
        "formats": found["formats"],
    }


def table_json(table: Table) -> dict[str, list[float]]:
    """A table of errors as plain JSON, formats in the order of `CHOICES`."""
    return {path: [row[f] for f in CHOICES] for path, row in table.items()}


def table_of(rows: Mapping[str, Sequence[float]]) -> Table:
    """The inverse."""
    return {path: dict(zip(CHOICES, row, strict=True)) for path, row in rows.items()}


def measure_table(w: Whole, fisher: bool) -> dict[str, list[float]]:
    """The error of every matrix in every format after `trial_rounds`."""
    from tunesmith.derive import LQ
    from tunesmith.derive.quantise import formats, several

    how = LQ(**several(rank=w.rank, trial_rounds=w.trial_rounds, **GRID))
    assert formats(how) == CHOICES
    weights = w.fisher if fisher else None
    out: Table = {}
    for s in w.base.sites.select("all-linear", ("linear",)):
        out[s.path] = {f: how.trial(s, f, weights) for f in CHOICES}
    return table_json(out)


def at_top(world: LanguageWorld, found: Mapping[str, Any], blocks: int, total: int) -> dict[str, Any]:
    """What is known of the whole model's layers, under the names they have in the world's upper blocks."""
    out = {}
    for path in (s.path for s in world.base.sites.select("all-linear", ("linear",))):
        number, rest = path.removeprefix("layers.").split(".", 1)
        out[path] = found[f"model.layers.{int(number) + total - blocks}.{rest}"]
    return out


def on(world: LanguageWorld, base: Base) -> LanguageWorld:
    """The world with another base in the place of its own."""
    return dataclasses.replace(world, base=base)
