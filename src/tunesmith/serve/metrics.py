# SPDX-License-Identifier: Apache-2.0
"""Numbers of a running server in the Prometheus text format."""

from __future__ import annotations

from tunesmith.serve.worker import Worker


def exposition(worker: Worker) -> str:
    """All metrics as text. Read from another thread than the engine's, so numbers may be a step apart."""
    c, now = worker.counts, worker.statistics()
    counters = {
        "requests_total": (c.requests, "requests taken"),
        "refused_total": (c.refused, "requests turned away because the queue was full"),
        "prompt_tokens_total": (c.prompt_tokens, "tokens of prompts"),
        "generated_tokens_total": (c.tokens, "tokens written"),
        "steps_total": (c.steps, "steps of the engine"),
        "busy_seconds_total": (c.busy_seconds, "seconds spent in steps"),
        "prefix_tokens_total": (now["prefix_tokens"], "prompt tokens found in the cache"),
        "guessed_tokens_total": (now["guessed"], "tokens that were guessed"),
        "guessed_right_total": (now["guessed_right"], "guesses that were what was written"),
        "delta_loads_total": (now["loads"], "deltas read from disk"),
        "delta_evictions_total": (now["evictions"], "deltas let go from memory"),
    }
    gauges = {
        "running_requests": (now["running"], "requests in the batch"),
        "waiting_requests": (now["waiting"], "requests in the queue"),
        "reading_requests": (now["reading"], "requests for embeddings or classes that are not done"),
        "cells": (now["cells"], "cells of the pool"),
        "cells_free": (now["cells_free"], "free cells, cached prefixes nobody reads counted in"),
        "cells_cached": (now["cells_cached"], "cells of cached prefixes nobody reads"),
        "deltas": (now["deltas"], "registered deltas"),
        "deltas_held": (now["deltas_held"], "deltas in memory"),
        "delta_bytes": (now["held_bytes"], "bytes of deltas in memory"),
        "first_token_seconds_p50": (now["first_token_p50"], "median time to the first token, last 1000 requests"),
        "first_token_seconds_p95": (now["first_token_p95"], "95 % of first tokens came within this time"),
    }
    lines = []
    for kind, table in (("counter", counters), ("gauge", gauges)):
        for name, (value, about) in table.items():
            lines += [
                f"# HELP tunesmith_{name} {about}",
                f"# TYPE tunesmith_{name} {kind}",
                f"tunesmith_{name} {value}",
            ]
    lines += ["# HELP tunesmith_ends_total requests by how they ended", "# TYPE tunesmith_ends_total counter"]
    lines += [f'tunesmith_ends_total{{reason="{reason}"}} {n}' for reason, n in sorted(c.ends.copy().items())]
    return "\n".join(lines) + "\n"
