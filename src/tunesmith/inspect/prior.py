# SPDX-License-Identifier: Apache-2.0
"""Do errors follow what is likely anyway? The prior of answers, its hold on correctness, and the layers it speaks from.

    log p(y)   mean log-probability of the answer's tokens after a neutral prompt, under the base
    rho        correlation over items of (answer correct) with log p(y)
    c_l        correlation over items of the lens log-probability of the answer at layer l with log p(y)
    a_l        lens accuracy at layer l

An answer is correct where every one of its tokens is the most likely one given those before it. A wrong item is
dominated by the prior where the tokens said instead have a higher prior. A prior layer is one where c_l rises and a_l
falls against the layer before; layers are ranked by (c_l - c_{l-1}) - (a_l - a_{l-1}), a choice of this library. With
`ablate` each layer's attention and MLP outputs are replaced by their mean over the answer positions and the accuracy on the
half of items with the lower prior is measured again.

Needs data with exact answers. The protocol follows the abstract, a figure caption and two secondary summaries of the
paper; details beyond them are unverified. Correctness can also follow the prior because likely answers are easier: use
matched pairs of items. "Identifying and Mitigating the Influence of the Prior Distribution in Large Language Models" 2025,
arXiv 2504.12585.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding, option, probe
from tunesmith.core.sample import Sample
from tunesmith.core.trace import primary
from tunesmith.inspect.answers import nth_answer_token, supervised, tokens_of
from tunesmith.inspect.lens import Lens


@dataclass(frozen=True)
class Item:
    """One question: the row's tokens, where its answer lies (token numbers), and the answer's tokens."""

    ids: tuple[int, ...]
    at: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Layers:
    """By layer: log-probability of each answer [items] (mean over its tokens) and whether it is the lens's choice."""

    logp: list[Tensor]
    correct: list[Tensor]


def items_of(base: Base, sample: Sample) -> list[Item]:
    """The last answer of each row, without special tokens at its end. Raises UsageError where there is none at all."""
    special = set(getattr(base.tokenizer, "all_special_ids", ()) or ())
    out = []
    for batch in sample.batches():
        keep, ids = supervised(sample, batch), tokens_of(batch)
        mask = sample.keep(batch)
        for row, t in enumerate(nth_answer_token(keep)):
            starts = (t == 0).nonzero().flatten().tolist()
            if not starts or starts[-1] == 0:
                continue
            start = starts[-1]
            end = start + int((t[start:] >= 0).long().cumprod(0).sum())
            tokens = ids[row].tolist()
            while end > start and tokens[end - 1] in special:
                end -= 1
            first = int(mask[row].long().argmax()) if mask is not None else 0  # padding on the left
            if end > start:
                at = tuple(range(start - first, end - first))
                out.append(Item(tuple(tokens[first:end]), at, tuple(tokens[start:end])))
    if not out:
        raise UsageError("no row of the data has an answer", hint="rows with a prompt and a completion")
    return out


@torch.no_grad()
def prior_of(base: Base, answers: Sequence[Sequence[int]], neutral: Sequence[int], *, batch: int = 32) -> Tensor:
    """log p(y) of token sequences after the neutral prompt, mean over their tokens, [n] fp64, as the base stands.

    Raises UsageError for an empty answer or neutral prompt.
    """
    if not neutral or not all(answers):
        raise UsageError("the neutral prompt and every answer need at least one token")
    out = []
    for i in range(0, len(answers), batch):
        some = answers[i : i + batch]
        ids, at = _padded([[*neutral, *y] for y in some]), len(neutral)
        logp = _run(base, ids).double().log_softmax(-1)
        for row, y in enumerate(some):
            said = logp[row, at - 1 : at - 1 + len(y)].gather(-1, torch.tensor(y, device=logp.device)[:, None])
            out.append(float(said.mean()))
    return torch.tensor(out, dtype=torch.float64)


@torch.no_grad()
def said(base: Base, items: Sequence[Item], *, batch: int = 32) -> list[tuple[int, ...]]:
    """What the model as it stands says at each answer's positions, given the answer's tokens before each."""
    out = []
    for i in range(0, len(items), batch):
        some = items[i : i + batch]
        best = _run(base, _padded([x.ids for x in some])).argmax(-1)
        out += [tuple(best[row, [p - 1 for p in x.at]].tolist()) for row, x in enumerate(some)]
    return out


@torch.no_grad()
def read_layers(base: Base, items: Sequence[Item], *, batch: int = 32) -> Layers:
    """The lens at every layer on every answer, as the base stands."""
    lens = Lens(base)
    logp: list[list[float]] = [[] for _ in lens.blocks]
    right: list[list[bool]] = [[] for _ in lens.blocks]
    for i in range(0, len(items), batch):
        some = items[i : i + batch]
        ids = _padded([x.ids for x in some]).to(base.device)
        states, _ = lens.states(lambda ids=ids: base.model(input_ids=ids))
        rows = torch.tensor([r for r, x in enumerate(some) for _ in x.at])
        cols = torch.tensor([p - 1 for x in some for p in x.at])
        y = torch.tensor([t for x in some for t in x.answer])
        sizes = [len(x.at) for x in some]
        for l, h in enumerate(states):
            with base.evaluating():
                z = lens.read(h[rows, cols]).float().cpu()
            each = z.log_softmax(-1).gather(-1, y[:, None])[:, 0]
            logp[l] += [float(v.mean()) for v in each.split(sizes)]
            right[l] += [bool(v.all()) for v in (z.argmax(-1) == y).split(sizes)]
    return Layers([torch.tensor(v, dtype=torch.float64) for v in logp], [torch.tensor(v) for v in right])


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's r of two [n]; None where one of them does not vary or n < 3."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float(a.norm() * b.norm())
    return None if len(a) < 3 or scale < 1e-12 else max(-1.0, min(1.0, float(a @ b) / scale))


def interval(r: float | None, n: int) -> tuple[float, float] | None:
    """95 % interval of a correlation by Fisher's z; None where it is not known or n < 4."""
    if r is None or n < 4 or abs(r) >= 1:
        return None
    z, half = math.atanh(r), 1.959964 / math.sqrt(n - 3)
    return math.tanh(z - half), math.tanh(z + half)


@probe("prior", paper="2504.12585", data=True)
class Prior:
    """Whether correctness follows the prior of the answers, before and after, and from which layers it speaks."""

    neutral: str = option("The word is", "text before the answer when its prior is measured")
    neutral_ids: list[int] = option([], "the same as token ids, for models without a tokenizer")
    strata: int = option(4, "quantiles of the prior in which accuracy is shown", low=2, high=100)
    suggest: int = option(4, "most layers to suggest for tuning", low=1, high=1000)
    layers: bool = option(True, "read the answers at every layer")
    ablate: bool = option(False, "replace each layer's outputs by their mean and measure accuracy again")

    @torch.no_grad()
    def measure(self, base: Base, delta: Delta | View, sample: Sample | None = None) -> Finding:
        """One row a layer. Raises UsageError without data, answers, a neutral prompt or a causal language model."""
        if sample is None:
            raise UsageError("prior needs data with exact answers", hint="sample=ts.sample(base, 'rows.jsonl')")
        items = items_of(base, sample)
        neutral = self._neutral(base)
        prior = prior_of(base, [x.answer for x in items], neutral)
        values: dict[str, Any] = {"items": len(items)}
        facts: dict[str, Any] = {"neutral": list(neutral)}
        read: dict[str, Layers] = {}
        for who in ("base", "delta"):
            with base.using(delta) if who == "delta" else nullcontext():
                spoken = said(base, items)
                if self.layers:
                    read[who] = read_layers(base, items)
            correct = torch.tensor([s == x.answer for s, x in zip(spoken, items, strict=True)])
            r = correlation(correct, prior)
            wrong = [i for i, ok in enumerate(correct.tolist()) if not ok]
            likelier = prior_of(base, [spoken[i] for i in wrong], neutral) > prior[wrong] if wrong else torch.zeros(0)
            values |= {f"{who}_accuracy": float(correct.double().mean()), f"{who}_rho": r,
                       f"{who}_prior_dominated": float(likelier.sum()) / len(items)}  # fmt: skip
            facts |= {f"{who}_rho_interval": interval(r, len(items)), f"{who}_strata": self._by_stratum(correct, prior)}
        rows = _rows(read, prior) if self.layers else []
        if self.layers:
            facts["suggested"] = suggested(rows, self.suggest)
        if self.ablate:
            low = [x for x, p in zip(items, prior, strict=True) if p <= prior.median()]
            for row, accuracy in zip(rows, ablated(base, low), strict=bool(rows)):
                row["low_prior_accuracy_without"] = accuracy
        parts = [f"{w}: correlation {_number(values[f'{w}_rho'])}, accuracy {100 * values[f'{w}_accuracy']:.0f} %"
                 for w in ("base", "delta")]  # fmt: skip
        return Finding(
            "prior", f"correctness against prior over {len(items)} items; {'; '.join(parts)}", values, rows, facts
        )

    def _neutral(self, base: Base) -> list[int]:
        if self.neutral_ids:
            if not all(isinstance(t, int) and t >= 0 for t in self.neutral_ids):
                raise UsageError(f"neutral_ids must be token ids, got {self.neutral_ids}")
            return list(self.neutral_ids)
        if base.tokenizer is None:
            raise UsageError("the base has no tokenizer for the neutral prompt", hint="give neutral_ids=[1, 2]")
        return [int(t) for t in base.tokenizer(self.neutral)["input_ids"]]

    def _by_stratum(self, correct: Tensor, prior: Tensor) -> list[dict[str, Any]]:
        groups = prior.argsort(stable=True).tensor_split(min(self.strata, len(prior)))
        return [{"prior": float(prior[g].mean()), "accuracy": float(correct[g].double().mean()), "items": len(g)}
                for g in groups]  # fmt: skip


def suggested(rows: Sequence[dict[str, Any]], most: int) -> list[int]:
    """Layers where c_l rises and a_l does not, best first; at most `most`. The first layer has none before it."""
    ranked = []
    for before, row in pairwise(rows):
        if row["base_c"] is None or before["base_c"] is None:
            continue
        dc, da = row["base_c"] - before["base_c"], row["base_a"] - before["base_a"]
        if dc > 0 and da <= 0:
            ranked.append((dc - da, row["layer"]))
    return [layer for _, layer in sorted(ranked, key=lambda r: (-r[0], r[1]))[:most]]


@torch.no_grad()
def ablated(base: Base, items: Sequence[Item]) -> list[float]:
    """Accuracy on the items with the attention and MLP outputs of one block after another replaced by their mean.

    The mean is taken over all answer positions of the items. Raises UsageError for blocks without known outputs.
    """
    outs = [s for s in base.sites.all() if s.kind == "linear" and s.role in ("o", "down")]
    blocks = [s.path for s in base.sites.all() if s.kind == "block"]
    if not outs:
        raise UsageError("no attention or MLP outputs are known", where=base.name, hint="the base could not be traced")
    means: dict[str, Tensor] = {}
    ids = _padded([x.ids for x in items])
    rows = torch.tensor([r for r, x in enumerate(items) for _ in x.at])
    cols = torch.tensor([p - 1 for x in items for p in x.at])

    def keep(path: str) -> Any:
        return lambda _m, _a, out: means.__setitem__(path, out[rows, cols].float().mean(0))

    with _hooks(base, {s.path: keep(s.path) for s in outs}):
        _run(base, ids)
    found = []
    for block in blocks:
        inside = [s.path for s in outs if base.sites.block_of(s.path) == block]
        put = {p: (lambda _m, _a, out, mean=means[p]: mean.to(out.dtype).expand_as(out)) for p in inside}
        with _hooks(base, put):
            spoken = said(base, items)
        found.append(sum(s == x.answer for s, x in zip(spoken, items, strict=True)) / len(items))
    return found


@contextmanager
def _hooks(base: Base, hooks: dict[str, Any]) -> Iterator[None]:
    handles = [base.modules[p].register_forward_hook(h) for p, h in hooks.items()]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def _rows(read: dict[str, Layers], prior: Tensor) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"layer": l} for l in range(len(read["base"].logp))]
    for who, seen in read.items():
        for row, logp, right in zip(rows, seen.logp, seen.correct, strict=True):
            row[f"{who}_c"], row[f"{who}_a"] = correlation(logp, prior), float(right.double().mean())
    return rows


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens padded on the right with 0: causal models do not look there."""
    out = torch.zeros(len(rows), max(len(r) for r in rows), dtype=torch.int64)
    for i, r in enumerate(rows):
        out[i, : len(r)] = torch.tensor(r)
    return out


def _run(base: Base, ids: Tensor) -> Tensor:
    with base.evaluating():
        out = primary(base.model(input_ids=ids.to(base.device)))
    if out is None or out.dim() != 3:
        raise UsageError(
            "the model gives no logits for every token", where=base.name, hint="use a causal language model"
        )
    return out.float().cpu()


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:+.2f}"
