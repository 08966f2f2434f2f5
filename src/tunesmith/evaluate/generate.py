# SPDX-License-Identifier: Apache-2.0
"""Generation from a base as it stands, with whatever deltas are in use, or from a decoder of several models.

The loop is our own, so that base and base + delta go through the same code, rows leave the batch as soon as they are
done, and batching changes no answer: prompts are padded on the left, positions count real tokens only, and with a
temperature every row draws from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.decoding import Decoder, Joint
from tunesmith.core.delta import Delta, View, site_seed
from tunesmith.core.errors import DeltaError, UsageError
from tunesmith.core.reading import in_use, reader
from tunesmith.data import prompt_ids
from tunesmith.data.layout import layout_for, stop_ids_for

Progress = Callable[[int, int], None]


def generate(
    base: Base | Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    others: Mapping[int, Sequence[Sequence[int]]] | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continue token prompts; yields (index of the prompt, new tokens) as soon as a row is done, in order of finishing.

    `base` may be a decoder (`tunesmith.decode`); `others[i]` are then prompts of its member i's own, one for each row.
    A row ends at a token of `stop_ids` (not among the tokens given back), after `max_new_tokens`, or where the model's
    positions end. Temperature 0 is greedy. `progress(done, total)` is called after every row. Consume it within the
    `base.using(...)` block it was called in. Raises UsageError for prompts or a model that cannot be generated from,
    DeltaError for logits that are NaN.
    """
    rows = _rows(base, prompts, max_new_tokens, temperature, seed, others or {})
    if batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {batch_size}")
    return _generate(base, rows, frozenset(stop_ids), batch_size, temperature, _stacks(base), progress)


def stream(
    base: Base | Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Continue one prompt, token by token; the same tokens as `generate` gives. Raises as `generate` does."""
    rows = _rows(base, [prompt], max_new_tokens, temperature, seed)
    return _stream(base, rows, frozenset(stop_ids), temperature, _stacks(base))


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of tokens, special tokens left out, white space as it is."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def chat(
    base: Base,
    messages: Sequence[dict[str, str]],
    delta: Delta | View | None = None,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The answer to a conversation, under `delta` if given, in the chat layout the delta was trained with."""
    info = layout_for(base, delta, system)
    ids = prompt_ids(messages, base.tokenizer, info.system, info.template)
    with base.using(delta):
        new = stream(
            base, ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids_for(base, info), temperature=temperature,
            seed=seed,
        )  # fmt: skip
        return decode(base.tokenizer, list(new)).strip()


# The loop


Stacks = tuple[tuple[View, ...], ...]


@dataclass
class _Row:
    index: int
    prompt: list[int]
    room: int
    generator: torch.Generator | None
    others: dict[int, list[int]] = field(default_factory=dict)
    new: list[int] = field(default_factory=list)


def _rows(
    base: Base | Decoder,
    prompts: Sequence[Sequence[int]],
    limit: int,
    temperature: float,
    seed: int,
    others: Mapping[int, Sequence[Sequence[int]]] | None = None,
) -> list[_Row]:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise UsageError(f"max_new_tokens must be a whole number of at least 1, not {limit!r}")
    if not 0.0 <= temperature < float("inf"):
        raise UsageError(f"temperature must be 0 or more, not {temperature}")
    written, shown = _bases(base), others or {}
    for i, given in shown.items():
        if isinstance(base, Base) or not 0 <= i < len(written) or len(given) != len(prompts):
            raise UsageError(f"{len(given)} prompts of member {i} for {len(prompts)} rows", where="others")
    rows = []
    for index, prompt in enumerate(prompts):
        ids = [int(t) for t in prompt]
        own = {i: [int(t) for t in given[index]] for i, given in shown.items()}
        room = min(_room(b, own.get(i, ids), limit, f"prompt {index + 1}") for i, b in enumerate(written))
        generator = torch.Generator().manual_seed(site_seed(seed, f"row {index}")) if temperature else None
        rows.append(_Row(index, ids, room, generator, own))
    return rows


def _room(base: Base, ids: list[int], limit: int, where: str) -> int:
    """How many tokens may follow. Raises UsageError for a prompt that the base cannot read."""
    config = getattr(base.model, "config", None)
    vocab, positions = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if not ids:
        raise UsageError("the prompt is empty", where=where)
    if min(ids) < 0 or (vocab and not in_use(base) and max(ids) >= vocab):
        raise UsageError("a token id is outside the vocabulary", where=where)
    room = limit if not positions else min(limit, int(positions) - len(ids))
    if room < 1:
        what = f"the prompt has {len(ids)} tokens, the model has {positions} positions"
        raise UsageError(what, where=where, hint="shorten the prompt")
    return room


def _bases(base: Base | Decoder) -> list[Base]:
    """Every model that writes. Raises UsageError for one that does not continue text."""
    found = [base] if isinstance(base, Base) else [m.base for m in base.members]
    for b in found:
        require_writer(b)
    return found


def _stacks(base: Base | Decoder) -> Stacks:
    return tuple(in_use(b) for b in _bases(base))


def require_writer(base: Base) -> None:
    """Raise UsageError for a base that does not continue text."""
    twofold = getattr(getattr(base.model, "config", None), "is_encoder_decoder", False)
    if base.family in ("encoder", "vision") or twofold:
        kind = "an encoder-decoder" if twofold else f"a base of family {base.family!r}"
        raise UsageError(f"{kind} is not generated from here", where=base.name, hint="use a causal language model")


def _generate(
    base: Base | Decoder,
    rows: list[_Row],
    stop: frozenset[int],
    batch_size: int,
    temperature: float,
    stack: Stacks,
    progress: Progress | None,
) -> Iterator[tuple[int, list[int]]]:
    ordered = sorted(rows, key=lambda r: -len(r.prompt))  # the largest batch first: a lack of memory shows at once
    done = 0
    for start in range(0, len(ordered), batch_size):
        for row, _ in _run(base, ordered[start : start + batch_size], stop, temperature, stack):
            if row is not None:
                done += 1
                if progress is not None:
                    progress(done, len(rows))
                yield row.index, row.new


def _stream(
    base: Base | Decoder, rows: list[_Row], stop: frozenset[int], temperature: float, stack: Stacks
) -> Iterator[int]:
    for row, token in _run(base, rows, stop, temperature, stack):
        if row is None:
            yield token


def _run(
    base: Base | Decoder, rows: list[_Row], stop: frozenset[int], temperature: float, stack: Stacks
) -> Iterator[tuple[_Row | None, int]]:
    """(None, token) for each token made, (row, -1) for each row finished."""
    open_, tokens = list(rows), []
    told = {i: [r.others[i] for r in rows] for i in (rows[0].others if rows else ())}
    source = reader(base) if isinstance(base, Base) else Joint(base, told)
    names = [b.name for b in _bases(base)]
    while open_:
        if _stacks(base) != stack:
            hint = "consume the iterator within the block it was made in"
            raise UsageError("other deltas are in use than when generation began", where=names[0], hint=hint)
        logits = source.more(tokens) if tokens else source.start([r.prompt for r in open_])
        if torch.isnan(logits).any():
            where = ", ".join([v.delta.name for one in stack for v in one] or names)
            raise DeltaError("the next-token logits are NaN", where=where, hint="the delta diverged in training")
        picked = _pick(logits, open_, temperature)
        finished = []
        for i, (row, token) in enumerate(zip(open_, picked, strict=True)):
            if token not in stop:
                row.new.append(token)
                yield None, token
            if token in stop or len(row.new) >= row.room:
                finished.append(i)
                yield row, -1
        keep = [i for i in range(len(open_)) if i not in finished]
        if finished and keep:
            source.keep(keep)
        open_, tokens = [open_[i] for i in keep], [picked[i] for i in keep]


def _pick(logits: Tensor, rows: list[_Row], temperature: float) -> list[int]:
    if not temperature:
        return [int(i) for i in logits.argmax(dim=-1)]
    p = torch.softmax(logits.double().cpu() / temperature, dim=-1)
    return [int(torch.multinomial(q, 1, generator=r.generator)) for q, r in zip(p, rows, strict=True)]
