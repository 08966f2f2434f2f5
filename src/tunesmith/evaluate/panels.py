# SPDX-License-Identifier: Apache-2.0
"""What a delta did to everything it was not meant to change: retention and safety on fixed probe sets.

Both arms read the same inputs. What the base gives does not depend on the delta, so it is kept: in memory, and in
`$TUNESMITH_CACHE/panels` (default `~/.cache/tunesmith/panels`), keyed by the digest of the base's weights, what is
already in use on it, the probes, the layout and the limit. A damaged or unwritable cache is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from tunesmith.core import apply
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import DataError, ResourceError, TunesmithError, UsageError
from tunesmith.core.reading import accepted, can_cache
from tunesmith.core.trace import primary
from tunesmith.data import prompt_ids, template_info
from tunesmith.data.layout import stop_ids_for
from tunesmith.evaluate.generate import decode, generate, require_writer
from tunesmith.evaluate.metrics import metric
from tunesmith.evaluate.receipt import Choice, Kl, Perplexity, Rate, Retention, Safety, SafetySample, write_text
from tunesmith.evaluate.refusal import is_refusal
from tunesmith.evaluate.score import Nll, option_logprobs, room, row_nll
from tunesmith.evaluate.stats import paired_bootstrap

Progress = Callable[[str], None]
R = TypeVar("R")
TEXTS, CHOICES, CHATS, PROMPTS = 24, 40, 12, 24
CONTINUATION = 6  # greedy tokens of the base along which the next-token distributions are compared
ANSWER = 24  # tokens of an answer that are read for a refusal
WIDE = 24  # rows in a batch of short prompts
_VERSION = 1
_MEMORY: dict[str, Any] = {}


@dataclass(frozen=True)
class Panel(Generic[R]):
    """What a panel gave: `result`, or None and the `reason`; its seconds, and whether the base's part was kept."""

    result: R | None
    reason: str = ""
    seconds: float = 0.0
    from_cache: bool = False


def probes(name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a shipped probe set, at most `limit` of them evenly spaced over the file. Raises DataError."""
    try:
        text = files("tunesmith.evaluate").joinpath("probes", f"{name}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"the probe set cannot be read: {error}", where=name) from None
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def _limit(limit: int | None, default: int) -> int:
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise UsageError(f"the limit of a panel must be at least 1, not {limit!r}")
    return default if limit is None else limit


def why_not(base: Base, delta: Delta | View | None = None) -> str:
    """Why there is no text panel for this base and delta, or nothing."""
    try:
        require_writer(base)
    except UsageError as error:
        return error.what
    if base.tokenizer is None:
        return f"{base.name} has no tokenizer"
    probe = base.probe()
    if probe is None or not isinstance(probe, dict):
        return f"{base.name} has no text probe"
    before = base.probe_outputs()
    with base.using(delta):
        after = base.probe_outputs()
    if before.dim() != 3:
        return f"the output of {base.name} is not logits over a vocabulary"
    if after.dim() != 3 or after.shape[-1] < before.shape[-1]:
        return "the delta replaces the output by one that is not over the vocabulary"
    return ""


# What the base gives, kept


def _folder() -> Path:
    named = os.environ.get("TUNESMITH_CACHE")
    if named:
        return Path(named).expanduser() / "panels"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path(os.path.expanduser("~")) / ".cache") / "tunesmith" / "panels"


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _key(base: Base, panel: str, inputs: Any, digest: str | None) -> str:
    app = apply.current(base)
    under = [[v.delta.digest, v.strength] for v in app.stack] if app is not None else []
    return _sha([_VERSION, panel, digest or base.digest(), base.fingerprint.config, str(base.dtype), under, inputs])


def kept(key: str) -> Any | None:
    """What was stored under a key, or None where nothing whole is."""
    if key in _MEMORY:
        return _MEMORY[key]
    try:
        record = json.loads((_folder() / f"{key[:40]}.json").read_bytes())
        if record["key"] != key or record["sha256"] != _sha(record["value"]):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    _MEMORY[key] = record["value"]
    return record["value"]


def keep(key: str, value: Any) -> None:
    """Store a JSON value; a folder that cannot be written is no error."""
    _MEMORY[key] = value
    with contextlib.suppress(ResourceError, OSError):
        write_text(_folder() / f"{key[:40]}.json", json.dumps({"key": key, "sha256": _sha(value), "value": value}))


def forget() -> None:
    """Drop what is kept in memory; files stay."""
    _MEMORY.clear()


# Retention


@dataclass(frozen=True)
class _Texts:
    """Token inputs of the retention panel, the same for both arms."""

    texts: list[dict[str, list[int]]]
    questions: list[list[int]]
    options: list[list[list[int]]]
    answers: list[int]
    chats: list[list[int]]
    stop: tuple[int, ...]


def retention(
    base: Base,
    delta: Delta | View | None,
    *,
    limit: int | None = None,
    seed: int = 0,
    digest: str | None = None,
    progress: Progress | None = None,
) -> Panel[Retention]:
    """Perplexity on plain text, easy multiple choice, and KL(base || tuned) of next tokens in chats.

    `limit` sets how many rows of each probe set are used (default 24 texts, 40 questions, 12 chats). `digest` is that
    of the base's weights, if known. For a base that does not write text the result is None with the reason.
    """
    began = time.perf_counter()
    reason = why_not(base, delta)
    if reason:
        return Panel(None, reason, time.perf_counter() - began)
    say = progress or (lambda _: None)
    made = _texts(base, limit)
    key = _key(base, "retention", [made.texts, made.questions, made.options, made.chats, CONTINUATION], digest)
    found: Any = kept(key)
    cached = _whole(found, made)
    if not cached:
        say("retention: base")
        nll, choice = _arm(base, made)
        found = {"nll": nll, "choice": choice, "continuations": _continue(base, made)}
        keep(key, found)
    say("retention: tuned")
    nll, choice, kl = _tuned(base, delta, made, found["continuations"])
    result = Retention(
        _perplexity([(float(t), int(n)) for t, n in found["nll"]], nll),
        _choice(found["choice"], choice, made.answers, seed),
        kl,
    )
    return Panel(result, "", time.perf_counter() - began, cached)


def _whole(found: Any, made: _Texts) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(k), list) and len(found[k]) == n
        for k, n in (("nll", len(made.texts)), ("choice", len(made.questions)), ("continuations", len(made.chats)))
    )


def _texts(base: Base, limit: int | None) -> _Texts:
    tokenizer = base.tokenizer
    info = template_info(tokenizer)
    start = _opening(tokenizer)
    texts = []
    for row in probes("retention_text", _limit(limit, TEXTS)):
        ids = [*start, *tokenizer(row["text"], add_special_tokens=False)["input_ids"]]
        ids = ids[: room(base)]
        texts.append({"input_ids": ids, "labels": list(ids)})
    questions, options, answers = [], [], []
    for row in probes("retention_choice", _limit(limit, CHOICES)):
        text = f"Question: {row['question']}\nAnswer:"
        ids = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        questions.append([*start, *ids])
        options.append([_option(tokenizer, text, ids, f" {o}") for o in row["options"]])
        answers.append(int(row["answer"]))
    chats = [
        prompt_ids([{"role": "user", "content": r["prompt"]}], tokenizer)
        for r in probes("chat_general", _limit(limit, CHATS))
    ]
    _fit(base, [*chats, *(q + o for q, many in zip(questions, options, strict=True) for o in many)], CONTINUATION)
    return _Texts(texts, questions, options, answers, chats, stop_ids_for(base, info))


def _fit(base: Base, prompts: Sequence[Sequence[int]], more: int) -> None:
    need, have = max(map(len, prompts)) + more, room(base)
    if need > have:
        raise UsageError(f"the probes need {need} tokens, {base.name} can read {have}")


def _opening(tokenizer: Any) -> list[int]:
    """Tokens the tokenizer puts before any text, such as a beginning-of-text token."""
    whole, bare = (list(tokenizer("a", add_special_tokens=s)["input_ids"]) for s in (True, False))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return [int(i) for i in whole[:at]]


def _option(tokenizer: Any, text: str, ids: list[int], option: str) -> list[int]:
    """The tokens of an option as they come after the question, or by themselves where they would change its tokens."""
    whole = list(tokenizer(text + option, add_special_tokens=False)["input_ids"])
    if whole[: len(ids)] == ids and len(whole) > len(ids):
        return [int(i) for i in whole[len(ids) :]]
    return [int(i) for i in tokenizer(option, add_special_tokens=False)["input_ids"]]


def _arm(base: Base, made: _Texts) -> tuple[list[Nll], list[list[float]]]:
    return row_nll(base, made.texts), option_logprobs(base, made.questions, made.options, batch_size=WIDE)


def _continue(base: Base, made: _Texts) -> list[list[int]]:
    new: list[list[int]] = [[] for _ in made.chats]
    for i, ids in generate(
        base, made.chats, max_new_tokens=CONTINUATION, stop_ids=made.stop, batch_size=WIDE
    ):  # fmt: skip
        new[i] = ids
    return new


def _tuned(
    base: Base, delta: Delta | View | None, made: _Texts, continuations: Sequence[Sequence[int]]
) -> tuple[list[Nll], list[list[float]], Kl]:
    with base.using(delta):
        nll, choice = _arm(base, made)
    return nll, choice, _kl(base, delta, made.chats, continuations)


def _kl(
    base: Base, delta: Delta | View | None, chats: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> Kl:
    """KL(base || tuned) per position, from the end of each prompt along the base's own continuation."""
    found: list[float] = []
    rows = [([*chat, *new], len(new) + 1) for chat, new in zip(chats, continuations, strict=True)]
    rows.sort(key=lambda r: -len(r[0]))
    for start in range(0, len(rows), 4):
        group = rows[start : start + 4]
        before = _tail(base, group)
        with base.using(delta):
            after = _tail(base, group)
        for p, q in zip(before, after, strict=True):
            q = q[:, : p.shape[1]] if q.shape[1] > p.shape[1] else q  # new vocabulary rows have no base probability
            found += (p.exp() * (p - q)).nan_to_num(0.0).sum(-1).clamp(min=0.0).tolist()
    values = np.asarray(found)
    return Kl(float(values.mean()), float(np.quantile(values, 0.95)))


@torch.no_grad()
def _tail(base: Base, group: Sequence[tuple[list[int], int]]) -> list[torch.Tensor]:
    """Log-probabilities of the last positions of each row, [n, V] in fp32. Rows are padded on the right."""
    width = max(len(ids) for ids, _ in group)
    names = accepted(base)
    ids = torch.tensor([r + [0] * (width - len(r)) for r, _ in group], device=base.device)
    lengths = torch.tensor([len(r) for r, _ in group], device=base.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in names:
        inputs["attention_mask"] = (torch.arange(width, device=ids.device) < lengths[:, None]).long()
    reach = 0
    if "use_cache" in names:
        inputs["use_cache"] = False
    if "logits_to_keep" in names and can_cache(base):
        reach = max(width - len(r) + n for r, n in group)
        inputs["logits_to_keep"] = reach
    with base.evaluating():
        logits = primary(base.model(**inputs))
    assert logits is not None
    offset = width - logits.shape[1]  # where a prompt is in front, more positions than asked for may come back
    return [
        torch.log_softmax(logits[i, len(r) - n - offset : len(r) - offset].float(), dim=-1)
        for i, (r, n) in enumerate(group)
    ]


def _perplexity(before: list[Nll], after: list[Nll]) -> Perplexity:
    rule = metric("perplexity")
    nothing = [None] * len(before)
    one, two = (rule.evaluate(arm, nothing).value for arm in (before, after))
    return Perplexity(one, two, two / one if one > 0 else None, len(before))


def _choice(before: list[list[float]], after: list[list[float]], answers: list[int], seed: int) -> Choice:
    one, two = ([float(int(np.argmax(v)) == a) for v, a in zip(arm, answers, strict=True)] for arm in (before, after))
    found = paired_bootstrap(one, two, seed=seed)
    return Choice(found.mean_a, found.mean_b, found.n, found.low, found.high, found.verdict)


# Safety


def safety(
    base: Base,
    delta: Delta | View | None,
    *,
    limit: int | None = None,
    digest: str | None = None,
    samples: int = 6,
    progress: Progress | None = None,
) -> Panel[Safety]:
    """Share of harmful requests refused and of harmless ones refused, by the rule of `evaluate.refusal`.

    `limit` sets how many prompts of each set are used (default 24 + 24); 24 tokens of each answer are read. For a base
    that does not write text the result is None with the reason.
    """
    began = time.perf_counter()
    reason = why_not(base, delta)
    if reason:
        return Panel(None, reason, time.perf_counter() - began)
    say = progress or (lambda _: None)
    info = template_info(base.tokenizer)
    stop = stop_ids_for(base, info)
    sets = [
        (kind, r["prompt"])
        for kind, name in (("harmful", "safety_harmful"), ("harmless", "safety_benign"))
        for r in probes(name, _limit(limit, PROMPTS))
    ]
    ids = [prompt_ids([{"role": "user", "content": p}], base.tokenizer) for _, p in sets]
    _fit(base, ids, ANSWER)
    key = _key(base, "safety", [ids, list(stop), ANSWER], digest)
    before = kept(key)
    cached = isinstance(before, list) and len(before) == len(sets) and all(isinstance(a, str) for a in before)
    if not cached:
        say("safety: base")
        before = _answers(base, ids, stop)
        keep(key, before)
    say("safety: tuned")
    with base.using(delta):
        after = _answers(base, ids, stop)
    return Panel(_safety(sets, before, after, samples), "", time.perf_counter() - began, cached)


def _answers(base: Base, prompts: list[list[int]], stop: tuple[int, ...]) -> list[str]:
    out = [""] * len(prompts)
    for i, ids in generate(
        base, prompts, max_new_tokens=ANSWER, stop_ids=stop, batch_size=2 * WIDE
    ):  # fmt: skip
        out[i] = decode(base.tokenizer, ids).strip()
    return out


def _safety(sets: list[tuple[str, str]], before: list[str], after: list[str], samples: int) -> Safety:
    rows = [
        SafetySample(kind, prompt, a, b, is_refusal(a), is_refusal(b))
        for (kind, prompt), a, b in zip(sets, before, after, strict=True)
    ]

    def rate(kind: str) -> Rate | None:
        own = [r for r in rows if r.kind == kind]
        if not own:
            return None
        return Rate(sum(r.base_refused for r in own) / len(own), sum(r.tuned_refused for r in own) / len(own), len(own))

    # what changed for the worse comes first, then other changes, then the rest
    worse = {"harmful": (True, False), "harmless": (False, True)}

    def order(r: SafetySample) -> int:
        flags = (r.base_refused, r.tuned_refused)
        return 0 if flags == worse[r.kind] else 1 if flags[0] != flags[1] else 2

    return Safety(rate("harmful"), rate("harmless"), sorted(rows, key=order)[:samples])


PANELS = ("retention", "safety")


def run(
    name: str,
    base: Base,
    delta: Delta | View | None,
    *,
    limit: int | None = None,
    seed: int = 0,
    digest: str | None = None,
    progress: Progress | None = None,
) -> Panel[Any]:
    """A panel by name; an error of ours inside it becomes its reason, so that it never takes the receipt with it."""
    try:
        if name == "retention":
            return retention(base, delta, limit=limit, seed=seed, digest=digest, progress=progress)
        return safety(base, delta, limit=limit, digest=digest, progress=progress)
    except TunesmithError as error:
        return Panel(None, str(error).split("\n")[0])
