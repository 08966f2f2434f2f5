# SPDX-License-Identifier: Apache-2.0
"""The rows of `log.jsonl`: what may be written to them, and cutting them back to the step a run resumes from."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tunesmith.core.errors import ResourceError
from tunesmith.evaluate.receipt import write_text


def jsonable(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def truncate(path: Path, step: int) -> None:
    """Drop log rows after `step` and a half-written last line, in one step: a kill here must not lose the log."""
    if not path.exists():
        return
    kept = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise ResourceError(f"the log cannot be read ({e.strerror or e})", where=str(path)) from None
    for line in lines:
        try:
            row = json.loads(line)
            at = row.get("step") or row["nonfinite"]["step"]
            if at <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            break
    write_text(path, "".join(f"{line}\n" for line in kept))
