# SPDX-License-Identifier: Apache-2.0
"""One thread, fixed seeds and one number format for every test, whatever the processor."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tunesmith.models import precision

torch.set_num_threads(1)
settings.register_profile("tunesmith", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("tunesmith")


_real_flags = precision.cpu_flags


def _no_flags(cpuinfo: Path | None = None) -> frozenset[str]:
    return frozenset() if cpuinfo is None else _real_flags(cpuinfo)


precision.cpu_flags = _no_flags  # precision "auto" is fp32 then: tolerances do not depend on the machine


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
