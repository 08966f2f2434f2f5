# SPDX-License-Identifier: Apache-2.0
"""The tiny Llama that the tests of serving share."""

from __future__ import annotations

import pytest
from serve_cases import tiny_llama

from tunesmith.core.base import Base


@pytest.fixture(scope="session")
def llama() -> Base:
    return tiny_llama()
