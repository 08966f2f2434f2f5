# SPDX-License-Identifier: Apache-2.0
"""Decoders as served models: several models that write together, or a guard in front of a delta.

A folder with `decoder.json` beside the deltas of a library is one, in the form

    {"format": "tunesmith-decoder/1", "kind": "combine", "top_p": 0.95,
     "terms": [{"weight": 1.0, "tuned": {"delta": "polite"}, "reference": {}}]}
    {"format": "tunesmith-decoder/1", "kind": "handoff", "tuned": {"delta": "polite"}, "k": 15}

A model is `{"model": NAME, "delta": NAME}`: without `model` the served base, without `delta` no delta; deltas go by their
name in the library, and for another base by their folder. Its rows run by themselves, each member over a cache of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.base import Base
from tunesmith.core.decoding import Decoder, Member, get_decoder
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import DataError, nearest
from tunesmith.core.header import strict_json
from tunesmith.models.open import load

if TYPE_CHECKING:
    from tunesmith.serve.library import Library

FILE = "decoder.json"
FORMAT = "tunesmith-decoder/1"
_KEYS = {"combine": {"terms", "top_p", "plausible"}, "handoff": {"tuned", "aligned", "k", "recompute"}}


def read(place: Path, library: Library, opened: Callable[[str], Base] = load) -> Decoder:
    """The decoder that a `decoder.json` describes. Raises DataError for a file that is none, and what its parts raise."""
    where = str(place)
    spec = strict_json(place.read_bytes(), where)
    kind = spec.pop("kind", None)
    if spec.pop("format", None) != FORMAT or kind not in _KEYS:
        raise DataError(f"this is no {FORMAT} file", where=where, hint=f'"kind" is one of {", ".join(_KEYS)}')
    for key in spec:
        if key not in _KEYS[kind]:
            raise DataError(f"a {kind} has no entry {key!r}", where=where, hint=nearest(key, _KEYS[kind]))

    bases: dict[str, Base] = {}

    def member(entry: Any) -> Member:
        if not isinstance(entry, Mapping) or not set(entry) <= {"model", "delta"}:
            raise DataError(f"a model is an object with model and delta, got {entry!r}"[:200], where=where)
        name, delta = entry.get("model"), entry.get("delta")
        if name is not None:
            base = bases[name] if name in bases else bases.setdefault(name, opened(name))
            return Member.of((base, None if delta is None else Delta.load(place.parent / delta, base)))
        return Member(library.base) if delta is None else Member(library.base, (library.view(delta),))

    if kind == "combine":
        terms = spec.pop("terms", None)
        if not isinstance(terms, list) or not terms:
            raise DataError("a combination has a list of terms", where=where)
        made = []
        for t in terms:
            if not isinstance(t, Mapping) or not {"weight", "tuned"} <= set(t) <= {"weight", "tuned", "reference"}:
                raise DataError("a term has weight, tuned and maybe reference", where=where)
            ref = t.get("reference", {})
            made.append((t["weight"], member(t["tuned"]), None if ref is None else member(ref)))
        return get_decoder(kind)(library.base, made, **spec)
    if "tuned" not in spec:
        raise DataError("a hand-off names who is tuned", where=where)
    tuned, aligned = member(spec.pop("tuned")), spec.pop("aligned", None)
    return get_decoder(kind)(library.base, tuned, aligned=None if aligned is None else member(aligned), **spec)


def caches(made: Decoder, base: Base) -> int:
    """How many times a token of `base` is kept, so to say: the sizes of the members' caches over that of the base."""
    own, total = _numbers(base) or 1, 0
    for c in sorted(set(made.caches)):
        m = made.members[list(made.caches).index(c)]
        total += max(1, -(-(_numbers(m.base) or own) // own))
    return total


def longest(made: Decoder) -> int:
    """Tokens that every member can read."""
    found = [getattr(getattr(m.base.model, "config", None), "max_position_embeddings", None) for m in made.members]
    return min([int(n) for n in found if n], default=1 << 30)


def layout_of(made: Decoder) -> dict[str, Any]:
    """The layout of the first delta that has one: the template it was trained with."""
    views: list[View] = [v for m in made.members for v in m.deltas]
    return next((dict(v.delta.layout) for v in views if v.delta.layout), {})


def _numbers(base: Base) -> int | None:
    config = getattr(base.model, "config", None)
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    if not (layers and width and heads):
        return None
    kv = getattr(config, "num_key_value_heads", None) or heads
    return int(layers * 2 * kv * (getattr(config, "head_dim", None) or width // heads))
