# SPDX-License-Identifier: Apache-2.0
"""The upper blocks of SmolLM2-135M-Instruct on worked sums, with the lower blocks run once.

A delta on the last `blocks` decoder blocks leaves everything below as it is, so the hidden states that enter the first
of them are computed once for every row and kept in memory. `TopModel` is what is left of the model: those blocks, the
final norm and the tied head, sharing the real modules. It takes `inputs_embeds` (the cached states), so every method
that attaches to blocks, layers, norms, attention or the head works on it; there is no token embedding.

The target is next-token loss on the answers of held-out GSM8K rows. Retention is measured on AG News: the loss there,
the divergence from the base and how often the likeliest next token is still the base's.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.errors import DataError, UsageError
from tunesmith.core.features import features
from tunesmith.core.objective import Objective, get_objective
from tunesmith.data import encode, plan_epoch, read
from tunesmith.models.open import load
from tunesmith.study.fair import assert_disjoint
from tunesmith.study.spec import Context
from tunesmith.study.worlds.world import Score
from tunesmith.train.modes import measuring

IGNORED = -100
MODEL = "smollm2-135m-instruct"
GENERAL_LENGTH = 96


class TopModel(nn.Module):
    """The last blocks, the final norm and the head of a Llama-like model, on hidden states computed below.

    Its modules are those of the model it is taken from: do not use deltas on both at a time.
    """

    def __init__(self, model: nn.Module, blocks: int) -> None:
        super().__init__()
        inner: Any = model.model
        if not 1 <= blocks <= len(inner.layers):
            raise UsageError(f"must lie in 1..{len(inner.layers)}, got {blocks}", where="blocks")
        self.layers = nn.ModuleList(list(inner.layers)[len(inner.layers) - blocks :])
        self.norm, self.rotary_emb, self.lm_head = inner.norm, inner.rotary_emb, model.lm_head

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head  # type: ignore[return-value]

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits from states [B, T, d] below the first block; mask [B, T], 1 where seen, padding on the right."""
        h = through(self.layers, self.rotary_emb, inputs_embeds, attention_mask, position_ids)
        return {"logits": self.lm_head(self.norm(h))}


def through(
    layers: Sequence[nn.Module] | nn.ModuleList,
    rotary: nn.Module,
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """States [B, T, d] after decoder blocks, with a causal mask that hides padding."""
    T = x.shape[1]
    if position_ids is None:
        position_ids = torch.arange(T, device=x.device)[None]
    mask = None
    if attention_mask is not None:
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        mask = causal & attention_mask[:, None, None, :].bool()
    angles = rotary(x, position_ids)
    for layer in layers:
        x = layer(x, attention_mask=mask, position_ids=position_ids, position_embeddings=angles)
        x = x[0] if isinstance(x, tuple) else x
    return x


@torch.no_grad()
def below(
    base: Base, rows: Sequence[Mapping[str, Any]], blocks: int, *, batch: int = 16, precision: str = "auto"
) -> list[Tensor]:
    """For each encoded row the states [T, d], fp32, that enter the last `blocks` blocks of `base`."""
    model: Any = base.model
    lower = list(model.model.layers)[: len(model.model.layers) - blocks]
    lengths = [len(r["input_ids"]) for r in rows]
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    with measuring(base, precision):
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            width = max(lengths[i] for i in some)
            ids = torch.zeros(len(some), width, dtype=torch.int64)
            mask = torch.zeros(len(some), width, dtype=torch.int64)
            for k, i in enumerate(some):
                ids[k, : lengths[i]] = torch.tensor(rows[i]["input_ids"])
                mask[k, : lengths[i]] = 1
            h = through(lower, model.model.rotary_emb, model.model.embed_tokens(ids), mask)
            for k, i in enumerate(some):
                out[i] = h[k, : lengths[i]].float().clone()
    return out


@dataclass
class StateTask:
    """Cached states [T, d] with labels [T] (not shifted, -100 unsupervised) as a training task, bucketed by length."""

    states: list[Tensor]
    labels: list[list[int]]
    objective: Objective = field(default_factory=lambda: get_objective("sft")())

    def __len__(self) -> int:
        return len(self.states)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch([len(y) for y in self.labels], batch_size, seed=seed, epoch=epoch)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        """`inputs_embeds` [B, T, d], `attention_mask` and `labels` [B, T], padded on the right to a multiple of 8."""
        width = -(-max(len(self.labels[i]) for i in indices) // 8) * 8
        x = torch.zeros(len(indices), width, self.states[indices[0]].shape[1])
        mask = torch.zeros(len(indices), width, dtype=torch.int64)
        y = torch.full((len(indices), width), IGNORED, dtype=torch.int64)
        for k, i in enumerate(indices):
            n = len(self.labels[i])
            x[k, :n], mask[k, :n], y[k, :n] = self.states[i], 1, torch.tensor(self.labels[i])
        return {"inputs_embeds": x, "attention_mask": mask, "labels": y}

    def tokens(self, indices: Sequence[int]) -> int:
        return sum(len(self.labels[i]) for i in indices)

    def subset(self, indices: Sequence[int]) -> StateTask:
        """Some of the rows, sharing their states."""
        return StateTask([self.states[i] for i in indices], [self.labels[i] for i in indices], self.objective)


@dataclass
class LanguageWorld:
    """A `TopModel` base with its splits; `metric` is mean next-token loss. `texts` are the encoded rows."""

    name: str
    base: Base
    task: StateTask
    held: dict[str, StateTask]
    batch: int = 4
    precision: str = "auto"
    companions: Sequence[Any] = ()
    higher_is_better: bool = False
    texts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def score(self, split: str) -> Score:
        """Loss and next-token accuracy on the supervised tokens of "dev", "test" or "general"."""
        return self.measure(self.held[split])

    def measure(self, task: StateTask) -> Score:
        """The same on any task of this world."""
        losses, right, units = [0.0] * len(task), [0] * len(task), [0] * len(task)
        with measuring(self.base, self.precision):
            for indices in _plan(task):
                hidden, target, row = self._supervised(task, indices)
                logits = self._logits(hidden)
                wrong = F.cross_entropy(logits, target, reduction="none").double()
                hit = logits.argmax(-1) == target
                for k, i in enumerate(indices):
                    mine = row == k
                    losses[i], right[i] = float(wrong[mine].sum()), int(hit[mine].sum())
                    units[i] = int(mine.sum())
        total = max(1, sum(units))
        values = {"loss": sum(losses) / total, "accuracy": sum(right) / total, "tokens": float(total)}
        rows = [loss / max(1, n) for loss, n in zip(losses, units, strict=True)]
        return Score(values["loss"], rows, units, values)

    def retention(self) -> dict[str, float]:
        """On general text: `loss`, `kl` (mean KL of base to model, nats) and `agreement` of the likeliest token."""
        task = self.held["general"]
        loss = kl = 0.0
        agree = n = 0
        with measuring(self.base, self.precision):
            for indices, kept in zip(_plan(task), self._of_base, strict=True):
                hidden, target, _ = self._supervised(task, indices)
                mine = F.log_softmax(self._logits(hidden), -1)
                with self.base.without():
                    theirs = F.log_softmax(self._logits(kept), -1)
                loss -= float(mine.gather(1, target[:, None]).double().sum())
                kl += float((theirs.exp() * (theirs - mine)).double().sum())
                agree += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
                n += len(target)
        return {"loss": loss / max(1, n), "kl": kl / max(1, n), "agreement": agree / max(1, n)}

    @cached_property
    def _of_base(self) -> list[Tensor]:
        """What the head of the base reads on the supervised general tokens, batch by batch."""
        task = self.held["general"]
        with self.base.without(), measuring(self.base, self.precision):
            return [self._supervised(task, indices)[0] for indices in _plan(task)]

    def _supervised(self, task: StateTask, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Head inputs [N, d], targets [N] and row numbers [N] of the supervised positions of some rows."""
        batch = task.batch(indices, 0)
        labels = batch.pop("labels")[:, 1:]
        keep = labels != IGNORED
        hidden = features(self.base, batch)[:, :-1][keep]
        return hidden, labels[keep], keep.nonzero()[:, 0]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.base.model.lm_head(hidden).float()  # type: ignore[operator]


def _plan(task: StateTask, batch: int = 4) -> list[list[int]]:
    """Row numbers by length, a few at a time: the logits of one batch are what measuring needs most memory for."""
    order = sorted(range(len(task)), key=lambda i: len(task.labels[i]))
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def gsm8k_top(
    ctx: Context,
    blocks: int = 10,
    train: int = 800,
    dev: int = 100,
    test: int = 200,
    length: int = 256,
    batch: int = 4,
    general: int = 200,
    precision: str = "auto",
) -> LanguageWorld:
    """SmolLM2-135M-Instruct on GSM8K: question to worked answer in the model's chat template, the answer supervised.

    Training and dev rows come from the training file, test rows from the test file, each drawn once by a fixed seed
    among those of at most `length` tokens; no row is in two splits. `general` is a retention set of AG News texts, cut
    to 96 tokens. Reading, tokenising and running the lower blocks takes about a minute on two cores with fast bf16. In
    a smoke run: a small random Llama and toy sums, at most 2 blocks and a few rows.

    Raises DataError where there are too few rows, UsageError for a number of blocks the model does not have.
    """
    counts = {"train": train, "dev": dev, "test": test, "general": general}
    if ctx.smoke:
        base, blocks, precision = toy_base(), min(blocks, 2), "fp32"
        texts = _toy_rows({k: min(n, 16 if k == "train" else 8) for k, n in counts.items()})
    else:
        base = load(MODEL, dtype="fp32", device="cpu")
        texts = _real_rows(ctx, base, counts, length)
    cut = {name: below(base, rows, blocks, precision=precision) for name, rows in texts.items()}
    tasks = {name: StateTask(cut[name], [list(r["labels"]) for r in rows]) for name, rows in texts.items()}
    first = tasks["train"].states[0][:16]
    top = Base(TopModel(base.model, blocks), tokenizer=base.tokenizer, example={"inputs_embeds": first[None]},
               name=f"{base.name} top {blocks}", family="causal-lm")  # fmt: skip
    top.model.eval()
    held = {k: t for k, t in tasks.items() if k != "train"}
    return LanguageWorld("gsm8k-top", top, tasks["train"], held, batch, precision, texts=texts)


def _real_rows(ctx: Context, base: Base, counts: Mapping[str, int], length: int) -> dict[str, list[dict[str, Any]]]:
    folder, news = ctx.data_folder("gsm8k"), ctx.data_folder("ag_news")
    learn = _drawn(base, folder / "train.jsonl.gz", counts["train"] + counts["dev"], length)  # type: ignore[operator]
    test = _drawn(base, folder / "test.jsonl.gz", counts["test"], length)  # type: ignore[operator]
    parts = {"train": learn[: counts["train"]], "dev": learn[counts["train"] :], "test": test}
    assert_disjoint(**{k: [tuple(r["input_ids"]) for r in rows] for k, rows in parts.items()})
    rows = [{"text": r["text"]} for r in read(str(news / "validation.jsonl")).rows]  # type: ignore[operator]
    rows = random.Random("general").sample(rows, min(counts["general"], len(rows)))
    general = encode(read(rows), base.tokenizer, max_length=GENERAL_LENGTH, overflow="truncate").rows if rows else []
    return {**parts, "general": general}


def _drawn(base: Base, path: Any, n: int, length: int) -> list[dict[str, Any]]:
    """`n` encoded rows of at most `length` tokens, in an order that depends on nothing but the file."""
    rows = read(str(path)).rows
    rows = random.Random(f"rows:{path.name}").sample(rows, len(rows))
    few = read([{"messages": r["messages"]} for r in rows[: 3 * n + 20]])
    found = encode(few, base.tokenizer, max_length=length, overflow="skip").rows
    if len(found) < n:
        raise DataError(f"{n} rows of at most {length} tokens are needed, {len(found)} were found", where=str(path))
    return found[:n]


def toy_base() -> Base:
    """A small Llama with random weights and a tied head, for smoke runs and tests."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.15)
            p.requires_grad_(False)
    return Base(model, name="toy", family="causal-lm")


def _toy_rows(counts: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Short rows: random tokens, then as many steps of one fixed count as the answer; general rows are random."""
    out: dict[str, list[dict[str, Any]]] = {}
    for name, n in counts.items():
        rng = random.Random(f"toy:{name}")
        out[name] = []
        for _ in range(n):
            ids = [rng.randrange(16, 64) for _ in range(rng.randint(4, 9))]
            if name == "general":
                out[name].append({"input_ids": ids, "labels": list(ids)})
            else:
                answer = list(range(2, 2 + len(ids)))
                out[name].append({"input_ids": [*ids, 1, *answer], "labels": [IGNORED] * (len(ids) + 1) + answer})
    return out
