# SPDX-License-Identifier: Apache-2.0
"""Fuzz the API of toy servers against its own OpenAPI description with schemathesis.

    python tools/fuzz_api.py --cases 10000 --seed 0

Valid and invalid bodies for every operation, and bodies that are no JSON. Every answer must come in time, with a status
that the description lists and a body of the form it gives for it, and never with 5xx. Afterwards every cell of the pool
must be free and the servers must still answer. Prints JSON; exits 1 if anything was wrong. Needs schemathesis.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import requests
import schemathesis
import torch
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi import checks

from serve_toy import ADMIN, fill, reader, serve, writer

SECONDS = 20.0  # the longest an answer may take
PATIENCE = {
    "deadline": None, "database": None, "suppress_health_check": list(hypothesis.HealthCheck),
    "phases": [hypothesis.Phase.generate], "print_blob": False,
}  # fmt: skip
CHECKS = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
RAW = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=100).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        ["[" * 5000, '{"a":' * 3000, "9" * 5000, "1e999", '{"model": NaN}', '{"model": "\\ud800"}', "\x00"]
    ).map(str.encode),
    st.recursive(st.none() | st.floats() | st.integers() | st.text(max_size=5), lambda c: st.lists(c, max_size=3)).map(
        lambda v: json.dumps(v).encode()
    ),
)


class Fuzz:
    """What was sent and what went wrong."""

    def __init__(self) -> None:
        self.cases, self.codes, self.wrong = 0, Counter[str](), list[str]()
        self.slowest = 0.0

    def check(self, what: str, sent: Any, answer: Any, seconds: float, verdict: str | None) -> None:
        self.cases += 1
        self.codes[f"{what} {answer.status_code}"] += 1
        self.slowest = max(self.slowest, seconds)
        if answer.status_code >= 500:
            verdict = f"status {answer.status_code}: {answer.text[:300]}"
        if verdict is not None and len(self.wrong) < 50:
            self.wrong.append(f"{what}: {verdict} after {str(sent)[:600]}")


def narrowed(found: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The description with models that exist and short answers, so that most cases reach the model."""
    for schema in found["components"]["schemas"].values():
        fields = schema.get("properties", {})
        if "model" in fields:
            fields["model"] = {"type": "string", "enum": [*names, names[0], "nobody"]}
        for name in ("max_tokens", "max_completion_tokens"):
            if name in fields:
                fields[name] = {"type": "integer", "minimum": 1, "maximum": 12}
                schema["required"] = sorted({*schema["required"], name})
        if "dimensions" in fields:
            fields["dimensions"] = {"enum": [24, None]}
        _shorten(fields)
    return found


def _shorten(part: Any) -> None:
    """Texts of a few tokens, and tokens that exist."""
    if isinstance(part, list):
        for one in part:
            _shorten(one)
    if not isinstance(part, dict):
        return
    for one in part.values():
        _shorten(one)
    if part.get("type") == "string" and part.get("maxLength", 0) > 1000:
        part["maxLength"] = 12
    if part.get("type") == "integer" and part.get("minimum") == 0 and "maximum" not in part:
        part["maximum"] = 299


def fuzz(url: str, names: list[str], cases: int, seed: int, into: Fuzz) -> None:
    """Send `cases` to a server, most of them to what writes and reads."""
    headers = {"authorization": f"Bearer {ADMIN}"}
    described = narrowed(requests.get(f"{url}/openapi.json", timeout=SECONDS).json(), names)
    schema = schemathesis.openapi.from_dict(described)
    operations = [o.ok() for o in schema.get_all_operations()]
    weights = {o.label: 8 if "/v1/c" in o.label or "/v1/e" in o.label else 1 for o in operations}
    session = requests.Session()
    for o in operations:
        share = max(4, cases * weights[o.label] // sum(weights.values()))
        modes = list(schemathesis.GenerationMode)
        for mode in modes:
            _cases(o, mode, share // (len(modes) + 1), seed, url, headers, session, into)
        if o.method.lower() in ("post", "put"):
            _raw(o, share // (len(modes) + 1), seed, url, headers, session, into)


def _cases(o: Any, mode: Any, n: int, seed: int, url: str, headers: dict[str, str], session: Any, into: Fuzz) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=max(1, n), **PATIENCE)
    @hypothesis.given(case=o.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        began = time.monotonic()
        answer = case.call(base_url=url, headers=headers, session=session, timeout=SECONDS)
        verdict = None
        try:
            case.validate_response(answer, checks=CHECKS)
        except (Failure, FailureGroup) as failure:
            verdict = " ".join(str(failure).split())[:600]
        into.check(
            o.label, case.body if case.body is not None else case.path, answer, time.monotonic() - began, verdict
        )

    try:
        run()
    except hypothesis.errors.Unsatisfiable:
        return  # an operation without parameters has no invalid form
    except schemathesis.errors.InvalidSchema as error:
        into.wrong.append(f"{o.label}: {error}")


def _raw(o: Any, n: int, seed: int, url: str, headers: dict[str, str], session: Any, into: Fuzz) -> None:
    path = o.path.replace("{name}", "d0")

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=max(1, n), **PATIENCE)
    @hypothesis.given(
        body=RAW, kind=st.sampled_from(["application/json", "text/plain", "application/x-www-form-urlencoded"])
    )
    def run(body: bytes, kind: str) -> None:
        began = time.monotonic()
        sent = {**headers, "content-type": kind}
        answer = session.post(f"{url}{path}", data=body, headers=sent, timeout=SECONDS)
        verdict = None
        if answer.status_code >= 400 and "message" not in answer.json().get("error", {}):
            verdict = f"no error in the body: {answer.text[:200]}"
        into.check(f"raw {path}", body, answer, time.monotonic() - began, verdict)

    run()


def check(cases: int, seed: int, work: Path) -> dict[str, Any]:
    """Fuzz a writing and a reading server whose deltas lie in `work`; the report."""
    found, left = Fuzz(), []
    for base, n in ((writer(), 7 * cases // 10), (reader(), 3 * cases // 10)):
        root = work / base.name
        root.mkdir()
        names = [base.name, *fill(base, root, 4)]
        server = serve(base, root)
        try:
            began, before = time.monotonic(), found.cases
            while found.cases - before < n:  # hypothesis ends early where it has seen all there is
                fuzz(server.url, names, n, seed + found.cases, found)
            left.append(after(server, base.name, time.monotonic() - began, found.cases - before))
        finally:
            server.close()
    return {
        "cases": found.cases, "seed": seed, "slowest_seconds": round(found.slowest, 3), "servers": left,
        "answers": dict(sorted(found.codes.items())), "wrong": found.wrong,
        "good": not found.wrong and all(x["good"] for x in left),
    }  # fmt: skip


def after(server: Any, name: str, seconds: float, cases: int) -> dict[str, Any]:
    """What a server looks like after the last case."""
    free, engine = server.settled(), server.worker.engine
    if engine is not None:
        engine.pool.check()
    alive = requests.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
    c = server.worker.counts
    return {
        "base": name, "cases": cases, "seconds": round(seconds, 1), "requests": c.requests, "ends": dict(c.ends),
        "everything_free": free, "alive": alive, "good": free and alive,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        report = check(args.cases, args.seed, Path(place))
    print(json.dumps(report, indent=2))
    return 0 if report["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
