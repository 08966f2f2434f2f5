# SPDX-License-Identifier: Apache-2.0
"""The texts of study 085: news and facts for pre-training, restaurant sentences (easy), titles of abstracts (hard)."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAD, SPLIT, END = 0, 1, 2  # bytes that no text holds


@dataclass(frozen=True)
class Row:
    """`source` ends in SPLIT, `target` in END; `slots` are (first, last + 1) of slot values within the target."""

    source: bytes
    target: bytes
    slots: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Splits:
    """Rows of one task; no row is in two of them."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


def clean(text: str) -> bytes:
    """ASCII without control characters, one space at a time."""
    return " ".join(text.split()).encode("ascii", "ignore")


def jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, zipped or not."""
    file = path if path.exists() else path.with_name(path.name + ".gz")
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def corpus(news: Path | None, facts: Path | None) -> Tensor:
    """The text to pre-train on, uint8: items in a fixed random order, END after each."""
    if news is None or facts is None:
        rng = random.Random(0)
        items = [
            clean(" ".join(rng.choice(("tin", "ore", "fir", "elm", "oak")) for _ in range(12))) for _ in range(1500)
        ]
    else:
        items = [clean(r["text"]) for f in ("train.jsonl", "train_extra.jsonl") for r in jsonl(news / f)]
        items += [clean(f"{r['prompt']} {r['ground_truth']}.") for r in jsonl(facts / "edit.jsonl")]
    random.Random(1).shuffle(items)
    return torch.frombuffer(bytearray(b"".join(i + bytes([END]) for i in items)), dtype=torch.uint8)


NAMES = ("Aromi", "Bibimbap House", "Clowns", "Cotto", "Fitzbillies", "Giraffe", "Green Man", "Loch Fyne", "Midsummer House",
         "Strada", "The Cricketers", "The Eagle", "The Mill", "The Phoenix", "The Punter", "Travellers Rest", "Wildwood",
         "Zizzi")  # fmt: skip
SLOTS: dict[str, tuple[str, ...]] = {
    "name": NAMES,
    "type": ("pub", "coffee shop", "restaurant", "bistro"),
    "food": ("French", "Italian", "Indian", "Chinese", "English", "Japanese", "fast"),
    "price": ("cheap", "moderate", "high", "less than 20 pounds", "more than 30 pounds"),
    "rating": ("low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"),
    "area": ("riverside", "city centre", "old town"),
    "family": ("yes", "no"),
    "near": ("Burger King", "Cafe Sicilia", "Raja Cuisine", "All Bar One", "Crowne Plaza Hotel", "Yippee Noodle Bar"),
}
OPENINGS = (
    (("name", "{} is a "), ("food", "{} "), ("type", "{}")),
    (("name", "{} is a "), ("type", "{}"), ("food", " that serves {} food")),
    (("food", "For {} food there is "), ("name", "{}, a "), ("type", "{}")),
)
CLOSINGS = {
    "price": (", with {} prices", ", where prices are {}"),
    "rating": (", rated {}", ", with a customer rating of {}"),
    "area": (" in the {} area", ", found in the {} area"),
    "near": (" near {}", ", close to {}"),
}
FAMILY = {
    "yes": (". It is family friendly", ". Children are welcome"),
    "no": (". It is not for children", ". Adults only"),
}


def restaurants(n: int, seed: str, longest: int = 320) -> list[Row]:
    """Different sets of slot values with a sentence that says all of them; 8 slots, the last five of them optional."""
    rng = random.Random(seed)
    seen: set[bytes] = set()
    rows: list[Row] = []
    while len(rows) < n:
        kept = [
            "name",
            "type",
            "food",
            *(s for s in ("price", "rating", "area", "family", "near") if rng.random() < 0.6),
        ]
        values = {s: rng.choice(SLOTS[s]) for s in kept}
        source = ";".join(f"{s[:2]}={v}" for s, v in values.items()).encode() + bytes([SPLIT])
        if source in seen:
            continue
        seen.add(source)
        row = _sentence(source, values, rng)
        if len(row.source) + len(row.target) <= longest:
            rows.append(row)
    return rows


def _sentence(source: bytes, values: dict[str, str], rng: random.Random) -> Row:
    text, spots = "", []

    def say(pattern: str, value: str) -> None:
        nonlocal text
        before, _, after = pattern.partition("{}")
        text += before
        spots.append((len(text), len(text) + len(value)))
        text += value + after

    for slot, pattern in rng.choice(OPENINGS):
        say(pattern, values[slot])
    for slot in rng.sample(sorted(CLOSINGS.keys() & values.keys()), len(CLOSINGS.keys() & values.keys())):
        say(rng.choice(CLOSINGS[slot]), values[slot])
    if "family" in values:
        text += rng.choice(FAMILY[values["family"]])
    return Row(source, (text + ".").encode() + bytes([END]), tuple(spots))


def easy(train: int, dev: int, test: int) -> Splits:
    """Restaurant sentences; the sets of values are all different."""
    rows = restaurants(train + dev + test, "restaurants")
    return Splits(rows[:train], rows[train : train + dev], rows[train + dev :])


def hard(folder: Path | None, train: int, dev: int, test: int, keep: int) -> Splits:
    """The title from the first `keep` bytes of an abstract, the title at its head cut off; titles are all different."""
    if folder is None:
        docs: Sequence[dict[str, str]] = [
            {"title": f"on {a} and {b}", "text": f"on {a} and {b} {b} was seen with {a} by those who looked."}
            for a in "abcdefgh" for b in "stuvwxyz"
        ]  # fmt: skip
    else:
        docs = jsonl(folder / "docs.jsonl")
    rows: dict[bytes, Row] = {}
    for doc in docs:
        title, text = clean(doc["title"]), clean(doc["text"])
        if text.startswith(title):
            text = text[len(title) :].strip(b" .")
        if (len(title) >= 8 and len(text) >= 40) or folder is None:
            rows.setdefault(title, Row(text[:keep] + bytes([SPLIT]), title[:90] + bytes([END])))
    found = list(rows.values())
    random.Random("titles").shuffle(found)
    train = min(train, len(found) - dev - test)
    return Splits(found[:train], found[train : train + dev], found[train + dev : train + dev + test])
