# SPDX-License-Identifier: Apache-2.0
"""Piano-roll patches: Bach chorales, two made-up concepts, what a patch is called, and a classifier that knows the concepts.

A patch is 16 steps by 36 pitches, 1 where a note sounds and -1 elsewhere, float32 [n, 1, 16, 36].
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS, PITCHES, LOWEST = 16, 36, 45
KEYS, SPARSE, DENSE, NULL = 12, 12, 13, 14
IDENTIFIERS = tuple(range(15, 23))  # four for each of two concepts
TOKENS = 23
CONCEPTS = ("arpeggio", "syncopation")


@dataclass(frozen=True)
class Patches:
    """Rolls with the prompt of each, [n, 2] int64: key class and density class."""

    rolls: Tensor
    prompts: Tensor

    def __len__(self) -> int:
        return len(self.rolls)

    def __getitem__(self, rows: Any) -> Patches:
        return Patches(self.rolls[rows], self.prompts[rows])


def chorales(path: Path) -> Tensor:
    """All whole patches of the chorales in a file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        songs = [json.loads(line)["notes"] for line in file]
    out = []
    for song in songs:
        roll = np.full((len(song), PITCHES), -1.0, dtype=np.float32)
        for t, voices in enumerate(song):
            for pitch in voices:
                if LOWEST <= pitch < LOWEST + PITCHES:
                    roll[t, pitch - LOWEST] = 1.0
        out += [roll[i : i + STEPS] for i in range(0, len(roll) - STEPS + 1, STEPS)]
    return torch.from_numpy(np.stack(out))[:, None]


def toy_chorales(n: int) -> Tensor:
    """Three held chords of random pitches in each patch, for a smoke run."""
    rng = np.random.default_rng(0)
    roll = np.full((n, 1, STEPS, PITCHES), -1.0, dtype=np.float32)
    for i in range(n):
        for a, b in ((0, 6), (6, 12), (12, 16)):
            roll[i, 0, a:b, rng.choice(PITCHES, 4, replace=False)] = 1.0
    return torch.from_numpy(roll)


def concept(name: str, n: int, rng: np.random.Generator) -> Tensor:
    """n patches of a concept.

    "arpeggio": one note at a time runs up or down through a chord over the whole range, each held one or two steps.
    "syncopation": chords of three or four notes struck only between the beats, each one step long, then silence.
    """
    out = np.full((n, 1, STEPS, PITCHES), -1.0, dtype=np.float32)
    for i in range(n):
        root, third = int(rng.integers(0, 12)), int(rng.choice([3, 4]))
        chord = [p for p in range(PITCHES) if (p - root) % 12 in (0, third, 7)]
        if name == "arpeggio":
            held, at, way = int(rng.integers(1, 3)), int(rng.integers(len(chord))), int(rng.choice([-1, 1]))
            for t in range(0, STEPS, held):
                out[i, 0, t : t + held, chord[at]] = 1.0
                if not 0 <= at + way < len(chord):
                    way = -way
                at += way
        else:
            low, size = int(rng.integers(0, len(chord) - 5)), int(rng.integers(3, 5))
            for t in (2, 6, 10, 14) if rng.random() < 0.5 else (1, 3, 6, 9, 11, 14):
                out[i, 0, t, chord[low : low + size]] = 1.0
    return torch.from_numpy(out)


def onsets(rolls: Tensor) -> Tensor:
    """Notes struck in each patch, [n]."""
    on = rolls[:, 0] > 0
    before = F.pad(on, (0, 0, 1, 0))[:, :-1]
    return (on & ~before).sum((1, 2))


def described(rolls: Tensor, median: float) -> Patches:
    """Each patch with its key class (the pitch class heard most) and whether it has more onsets than `median`."""
    heard = (rolls[:, 0] > 0).float().sum(1)  # [n, 36]
    classes = torch.stack([heard[:, (k - LOWEST) % 12 :: 12].sum(1) for k in range(KEYS)], 1)
    density = torch.where(onsets(rolls) > median, DENSE, SPARSE)
    return Patches(rolls, torch.stack([classes.argmax(1), density], 1))


class Listener(nn.Module):
    """Patches [n, 1, 16, 36] to two logits: holds an arpeggio, holds syncopation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4 * 9, 64), nn.ReLU(),
            nn.Linear(64, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def listener(songs: Tensor, steps: int, seed: int) -> Listener:
    """A classifier trained on chorales (some noisy), fresh draws of each concept, and overlays of both concepts."""
    rng = np.random.default_rng([seed, 9])
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Listener()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        x, y = _lesson(songs, 16, rng, g)
        loss = F.binary_cross_entropy_with_logits(model(x), y)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return model.eval()


def _lesson(songs: Tensor, n: int, rng: np.random.Generator, g: torch.Generator) -> tuple[Tensor, Tensor]:
    arp, arp2 = concept("arpeggio", 2 * n, rng).chunk(2)
    syn, syn2 = concept("syncopation", 2 * n, rng).chunk(2)
    some = songs[torch.randint(len(songs), (2 * n,), generator=g)]
    x = torch.cat([some, arp, syn, torch.maximum(arp2, syn2)])
    y = torch.tensor([[0.0, 0.0]] * (2 * n) + [[1.0, 0.0]] * n + [[0.0, 1.0]] * n + [[1.0, 1.0]] * n)
    flipped = torch.rand(x.shape, generator=g) < 0.02 * torch.rand((len(x), 1, 1, 1), generator=g)
    return torch.where(flipped, -x, x), y


@torch.no_grad()
def heard(model: Listener, rolls: Tensor) -> Tensor:
    """Scores in 0..1, [n, 2]: arpeggio, syncopation."""
    return model(rolls).sigmoid()
