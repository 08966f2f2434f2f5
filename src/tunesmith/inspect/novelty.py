# SPDX-License-Identifier: Apache-2.0
"""What is new in what a delta learned: texts generated from the contrast of the model with and without it.

    s(v) = log p_delta(v | y) - gamma log p_ref(v | y)        where p_delta(v | y) >= alpha max_v p_delta(v | y), else -inf
    y_t ~ softmax(s)        from the start token on

The reference starts as the base. With `iterative` it takes one step of AdamW on the cross-entropy of each generated text,
so that the next ones show something else; that update is a delta thrown away afterwards. gamma = 0 samples from the model
with the delta. The published code samples within beam search of width 4; here tokens are drawn from softmax(s).

Each text has its novelty, the mean log-ratio log p_delta - log p_base of its tokens under the *base*, and a cluster (k-means
on its tokens, the number by the silhouette). Small models repeat themselves, and a text may be new to the base because it
is garbled: read the texts, the clusters only order them.

Needs no data. Luo et al. 2024, arXiv 2410.14765 (contrastive generative exploration).
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding, option, probe
from tunesmith.core.sample import Sample
from tunesmith.core.trace import primary


@dataclass(frozen=True)
class Generated:
    """One text: its tokens without the start, and its novelty in nats a token."""

    ids: tuple[int, ...]
    novelty: float


def contrast(target: Tensor, ref: Tensor, gamma: float = 1.0, alpha: float = 0.1) -> Tensor:
    """s [..., vocab] of logits of the two models; -inf where the token is not plausible under the target."""
    lt, lr = target.double().log_softmax(-1), ref.double().log_softmax(-1)
    plausible = lt >= lt.max(-1, keepdim=True).values + (
        torch.tensor(alpha).double().log() if alpha > 0 else -torch.inf
    )
    return torch.where(plausible, lt - gamma * lr, -torch.inf)


@probe("novelty", paper="2410.14765", data=False, slow=True)
class Novelty:
    """Generate examples of what is new in the data a delta was trained on, and group them."""

    n: int = option(32, "texts to generate", low=1, high=100000)
    length: int = option(24, "most tokens of a text", low=1, high=100000)
    gamma: float = option(1.0, "weight of the reference; 0 samples from the changed model", low=0.0, high=100.0)
    alpha: float = option(0.1, "a token must have this share of the best one's probability", low=0.0, high=1.0)
    iterative: bool = option(False, "train the reference on every text, so that the next shows something else")
    distill: str = option("full", "method that holds the reference's throw-away update")
    lr: float = option(5e-5, "learning rate of that update", low=0.0, high=10.0)
    start: int = option(-1, "token to start from; -1: the tokenizer's or the model's own", low=-1, high=10**9)
    batch: int = option(16, "texts generated together where the reference stays", low=1, high=4096)
    seed: int = option(0, "seed of the draws", low=0, high=2**31)

    def measure(self, base: Base, delta: Delta | View, sample: Sample | None = None) -> Finding:
        """One row a text, most novel first within clusters of falling size. Raises UsageError for other than causal LMs."""
        texts = explore(base, delta, self)
        shown = [_text(base, t.ids) for t in texts]
        groups, why = clusters([t.ids for t in texts], self.seed)
        rows = [
            {"cluster": g, "novelty": t.novelty, "text": text, "ids": list(t.ids)}
            for t, text, g in zip(texts, shown, groups, strict=True)
        ]
        order = {g: i for i, g in enumerate(sorted(set(groups), key=lambda g: -groups.count(g)))}
        for r in rows:
            r["cluster"] = order[r["cluster"]]
        rows.sort(key=lambda r: (r["cluster"], -r["novelty"]))
        distinct = len({t.ids for t in texts})
        values: dict[str, Any] = {
            "texts": len(rows), "distinct": distinct, "clusters": len(order),
            "mean_novelty": sum(t.novelty for t in texts) / len(texts),
        }  # fmt: skip
        facts = {
            "gamma": self.gamma, "alpha": self.alpha, "iterative": self.iterative, "clusters": why,
            "note": "a text can be unlikely under the base because it is garbled; small models repeat themselves",
        }  # fmt: skip
        text = (
            f"{distinct} distinct of {len(rows)} texts in {len(order)} clusters, "
            f"{values['mean_novelty']:.2f} nats a token likelier than under the base on average"
        )
        return Finding("novelty", text, values, rows, facts)


def explore(base: Base, delta: Delta | View, how: Novelty | None = None) -> list[Generated]:
    """Texts of contrastive exploration. The base is as before afterwards. Raises UsageError for other than causal LMs."""
    how = how or Novelty()
    start, ends = _start(base, how.start), _ends(base)
    g = torch.Generator().manual_seed(how.seed)
    out: list[Generated] = []
    reference = _Reference(base, how) if how.iterative else None
    while len(out) < how.n:
        rows = 1 if reference is not None else min(how.batch, how.n - len(out))
        ids, novelty = torch.full((rows, 1), start), torch.zeros(rows, dtype=torch.float64)
        count, open_ = torch.zeros(rows), torch.ones(rows, dtype=torch.bool)
        for _ in range(how.length):
            plain = _last(base, ids)
            with base.using(delta):
                target = _last(base, ids)
            ref = plain if reference is None else reference.last(ids)
            drawn = torch.multinomial(contrast(target, ref, how.gamma, how.alpha).softmax(-1), 1, generator=g)
            ratio = (target.double().log_softmax(-1) - plain.double().log_softmax(-1)).gather(-1, drawn)[:, 0]
            ended = torch.isin(drawn[:, 0], ends)
            open_ = open_ & ~ended
            novelty += torch.where(open_, ratio, 0.0)
            count += open_
            ids = torch.cat([ids, drawn], 1)
            if not open_.any():
                break
        for row, k, total in zip(ids.tolist(), count.long().tolist(), novelty.tolist(), strict=True):
            out.append(Generated(tuple(row[1 : 1 + k]), total / max(k, 1)))
        if reference is not None and len(out[-1].ids):
            reference.learn(torch.tensor([[start, *out[-1].ids]]))
    return out


class _Reference:
    """The base with a throw-away update that learns every text."""

    def __init__(self, base: Base, how: Novelty) -> None:
        self.base = base
        self.delta = Delta.create(base, methods.parse(how.distill), name="reference", seed=how.seed)
        self.optimiser = torch.optim.AdamW([t for t in self.delta.parameters() if t.requires_grad], lr=how.lr)

    def last(self, ids: Tensor) -> Tensor:
        with self.base.using(self.delta):
            return _last(self.base, ids)

    def learn(self, ids: Tensor) -> None:
        """One step on the cross-entropy of the text."""
        with torch.enable_grad(), self.base.evaluating(), self.base.frozen(), self.base.using(self.delta):
            z = _logits(self.base, ids)
            loss = torch.nn.functional.cross_entropy(z[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten().to(z.device))
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
        self.optimiser.step()


@torch.no_grad()
def _last(base: Base, ids: Tensor) -> Tensor:
    with base.evaluating():
        return _logits(base, ids)[:, -1].float().cpu()


def _logits(base: Base, ids: Tensor) -> Tensor:
    with contextlib.suppress(TypeError):
        out = primary(base.model(input_ids=ids.to(base.device)))
        if out is not None and out.dim() == 3 and out.shape[:2] == ids.shape:
            return out
    raise UsageError("novelty generates text and needs a causal language model", where=base.name)


def _start(base: Base, given: int) -> int:
    config = getattr(base.model, "config", None)
    if given >= 0:
        return given
    for owner, name in ((base.tokenizer, "bos_token_id"), (config, "bos_token_id"), (config, "eos_token_id")):
        found = getattr(owner, name, None)
        if isinstance(found, int):
            return found
    raise UsageError("the model names no start token", where=base.name, hint="give one: novelty:start=1")


def _ends(base: Base) -> Tensor:
    config = getattr(base.model, "config", None)
    found: set[int] = set()
    for owner in (base.tokenizer, config, getattr(base.model, "generation_config", None)):
        end = getattr(owner, "eos_token_id", None)
        found |= {end} if isinstance(end, int) else set(end) if isinstance(end, list | tuple) else set()
    return torch.tensor(sorted(found), dtype=torch.int64)


def _text(base: Base, ids: tuple[int, ...]) -> str:
    if base.tokenizer is None:
        return " ".join(map(str, ids))
    return str(base.tokenizer.decode(list(ids)))


def clusters(texts: list[tuple[int, ...]], seed: int = 0, most: int = 8) -> tuple[list[int], str]:
    """A group for each text and how it was found: k-means on tf-idf of tokens, k in 2..`most` by the silhouette.

    One group where texts are too few or alike, or where scikit-learn is not installed.
    """
    distinct = len(set(texts))
    if distinct < 3:
        return [0] * len(texts), "one group: fewer than three distinct texts"
    if importlib.util.find_spec("sklearn") is None:
        return [0] * len(texts), "one group: scikit-learn is not installed (pip install 'tunesmith[inspect]')"
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import silhouette_score

    X = TfidfVectorizer(analyzer=lambda ids: list(ids) or [-1], min_df=1).fit_transform(texts)
    best, chosen = -1.0, [0] * len(texts)
    for k in range(2, min(most, distinct - 1) + 1):
        labels = KMeans(k, n_init=4, random_state=seed).fit_predict(X)
        if len(set(labels)) < 2:
            continue
        score = float(silhouette_score(X, labels, metric="cosine"))
        if score > best:
            best, chosen = score, [int(v) for v in labels]
    return chosen, f"k-means on tf-idf of tokens, silhouette {best:.2f}"
