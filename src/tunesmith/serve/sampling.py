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
LIKELIEST = 1024  # tokens among which a nucleus is looked for first: sorting a whole vocabulary is slow


@dataclass(frozen=True)
class Sampling:
    """How a row draws its tokens; temperature 0 takes the most likely one.

    Args:
        top_k: keep the k most likely tokens (0: all); top_p: keep the fewest that hold this much probability; min_p: drop
            those less likely than this share of the most likely one.
        repetition: divides positive and multiplies negative logits of tokens in prompt or answer (Keskar et al. 2019);
            presence, frequency: taken off the logits of tokens in the answer, once or per occurrence.
        bias: added to the logits of single tokens.
        logprobs: how many alternatives are reported with each token and its log probability; None: neither.
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
    logprobs: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0, 100.0), "top_k": (0, 2**31), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
            "repetition": (1e-3, 100.0), "presence": (-2.0, 2.0), "frequency": (-2.0, 2.0),
            "logprobs": (0, MOST_LOGPROBS),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also refuses NaN
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
    """A token and, where asked for, its log probability under the model (before temperature and filters) and the likeliest."""

    token: int
    logprob: float | None = None
    others: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Chosen]:
    """One token for each row of `logits` [n, V]. `Row.allowed` [V] bool leaves only some tokens (constrained output).

    Raises UsageError where a row allows no token at all, or its logits are not finite.
    """
    out = []
    for chosen in choose_each(logits, rows):
        if isinstance(chosen, UsageError):
            raise chosen
        out.append(chosen)
    return out


def choose_each(logits: Tensor, rows: Sequence[Row]) -> list[Chosen | UsageError]:
    """The same, with the error of a row in the place of its token."""
    if logits.dim() != 2 or len(rows) != len(logits):
        raise UsageError(f"{len(rows)} rows cannot draw from logits of shape {tuple(logits.shape)}")
    top, best = logits.max(-1)  # NaN is above every number, and not below infinity
    tokens, out_of_range = best.tolist(), (~(top < float("inf"))).tolist()
    errors: list[UsageError | None] = [_not_finite() if bad else None for bad in out_of_range]
    some = [i for i, r in enumerate(rows) if errors[i] is None and not _plain(r)]
    if some:
        z, found = _edited(logits[some].float(), [rows[i] for i in some])
        for i, token, error in zip(some, _drawn(z, [rows[i] for i in some], found), found, strict=True):
            tokens[i], errors[i] = token, error
    told = _log_probabilities(logits, rows, tokens)
    return [error or told.get(i, Chosen(token)) for i, (token, error) in enumerate(zip(tokens, errors, strict=True))]


def _plain(row: Row) -> bool:
    """Whether a row takes the likeliest token whatever it has written."""
    s = row.sampling
    return s.temperature == 0 and not _edits(row)


def _edits(row: Row) -> bool:
    """Whether a row's logits are changed before a token is drawn."""
    s = row.sampling
    written = bool((s.presence or s.frequency) and row.answer)
    return s.repetition != 1.0 or written or bool(s.bias) or row.allowed is not None


def _not_finite() -> UsageError:
    return UsageError("the logits of a row are not finite", hint="is its delta trained, and in a dtype it fits?")


def _drawn(z: Tensor, rows: Sequence[Row], errors: Sequence[UsageError | None]) -> list[int]:
    """The token of each row of edited logits [n, V]; any where there is an error."""
    tokens = z.argmax(-1)
    drawn = [i for i, r in enumerate(rows) if r.sampling.temperature > 0 and errors[i] is None]
    if drawn:
        at = torch.tensor(drawn, device=z.device)
        tokens[at] = _draw(_filtered(z[at], [rows[i].sampling for i in drawn]), [rows[i] for i in drawn])
    return tokens.tolist()


def _log_probabilities(logits: Tensor, rows: Sequence[Row], tokens: Sequence[int]) -> dict[int, Chosen]:
    """What was chosen with log probabilities, for the rows that want them."""
    wanted = [i for i, r in enumerate(rows) if r.sampling.logprobs is not None]
    if not wanted:
        return {}
    logp = torch.log_softmax(logits[wanted].float(), -1)  # [n, V]
    most = max(rows[i].sampling.logprobs or 0 for i in wanted)
    top = torch.topk(logp, min(most, logp.shape[1])) if most else None
    out = {}
    for n, i in enumerate(wanted):
        k = rows[i].sampling.logprobs or 0
        others = () if top is None or not k else tuple(
            zip(top.indices[n, :k].tolist(), top.values[n, :k].tolist(), strict=True)
        )  # fmt: skip
        out[i] = Chosen(tokens[i], float(logp[n, tokens[i]]), others)
    return out


def scores(z: Tensor, row: Row) -> Tensor:
    """The logits [V] of one row after its settings; -inf where a token is out. Raises UsageError as `choose` does."""
    if not bool(z.max() < float("inf")):
        raise _not_finite()
    edited, errors = _edited(z[None].float(), [row])
    if errors[0] is not None:
        raise errors[0]
    return edited[0] if row.sampling.temperature == 0 else _filtered(edited, [row.sampling])[0]


def _edited(raw: Tensor, rows: Sequence[Row]) -> tuple[Tensor, list[UsageError | None]]:
    """The logits [n, V] after penalties, bias and constraints, `raw` itself where there are none; what is wrong with rows."""
    errors: list[UsageError | None] = [None] * len(rows)
    z = raw
    for i, row in enumerate(rows):
        if not _edits(row):
            continue
        z = raw.clone() if z is raw else z
        try:
            _edit(z[i], row)
        except UsageError as error:
            errors[i] = error
    return z, errors


def _edit(z: Tensor, row: Row) -> None:
    s = row.sampling
    if s.repetition != 1.0 and (row.prompt or row.answer):
        seen = torch.tensor(sorted({*row.prompt, *row.answer}), device=z.device)
        z[seen] = torch.where(z[seen] > 0, z[seen] / s.repetition, z[seen] * s.repetition)
    if (s.presence or s.frequency) and row.answer:
        tokens, counts = torch.tensor(list(row.answer), device=z.device).unique(return_counts=True)
        z[tokens] -= s.presence + s.frequency * counts
    for token, b in s.bias.items():
        if not 0 <= token < len(z):
            raise UsageError(f"there is no token {token}; the vocabulary has {len(z)}", where="bias")
        z[token] += b
    if row.allowed is not None:
        z.masked_fill_(~row.allowed, float("-inf"))
        if not bool(torch.isfinite(z).any()):
            raise UsageError("no token is allowed here", hint="the schema and the vocabulary do not fit together")


def _filtered(z: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Logits [n, V] after temperature, top-k, top-p and min-p of each row; fresh."""
    z = z / torch.tensor([s.temperature for s in settings], device=z.device)[:, None]
    out = float("-inf")
    few = [i for i, s in enumerate(settings) if 0 < s.top_k < z.shape[1]]
    if few:
        k = torch.tensor([settings[i].top_k for i in few], device=z.device)[:, None]
        least = torch.topk(z[few], int(k.max())).values.gather(1, k - 1)
        z[few] = z[few].masked_fill(z[few] < least, out)
    nucleus = [i for i, s in enumerate(settings) if s.top_p < 1]
    if nucleus:
        p = torch.tensor([settings[i].top_p for i in nucleus], device=z.device)[:, None]
        z[nucleus] = _nucleus(z[nucleus], p)
    floor = [i for i, s in enumerate(settings) if s.min_p]
    if floor:
        share = torch.tensor([settings[i].min_p for i in floor], device=z.device)[:, None]
        p = torch.softmax(z[floor], -1)
        z[floor] = z[floor].masked_fill(p < share * p.amax(-1, keepdim=True), out)
    return z


def _nucleus(z: Tensor, top_p: Tensor) -> Tensor:
    """Logits [n, V] with only the fewest tokens that hold `top_p` [n, 1]: looked for among the likeliest first."""
    p = torch.softmax(z, -1)
    for most in (LIKELIEST, z.shape[1]):
        falling, at = torch.topk(p, min(most, p.shape[1]))
        held = falling.cumsum(-1)
        if bool((held[:, -1:] >= top_p).all()) or falling.shape[1] == p.shape[1]:
            break
    kept = torch.zeros_like(z, dtype=torch.bool).scatter_(1, at, held - falling < top_p)  # held by what is more likely
    return z.masked_fill(~kept, float("-inf"))


def _draw(z: Tensor, rows: Sequence[Row]) -> Tensor:
    """A token for each row of filtered logits [n, V]."""
    total = torch.softmax(z.double(), -1).cumsum(-1)
    u = torch.tensor([_uniform(r.sampling.seed, len(r.answer)) for r in rows], dtype=total.dtype, device=z.device)
    tokens = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0]
    # Rounding may leave the sum a little below u: then the last token that can be drawn.
    last = (z > float("-inf")).to(torch.int8).flip(-1).argmax(-1)
    return torch.minimum(tokens, z.shape[1] - 1 - last)


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that only the seed and the step decide."""
    return int.from_bytes(hashlib.sha256(f"sample:{seed}:{step}".encode()).digest()[:7], "big") / 2**56
