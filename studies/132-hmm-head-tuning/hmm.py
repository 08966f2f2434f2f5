# SPDX-License-Identifier: Apache-2.0
"""Hidden Markov text, its beliefs, features of either kind, and the recurrent models of study 132."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def seeded(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


def dirichlet(rows: int, columns: int, alpha: float, seed: int) -> Tensor:
    """Rows [rows, columns] from a Dirichlet, fp64."""
    import numpy as np

    return torch.from_numpy(np.random.default_rng(seed).dirichlet([alpha] * columns, rows))


@dataclass(frozen=True)
class HMM:
    """Transition A [H, H] (row: from), emission O [H, V], start [H], fp64."""

    A: Tensor
    O: Tensor
    start: Tensor

    def sample(self, n: int, T: int, g: torch.Generator) -> Tensor:
        """n sequences of symbols [n, T]."""
        h = torch.multinomial(self.start, n, True, generator=g)
        out = []
        for _ in range(T):
            out.append(torch.multinomial(self.O[h], 1, generator=g)[:, 0])
            h = torch.multinomial(self.A[h], 1, generator=g)[:, 0]
        return torch.stack(out, 1)

    def beliefs(self, x: Tensor) -> Tensor:
        """P(h_T | x_1 .. x_T) of sequences [n, T], [n, H], by the forward algorithm."""
        b = self.start.expand(len(x), -1)
        for t in range(x.shape[1]):
            if t:
                b = b @ self.A
            b = b * self.O[:, x[:, t]].T
            b = b / b.sum(1, keepdim=True)
        return b


def made(hidden: int, symbols: int, alpha: float = 0.3, seed: int = 0) -> HMM:
    return HMM(
        dirichlet(hidden, hidden, alpha, 3 * seed), dirichlet(hidden, symbols, alpha, 3 * seed + 1),
        dirichlet(1, hidden, 1.0, 3 * seed + 2)[0],
    )  # fmt: skip


def expanded(beliefs: Tensor, p: int) -> Tensor:
    """p features of beliefs [n, H] by a fixed random ReLU layer, [n, p]; smaller p are the first of a larger one."""
    g = seeded("relu")
    W = torch.randn(4096, beliefs.shape[1], generator=g, dtype=torch.float64)[:p]
    b = 0.3 * torch.randn(4096, generator=g, dtype=torch.float64)[:p]
    return (beliefs @ W.T + b).relu()


class Recurrent(nn.Module):
    """A GRU of some width that predicts the next symbol; `features` are its last state."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(symbols, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(x))[0])

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return torch.cat([self.gru(self.embed(part))[0][:, -1] for part in x.split(500)]).double()


def pretrained(hmm: HMM, T: int, width: int, steps: int) -> tuple[Recurrent, float]:
    """The model after `steps` of 64 fresh sequences, and its loss a symbol on 500 others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Recurrent(hmm.O.shape[1], width)
    g = seeded("text", width)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        x = hmm.sample(64, T, g)
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        optimiser.step()
    held = hmm.sample(500, T, seeded("held out"))
    with torch.no_grad():
        loss = F.cross_entropy(model(held[:, :-1]).flatten(0, 1), held[:, 1:].flatten())
    return model.eval(), float(loss)


def labels(beliefs: Tensor, M: Tensor, snr: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Targets [n, k] linear in the belief by M [H, k], without noise and with noise of variance signal / snr."""
    clean = beliefs @ M
    noise = (clean.var(0) / snr).sqrt() * torch.randn(clean.shape, generator=g, dtype=torch.float64)
    return clean, clean + noise
