# SPDX-License-Identifier: Apache-2.0
"""News with a little of five other kinds mixed in, and rules that tell the kinds apart."""

from __future__ import annotations

import random
import re
from typing import Any

KINDS = ("language A", "language B", "code", "phone book", "chess")
_A = ("zor", "quil", "vex", "nath", "ugri", "belo")
_B = ("pemi", "shao", "tulu", "kiri", "wanto", "dzei")
_NAMES = ("Adams", "Berger", "Castillo", "Dubois", "Eriksen", "Fontana", "Grigoriev", "Hansen", "Ivanov", "Jones")
_MOVE = re.compile(r"\b(?:[KQRBN]x?[a-h][1-8]|O-O)\b")
_NUMBER = re.compile(r"\d{3}-\d{4}")
_CODE = re.compile(r"\breturn\b|\bfor \w+ in\b|[\w\])] ?[=+]= ?[\w\[(]|\w+\(\w*\)\s*:|\w \+= \w|\w ?= ?[\w\[(]")
_SURE = re.compile(r"\bdef \w+ ?\(|\bclass \w+[(:]|^\s*(?:import|from) \w+\s*(?:$|import|\n)|\n[ \t]+\w", re.M)


def made(kind: str, n: int, seed: int, code: list[str]) -> list[str]:
    """`n` texts of one kind; `code` is where snippets come from."""
    rng = random.Random(f"035:{kind}:{seed}")
    return [_one(kind, rng, code) for _ in range(n)]


def _one(kind: str, rng: random.Random, code: list[str]) -> str:
    if kind in ("language A", "language B"):
        parts = _A if kind.endswith("A") else _B
        return " ".join("".join(rng.choices(parts, k=rng.randint(2, 3))) for _ in range(8)) + "."
    if kind == "code":
        return rng.choice(code)
    if kind == "phone book":
        return "; ".join(
            f"{rng.choice(_NAMES)}, {rng.choice('ABCDEFG')}. 555-{rng.randint(1000, 9999)}" for _ in range(3)
        )
    moves = [f"{rng.choice('KQRBN')}{rng.choice('abcdefgh')}{rng.randint(1, 8)}" for _ in range(12)]
    return " ".join(f"{i + 1}. {a} {b}" for i, (a, b) in enumerate(zip(moves[::2], moves[1::2], strict=True)))


def kind_of(text: str) -> str | None:
    """Which of the five kinds a text is of, None for ordinary text. Two signs of a kind are needed."""
    low = text.casefold()
    counts = {
        "language A": sum(low.count(p) for p in _A),
        "language B": sum(low.count(p) for p in _B),
        "code": len(_CODE.findall(text)) + 2 * len(_SURE.findall(text)),
        "phone book": 2 * len(_NUMBER.findall(text)),
        "chess": len(_MOVE.findall(text)),
    }
    best = max(counts, key=lambda k: counts[k])
    return best if counts[best] >= 2 else None


def mixture(news: list[str], novel: int, seed: int, code: list[str]) -> list[str]:
    """All the news and `novel` texts of each kind, shuffled."""
    rows = [*news, *(t for kind in KINDS for t in made(kind, novel, seed, code))]
    return random.Random(f"035:order:{seed}").sample(rows, len(rows))


def encoded(tokenizer: Any, texts: list[str], start: int, length: int) -> list[list[int]]:
    """Token rows that begin with the start token and hold at most `length` of the text's."""
    return [[start, *tokenizer(t, add_special_tokens=False)["input_ids"][:length]] for t in texts]
