# SPDX-License-Identifier: Apache-2.0
"""What a base answers on a data set, as it stands with whatever deltas are in use.

`examples` lays the data out once, so that two arms read the very same tokens; `answer` runs one arm; `predict` does
both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View, as_view
from tunesmith.core.errors import DataError, UsageError
from tunesmith.core.features import features
from tunesmith.core.reading import Cached, accepted, can_cache
from tunesmith.core.trace import primary
from tunesmith.data import IGNORED, Dataset, collate, encode, preference_sides, prompt_ids
from tunesmith.data.images import normalised
from tunesmith.data.layout import layout_for, stop_ids_for
from tunesmith.evaluate.generate import decode, generate, require_writer

Progress = Callable[[int, int], None]
Nll = tuple[float, int]
BATCH_TOKENS = 2048
LOGIT_ELEMENTS = 32_000_000  # logits held at once, 128 MB in fp32
LABELLED = ("classification", "tagging", "image", "audio")


@dataclass(frozen=True)
class Examples:
    """A data set laid out for scoring: one entry of `rows`, `references` and `prompts` per example.

    `rows` are token prompts (chat), encoded rows, pairs of encoded rows (preference) or raw arrays. `notes` says what
    was left out or cut.
    """

    kind: str
    rows: list[Any]
    references: list[Any]
    prompts: list[str]
    labels: list[str] = field(default_factory=list)
    stop_ids: tuple[int, ...] = ()
    max_new_tokens: int = 0
    image: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Predictions:
    """What one arm answered, in the form the metrics take.

    `outputs` are texts (chat), label names (classification, image, audio, preference), lists of tag names (tagging),
    numbers (regression) or (summed negative log-likelihood in nats, tokens) pairs (text). `confidence` is the
    probability of each given label, None where there is none.
    """

    kind: str
    outputs: list[Any]
    references: list[Any]
    prompts: list[str]
    confidence: list[float] | None = None
    notes: tuple[str, ...] = ()


def predict(
    base: Base,
    dataset: Dataset | Examples,
    *,
    delta: Delta | View | None = None,
    system: str | None = None,
    max_length: int = 1024,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Predictions:
    """What the base answers on every example, with what is in use and `delta` on top.

    Raises DataError for data that cannot be scored, UsageError for a base that cannot answer it.
    """
    made = dataset
    if isinstance(made, Dataset):
        made = examples(base, made, delta=delta, system=system, max_length=max_length, max_new_tokens=max_new_tokens)
    with base.using(delta):
        return answer(base, made, batch_size=batch_size, progress=progress)


# Laying out


def examples(
    base: Base,
    dataset: Dataset,
    *,
    delta: Delta | View | None = None,
    system: str | None = None,
    max_length: int = 1024,
    max_new_tokens: int | None = None,
) -> Examples:
    """Lay a data set out; chat uses the layout stored with `delta` where there is one.

    `max_new_tokens` defaults to the longest reference in tokens * 1.3 + 8. Chat prompts longer than `max_length` (or
    what the base can read) are left out, other rows are cut, both are noted. Raises DataError when nothing is left.
    """
    if not len(dataset):
        raise DataError("there is no example to score", where=dataset.report.path)
    if max_length < 2:
        raise UsageError(f"max_length must be at least 2, not {max_length}")
    labels = [str(x) for x in dataset.labels or ()]
    if dataset.kind in ("image", "audio"):
        layout = as_view(delta).delta.layout if delta is not None else {}
        image = layout.get("image") or base.source.get("image")
        names = [_name(labels, r["label"]) for r in dataset.rows]
        prompts = [f"{dataset.kind} {i + 1}" for i in range(len(dataset))]
        return Examples(dataset.kind, list(dataset.rows), names, prompts, labels, image=image)
    if base.tokenizer is None:
        raise UsageError(f"{base.name} has no tokenizer, so it cannot read {dataset.kind} data")
    max_length = min(max_length, room(base))
    if dataset.kind == "chat":
        return _chat(base, dataset, delta, system, max_length, max_new_tokens)
    if dataset.kind == "preference":
        return _preference(base, dataset, system, max_length)
    return _encoded(base, dataset, labels, max_length)


def room(base: Base) -> int:
    """Tokens the base can read at once, by its positions and its tokenizer; a very large number without a limit."""
    positions = getattr(getattr(base.model, "config", None), "max_position_embeddings", None)
    own = getattr(base.tokenizer, "model_max_length", None)
    return min(int(positions or 1 << 30), int(own) if own and own < 1 << 30 else 1 << 30)


def _name(labels: Sequence[str], index: Any) -> str:
    return labels[int(index)] if 0 <= int(index) < len(labels) else str(index)


def _chat(
    base: Base, dataset: Dataset, delta: Any, system: str | None, max_length: int, max_new_tokens: int | None
) -> Examples:
    require_writer(base)
    info = layout_for(base, delta, system)
    rows, references, prompts, lost, mute = [], [], [], 0, 0
    for number, row in enumerate(dataset.rows, 1):
        messages = row["messages"]
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        if last is None and row.get("answer") is None:
            mute += 1
            continue
        before = messages if last is None else messages[:last]
        try:
            ids = prompt_ids(before, base.tokenizer, info.system, info.template)
        except DataError as error:
            raise DataError(error.what, where=f"{dataset.report.path}, row {number}", hint=error.hint) from None
        if len(ids) > max_length or len(ids) >= room(base):
            lost += 1
            continue
        rows.append(ids)
        references.append(str(row["answer"]) if last is None else messages[last]["content"])
        prompts.append(next((m["content"] for m in reversed(before) if m["role"] == "user"), ""))
    if not rows:
        what = f"no example can be scored: {lost} prompts are longer than {max_length} tokens, {mute} have no answer"
        raise DataError(what, where=dataset.report.path, hint="raise max_length, or give conversations with an answer")
    notes = [f"{lost} prompts longer than {max_length} tokens were left out"] if lost else []
    notes += [f"{mute} conversations without an answer were left out"] if mute else []
    if max_new_tokens is None:
        found = base.tokenizer(references, add_special_tokens=False)["input_ids"]
        max_new_tokens = math.ceil(1.3 * max(map(len, found))) + 8
    return Examples(
        "chat", rows, references, prompts, [], stop_ids_for(base, info), max_new_tokens, notes=tuple(notes)
    )  # fmt: skip


def _preference(base: Base, dataset: Dataset, system: str | None, max_length: int) -> Examples:
    require_writer(base)
    arms = [
        encode(side, base.tokenizer, max_length=max_length, system=system, overflow="skip", train_on="last")
        for side in preference_sides(dataset)
    ]
    at = [dict(zip(a.source_index, a.rows, strict=True)) for a in arms]
    both = sorted(at[0].keys() & at[1].keys())
    if not both:
        raise DataError(f"every pair is longer than {max_length} tokens", where=dataset.report.path)
    lost = len(dataset) - len(both)
    notes = (f"{lost} pairs longer than {max_length} tokens were left out",) if lost else ()
    prompts = [str(dataset.rows[i]["prompt"][-1]["content"]) for i in both]
    rows = [(at[0][i], at[1][i]) for i in both]
    return Examples("preference", rows, ["chosen"] * len(both), prompts, notes=notes)


def _encoded(base: Base, dataset: Dataset, labels: list[str], max_length: int) -> Examples:
    found = encode(dataset, base.tokenizer, max_length=max_length, overflow="truncate")
    notes = list(found.notes)
    if found.truncated:
        notes.append(f"{len(found.truncated)} examples were longer than {max_length} tokens and were cut")
    rows, source = list(found.rows), list(found.source_index)
    if dataset.kind == "text":
        short = [i for i, r in enumerate(rows) if len(r["input_ids"]) < 2]
        if short:
            notes.append(f"{len(short)} texts of one token were left out")
            kept = [i for i in range(len(rows)) if i not in set(short)]
            rows, source = [rows[i] for i in kept], [source[i] for i in kept]
        if not rows:
            raise DataError("no text has two tokens or more", where=dataset.report.path)
        references: list[Any] = [dataset.rows[i]["text"] for i in source]
        return Examples("text", rows, references, [r[:200] for r in references], notes=tuple(notes))
    if dataset.kind == "tagging":
        references = [[_name(labels, t) for t in r["labels"] if t != IGNORED] for r in rows]
        prompts = [" ".join(dataset.rows[i]["tokens"]) for i in source]
    else:
        number = dataset.kind == "regression"
        references = [float(r["labels"]) if number else _name(labels, r["labels"]) for r in rows]
        given = [dataset.rows[i] for i in source]
        prompts = [" | ".join(r[k] for k in ("text", "text_pair") if k in r) for r in given]
    return Examples(dataset.kind, rows, references, prompts, labels, notes=tuple(notes))


# Answering


def answer(base: Base, made: Examples, *, batch_size: int = 16, progress: Progress | None = None) -> Predictions:
    """Run one arm over laid-out examples. Raises UsageError for a model whose output does not fit the data."""
    if batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {batch_size}")
    confidence: list[float] | None = None
    if made.kind == "chat":
        outputs: list[Any] = [""] * len(made)
        for index, ids in generate(
            base, made.rows, max_new_tokens=made.max_new_tokens, stop_ids=made.stop_ids, batch_size=batch_size,
            progress=progress,
        ):  # fmt: skip
            outputs[index] = decode(base.tokenizer, ids).strip()
    elif made.kind == "text":
        outputs = list(row_nll(base, made.rows, progress=progress))
    elif made.kind == "preference":
        pairs = [row_nll(base, [r[side] for r in made.rows]) for side in (0, 1)]
        outputs = ["chosen" if a[0] < b[0] else "rejected" for a, b in zip(*pairs, strict=True)]
    else:
        outputs, confidence = _labelled(base, made, batch_size, progress)
    return Predictions(made.kind, outputs, made.references, made.prompts, confidence, made.notes)


def _labelled(
    base: Base, made: Examples, batch_size: int, progress: Progress | None
) -> tuple[list[Any], list[float] | None]:
    outputs: list[Any] = [None] * len(made)
    confidence = [0.0] * len(made)
    lengths = [len(r["input_ids"]) if "input_ids" in r else 0 for r in made.rows]
    order = sorted(range(len(made)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        logits, labels = head_logits(base, made, chosen)
        if made.kind == "regression":
            for i, value in zip(chosen, logits.reshape(-1).tolist(), strict=True):
                outputs[i] = value
        elif made.kind == "tagging":
            best = logits.argmax(-1)
            for i, row, target in zip(chosen, best, labels, strict=True):
                outputs[i] = [_name(made.labels, t) for t in row[target != IGNORED].tolist()]
        else:
            p, best = torch.softmax(logits, dim=-1).max(dim=-1)
            for i, sure, at in zip(chosen, p.tolist(), best.tolist(), strict=True):
                outputs[i], confidence[i] = _name(made.labels, at), min(1.0, sure)
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return outputs, confidence if made.kind in ("classification", "image", "audio") else None


def model_inputs(base: Base, made: Examples, chosen: Sequence[int]) -> tuple[Any, Tensor]:
    """The model's inputs for chosen examples (named, or a tuple where a lone array goes in by position) and labels."""
    batch = collate([made.rows[i] for i in chosen], pad_id=_pad(base))
    labels = batch.pop("labels").to(base.device)
    if "pixel_values" in batch:
        batch["pixel_values"] = normalised(batch["pixel_values"], made.image)
    batch = {k: v.to(base.device) for k, v in batch.items()}
    named = {k: v for k, v in batch.items() if k in accepted(base)}
    if len(batch) == 1 or not named:
        return (next(iter(batch.values())),), labels
    return named, labels


@torch.no_grad()
def head_logits(base: Base, made: Examples, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The output on chosen examples in fp32, [B, C] or [B, T, C] for tagging, and their labels.

    Raises UsageError when the output is not one number per label.
    """
    inputs, labels = model_inputs(base, made, chosen)
    with base.evaluating():
        out = base.model(**inputs) if isinstance(inputs, Mapping) else base.model(*inputs)
    logits = primary(out)
    want = 1 if made.kind == "regression" else len(made.labels)
    shape = (*labels.shape, want) if made.kind == "tagging" else (len(chosen), want)
    fits = logits is not None and (tuple(logits.shape) == shape or (want == 0 and logits.dim() == 2))
    if not fits and made.kind == "regression" and logits is not None:
        fits = logits.numel() == len(chosen)
    if not fits or logits is None:
        got = None if logits is None else list(logits.shape)
        hint = "use a delta with a head (method 'head') for this many labels"
        raise UsageError(f"the output {got} is not {list(shape)}, one number per label", where=base.name, hint=hint)
    if torch.isnan(logits).any():
        raise UsageError("the output is NaN", where=base.name, hint="the delta diverged in training")
    return logits.float(), labels


def constant(made: Examples) -> Predictions:
    """What a base without a head is worth: the most frequent label, or the mean value, of these very examples."""
    if made.kind == "regression":
        mean = math.fsum(made.references) / len(made)
        outputs: list[Any] = [mean] * len(made)
    elif made.kind == "tagging":
        common = Counter(t for tags in made.references for t in tags).most_common(1)
        outputs = [[common[0][0]] * len(tags) if common else [] for tags in made.references]
    elif made.kind in LABELLED:
        outputs = [Counter(made.references).most_common(1)[0][0]] * len(made)
    else:
        raise UsageError(f"there is no constant answer to {made.kind} data")
    return Predictions(made.kind, outputs, made.references, made.prompts, None, made.notes)


# Likelihoods


def _pad(base: Base) -> int:
    found = getattr(base.tokenizer, "pad_token_id", None)
    return 0 if found is None else int(found)


def row_nll(
    base: Base,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[Nll]:
    """(summed negative log-likelihood in nats, tokens) of the labelled tokens of each row of input_ids and labels.

    Logits are made only where a label is, in chunks, unless the model does more to them than its output layer does.
    """
    if not rows:
        return []
    direct = _direct_head(base, rows[0]["input_ids"][:16])
    if direct is None:
        width = getattr(getattr(base.model, "config", None), "vocab_size", None) or 1
        batch_tokens = max(1, min(batch_tokens, LOGIT_ELEMENTS // width))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    out: list[Nll] = [(0.0, 0)] * len(rows)
    start = 0
    while start < len(order):
        longest = len(rows[order[start]]["input_ids"])
        chosen = order[start : start + max(1, batch_tokens // max(1, longest))]
        picked = [{k: list(rows[i][k]) for k in ("input_ids", "labels")} for i in chosen]
        batch = {k: v.to(base.device) for k, v in collate(picked, pad_id=_pad(base), pad_to=None).items()}
        for i, pair in zip(chosen, _batch_nll(base, batch, direct), strict=True):
            out[i] = pair
        start += len(chosen)
        if progress is not None:
            progress(start, len(order))
    return out


@torch.no_grad()
def _batch_nll(base: Base, batch: dict[str, Tensor], head: nn.Module | None) -> list[Nll]:
    labels = batch.pop("labels")[:, 1:]
    keep = labels != IGNORED
    inputs = _inputs(base, batch)
    with base.evaluating():
        if head is not None:
            hidden = features(base, inputs)[:, :-1][keep]
            logits_of: Callable[[Tensor], Tensor] = head
        else:
            found = primary(base.model(**inputs))
            if found is None or found.dim() != 3:
                raise UsageError("the output holds no logits over a vocabulary", where=base.name)
            hidden, logits_of = found[:, :-1][keep], lambda x: x
        target, row = labels[keep], keep.nonzero()[:, 0]
        total = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        step = max(1, LOGIT_ELEMENTS // int(getattr(head, "out_features", 0) or hidden.shape[-1] or 1))
        for i in range(0, len(target), step):
            logits = logits_of(hidden[i : i + step]).float()
            nll = torch.logsumexp(logits, -1) - logits.gather(-1, target[i : i + step, None])[:, 0]
            total.index_add_(0, row[i : i + step], nll.double())
    return list(zip(total.tolist(), keep.sum(1).tolist(), strict=True))


def _inputs(base: Base, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    names = accepted(base)
    extra = {"use_cache": False} if "use_cache" in names else {}
    return {**{k: v for k, v in batch.items() if k in names}, **extra}


@torch.no_grad()
def _direct_head(base: Base, ids: Sequence[int]) -> nn.Module | None:
    """The output layer, if applying it to the features gives the model's own logits under what is in use.

    It does not where the model caps or scales its logits, or a delta changes them after the output layer.
    """
    head = next((s.module for s in base.sites.role("head") if isinstance(s.module, nn.Linear)), None)
    if head is None:
        return None
    inputs = _inputs(base, {"input_ids": torch.tensor([list(ids)], device=base.device)})
    with base.evaluating():
        want = primary(base.model(**inputs))
        try:
            got = head(features(base, inputs))
        except UsageError:
            return None
    if want is None or want.shape != got.shape:
        return None
    scale = float(want.abs().max()) + 1e-6
    return head if float((want - got).abs().max()) <= 1e-3 * scale else None


def option_logprobs(
    base: Base,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Summed log-probability (nats) of each token option after its prompt.

    Where the model has a cache each prompt is read once for all its options. Raises UsageError for an empty prompt or
    option.
    """
    if len(prompts) != len(options):
        raise UsageError(f"{len(prompts)} prompts for {len(options)} lists of options")
    for i, (p, many) in enumerate(zip(prompts, options, strict=True)):
        if not p or not many or not all(many):
            raise UsageError("a prompt, its options, or one of them is empty", where=f"prompt {i + 1}")
    require_writer(base)
    prompts = [list(p) for p in prompts]
    if not can_cache(base):
        rows = [_option_row(p, o) for p, many in zip(prompts, options, strict=True) for o in many]
        flat = iter(row_nll(base, rows, progress=progress))
        return [[-next(flat)[0] for _ in many] for many in options]
    out: list[list[float]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = _shared_prefix(base, [prompts[i] for i in chosen], [options[i] for i in chosen])
        for i, values in zip(chosen, found, strict=True):
            out[i] = values
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return out


def _option_row(prompt: Sequence[int], option: Sequence[int]) -> dict[str, list[int]]:
    return {"input_ids": [*prompt, *option], "labels": [IGNORED] * len(prompt) + list(option)}


def _shared_prefix(
    base: Base, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    source = Cached(base)
    first = torch.log_softmax(source.start(prompts), dim=-1)
    out = [[float(first[i, o[0]]) for o in many] for i, many in enumerate(options)]
    longer = [(i, j) for i, many in enumerate(options) for j, o in enumerate(many) if len(o) > 1]
    if not longer:
        return out
    source.keep([i for i, _ in longer])
    tails = [list(options[i][j]) for i, j in longer]
    width = max(map(len, tails)) - 1
    ids = torch.tensor([t[:-1] + [0] * (width + 1 - len(t)) for t in tails], device=base.device)
    seen = torch.tensor([[1] * (len(t) - 1) + [0] * (width + 1 - len(t)) for t in tails], device=base.device)
    logp = torch.log_softmax(source.feed(ids, seen, last=False), dim=-1)
    for row, (i, j) in enumerate(longer):
        out[i][j] += sum(float(logp[row, k, t]) for k, t in enumerate(tails[row][1:]))
    return out
