# SPDX-License-Identifier: Apache-2.0
"""A slice of the fuzzing that `tools/fuzz_api.py` does: nothing but documented answers, and nothing left behind."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("schemathesis")


@pytest.mark.parametrize("cases", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_body_breaks_the_api(cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    report = importlib.import_module("fuzz_api").check(cases, 1, tmp_path)
    assert report["good"], report["wrong"]
    assert report["cases"] >= cases and any(k.endswith("chat/completions 200") for k in report["answers"])
