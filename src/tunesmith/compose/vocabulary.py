# SPDX-License-Identifier: Apache-2.0
"""Token tables of models with different tokenizers, matched by token string before they are combined.

    plan = align(base, [folder, ...])      look at it: print(plan.summary()), plan.to_dict()
    merge_folders(..., vocabulary=plan)

A row of an embedding or head belongs to a token, not to a number. The plan says, for every row of the result, which row
of the base and of each model it comes from. What a model that lacks a token is taken to have there is the policy:

    base    the base's row, so that it votes for no change
    mean    the mean of the rows of the other models that have it (the base's where none has)
    zero    the row stays as in the base, whatever the others say

With `target="union"` the added tokens of the models (those that a tokenizer matches before it splits text) get rows of
their own, which start at the mean of the models that have them. Pieces of another tokenizer's own vocabulary are left
out: without its merge rules no text would ever reach them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.core.errors import DeltaError, UsageError, nearest
from tunesmith.core.header import strict_json

if TYPE_CHECKING:
    from tunesmith.compose.folders import ModelFolder

TARGETS = ("base", "union")
MISSING = ("base", "mean", "zero")
LACKS = -1
TOKENIZER = "tokenizer.json"
_SHOWN = 5


@dataclass(frozen=True)
class Match:
    """How one model's vocabulary relates to the base's: tokens by string."""

    name: str
    common: int
    moved: list[tuple[str, int, int]]
    added: list[str]
    dropped: list[str]


@dataclass(frozen=True)
class VocabularyPlan:
    """Where every row of the result comes from; -1 where a model has no such token.

    `base_index` [rows] and `index` (one list [rows] a model) are row numbers. `new_tokens` are those that the base lacks,
    as entries of `added_tokens` in tokenizer.json.
    """

    rows: int
    missing: str
    target: str
    base_index: list[int]
    index: list[list[int]]
    matches: list[Match]
    new_tokens: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> str:
        """One line a model: tokens in common, moved, added, dropped, with examples."""
        lines = []
        for m in self.matches:
            parts = [f"{m.common:,} tokens in common"]
            for label, found in (("moved", [t for t, _, _ in m.moved]), ("added", m.added), ("dropped", m.dropped)):
                if found:
                    shown = ", ".join(repr(t)[:30] for t in found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
                    parts.append(f"{len(found):,} {label} ({shown})")
            lines.append(f"{m.name}: " + ", ".join(parts))
        lines.append(
            f"result: {self.rows:,} rows, {len(self.new_tokens)} new tokens; a missing row is {_SAID[self.missing]}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record: counts, tokens and policy, without the row tables."""
        models = [
            {
                "name": m.name, "common": m.common, "moved": len(m.moved), "added": m.added[:1000],
                "dropped": m.dropped[:1000], "moved_first": [list(t) for t in m.moved[:20]],
            }
            for m in self.matches
        ]  # fmt: skip
        new = [t["content"] for t in self.new_tokens]
        return {"rows": self.rows, "target": self.target, "missing": self.missing, "new_tokens": new, "models": models}

    def check(self, models: int) -> None:
        """Raise UsageError for a plan that was made for another number of models or names impossible rows."""
        if len(self.index) != models:
            raise UsageError(f"the vocabulary plan is for {len(self.index)} models, not for {models}")
        for table in (self.base_index, *self.index):
            if len(table) != self.rows or any(i < LACKS for i in table):
                raise UsageError("the vocabulary plan names impossible rows", hint="make it with align(base, folders)")

    def base_rows(self, base: Tensor, table: Callable[[int], Tensor]) -> Tensor:
        """The base's table [rows, ...] in the new order; tokens it lacks start at the mean of the models that have them.

        `base` is its own table, `table(i)` the one of model i, both fp32 or wider.
        """
        at = torch.tensor(self.base_index)
        out = base[at.clamp_min(0)]
        new = at == LACKS
        if bool(new.any()):
            total, count = torch.zeros_like(out[new]), torch.zeros(int(new.sum()))
            for i, index in enumerate(self.index):
                theirs = torch.tensor(index)[new]
                has = theirs != LACKS
                total[has] += table(i)[theirs[has]]
                count[has] += 1
            out[new] = total / _per_row(count.clamp_min(1), total)
        return out

    def changes(self, base: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
        """The change [rows, ...] of each model against `base`, the base's table in the new order."""
        has = torch.stack([torch.tensor(i) != LACKS for i in self.index])  # [models, rows]
        out = []
        for index, table, own in zip(self.index, tables, has, strict=True):
            rows = table[torch.tensor(index).clamp_min(0)].sub_(base)
            rows[~own] = 0
            out.append(rows)
        lacking = ~has.all(0)
        if self.missing == "zero":
            for rows in out:
                rows[lacking] = 0
        elif self.missing == "mean" and bool(lacking.any()):
            count = has.sum(0)[lacking].to(base.dtype)
            mean = torch.stack([rows[lacking] for rows in out]).sum(0)
            mean = mean / _per_row(count.clamp_min(1), mean)
            for rows, own in zip(out, has, strict=True):
                rows[~own] = mean[~own[lacking]]
        return out


_SAID = {
    "base": "the base's", "mean": "the mean of the models that have it", "zero": "left as in the base for all models",
}  # fmt: skip


def _per_row(count: Tensor, like: Tensor) -> Tensor:
    return count.reshape(-1, *([1] * (like.dim() - 1)))


def align(
    base: ModelFolder, folders: Sequence[ModelFolder], *, target: str = "base", missing: str = "base"
) -> VocabularyPlan:
    """Match the vocabularies of model folders by token string.

    Args:
        target: "base" keeps the base's tokens, "union" adds the models' added tokens.
        missing: what a model without a token is taken to have there: "base", "mean" or "zero" (see the module).
    Raises UsageError for a folder without tokenizer.json or vocab_size, or tokens beyond the rows of its table.
    """
    for name, value, choices in (("target", target, TARGETS), ("missing", missing, MISSING)):
        if value not in choices:
            raise UsageError(f"unknown choice {name}={value!r}", hint=nearest(value, choices))
    own = _vocabulary(base)
    theirs = [_vocabulary(f) for f in folders]
    base_rows = base.vocabulary_rows or 0
    token_at = {i: t for t, i in own.items()}
    new = _new_tokens(folders, own) if target == "union" else []
    first = max(token_at, default=-1) + 1
    new = [{**t, "id": first + n} for n, t in enumerate(new)]
    token_at.update({t["id"]: t["content"] for t in new})
    rows = max(base_rows, first + len(new))
    fresh = {t["id"] for t in new}
    base_index = [LACKS if r in fresh or r >= base_rows else r for r in range(rows)]
    index = []
    for f, vocabulary in zip(folders, theirs, strict=True):
        used, height = set(vocabulary.values()), f.vocabulary_rows or 0
        # rows without a token in both models are padding, and stand for each other
        index.append(
            [
                vocabulary.get(token_at[r], LACKS) if r in token_at else r if r not in used and r < height else LACKS
                for r in range(rows)
            ]
        )
    matches = [_match(f.name, own, v) for f, v in zip(folders, theirs, strict=True)]
    return VocabularyPlan(rows, missing, target, base_index, index, matches, new)


def _match(name: str, own: Mapping[str, int], other: Mapping[str, int]) -> Match:
    common = [t for t in own if t in other]
    moved = [(t, own[t], other[t]) for t in common if own[t] != other[t]]
    return Match(name, len(common), moved, [t for t in other if t not in own], [t for t in own if t not in other])


def _vocabulary(folder: ModelFolder) -> dict[str, int]:
    where = str(folder.path)
    found, rows = folder.vocabulary, folder.vocabulary_rows
    if found is None:
        raise UsageError(
            f"has no {TOKENIZER}, so its tokens are not known", where=where, hint="save its tokenizer there"
        )
    if rows is None:
        raise UsageError("its config names no vocab_size", where=where)
    beyond = next((t for t, i in found.items() if i >= rows), None)
    if beyond is not None:
        raise UsageError(f"the token {beyond[:40]!r} has id {found[beyond]}, the table has {rows} rows", where=where)
    return found


def _new_tokens(folders: Sequence[ModelFolder], own: Mapping[str, int]) -> list[dict[str, Any]]:
    """Added tokens that the base lacks, in the order of the models, each once."""
    found: dict[str, dict[str, Any]] = {}
    for f in folders:
        for entry in _load(f.path / TOKENIZER).get("added_tokens") or []:
            if entry["content"] not in own:
                found.setdefault(entry["content"], entry)
    return list(found.values())


def _load(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as f:
            return strict_json(f.read((64 << 20) + 1), str(path))
    except OSError as e:
        raise UsageError(f"cannot be read ({e.strerror or e})", where=str(path)) from None
    except DeltaError as e:
        raise UsageError(e.what, where=e.where, hint=e.hint) from None


def read_vocabulary(path: Path) -> dict[str, int]:
    """Token strings to ids of a tokenizer.json, added tokens included. Raises UsageError for a damaged one."""
    root = _load(path)
    model = root.get("model")
    table = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(table, list):  # Unigram: [token, score] in the order of ids
        pairs = [(e[0], i) for i, e in enumerate(table) if isinstance(e, list) and e and isinstance(e[0], str)]
        damaged = len(pairs) != len(table)
        found = dict(pairs)
    else:
        damaged, found = not isinstance(table, dict), dict(table) if isinstance(table, dict) else {}
    added = root.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in added):
        damaged, added = True, []
    found.update({t["content"]: t.get("id") for t in added})
    if damaged or not all(type(i) is int and 0 <= i < 2**31 for i in found.values()):
        raise UsageError("its vocabulary is damaged: tokens must map to whole numbers", where=str(path))
    if len(set(found.values())) != len(found):
        seen: dict[int, str] = {}
        for token, i in found.items():
            if i in seen:
                raise UsageError(f"{seen[i][:40]!r} and {token[:40]!r} have one id, {i}", where=str(path))
            seen[i] = token
    return found


def with_new_tokens(tokenizer: Mapping[str, Any], plan: VocabularyPlan) -> dict[str, Any]:
    """The base's tokenizer.json with the plan's new tokens among its added ones."""
    return {**tokenizer, "added_tokens": [*(tokenizer.get("added_tokens") or []), *plan.new_tokens]}
