# SPDX-License-Identifier: Apache-2.0
"""The top blocks of SmolLM2 on prompts that end before a label word, with plain SGD and grafts of what it changes.

The model here gives the logits of the label words at the last position; embeddings and head are no part of it and stay as they
are. States of the lower blocks are computed once for every row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.compose.build import build
from tunesmith.compose.collect import DeltaChanges
from tunesmith.compose.graft import Graft, Masks, largest, localize, step_of
from tunesmith.compose.working import dense_changes, dense_delta, gradients
from tunesmith.core import method as methods
from tunesmith.core.algebra import Dense, Sparse
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.evaluate.calibration import ece
from tunesmith.models.precision import parse
from tunesmith.study.fair import assert_disjoint
from tunesmith.study.spec import Context
from tunesmith.study.worlds.encoder import States
from tunesmith.study.worlds.language import MODEL, below, through, toy_base

TASKS = ("sst2", "ag_news")
TEMPLATES = {"sst2": ("Review:", "\nSentiment:"), "ag_news": ("Article:", "\nCategory:")}
WORDS = {"sst2": (" negative", " positive"), "ag_news": (" Politics", " Sports", " Business", " Technology")}
Text = tuple[str, int]


@dataclass(frozen=True)
class Sizes:
    """Top blocks, rows of a class to learn from and to choose on, test and shifted rows, tokens of a text; SGD; the search
    (`flips`: steps until the last entry within the budget flips)."""

    blocks: int = 3
    shots: int = 64
    dev: int = 32
    test: int = 1000
    shifted: int = 300
    length: int = 24
    batch: int = 16
    rates: tuple[float, ...] = (0.3, 1.0)
    epochs: int = 10
    share: float = 1e-4
    steps: int = 15
    flips: float = 5.0
    precision: str = "auto"


TOY = Sizes(2, 6, 4, 12, 8, 6, 4, (0.5, 1.0), 4, 0.01, 3, 2.0, "fp32")


class WordModel(nn.Module):
    """The last blocks and the final norm of a Llama-like model: states [B, T, d] to logits [B, words] at the last position."""

    def __init__(self, model: nn.Module, blocks: int, words: Sequence[int]) -> None:
        super().__init__()
        inner: Any = model.model
        self.layers = nn.ModuleList(list(inner.layers)[len(inner.layers) - blocks :])
        self.norm, self.rotary_emb = inner.norm, inner.rotary_emb
        self.register_buffer("words", model.lm_head.weight[list(words)].detach().clone())  # type: ignore[union-attr, index]

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        h = through(self.layers, self.rotary_emb, inputs_embeds, attention_mask)
        last = h[torch.arange(len(h)), attention_mask.sum(1) - 1]
        return F.linear(self.norm(last), self.words)  # type: ignore[arg-type]


@dataclass
class Words:
    """A task on the top blocks: `rows` has the states of `test` and `shifted`; those of a seed come from `drawn`."""

    name: str
    full: Base
    base: Base
    rows: dict[str, States]
    pool: list[list[Text]]
    sizes: Sizes
    encode: Callable[[str], list[int]]

    def drawn(self, seed: int) -> tuple[States, States]:
        """Training and dev rows of a seed, the same number of each class."""
        rng, sizes = random.Random(f"019:{self.name}:{seed}"), self.sizes
        some = [rng.sample(texts, sizes.shots + sizes.dev) for texts in self.pool]
        learn = [t for texts in some for t in texts[: sizes.shots]]
        dev = [t for texts in some for t in texts[sizes.shots :]]
        assert_disjoint(train=learn, dev=dev)
        return self.states(learn), self.states(dev)

    def states(self, texts: Sequence[Text]) -> States:
        return states(self.full, texts, self.encode, self.sizes)

    def batches(self, rows: States, size: int = 32) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Inputs and labels, rows by length."""
        order = sorted(range(len(rows)), key=lambda i: len(rows.states[i]))
        for k in range(0, len(order), size):
            yield self.batch(rows, order[k : k + size])

    def batch(self, rows: States, at: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        return rows.some(at), torch.tensor([rows.labels[i] for i in at])

    def loss(self, base: Base, batch: tuple[dict[str, Tensor], Tensor]) -> tuple[Tensor, int]:
        """Summed cross-entropy over the label words, and the rows."""
        inputs, y = batch
        with self.quick():
            logits = base.model(**inputs)
        return F.cross_entropy(logits.float(), y, reduction="sum"), len(y)

    def quick(self) -> Any:
        half = parse(self.sizes.precision, self.base.device) == torch.bfloat16
        return torch.autocast("cpu", torch.bfloat16, enabled=half)

    @torch.no_grad()
    def probabilities(self, rows: States) -> tuple[Tensor, Tensor]:
        """Of the label words [n, classes], with the labels [n] in the same order, from the base as it stands."""
        found = []
        with self.base.evaluating(), self.quick():
            for inputs, y in self.batches(rows, 64):
                found.append((self.base.model(**inputs).float().softmax(-1), y))
        p, y = zip(*found, strict=True)
        return torch.cat(p), torch.cat(y)

    def accuracy(self, *parts: States) -> float:
        right = [p.argmax(-1) == y for p, y in map(self.probabilities, parts)]
        return float(torch.cat(right).double().mean())

    def measured(self, delta: Delta | None, reference: Tensor | None = None) -> tuple[dict[str, float], Tensor]:
        """Accuracy and ECE on test rows, accuracy on shifted rows, in percent, and how often it says what `reference` says.

        Beside it what the model says on test rows.
        """
        with self.base.using(delta):
            p, y = self.probabilities(self.rows["test"])
            shifted = self.accuracy(self.rows["shifted"])
        confidence, said = p.max(-1)
        right = said == y
        found = {"test": 100 * float(right.double().mean()), "ece": 100 * ece(confidence.numpy(), right.numpy()),
                 "shifted": 100 * shifted}  # fmt: skip
        if reference is not None:
            found["agreement"] = 100 * float((said == reference).double().mean())
        return found, said

    def fine_tuned(self, rows: States, seed: int, lr: float) -> tuple[Delta, dict[str, float]]:
        """Every weight and norm of the blocks after SGD, pass by pass until more than 95 % of the rows are right."""
        delta = Delta.create(self.base, methods.build("full", {}), seed=seed)
        moving = [t for part in delta.parts for _, _, t in part.items()]
        rng, right, passes = random.Random(f"019:sgd:{seed}"), 0.0, 0
        while passes < self.sizes.epochs and right <= 0.95:
            order = rng.sample(range(len(rows)), len(rows))
            with self.base.frozen(), self.base.evaluating(), self.base.using(delta, check=False):
                for k in range(0, len(order), self.sizes.batch):
                    value, n = self.loss(self.base, self.batch(rows, order[k : k + self.sizes.batch]))
                    for t, g in zip(moving, torch.autograd.grad(value / n, moving), strict=True):
                        t.data.sub_(lr * g)
            with self.base.using(delta):
                right = self.accuracy(rows)
            passes += 1
        return delta, {"passes": passes, "training rows": 100 * right}

    def grafted(self, delta: Delta, learn: States, dev: States, seed: int) -> Graft:
        """The learnt graft: entries at most a share of all, chosen by gradient descent on training rows."""
        return localize(
            self.base, DeltaChanges(self.base, [delta]), lambda: self.batches(learn), self.loss, budget=self.sizes.share,
            start=self.sizes.share / 2, steps=self.sizes.steps, lr=self.search_rate(delta, learn), seed=seed,
            score=lambda base: self.accuracy(learn, dev),
        )  # fmt: skip

    def search_rate(self, delta: Delta, learn: States) -> float:
        """The rate at which the last entry within the budget would flip after some steps, by the gradient at the first mask.

        An entry with dL/dS = -v at the start has dS/dt = lr v exp(S - S_0) while it is far from flipping: it flips after
        1 / (lr v) steps. A fixed rate flips nothing or everything, depending on how far fine-tuning went.
        """
        changes = DeltaChanges(self.base, [delta])
        dense = dense_changes(changes)
        size = sum(d.numel() for d in dense.values())
        most, first = max(1, int(self.sizes.share * size)), int(self.sizes.share / 2 * size)
        held = {k: torch.zeros(d.numel(), dtype=torch.bool) for k, d in dense.items()}
        for k, at in largest(dense, first).items():
            held[k][at] = True
        kept = {k: d * held[k].view(d.shape) for k, d in dense.items()}
        start = dense_delta(self.base, [(p, Dense(kept[p.key])) for p in changes.places()])
        total = {k: torch.zeros_like(d) for k, d in dense.items()}
        for batch in self.batches(learn):
            for k, G in gradients(self.base, start, lambda b=batch: self.loss(self.base, b)[0]).items():  # type: ignore[misc]
                total[k] += G / len(learn)
        half, none = torch.tensor(0.5), torch.tensor(False)
        gain = torch.cat([(-step_of(total[k], d, half, none)).flatten()[~held[k]] for k, d in dense.items()])
        last = float(gain.topk(max(1, most - first)).values[-1])
        return 1 / (self.sizes.flips * last) if last > 0 else 1e7

    def only(self, delta: Delta, masks: Masks, name: str) -> Delta:
        """The delta with nothing but the entries of some masks."""
        changes = DeltaChanges(self.base, [delta])
        dense = dense_changes(changes)
        kept = [
            (p, Sparse(masks[p.key], dense[p.key].flatten()[masks[p.key]], tuple(dense[p.key].shape)))
            for p in changes.places()
            if len(masks.get(p.key, ()))
        ]
        return build(self.base, kept, name=name, facts={})


def baselines(delta: Delta, base: Base, share: float, seed: int) -> dict[str, Masks]:
    """As many entries, share of all: drawn at random, moved most, and moved most among the gains of norms."""
    changes = DeltaChanges(base, [delta])
    dense = dense_changes(changes)
    kinds = {p.key: p.kind for p in changes.places()}
    count = max(1, int(share * sum(d.numel() for d in dense.values())))
    g = torch.Generator().manual_seed(seed)
    noise: Mapping[str, Tensor] = {k: torch.rand(d.shape, generator=g) for k, d in dense.items()}
    norms = {k: d for k, d in dense.items() if kinds[k] == "norm"}
    return {
        "random entries": largest(noise, count), "largest movement": largest(dense, count),
        "norm gains": largest(norms, min(count, sum(d.numel() for d in norms.values()))),
    }  # fmt: skip


def made(ctx: Context, name: str, sizes: Sizes, full: Base | None = None) -> Words:
    """A task. SST-2 is shifted to product reviews (kitchen), AG News to its own rows with 15 % of characters exchanged.

    In a smoke run a small random Llama and texts of toy tokens, whose first one says the class.
    """
    classes = len(WORDS[name])
    if ctx.smoke:
        full = full or toy_base()
        rng = random.Random(f"019:{name}")
        toy = [(" ".join(str(t) for t in (8 + y, *(rng.randrange(16, 64) for _ in range(rng.randint(2, 4))))), y)
               for _ in range(40) for y in range(classes)]  # fmt: skip
        toy = list(dict.fromkeys(toy))
        held = {"test": toy[: sizes.test], "shifted": toy[sizes.test : sizes.test + sizes.shifted]}
        rest, words = toy[sizes.test + sizes.shifted :], list(range(2, 2 + classes))

        def encode(text: str) -> list[int]:
            return [int(t) for t in text.split()] + [1]
    else:
        full = full or _loaded()
        tokenizer, (before, after) = full.tokenizer, TEMPLATES[name]
        held, rest = _texts(ctx, name, sizes)

        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        words = [ids(w)[0] for w in WORDS[name]]

        def encode(text: str) -> list[int]:
            return [*ids(before), *ids(f" {text}")[: sizes.length], *ids(after)]

    model = WordModel(full.model, sizes.blocks, words).eval()
    rows = {k: states(full, v, encode, sizes) for k, v in held.items()}
    base = Base(model, example=rows["test"].some([0, 1]), name=f"{full.name} top {sizes.blocks} words")
    return Words(name, full, base, rows, [[t for t in rest if t[1] == y] for y in range(classes)], sizes, encode)


def states(full: Base, texts: Sequence[Text], encode: Callable[[str], list[int]], sizes: Sizes) -> States:
    """What enters the top blocks, for every text."""
    rows = [{"input_ids": encode(text)} for text, _ in texts]
    return States(below(full, rows, sizes.blocks, precision=sizes.precision), [y for _, y in texts])


def _loaded() -> Base:
    from tunesmith.models.open import load

    return load(MODEL, dtype="fp32", device="cpu")


def _texts(ctx: Context, name: str, sizes: Sizes) -> tuple[dict[str, list[Text]], list[Text]]:
    from tunesmith.data import read

    def file(folder: Any, split: str) -> list[Text]:
        """Rows of six words or more; a text that the file repeats once."""
        path = next(p for e in ("jsonl", "jsonl.gz") if (p := folder / f"{split}.{e}").is_file())
        return list({(r["text"].strip(), int(r["label"])) for r in read(str(path)).rows if len(r["text"].split()) >= 6})

    folder = ctx.data_folder(name)
    final = random.Random("019:test").sample(sorted(file(folder, "test")), sizes.test)
    known = {text for text, _ in final}
    rest = sorted(t for t in file(folder, "train") if t[0] not in known)
    if name == "sst2":
        shifted = sorted(file(ctx.data_folder("amazon_domains") / "kitchen", "test"))  # type: ignore[operator]
        shifted = random.Random("019:shifted").sample(shifted, min(sizes.shifted, len(shifted)))
    else:
        rng = random.Random("019:noise")
        shifted = [(noised(text, 0.15, rng), y) for text, y in final[: sizes.shifted]]
    return {"test": final, "shifted": shifted}, random.Random("019:pool").sample(rest, min(4000, len(rest)))


def noised(text: str, share: float, rng: random.Random) -> str:
    """Neighbouring characters exchanged; about `share` of the characters take part."""
    out, i = list(text), 0
    while i + 1 < len(out):
        if rng.random() < share / 2:
            out[i], out[i + 1] = out[i + 1], out[i]
            i += 1
        i += 1
    return "".join(out)
