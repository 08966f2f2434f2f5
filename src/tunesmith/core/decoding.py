# SPDX-License-Identifier: Apache-2.0
"""Decoders: who has a say in the next token, when, and how their log-probabilities become one distribution.

A decoder names its `members`, models under deltas. At step t (the number of tokens written so far) `needs(t)` says which
of them must be read, and `step(logits, t, rows)` makes next-token log-probabilities [rows, V] of their logits [rows, V].
`Joint` keeps the rows: a member that is not needed reads nothing, and catches up in one pass when it is.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View, as_view
from tunesmith.core.errors import UsageError, nearest
from tunesmith.core.reading import Cached, Whole, reader


@dataclass(frozen=True)
class Member:
    """A model that has a say: a base with the deltas it runs under, on top of those in use around it."""

    base: Base
    deltas: tuple[View, ...] = ()

    @classmethod
    def of(cls, what: Any, base: Base | None = None) -> Member:
        """A member from a base, a delta (on `base`), a pair of both, or a member. Raises UsageError for anything else."""
        if isinstance(what, Member):
            return what
        if isinstance(what, Base):
            return cls(what)
        if isinstance(what, Delta | View) and base is not None:
            return cls(base, (as_view(what),))
        if isinstance(what, tuple) and len(what) == 2 and isinstance(what[0], Base):
            return cls(what[0], () if what[1] is None else (as_view(what[1]),))
        raise UsageError(f"{type(what).__name__} is no model", hint="a base, a delta of it, or (base, delta)")

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells members apart: two with one key give the same logits."""
        return (id(self.base.model), *((id(v.delta), v.strength) for v in self.deltas if v.strength != 0))


@runtime_checkable
class Decoder(Protocol):
    """One way to write with several models, or with one that changes on the way.

    `caches[i]` is the number of the key-value cache that member i reads with: members of one base may share one.
    """

    @property
    def members(self) -> Sequence[Member]: ...

    @property
    def caches(self) -> Sequence[int]: ...

    def needs(self, step: int) -> Sequence[int]:
        """The members that are read at this step, none where the token is known."""
        ...

    def step(self, logits: Mapping[int, Tensor], step: int, rows: int) -> Tensor:
        """Log-probabilities [rows, V] fp32 from the logits [rows, V] of the members needed."""
        ...


F = TypeVar("F", bound=Callable[..., Any])
_BUILDERS: dict[str, Callable[..., Decoder]] = {}


def decoder(name: str) -> Callable[[F], F]:
    """Function decorator that enters what builds a decoder under `name`, so that engines find it without its folder."""

    def wrap(build: F) -> F:
        _BUILDERS[name] = build
        return build

    return wrap


def get_decoder(name: str) -> Callable[..., Decoder]:
    """What builds the decoder called `name`. Raises UsageError naming the nearest."""
    if name not in _BUILDERS:
        importlib.import_module("tunesmith.decode")
    if name not in _BUILDERS:
        raise UsageError(f"unknown decoder {name!r}", hint=nearest(name, _BUILDERS))
    return _BUILDERS[name]


def digest(made: Decoder) -> str:
    """sha256 over a decoder's kind, its numbers, and the bases and deltas of its members."""
    h = hashlib.sha256(type(made).__name__.encode())
    options = {f.name: getattr(made, f.name) for f in fields(made) if f.name != "members"}  # type: ignore[arg-type]
    h.update(repr(sorted(options.items())).encode())
    for m in made.members:
        h.update(repr((m.base.fingerprint.digest, [(v.delta.digest, v.strength) for v in m.deltas])).encode())
    return h.hexdigest()


def vocabulary(members: Sequence[Member]) -> int:
    """How many tokens all members share: they must mean the same in each.

    Token maps are compared where members have tokenizers; a model may have more rows than its tokenizer has tokens
    (padding), and those beyond the smallest are left out. Raises UsageError naming the first token that differs.
    """
    sizes = [getattr(getattr(m.base.model, "config", None), "vocab_size", None) for m in members]
    maps = {id(m.base.tokenizer): m for m in members if m.base.tokenizer is not None}
    first: dict[str, int] | None = None
    for m in maps.values():
        known = dict(m.base.tokenizer.get_vocab())
        if first is None:
            first, whose = known, m.base.name
            continue
        for token in sorted({*first, *known}, key=lambda t: (first.get(t, known.get(t, 0)), t)):
            if first.get(token) != known.get(token):
                what = f"the token {token!r} is {first.get(token)} in {whose} and {known.get(token)} in {m.base.name}"
                raise UsageError(what, hint="combine models of one family, which share a tokenizer")
    named = [s for s in sizes if s]
    if not named:
        raise UsageError("no member says how large its vocabulary is", where=members[0].base.name)
    if first is None and len(set(named)) > 1:
        raise UsageError(
            f"vocabularies of {named} tokens and no tokenizer to compare", hint="give the bases tokenizers"
        )
    return int(min(named))


@dataclass
class Joint:
    """Rows in flight under a decoder, with the interface of `reading.Cached`.

    `others[i]` are prompts of member i's own, one for each row, where it is shown something else than the rest; what is
    written is common to all.
    """

    decoder: Decoder
    others: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)
    _step: int = 0  # tokens written
    _rows: list[list[int]] = field(default_factory=list)
    _prompts: dict[int, list[list[int]]] = field(default_factory=dict)
    _sources: dict[int, Cached | Whole] = field(default_factory=dict)
    _read: dict[int, int] = field(default_factory=dict)  # by cache, how many of them it holds

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin rows; next-token log-probabilities [B, V]."""
        self._rows = [[] for _ in prompts]
        for i, c in enumerate(self.decoder.caches):
            given = self.others.get(i, prompts)
            if len(given) != len(prompts):
                raise UsageError(f"{len(given)} prompts of member {i} for {len(prompts)} rows")
            if c in self._prompts and [list(p) for p in given] != self._prompts[c]:
                raise UsageError(f"member {i} shares its cache with another and cannot have a prompt of its own")
            self._prompts[c] = [list(p) for p in given]
        return self._next()

    def more(self, tokens: Sequence[int]) -> Tensor:
        """One more token in every row; next-token log-probabilities [B, V]."""
        for row, t in zip(self._rows, tokens, strict=True):
            row.append(t)
        self._step += 1
        return self._next()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self._rows = [self._rows[i] for i in rows]
        self._prompts = {c: [p[i] for i in rows] for c, p in self._prompts.items()}
        for source in self._sources.values():
            source.keep(rows)

    def _next(self) -> Tensor:
        found = {i: self._logits(i) for i in self.decoder.needs(self._step)}
        return self.decoder.step(found, self._step, len(self._rows))

    def _logits(self, i: int) -> Tensor:
        """Member i's next-token logits [B, V] fp32, once its cache has read what was written since it was last asked."""
        member, c = self.decoder.members[i], self.decoder.caches[i]
        with member.base.using(*member.deltas):
            if c not in self._sources:
                self._sources[c] = reader(member.base)
                z = self._sources[c].start([[*p, *r] for p, r in zip(self._prompts[c], self._rows, strict=True)])
            else:
                new = [r[self._read[c] :] for r in self._rows]
                z = self._sources[c].read(new)
        self._read[c] = self._step
        return z
