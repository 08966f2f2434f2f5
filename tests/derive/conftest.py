# SPDX-License-Identifier: Apache-2.0
"""Small bases to derive from."""

from __future__ import annotations

import pytest

from tunesmith.core.base import Base
from tunesmith.core.toys import toys


@pytest.fixture
def lm() -> Base:
    return toys()[0]


@pytest.fixture
def vision() -> Base:
    return toys()[2]
