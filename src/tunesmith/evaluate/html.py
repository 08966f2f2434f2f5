# SPDX-License-Identifier: Apache-2.0
"""A receipt as one self-contained page with inline SVG plots; see `page` for what the shell promises."""

from __future__ import annotations

import os
from pathlib import Path

from tunesmith.evaluate import page as shell
from tunesmith.evaluate import plots, summary
from tunesmith.evaluate.page import escaped, section, table
from tunesmith.evaluate.receipt import Mean, Receipt, Sample, write_text

_SAMPLES = 12
_SAMPLE_TEXT = 4000


def write_html(receipt: Receipt, path: str | os.PathLike[str]) -> Path:
    """Write the page to `path`, atomically. Raises ResourceError if it cannot be written."""
    return write_text(path, page(receipt))


def page(receipt: Receipt) -> str:
    """The whole page as text."""
    body = "\n".join(
        (
            _head(receipt),
            _plots(receipt),
            _before_after(receipt),
            _gates(receipt),
            _samples(receipt),
            _safety_samples(receipt),
            _controls(receipt),
            _facts(receipt),
            _next(receipt),
        )
    )
    return shell.page(f"{receipt.delta.name} on {receipt.base.name}", body)


def _coloured(text: str, good: bool | None) -> str:
    return escaped(text) if good is None else f'<span class="{"good" if good else "bad"}">{escaped(text)}</span>'


def _head(receipt: Receipt) -> str:
    delta, base = receipt.delta, receipt.base
    kind, edge = {None: ("soft", ""), True: ("good", " good-edge"), False: ("bad", " bad-edge")}[receipt.accepted]
    badge = f'<span class="badge {kind}">{escaped(summary.verdict_text(receipt))}</span>'
    made = f"{delta.method}, {delta.trainable_parameters:,} trained parameters, {receipt.created}"
    warnings = "".join(f'<p class="warn">{escaped(w)}</p>' for w in receipt.warnings)
    return (
        f'<header>\n<h1>{escaped(delta.name)} <span class="soft">on {escaped(base.name)}</span></h1>\n'
        f'<p class="soft">{escaped(made)} {badge}</p>\n'
        f'<p class="proof{edge}">{escaped(receipt.proof())}</p>\n{warnings}</header>'
    )


def _plots(receipt: Receipt) -> str:
    made = shell.figures(plots.all_plots(receipt))
    return f"<h2>At a glance</h2>\n{made}" if made else ""


def _before_after(receipt: Receipt) -> str:
    rows = [
        (escaped(r.label), escaped(r.base), escaped(r.tuned), _coloured(r.change, r.good))
        for r in summary.rows(receipt)
    ]
    d, n = receipt.target.difference, receipt.target.n
    counts = f"{d.win} better, {d.tie} equal, {d.loss} worse; {summary.p_text(d.p)}"
    note = f"Paired on the same {n} examples: {counts}. Intervals are 95 %."
    return section(
        "Before and after", table(("", "base", "tuned", "change"), rows) + f'\n<p class="soft">{escaped(note)}</p>'
    )


def _gates(receipt: Receipt) -> str:
    rows = [
        (
            _coloured("pass" if g.passed else "fail", g.passed),
            escaped(g.clause),
            escaped(summary.gate_value(g, g.measured)),
            "" if g.limit is None else escaped(summary.gate_value(g, g.limit)),
            escaped(g.reason),
        )
        for g in receipt.gates
    ]
    return section("Gates", table(("", "required", "measured", "limit", "why"), rows) if rows else "")


def _sample(sample: Sample, metric: str) -> str:
    sides = "".join(
        f'<div class="{name}"><div class="label">{name}: {escaped(summary.score(value, metric))}</div>'
        f'<pre dir="auto">{escaped(text, _SAMPLE_TEXT) or "(empty)"}</pre></div>'
        for name, text, value in (("base", sample.base, sample.base_score), ("tuned", sample.tuned, sample.tuned_score))
    )
    return (
        f'<div class="sample"><div class="label">prompt</div><pre dir="auto">{escaped(sample.prompt, _SAMPLE_TEXT)}</pre>'
        f'<div class="label">expected</div><pre dir="auto">{escaped(sample.reference, _SAMPLE_TEXT)}</pre>'
        f'<div class="pair">{sides}</div></div>'
    )


def _samples(receipt: Receipt) -> str:
    target = receipt.target
    return section("Side by side", "\n".join(_sample(s, target.metric) for s in target.samples[:_SAMPLES]))


def _safety_samples(receipt: Receipt) -> str:
    if receipt.safety is None:
        return ""
    blocks = []
    for s in receipt.safety.samples[:_SAMPLES]:
        sides = "".join(
            f'<div class="{name}"><div class="label">{name}: {"refused" if refused else "answered"}</div>'
            f'<pre dir="auto">{escaped(text, _SAMPLE_TEXT) or "(empty)"}</pre></div>'
            for name, text, refused in (("base", s.base, s.base_refused), ("tuned", s.tuned, s.tuned_refused))
        )
        blocks.append(
            f'<div class="sample"><div class="label">{escaped(s.kind)} prompt</div>'
            f'<pre dir="auto">{escaped(s.prompt, _SAMPLE_TEXT)}</pre><div class="pair">{sides}</div></div>'
        )
    return section("Safety, side by side", "\n".join(blocks))


def _controls(receipt: Receipt) -> str:
    metric = receipt.target.metric
    rows = [
        (
            escaped(c.name),
            escaped(summary.with_interval(Mean(c.mean, c.low, c.high), metric)),
            escaped(summary.change(c.difference, metric)),
        )
        for c in receipt.controls
    ]
    return section("Controls (these should not help)", table(("", "score", "against base"), rows) if rows else "")


def _facts(receipt: Receipt) -> str:
    facts = summary.cost_facts(receipt)
    facts += [
        ("base", f"{receipt.base.name}, fingerprint {summary.short(receipt.base.fingerprint)}"),
        ("delta", f"digest {summary.short(receipt.delta.digest)}"),
    ]
    facts += [(str(k), str(v)) for k, v in receipt.environment.items()]
    listed = "\n".join(f"<dt>{escaped(k)}</dt><dd>{escaped(v, 400)}</dd>" for k, v in facts)
    undo = f"<dt>undo</dt><dd>{_coloured(summary.undo_text(receipt), receipt.undo.exact)}</dd>"
    return section("Cost, undo and environment", f"<dl>\n{undo}\n{listed}\n</dl>")


def _next(receipt: Receipt) -> str:
    commands = "\n".join(escaped(c) for c in receipt.next)
    return f'<div class="next">{section("Next", f"<pre>{commands}</pre>")}</div>' if commands else ""
