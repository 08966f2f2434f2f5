# SPDX-License-Identifier: Apache-2.0
"""The next token of each row from its logits, by settings of its own and numbers of its own.

Settings act in this order: repetition, presence and frequency penalties, temperature, top-k, top-p, min-p. The number
that draws a token is a function of the row's seed and of how many tokens it has written, so what a row writes does not
depend on the batch it runs in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How a row draws its tokens; temperature 0 takes the most likely one.

    Args:
        top_k: keep the k most likely tokens (0: all); top_p: keep the fewest that hold this much probability; min_p: drop
            those less likely than this share of the most likely one.
        repetition: divides positive and multiplies negative logits of tokens in prompt or answer (Keskar et al. 2019);
            presence, frequency: taken off the logits of tokens in the answer, once or per occurrence.
        bias: added to the logits of single tokens.
        logprobs: how many alternatives are reported with each token.
    Raises UsageError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = 0
    logprobs: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0, 100.0), "top_k": (0, 2**31), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
            "repetition": (1e-3, 100.0), "presence": (-2.0, 2.0), "frequency": (-2.0, 2.0),
            "logprobs": (0, MOST_LOGPROBS),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise UsageError(f"must lie in {low} .. {high}, got {value}", where=name)
        if self.top_p == 0:
            raise UsageError("must be above 0", where="top_p", hint="temperature=0 takes the most likely token")
        if not all(-100 <= b <= 100 for b in self.bias.values()):
            raise UsageError("must lie in -100 .. 100", where="bias")


@dataclass(frozen=True)
class Row:
    """A row that wants a token: its settings, the tokens of its prompt and of its answer so far."""

    sampling: Sampling
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()
    allowed: Tensor | None = None


@dataclass(frozen=True)
class Chosen:
    """A token with its log probability under the model (before temperature and filters), and the likeliest others."""

    token: int
    logprob: float
    others: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Chosen]:
    """One token for each row of `logits` [n, V]. `Row.allowed` [V] bool leaves only some tokens (constrained output).

    Raises UsageError where a row allows no token at all, or its logits are not finite.
    """
    if logits.dim() != 2 or len(rows) != len(logits):
        raise UsageError(f"{len(rows)} rows cannot draw from logits of shape {tuple(logits.shape)}")
    logits = logits.float()
    raw = torch.log_softmax(logits, -1)  # [n, V]
    out = []
    for z, logp, row in zip(logits, raw, rows, strict=True):
        token = _draw(scores(z, row), row)
        k = row.sampling.logprobs
        top = torch.topk(logp, min(k, len(logp))) if k else None
        others = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        out.append(Chosen(token, float(logp[token]), others))
    return out


def scores(z: Tensor, row: Row) -> Tensor:
    """The logits [V] of one row after its settings; -inf where a token is out."""
    s = row.sampling
    if bool(z.isnan().any()) or float(z.max()) == float("inf"):
        raise UsageError("the logits of a row are not finite", hint="is its delta trained, and in a dtype it fits?")
    z = z.clone()
    if s.repetition != 1.0 and (row.prompt or row.answer):
        seen = torch.tensor(sorted({*row.prompt, *row.answer}))
        z[seen] = torch.where(z[seen] > 0, z[seen] / s.repetition, z[seen] * s.repetition)
    if (s.presence or s.frequency) and row.answer:
        tokens, counts = torch.tensor(list(row.answer)).unique(return_counts=True)
        z[tokens] -= s.presence + s.frequency * counts
    for token, b in s.bias.items():
        if not 0 <= token < len(z):
            raise UsageError(f"there is no token {token}; the vocabulary has {len(z)}", where="bias")
        z[token] += b
    if row.allowed is not None:
        z = z.masked_fill(~row.allowed, float("-inf"))
        if not bool(torch.isfinite(z).any()):
            raise UsageError("no token is allowed here", hint="the schema and the vocabulary do not fit together")
    if s.temperature == 0:
        return z
    z = z / s.temperature
    if 0 < s.top_k < len(z):
        z = z.masked_fill(z < torch.topk(z, s.top_k).values[-1], float("-inf"))
    if s.top_p < 1:
        falling, at = z.sort(descending=True)
        before = torch.softmax(falling, -1).cumsum(-1) - torch.softmax(falling, -1)  # held by what is more likely
        out = before >= s.top_p
        z = z.masked_fill(torch.zeros_like(out).scatter(0, at, out), float("-inf"))
    if s.min_p:
        p = torch.softmax(z, -1)
        z = z.masked_fill(p < s.min_p * p.max(), float("-inf"))
    return z


def _draw(z: Tensor, row: Row) -> int:
    if row.sampling.temperature == 0:
        return int(z.argmax())
    p = torch.softmax(z.double(), -1)
    u = _uniform(row.sampling.seed, len(row.answer)) * float(p.sum())
    token = int(torch.searchsorted(p.cumsum(-1), u, right=True))
    return min(token, int(p.nonzero()[-1]))  # rounding may leave the sum a little below u


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that only the seed and the step decide."""
    return int.from_bytes(hashlib.sha256(f"sample:{seed}:{step}".encode()).digest()[:7], "big") / 2**56
