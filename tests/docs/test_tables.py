# SPDX-License-Identifier: Apache-2.0
"""The generated tables of the README are those of the code, and the check sees when they are not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tunesmith.core import method as registry
from tunesmith.core.derive import trainable_recipes

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def tables(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "readme_tables.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tables_are_up_to_date_and_rewriting_repairs_them(tmp_path: Path) -> None:
    assert tables("--check").stdout == ""
    text = README.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `lora`"))
    stale = tmp_path / "README.md"
    stale.write_text(text.replace(row, row.replace("exact", "no")), encoding="utf-8")
    checked = tables("--check", str(stale))
    assert checked.returncode == 1 and "methods" in checked.stdout and "verbs" not in checked.stdout
    assert tables(str(stale)).returncode == 0
    assert stale.read_text(encoding="utf-8") == text


def test_every_method_of_the_package_has_a_row() -> None:
    text = README.read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([\w-]+)` \| `ts\.", text, re.MULTILINE))
    methods = {i.name for i in registry.methods() if i.cls.__module__.startswith("tunesmith.deltas.")}
    assert rows == methods | {i.name for i in trainable_recipes()}


def test_missing_markers_are_an_error(tmp_path: Path) -> None:
    bare = tmp_path / "README.md"
    bare.write_text("# no markers\n", encoding="utf-8")
    done = tables(str(bare))
    assert done.returncode == 1 and "verbs:begin" in done.stderr


def test_the_demo_block_can_be_filled() -> None:
    text = README.read_text(encoding="utf-8")
    for mark in ("<!-- demo:begin -->", "<!-- demo:end -->"):
        assert text.count(mark) == 1
    inside = text.split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    assert inside.strip(), "the receipt of the demo is missing"
