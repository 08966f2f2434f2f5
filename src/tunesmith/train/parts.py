# SPDX-License-Identifier: Apache-2.0
"""How the rows of a step are cut into parts that are computed one after another.

The loss of a step is a sum over rows, so the cut changes its gradient by rounding only. A part holds in memory what its
backward pass needs; beyond some thousand positions a matrix product gets no faster, so larger parts cost memory for
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tunesmith.train.config import TrainConfig
from tunesmith.train.processes import world
from tunesmith.train.tasks import Task

POSITIONS = {"cpu": 1024, "cuda": 16384}  # tokens of a part, padding included, where `micro_batch` does not say


def parts_of(task: Task, indices: Sequence[int], config: TrainConfig, device: torch.device) -> list[list[int]]:
    """The rows of one step in parts, in order: `micro_batch` rows each, else even parts of about `POSITIONS` tokens."""
    rows = list(indices)
    size = config.micro_batch or _size(task, rows, device)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _size(task: Task, rows: list[int], device: torch.device) -> int:
    longest = max(task.tokens([i]) for i in rows)
    if longest <= 1:  # pictures and sounds
        return len(rows)
    room = POSITIONS.get(device.type, POSITIONS["cpu"]) * world()  # each process takes its share of a part
    return math.ceil(len(rows) / math.ceil(len(rows) * longest / room))
