# SPDX-License-Identifier: Apache-2.0
"""How deep into the answer a delta changes the model: divergence and loss by token position.

    KL_t = KL( pi_delta(. | x, y_<t) || pi_base(. | x, y_<t) )        averaged over the answers that have a token t

t = 1 is the first answer token after the template. A change that lives in the first few tokens ("shallow") is undone by
whatever gets past them. With `layers` the same divergence is also read at every depth through the model's last norm and
head (see `lens`), averaged over the answer tokens: where in the model the answers part. That reading is an addition of
this library.

Needs data with answers. Qi et al. 2024, arXiv 2406.05946.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding, option, probe
from tunesmith.core.sample import Sample
from tunesmith.inspect.answers import logits_of, nth_answer_token, supervised, tokens_of
from tunesmith.inspect.lens import Lens


@probe("depth-kl", paper="2406.05946", data=True)
class DepthKL:
    """Divergence of the changed model from the base by position in the answer."""

    positions: int = option(20, "answer positions of the profile", low=1, high=100000)
    first: int = option(5, "how many of them count as the first ones", low=1, high=100000)
    layers: bool = option(False, "read the divergence at every depth too")

    @torch.no_grad()
    def measure(self, base: Base, delta: Delta | View, sample: Sample | None = None) -> Finding:
        """One row a position. Raises UsageError without data, answers or logits."""
        if sample is None:
            raise UsageError("depth-kl needs data with answers", hint="sample=ts.sample(base, 'rows.jsonl')")
        kl, before, after = (torch.zeros(self.positions, dtype=torch.float64) for _ in range(3))
        n = torch.zeros(self.positions, dtype=torch.float64)
        lens = Lens(base) if self.layers else None
        deep, tokens = torch.zeros(len(lens.blocks) if lens else 0, dtype=torch.float64), 0
        for batch in sample.batches():
            t = nth_answer_token(supervised(sample, batch))[:, 1:].cpu()  # logits at i - 1 predict token i
            counted = (t >= 0) & (t < self.positions)
            if not counted.any():
                continue
            y = tokens_of(batch)[:, 1:].cpu()[counted]
            p, q = _pair(base, delta, sample, batch, counted)
            at = t[counted]
            n += torch.bincount(at, minlength=self.positions)
            for total, each in ((kl, divergence(q, p)), (before, _loss(p, y)), (after, _loss(q, y))):
                total += torch.bincount(at, weights=each, minlength=self.positions)
            if lens is not None:
                deep += _by_layer(lens, base, delta, sample, batch, counted)
                tokens += int(counted.sum())
        if not n.sum():
            raise UsageError("no row of the data has an answer token after its first token")
        rows = [
            {"t": i + 1, "kl": float(kl[i] / n[i]), "base_loss": float(before[i] / n[i]),
             "delta_loss": float(after[i] / n[i]), "answers": int(n[i])}
            for i in range(self.positions) if n[i]
        ]  # fmt: skip
        mass = sum(r["kl"] for r in rows)
        share = sum(r["kl"] for r in rows[: self.first]) / mass if mass > 0 else None
        values: dict[str, Any] = {
            "first_share": share, "first_kl": rows[0]["kl"], "mean_kl": mass / len(rows), "answers": rows[0]["answers"],
        }  # fmt: skip
        told = "no divergence at all" if share is None else (
            f"the first {min(self.first, len(rows))} of {len(rows)} answer positions hold {100 * share:.0f} % of the KL"
        )  # fmt: skip
        facts: dict[str, Any] = {"direction": "KL(with delta || base), nats", "positions": self.positions}
        if lens is not None:
            facts["by_layer"] = [{"depth": i, "kl": float(v / tokens)} for i, v in enumerate(deep)]
        return Finding("depth-kl", f"{told}; {mass / len(rows):.3g} nats a token on average", values, rows, facts)


def divergence(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) in nats of rows of logits [n, vocab], fp64 sums."""
    lq, lp = q.double().log_softmax(-1), p.double().log_softmax(-1)
    return (lq.exp() * (lq - lp)).sum(-1).clamp_min(0)


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return -logits.double().log_softmax(-1).gather(-1, y[:, None])[:, 0]


def _pair(base: Base, delta: Delta | View, sample: Sample, batch: Any, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, vocab] of the base and with the delta at the counted predictions."""
    p = logits_of(base, sample, batch)[:, :-1].cpu()[counted]
    with base.using(delta):
        q = logits_of(base, sample, batch)[:, :-1].cpu()[counted]
    if q.shape[-1] != p.shape[-1]:
        raise UsageError(f"the delta changes the vocabulary from {p.shape[-1]} to {q.shape[-1]} tokens")
    return p, q


def _by_layer(lens: Lens, base: Base, delta: Delta | View, sample: Sample, batch: Any, counted: Tensor) -> Tensor:
    def read() -> list[Tensor]:
        states, _ = lens.states(lambda: sample.run(base, batch))
        with base.evaluating():
            return [lens.read(h[:, :-1][counted.to(h.device)]).float().cpu() for h in states]

    plain = read()
    with base.using(delta):
        changed = read()
    return torch.stack([divergence(q, p).sum() for p, q in zip(plain, changed, strict=True)])
