# SPDX-License-Identifier: Apache-2.0
"""The counting world of study 002: strings, models, fine-tuning, and the three measurements."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.sample import Sample
from tunesmith.inspect.readout import block_states, readout
from tunesmith.inspect.revival import revive
from tunesmith.inspect.wrapper import ablation, leading, row_scores
from tunesmith.study.worlds.gpt import TinyGPT

A, B, C, OTHERS = 0, 1, 2, (3, 4, 5, 6, 7)  # letters; the others are frequent to rare
COUNT, EQ = 8, 9
PRIOR = (0.5, 0.3, 0.2)
SKEW = (0.4, 0.25, 0.15, 0.12, 0.08)


def seeded(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


@dataclass(frozen=True)
class World:
    """`letters` of a string, counts 0 .. `most` of a and b, and the size of the model."""

    letters: int
    most: int
    dim: int
    depth: int
    batch: int

    def strings(self, n: int, g: torch.Generator, *, spurious: float = 0.0, unequal: bool = False) -> Tensor:
        """n strings [n, letters]: counts of a and b uniform and independent, the rest c and other letters.

        In a share `spurious` of them count(b) = count(a) + 1. With `unequal` count(a) = count(b) never holds.
        """
        a = torch.randint(0, self.most + 1, (n,), generator=g)
        b = torch.randint(0, self.most + 1, (n,), generator=g)
        if unequal:
            b = (a + torch.randint(1, self.most + 1, (n,), generator=g)) % (self.most + 1)
        linked = torch.rand(n, generator=g) < spurious
        a = torch.where(linked, torch.randint(0, self.most, (n,), generator=g), a)
        b = torch.where(linked, a + 1, b)
        c = torch.randint(0, self.most + 1, (n,), generator=g).clamp_max(self.letters - 2 * self.most)
        rest = torch.tensor(OTHERS)[torch.multinomial(torch.tensor(SKEW), n * self.letters, True, generator=g)]
        place = torch.arange(self.letters).expand(n, -1)
        x = rest.view(n, -1)
        x = torch.where(place < (a + b + c)[:, None], C, x)
        x = torch.where(place < (a + b)[:, None], B, x)
        x = torch.where(place < a[:, None], A, x)
        order = torch.rand(n, self.letters, generator=g).argsort(1)
        return x.gather(1, order)

    def prompts(self, x: Tensor, operand: Tensor) -> Tensor:
        """[COUNT, operand, letters..., =] as tokens [n, letters + 3]."""
        n = len(x)
        return torch.cat([torch.full((n, 1), COUNT), operand[:, None], x, torch.full((n, 1), EQ)], 1)

    def model(self, seed: int) -> TinyGPT:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return TinyGPT(self.most + 1, vocab=10, dim=self.dim, depth=self.depth, length=self.letters + 3)


def counted(x: Tensor, letter: Tensor | int) -> Tensor:
    """How often `letter` (one for all or one each, [n]) stands in each string [n, letters]."""
    return (x == (letter if isinstance(letter, int) else letter[:, None])).sum(1)


def loss(base: Base, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Summed loss of the answers."""
    return F.cross_entropy(base.model(batch[0])[:, -1], batch[1], reduction="sum")


def run(base: Base, batch: tuple[Tensor, Tensor]) -> Any:
    return base.model(batch[0])


def pretrained(world: World, seed: int, steps: int, *, knows_a: bool) -> Base:
    """A model that counts a, b or c on request by the prior; without `knows_a` answers about a are drawn at random."""
    model, g = world.model(seed), seeded("strings", seed, knows_a)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm = max(1, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / warm) * max(0.01, 1 - max(0, s - warm) / max(1, steps - warm))
    )
    for _ in range(steps):
        x = world.strings(world.batch, g)
        operand = torch.multinomial(torch.tensor(PRIOR), world.batch, True, generator=g)
        y = counted(x, operand)
        if not knows_a:
            y = torch.where(operand == A, torch.randint(0, world.most + 1, y.shape, generator=g), y)
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(world.prompts(x, operand))[:, -1], y).backward()
        optimiser.step()
        schedule.step()
    for p in model.requires_grad_(False).eval().parameters():
        p.grad = None
    return Base(model, example=(world.prompts(world.strings(4, g), torch.zeros(4, dtype=torch.int64)),), name="counter")


@dataclass
class Task:
    """Rows of the prompt [COUNT a] with the count of a letter as the answer."""

    x: Tensor
    y: Tensor
    letter: int

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(size), self.y.split(size), strict=True))


def task(world: World, n: int, letter: int, *words: object) -> Task:
    """n rows on strings in which counts of a and b differ, so that an answer tells which was counted."""
    x = world.strings(n, seeded(*words), unequal=True)
    return Task(world.prompts(x, torch.full((n,), A)), counted(x, letter), letter)


@torch.no_grad()
def accuracy(base: Base, rows: Task) -> float:
    found = [base.model(x)[:, -1].argmax(1) == y for x, y in rows.batches(256)]
    return float(torch.cat(found).double().mean())


def tuned(world: World, base: Base, lr: float, steps: int, seed: int) -> Delta:
    """Full fine-tuning to answer [COUNT a] with the count of b, AdamW, 20 % warm-up, cosine to 1/100."""
    delta = Delta.create(base, ts.Full(targets="everything"), seed=seed)
    rows = task(world, steps * world.batch, B, "fine-tuning", seed)
    optimiser = torch.optim.AdamW([t for _, t in delta.items()], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=max(2, steps), pct_start=0.2, cycle_momentum=False,
                                                   final_div_factor=4)  # fmt: skip
    with base.frozen(), base.using(delta):
        for batch in rows.batches(world.batch):
            optimiser.zero_grad(set_to_none=True)
            (loss(base, batch) / len(batch[1])).backward()
            optimiser.step()
            schedule.step()
    return delta


def probes(world: World, base: Base, delta: Delta | None, seed: int, n: int, steps: int) -> list[float]:
    """Accuracy of a linear read-out of the count of a at the last position, after every block."""
    learn, held = task(world, n, A, "probe", seed), task(world, n // 2, A, "probe test", seed)
    with base.using(delta):
        states = [block_states(base, rows.batches(256), run) for rows in (learn, held)]
    return [
        readout(states[0][p], learn.y, states[1][p], held.y, classes=world.most + 1, steps=steps, lr=1e-2)
        for p in states[0]
    ]


def pruned(world: World, base: Base, delta: Delta, seed: int, ks: tuple[int, ...]) -> list[dict[str, float]]:
    """Old-task and new-task accuracy with the k rows zeroed that hide the old task most."""
    whole = base.merged(delta)
    learn = task(world, 512, A, "pruning", seed)
    held = {letter: task(world, 512, letter, "pruning test", seed) for letter in (A, B)}
    scores = row_scores(whole, Sample(lambda: learn.batches(256), run, loss), "everything")
    found = []
    for k in (0, *ks):
        with whole.using(ablation(whole, leading(scores, k))):
            found.append({"k": k, "old": accuracy(whole, held[A]), "new": accuracy(whole, held[B])})
    return found


def back(world: World, base: Base, delta: Delta, lr: float, seed: int, most: int, goal: float) -> dict[str, Any]:
    """Steps of training on the old task until its accuracy is at the goal, looked at more rarely as they go on."""
    rows, held = task(world, most * world.batch, A, "back", seed), task(world, 512, A, "back test", seed)
    looks: list[int] = []
    step = 1
    while step < most:
        looks.append(step)
        step += max(1, step // 8)
    mean: Callable[..., Tensor] = lambda b, batch: loss(b, batch) / len(batch[1])  # noqa: E731
    found = revive(
        base, delta, rows.batches(world.batch), mean, lambda b: accuracy(b, held), goal, lr=lr, looks=[*looks, most]
    )
    return {"reached": found.reached, "steps": found.steps, "accuracy": found.scores}
