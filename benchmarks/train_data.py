# SPDX-License-Identifier: Apache-2.0
"""The data of `train.py`: written once as a user would have it, and once encoded for the peers.

Everything comes from the shared data folder (TUNESMITH_DATA): public-domain books, GSM8K, Banking77, CIFAR-10.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SHOTS = 16


def write(kind: str, folder: Path, rows: int, length: int, seed: int) -> Path:
    """`rows` examples of a kind, drawn by `seed`, in a file that `tunesmith.tune` reads."""
    made = {"text": _text, "gsm8k": _gsm8k, "banking": _banking, "cifar": _cifar}[kind]
    return made(folder, rows, length, seed)


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def _text(folder: Path, rows: int, length: int, seed: int) -> Path:
    """Runs of `length` words from books: at least as many tokens, so that truncation fills every row."""
    from tunesmith.data import read

    words: list[str] = []
    for book in ("alice", "dorian_gray", "dracula", "pride_and_prejudice"):
        words += " ".join(str(r["text"]) for r in read(f"shared:books/{book}.txt").rows).split()
    starts = random.Random(seed).sample(range(0, len(words) - length, length // 2), rows)
    return _lines(folder / "data.jsonl", [{"text": " ".join(words[s : s + length])} for s in starts])


def _gsm8k(folder: Path, rows: int, length: int, seed: int) -> Path:
    from tunesmith.data import read

    found = read("shared:gsm8k/train.jsonl.gz").rows
    picked = [found[i] for i in random.Random(seed).sample(range(len(found)), rows)]
    return _lines(folder / "data.jsonl", [{"messages": r["messages"]} for r in picked])


def _banking(folder: Path, rows: int, length: int, seed: int) -> Path:
    """16 examples of each class, cut to `rows`."""
    from tunesmith.data import read

    data = read("shared:banking77/train.jsonl.gz")
    found = [dict(r) for r in data.rows]
    random.Random(seed).shuffle(found)
    seen: dict[Any, int] = {}
    few = [
        r
        for r in found
        if seen.setdefault(r["label"], 0) < SHOTS and not seen.update({r["label"]: seen[r["label"]] + 1})
    ]
    names = data.labels
    return _lines(folder / "data.jsonl", [{"text": r["text"], "label": names[r["label"]]} for r in few[:rows]])


def _cifar(folder: Path, rows: int, length: int, seed: int) -> Path:
    import numpy as np

    from tunesmith.data import read

    data = read("shared:cifar10/cifar10.npz")
    at = random.Random(seed).sample(range(len(data.rows)), rows)
    X = np.stack([np.asarray(data.rows[i]["array"]) for i in at])
    y = np.asarray([data.rows[i]["label"] for i in at])
    np.savez(folder / "data.npz", X=X, y=y, classes=np.asarray(data.labels))
    return folder / "data.npz"


def write_encoded(task: Any, folder: Path, order: list[int], pad: int) -> None:
    """The rows as the peers take them: token lists in JSON, or pixels ready for the net, and their order."""
    rows = task.rows
    if "array" in rows[0]:
        import torch

        made = [task.batch(range(i, min(i + 64, len(rows))), 0) for i in range(0, len(rows), 64)]
        torch.save({k: torch.cat([m[k] for m in made]) for k in made[0]}, folder / "encoded.pt")
        plain: list[Any] = []
    else:
        kept = ("input_ids", "labels")
        plain = [{k: r[k] for k in kept if k in r} for r in rows]
    (folder / "encoded.json").write_text(json.dumps({"rows": plain, "order": order, "pad": pad}))


def read_encoded(folder: Path) -> tuple[list[dict[str, Any]], list[int], int]:
    """(rows, order, padding token), without tunesmith."""
    found = json.loads((folder / "encoded.json").read_text())
    rows = found["rows"]
    if (folder / "encoded.pt").exists():
        import torch

        whole = torch.load(folder / "encoded.pt", weights_only=True)
        rows = [{k: v[i] for k, v in whole.items()} for i in range(len(whole["labels"]))]
    return rows, found["order"], found["pad"]
