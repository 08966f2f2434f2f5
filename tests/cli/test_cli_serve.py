# SPDX-License-Identifier: Apache-2.0
"""`tunesmith serve` from the command line: its proof, a real server that ends at SIGTERM, and its errors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest


@pytest.fixture
def shelf(saved: Path, tmp_path: Path) -> Path:
    """A folder that holds the saved delta and a broken one."""
    root = tmp_path / "deltas"
    root.mkdir()
    (root / "good").symlink_to(saved, target_is_directory=True)
    (root / "broken").mkdir()
    (root / "broken" / "delta.json").write_text("{}")
    return root


def test_the_proof_from_the_command_line(run: Callable[..., Any], tiny: Path, shelf: Path) -> None:
    done = run("serve", "--model", str(tiny), "--deltas", str(shelf), "--selftest", "--json")
    assert done.code == 0, done.err
    assert done.json["holds"] is True and done.json["deltas"] == 1 and done.json["tokens"] == 48
    assert "selftest holds" in done.json["proof"]


def test_a_server_answers_and_finishes_what_is_under_way_at_sigterm(tiny: Path, shelf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunesmith", "serve", "--model", str(tiny), "--deltas", str(shelf), "--port", "0"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        until, found = time.monotonic() + 90, None
        while found is None and time.monotonic() < until:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", "".join(said))
            time.sleep(0.05)
        assert found, "".join(said)
        assert "not served" in "".join(said) and "broken" in "".join(said)
        url = found[0]
        body = {"model": "good", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 300, "temperature": 0}
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60))
        )
        asking.start()
        while "tunesmith_running_requests 1" not in httpx.get(f"{url}/metrics").text and asking.is_alive():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        asking.join(timeout=60)
        assert answers and answers[0].status_code == 200
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, "".join(said)
    assert re.search(r"served 1 requests, \d+ tokens; cells free 16384/16384", out)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--policy", "lifo"], "unknown policy 'lifo'"),
        (["--deltas", "nowhere"], "is no folder"),
        (["--keys", "nowhere.json"], "the keys cannot be read"),
    ],
)
def test_bad_settings_are_told(run: Callable[..., Any], tiny: Path, more: list[str], text: str) -> None:
    done = run("serve", "--model", str(tiny), *more)
    assert done.code == 2 and text in done.err


def test_replicas_need_their_extra(
    run: Callable[..., Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "tunesmith.serve.cluster", raising=False)
    done = run("serve", "--model", str(tiny), "--deltas", str(tmp_path), "--replicas", "2")
    assert done.code == 6 and "tunesmith[serve,ray]" in done.err


def test_a_base_that_reads_no_text_is_not_served(run: Callable[..., Any]) -> None:
    done = run("serve", "--model", "efficientnet-lite0")
    assert done.code == 2 and "is not served" in done.err
    done = run("serve", "--model", "minilm-l6", "--selftest")
    assert done.code == 2 and "text that is written" in done.err
