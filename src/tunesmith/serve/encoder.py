# SPDX-License-Identifier: Apache-2.0
"""Texts read at once: embeddings of an encoder, classes of a delta with a head. The other engine beside `engine`.

`step` runs one batch: rows of the requests that came first, as many as fit into the limit of padded tokens, each under
its request's delta. Rows of one delta run together; those of several run one delta after the other on the model's own
forward pass. A request ends when all its rows are done. Not thread-safe: one thread steps it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.trace import primary
from tunesmith.data.batching import collate
from tunesmith.serve.library import Entry, Library
from tunesmith.serve.mixed import Resident

HEAD = "head"
Task = Literal["embed", "classify"]


@dataclass(frozen=True)
class Reading:
    """Rows to read under one delta or none; a row has "input_ids" and, of pairs, "token_type_ids"."""

    id: str
    rows: tuple[Mapping[str, list[int]], ...]
    task: Task
    delta: str | None = None

    @property
    def tokens(self) -> int:
        return sum(len(r["input_ids"]) for r in self.rows)


@dataclass(frozen=True)
class Outcome:
    """The end of a reading: a vector for each row, fp32 [rows, d], or the error. The event of this engine."""

    id: str
    vectors: Tensor | None = None
    reason: str = "stop"
    error: TunesmithError | None = None
    chosen: None = None


@dataclass
class _Open:
    """A reading under way: the rows still to be read, longest first, and what was read."""

    reading: Reading
    rows: list[int]
    done: dict[int, Tensor] = field(default_factory=dict)
    held: Resident | None = None


class Encoder:
    """Reads texts on one base.

    Args:
        tokens: the most in one batch, padding counted; a single row may be longer.
    """

    def __init__(self, base: Base, library: Library, *, tokens: int = 8192) -> None:
        if tokens < 1:
            raise UsageError(f"must be at least 1, got {tokens}", where="tokens")
        self.base, self.library, self.most = base, library, tokens
        self.sentence: dict[str, Any] = {
            "pooling": "mean", "normalize": True, "max_length": None, "other": [], **(base.source.get("sentence") or {}),
        }  # fmt: skip
        config = getattr(base.model, "config", None)
        self.longest = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self.vocabulary = int(getattr(config, "vocab_size", None) or 1 << 60)
        self.hidden = int(getattr(config, "hidden_size", 0))
        self._taken = set(inspect.signature(type(base.model).forward).parameters)
        self._pad = int(getattr(base.tokenizer, "pad_token_id", None) or 0)
        self._open: dict[str, _Open] = {}

    def limit(self, task: Task, entry: Entry | None) -> int:
        """The most tokens of a row: what the encoder or the delta was made for."""
        named = self.sentence["max_length"] if task == "embed" else (entry.layout.get("max_length") if entry else None)
        return min(self.longest, named) if isinstance(named, int) and named > 0 else self.longest

    def labels(self, entry: Entry | None) -> list[str]:
        """The names of the classes of a delta with a head, or of a base that is a classifier.

        Raises UsageError for a delta or a base that does not classify whole texts.
        """
        if entry is None:
            if self.base.source.get("task") != "sequence-classification":
                raise UsageError("the base has no classifier", where=self.base.name, hint="name a delta with a head")
            return [str(v) for _, v in sorted(self.base.model.config.id2label.items())]  # type: ignore[union-attr]
        if HEAD not in entry.methods:
            raise UsageError("the delta has no head, so it gives no classes", where=entry.name)
        kind = entry.layout.get("kind", "classification")
        if kind != "classification":
            raise UsageError(f"its head is for {kind}, not for classes of whole texts", where=entry.name)
        return [str(n) for n in entry.layout.get("labels") or ()]

    def check_embeds(self, entry: Entry | None) -> None:
        """Raise UsageError where the base or the delta gives no embeddings."""
        if self.base.family != "encoder" or self.base.source.get("task") not in (None, "encoder", "masked-lm"):
            raise UsageError("the base is no encoder, so it gives no embeddings", where=self.base.name)
        if entry is not None and HEAD in entry.methods:
            raise UsageError("the delta has a head: it gives classes, not embeddings", where=entry.name,
                             hint="POST /v1/classify")  # fmt: skip
        if self.sentence["other"]:
            names = ", ".join(self.sentence["other"])
            raise UsageError(f"its embeddings need layers that are not served: {names}", where=self.base.name)
        if self.sentence["pooling"] not in _POOLS:
            raise UsageError(f"its pooling {self.sentence['pooling']!r} is not served", where=self.base.name,
                             hint=f"served are {', '.join(_POOLS)}")  # fmt: skip

    def submit(self, reading: Reading) -> None:
        """Queue a reading. Raises UsageError for one that can never be served: unknown delta, no rows, rows too long."""
        if reading.id in self._open:
            raise UsageError(f"the id {reading.id!r} is in use")
        entry = None if reading.delta is None else self.library.find(reading.delta)
        if reading.task == "embed":
            self.check_embeds(entry)
        else:
            self.labels(entry)
        limit, lengths = self.limit(reading.task, entry), [len(r["input_ids"]) for r in reading.rows]
        if not lengths or min(lengths) < 1:
            raise UsageError("there is nothing to read", where="input")
        if max(lengths) > limit:
            at = lengths.index(max(lengths))
            raise UsageError(f"text {at} has {max(lengths)} tokens, more than the {limit} that are read", where="input",
                             hint="shorten it, or ask with truncate=true")  # fmt: skip
        if not all(0 <= t < self.vocabulary for r in reading.rows for t in r["input_ids"]):
            raise UsageError(f"token numbers go from 0 to {self.vocabulary - 1}", where="input")
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        self._open[reading.id] = _Open(reading, order)

    def cancel(self, id: str) -> bool:
        """Forget a reading; False for a stranger."""
        found = self._open.pop(id, None)
        if found is not None and found.held is not None:
            self.library.release(found.held)
        return found is not None

    @property
    def idle(self) -> bool:
        return not self._open

    def under_way(self) -> list[str]:
        """Readings that have begun: their delta is held, or some rows are read."""
        return [id for id, o in self._open.items() if o.held is not None or o.done]

    def queued(self) -> list[str]:
        """Readings that have not."""
        return [id for id in self._open if id not in self.under_way()]

    @property
    def waiting(self) -> int:
        """Readings that are not done."""
        return len(self._open)

    @torch.no_grad()
    def step(self) -> list[Outcome]:
        """Read one batch; the readings that ended with it. One that fails does not disturb the others."""
        groups: dict[tuple[str, str | None], list[tuple[_Open, int]]] = {}
        ended: list[Outcome] = []
        for one, i in self._batch():
            groups.setdefault((one.reading.task, one.reading.delta), []).append((one, i))
        for rows in groups.values():
            alive = self._acquired(rows, ended)
            if not alive:
                continue
            try:
                vectors = self._read(alive)
            except TunesmithError as error:
                ended += [self._end(one, error=error) for one in {id(o): o for o, _ in alive}.values()]
                continue
            for (one, i), v in zip(alive, vectors, strict=True):
                one.done[i] = v
                one.rows.remove(i)
        for one in [o for o in self._open.values() if not o.rows]:
            ended.append(self._end(one, torch.stack([one.done[i] for i in range(len(one.reading.rows))])))
        return ended

    def _batch(self) -> list[tuple[_Open, int]]:
        """Rows for one pass, those of the oldest readings first."""
        out: list[tuple[_Open, int]] = []
        longest = 0
        for one in self._open.values():
            for i in one.rows:
                wide = max(longest, len(one.reading.rows[i]["input_ids"]))
                if out and wide * (len(out) + 1) > self.most:
                    return out
                longest = wide
                out.append((one, i))
        return out

    def _acquired(self, rows: Sequence[tuple[_Open, int]], ended: list[Outcome]) -> list[tuple[_Open, int]]:
        """The rows whose reading has its delta; readings whose delta cannot be had end."""
        for one in {id(o): o for o, _ in rows}.values():
            if one.reading.delta is None or one.held is not None:
                continue
            try:
                one.held = self.library.acquire(one.reading.delta)
                if one.held.decoder is not None:
                    raise UsageError("it is a decoder, which only writes", where=one.reading.delta)
            except TunesmithError as error:
                ended.append(self._end(one, error=error))
        # Rows of one name may hold two versions of it, if it was written anew between two batches.
        alive = [(o, i) for o, i in rows if o.reading.id in self._open]
        return [(o, i) for o, i in alive if o.held is alive[0][0].held]

    def _read(self, rows: Sequence[tuple[_Open, int]]) -> Tensor:
        one = rows[0][0]
        batch: dict[str, Any] = dict(collate([dict(o.reading.rows[i]) for o, i in rows], pad_id=self._pad))
        batch = {k: v.to(self.base.device) for k, v in batch.items() if k in self._taken}
        with self.base.evaluating(), self.base.using(one.held.view if one.held is not None else None):
            if one.reading.task == "embed":
                return self._embedded(batch)
            out = primary(self.base.model(**batch))
        if out is None or out.dim() != 2 or not bool(torch.isfinite(out).all()):
            raise UsageError("it gave no finite number for each class", where=one.reading.delta or self.base.name)
        return torch.softmax(out.float(), -1).cpu()

    def _embedded(self, batch: dict[str, Any]) -> Tensor:
        has_states = self.base.source.get("task") == "masked-lm"
        out = self.base.model(**batch, **({"output_hidden_states": True} if has_states else {}))
        h = out.hidden_states[-1] if has_states else primary(out)
        if h is None or h.dim() != 3:
            raise UsageError("the model gave no vector for each token", where=self.base.name)
        mask = batch.get("attention_mask", torch.ones(h.shape[:2], device=h.device)).float()[..., None]
        v = _POOLS[self.sentence["pooling"]](h.float(), mask)
        if not bool(torch.isfinite(v).all()):
            raise UsageError("the embedding is not finite", where=self.base.name, hint="the delta diverged in training")
        return (F.normalize(v, dim=-1) if self.sentence["normalize"] else v).cpu()

    def _end(self, one: _Open, vectors: Tensor | None = None, error: TunesmithError | None = None) -> Outcome:
        self.cancel(one.reading.id)
        return Outcome(one.reading.id, vectors, "stop" if error is None else "error", error)


def _last(h: Tensor, mask: Tensor) -> Tensor:
    at = (mask[..., 0] * torch.arange(1, h.shape[1] + 1, device=h.device)).argmax(1)
    return h[torch.arange(len(h), device=h.device), at]


# h [B, T, d] fp32 and mask [B, T, 1] to [B, d], by the names sentence-transformers gives them
_POOLS = {
    "mean": lambda h, mask: (h * mask).sum(1) / mask.sum(1),
    "cls": lambda h, mask: h[:, 0],
    "last": _last,
    "lasttoken": _last,
    "max": lambda h, mask: h.masked_fill(mask == 0, float("-inf")).amax(1),
    "mean_sqrt_len_tokens": lambda h, mask: (h * mask).sum(1) / mask.sum(1).sqrt(),
}
