# SPDX-License-Identifier: Apache-2.0
"""A server killed under load, with a writer of its deltas, loses none and answers as before (`tools/serve_kill.py`)."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_under_load_and_started_again(kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    report = importlib.import_module("serve_kill").check(kills, 3, tmp_path)
    assert report["good"] and report["kills"] == kills, report
