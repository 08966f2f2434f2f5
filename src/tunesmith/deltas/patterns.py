# SPDX-License-Identifier: Apache-2.0
"""Options that differ by path; see `tunesmith.core.patterns`."""

from __future__ import annotations

from tunesmith.core.patterns import matches, pick, require_used

__all__ = ["matches", "pick", "require_used"]
