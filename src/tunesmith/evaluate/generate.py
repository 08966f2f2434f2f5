# SPDX-License-Identifier: Apache-2.0
"""Generation from a base as it stands, with whatever deltas are in use.

The loop is our own, so that base and base + delta go through the same code, rows leave the batch as soon as they are
done, and batching changes no answer: prompts are padded on the left, positions count real tokens only, and with a
temperature every row draws from a generator of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.core import apply
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View, site_seed
from tunesmith.core.errors import DeltaError, UsageError
from tunesmith.core.trace import primary
from tunesmith.data import prompt_ids
from tunesmith.data.layout import layout_for, stop_ids_for

Progress = Callable[[int, int], None]
WORTH = 8  # common first tokens that are worth a pass of their own


def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continue token prompts; yields (index of the prompt, new tokens) as soon as a row is done, in order of finishing.

    A row ends at a token of `stop_ids` (not among the tokens given back), after `max_new_tokens`, or where the model's
    positions end. Temperature 0 is greedy. `progress(done, total)` is called after every row. Consume it within the
    `base.using(...)` block it was called in. Raises UsageError for prompts or a model that cannot be generated from,
    DeltaError for logits that are NaN.
    """
    rows = _rows(base, prompts, max_new_tokens, temperature, seed)
    if batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {batch_size}")
    return _generate(base, rows, frozenset(stop_ids), batch_size, temperature, _in_use(base), progress)


def stream(
    base: Base,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Continue one prompt, token by token; the same tokens as `generate` gives. Raises as `generate` does."""
    rows = _rows(base, [prompt], max_new_tokens, temperature, seed)
    return _stream(base, rows, frozenset(stop_ids), temperature, _in_use(base))


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


@dataclass
class _Row:
    index: int
    prompt: list[int]
    room: int
    generator: torch.Generator | None
    new: list[int] = field(default_factory=list)


def _rows(base: Base, prompts: Sequence[Sequence[int]], limit: int, temperature: float, seed: int) -> list[_Row]:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise UsageError(f"max_new_tokens must be a whole number of at least 1, not {limit!r}")
    if not 0.0 <= temperature < float("inf"):
        raise UsageError(f"temperature must be 0 or more, not {temperature}")
    require_writer(base)
    config = getattr(base.model, "config", None)
    vocab, positions = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    rows = []
    for index, prompt in enumerate(prompts):
        ids = [int(i) for i in prompt]
        if not ids:
            raise UsageError("the prompt is empty", where=f"prompt {index + 1}")
        if min(ids) < 0 or (vocab and not _in_use(base) and max(ids) >= vocab):
            raise UsageError("a token id is outside the vocabulary", where=f"prompt {index + 1}")
        room = limit if not positions else min(limit, int(positions) - len(ids))
        if room < 1:
            what = f"the prompt has {len(ids)} tokens, the model has {positions} positions"
            raise UsageError(what, where=f"prompt {index + 1}", hint="shorten the prompt")
        generator = torch.Generator().manual_seed(site_seed(seed, f"row {index}")) if temperature else None
        rows.append(_Row(index, ids, room, generator))
    return rows


def require_writer(base: Base) -> None:
    """Raise UsageError for a base that does not continue text."""
    twofold = getattr(getattr(base.model, "config", None), "is_encoder_decoder", False)
    if base.family in ("encoder", "vision") or twofold:
        kind = "an encoder-decoder" if twofold else f"a base of family {base.family!r}"
        raise UsageError(f"{kind} is not generated from here", where=base.name, hint="use a causal language model")


def _in_use(base: Base) -> tuple[View, ...]:
    app = apply.current(base)
    return app.stack if app is not None else ()


def _generate(
    base: Base,
    rows: list[_Row],
    stop: frozenset[int],
    batch_size: int,
    temperature: float,
    stack: tuple[View, ...],
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
    base: Base, rows: list[_Row], stop: frozenset[int], temperature: float, stack: tuple[View, ...]
) -> Iterator[int]:
    for row, token in _run(base, rows, stop, temperature, stack):
        if row is None:
            yield token


def _run(
    base: Base, rows: list[_Row], stop: frozenset[int], temperature: float, stack: tuple[View, ...]
) -> Iterator[tuple[_Row | None, int]]:
    """(None, token) for each token made, (row, -1) for each row finished."""
    source = Cached(base) if can_cache(base) else Whole(base)
    open_, tokens = list(rows), []
    while open_:
        if _in_use(base) != stack:
            hint = "consume the iterator within the block it was made in"
            raise UsageError("other deltas are in use than when generation began", where=base.name, hint=hint)
        logits = source.more(tokens) if tokens else source.start([r.prompt for r in open_])
        if torch.isnan(logits).any():
            names = ", ".join(v.delta.name for v in stack) or base.name
            raise DeltaError("the next-token logits are NaN", where=names, hint="the delta diverged in training")
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


def padded_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [B, T], padded on the left."""
    width = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, r in enumerate(rows):
        ids[i, width - len(r) :] = torch.tensor(list(r))
        mask[i, width - len(r) :] = 1
    return ids.to(device), mask.to(device)


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts have in common, leaving each at least one of its own."""
    low, high = min(prompts), max(prompts)  # what the first and last in order share, all share
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(same, min(map(len, prompts)) - 1)


def accepted(base: Base) -> set[str]:
    """Names the model's forward takes; one that only hands `**kwargs` on takes what its parent class takes."""
    for cls in type(base.model).__mro__:
        if "forward" in cls.__dict__:
            given = inspect.signature(cls.__dict__["forward"]).parameters
            named = {n for n, p in given.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {"self"}
            if named or len(given) == 1:
                return named
    return set()


def can_cache(base: Base) -> bool:
    """Whether a key-value cache gives what the model gives without one.

    Programs of use (output parts) may run the model several times in one pass, which would fill the cache twice.
    """
    if not {"past_key_values", "use_cache", "attention_mask"} <= accepted(base):
        return False
    if getattr(base.model, "config", None) is None or getattr(base.model, "_is_stateful", False):
        return False
    once = all(
        part.info.carrier != "output" and (v.strength == 1.0 or part.info.carrier != "prompt")
        for v in _in_use(base)
        for part in v.delta.parts
    )
    return once


def _checked(base: Base, out: Any, columns: int) -> Tensor:
    """Logits [B, T, V] in fp32 out of the model's output."""
    logits = primary(out)
    vocab = getattr(getattr(base.model, "config", None), "vocab_size", None)
    fits = logits is not None and logits.dim() == 3 and logits.shape[1] in (1, columns)
    if logits is None or not fits or (vocab and logits.shape[2] < vocab):
        shape = None if logits is None else list(logits.shape)
        hint = "a delta with a head answers with labels; score it as classification"
        raise UsageError(f"the output {shape} holds no logits over a vocabulary", where=base.name, hint=hint)
    return logits.float()


class Cached:
    """Rows in flight over a growing key-value cache."""

    def __init__(self, base: Base) -> None:
        from transformers import DynamicCache

        self.base, self.names = base, accepted(base)
        self.cache: Any = DynamicCache(config=base.model.config)
        self.mask: Tensor | None = None

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, what all of them begin with only once; next-token logits [B, V] in fp32."""
        n = shared_length(prompts) if len(prompts) > 1 else 0
        if n >= WORTH:
            first = torch.tensor([list(prompts[0][:n])], device=self.base.device)
            self.feed(first, torch.ones_like(first), last=True)
            self.keep([0] * len(prompts))
            prompts = [p[n:] for p in prompts]
        return self.feed(*padded_left(prompts, self.base.device), last=True)[:, -1]

    def more(self, tokens: Sequence[int]) -> Tensor:
        """One more token in every row; next-token logits [B, V] in fp32."""
        ids = torch.tensor(list(tokens), dtype=torch.int64, device=self.base.device)[:, None]
        return self.feed(ids, torch.ones_like(ids), last=True)[:, -1]

    @torch.no_grad()
    def feed(self, ids: Tensor, mask: Tensor, *, last: bool) -> Tensor:
        """Logits in fp32 after the new tokens [B, n]: [B, n, V], or [B, 1, V] (maybe more) with `last`."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": self.mask, "past_key_values": self.cache}
        inputs["use_cache"] = True
        if "position_ids" in self.names:
            inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if last and "logits_to_keep" in self.names:
            inputs["logits_to_keep"] = 1
        with self.base.evaluating():
            out = self.base.model(**inputs)
        return _checked(self.base, out, ids.shape[1])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order; a row may occur several times."""
        index = torch.tensor(list(rows), device=self.base.device)
        self.cache.batch_select_indices(index)
        assert self.mask is not None
        self.mask = self.mask[index]


class Whole:
    """Rows in flight over a model without a cache: every step reads the whole of each row.

    Padding is on the right, where a causal model cannot see it; a model that takes no mask gets rows of one length at a
    time and no padding at all.
    """

    def __init__(self, base: Base) -> None:
        self.base, self.names = base, accepted(base)
        self.rows: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; next-token logits [B, V] in fp32."""
        self.rows = [list(p) for p in prompts]
        return self._read()

    def more(self, tokens: Sequence[int]) -> Tensor:
        """One more token in every row; next-token logits [B, V] in fp32."""
        self.rows = [[*r, t] for r, t in zip(self.rows, tokens, strict=True)]
        return self._read()

    @torch.no_grad()
    def _read(self) -> Tensor:
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault(0 if "attention_mask" in self.names else len(row), []).append(i)
        found: dict[int, Tensor] = {}
        for members in groups.values():
            found.update(zip(members, self._group([self.rows[i] for i in members]), strict=True))
        return torch.stack([found[i] for i in range(len(self.rows))])

    def _group(self, rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=self.base.device)
        lengths = torch.tensor([len(r) for r in rows], device=self.base.device)
        inputs: dict[str, Any] = {"input_ids": ids}
        if "attention_mask" in self.names:
            inputs["attention_mask"] = (torch.arange(width, device=ids.device) < lengths[:, None]).long()
        if "use_cache" in self.names:
            inputs["use_cache"] = False
        with self.base.evaluating():
            out = self.base.model(**inputs) if "input_ids" in self.names else self.base.model(ids)
        logits = _checked(self.base, out, width)
        return logits[torch.arange(len(rows), device=ids.device), lengths - 1]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.rows = [self.rows[i] for i in rows]
