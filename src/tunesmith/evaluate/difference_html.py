# SPDX-License-Identifier: Apache-2.0
"""What a delta changed as one self-contained page; see `page` and `svg` for what shell and pictures promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tunesmith.core.probe import Finding
from tunesmith.evaluate import page as shell
from tunesmith.evaluate.difference import Difference
from tunesmith.evaluate.page import escaped, section, table
from tunesmith.evaluate.svg import BAD, BASE, INK, SOFT, TUNED, WARN, svg

_ROWS = 40
_TEXTS = 24
_LINES = 6
_LEVELS = 24


def page(found: Difference) -> str:
    """The whole page as text."""
    at = "" if found.strength == 1 else f" at strength {found.strength:g}"
    made = f"{', '.join(found.methods)}{at}, {found.created}"
    head = (
        f'<header>\n<h1>{escaped(found.delta)} <span class="soft">against {escaped(found.base)}</span></h1>\n'
        f'<p class="soft">{escaped(made)}</p>\n<p class="proof">{escaped(found.proof())}</p>\n</header>'
    )
    parts = [head, *(_finding(f) for f in found.findings)]
    if found.skipped:
        listed = "\n".join(f"<dt>{escaped(k)}</dt><dd>{escaped(v, 400)}</dd>" for k, v in found.skipped.items())
        parts.append(section("Not measured", f"<dl>\n{listed}\n</dl>"))
    facts = {"base": f"{found.base}, sha256 {found.base_digest[:16]}", "delta": f"digest {found.delta_digest[:16]}"}
    facts |= {name: f"{_options(found.options[name])}; {s:.1f} s" for name, s in found.seconds.items()}
    listed = "\n".join(f"<dt>{escaped(k)}</dt><dd>{escaped(v, 400)}</dd>" for k, v in facts.items())
    parts.append(section("How it was measured", f"<dl>\n{listed}\n</dl>"))
    return shell.page(f"{found.delta} against {found.base}", "\n".join(parts))


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in options.items()) or "no options"


def _finding(f: Finding) -> str:
    pictures = shell.figures(plots(f))
    note = f.facts.get("note")
    beside = f.facts.get("not_seen")
    told = [f"<p>{escaped(f.summary)}</p>"]
    if note:
        told.append(f'<p class="soft">{escaped(str(note))}</p>')
    if beside:
        told.append(f'<p class="warn">Not seen: {escaped("; ".join(f"{k}: {v}" for k, v in beside.items()))}</p>')
    return section(_TITLES.get(f.probe, escaped(f.probe)), "\n".join([*told, pictures, _rows(f)]))


def _rows(f: Finding) -> str:
    columns = [c for c in _COLUMNS.get(f.probe, ()) if any(c in r for r in f.rows)]
    if not columns:
        return ""
    key, falling = _SORTED.get(f.probe, ("", False))
    rows = sorted(f.rows, key=lambda r: r.get(key) or 0.0, reverse=falling) if key else list(f.rows)
    most = _TEXTS if f.probe == "novelty" else _ROWS
    body = [[escaped(cell(r.get(c)), 300) for c in columns] for r in rows[:most]]
    left = f'<p class="soft">{len(rows) - most} more rows are in the JSON.</p>' if len(rows) > most else ""
    return table([escaped(c.replace("_", " ")) for c in columns], body) + left


def cell(value: Any) -> str:
    """A value as a short text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else str(value)
    return str(value)


_TITLES = {
    "norms": "Size and rank of the change",
    "localisation": "Where it is concentrated",
    "drift": "Which modules moved",
    "spectra": "Spectra before and after",
    "intruders": "Intruder dimensions",
    "depth-kl": "How deep into the answer",
    "prior": "Hold of the prior",
    "novelty": "What is new",
    "revival": "How soon the old task comes back",
    "wrapper": "The old task with a few rows off",
}
_COLUMNS = {
    "norms": ("tensor", "role", "depth", "norm", "relative", "stable_rank", "effective_rank"),
    "localisation": ("tensor", "role", "depth", "entries", "share_of_norm", "needed_90", "participation"),
    "drift": ("module", "role", "depth", "entries", "drift", "relative"),
    "spectra": ("tensor", "role", "depth", "overlap", "moved", "inside"),
    "intruders": ("tensor", "role", "depth", "intruders", "by_space", "side", "spans"),
    "depth-kl": ("t", "kl", "base_loss", "delta_loss", "answers"),
    "prior": ("layer", "base_c", "base_a", "delta_c", "delta_a", "low_prior_accuracy_without"),
    "novelty": ("cluster", "novelty", "text"),
    "revival": ("step", "loss", "recovered"),
    "wrapper": ("k", "loss", "recovered", "rows"),
}
_SORTED = {
    "norms": ("relative", True),
    "localisation": ("share_of_norm", True),
    "spectra": ("overlap", False),
    "intruders": ("intruders", True),
}


def plots(f: Finding) -> list[tuple[str, str]]:
    """(caption, svg) of every picture a finding has data for."""
    return [(caption, svg(draw, f"{f.probe}-{i}")) for i, (caption, draw) in enumerate(_PLOTS.get(f.probe, _none)(f))]


Drawn = list[tuple[str, Callable[[Axes], None]]]


def _none(f: Finding) -> Drawn:
    return []


def _grid(rows: Sequence[Mapping[str, Any]], value: str, label: str) -> Callable[[Axes], None]:
    """Depth against role, the area of each dot by its mean value; lines where only one role is there."""
    cells: dict[tuple[str, int], list[float]] = {}
    for r in rows:
        if r.get(value) is not None:
            cells.setdefault((r["role"] or r["kind"], r["depth"]), []).append(float(r[value]))
    means = {k: sum(v) / len(v) for k, v in cells.items()}
    roles = list(dict.fromkeys(role for role, _ in means))
    top = max(means.values(), default=0.0)

    def draw(axes: Axes) -> None:
        # In steps, as each size of dot is a path of its own in the file; not cut at the first and last depth.
        steps: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        for (role, depth), v in means.items():
            level = max(1, round(_LEVELS * v / top)) if top > 0 else 1
            steps.setdefault((level, v > 0), []).append((depth, roles.index(role)))
        for (level, moved), at in steps.items():
            axes.scatter(*zip(*at, strict=True), s=130 * level / _LEVELS, color=TUNED if moved else BASE, linewidths=0,
                         clip_on=False)  # fmt: skip
        axes.set_yticks(range(len(roles)), roles)
        axes.set_ylim(len(roles) - 0.4, -0.6)
        axes.set_xlabel(f"depth; largest {label} {top:.3g}")
        _whole_numbers(axes, [depth for _, depth in means])

    return draw


def _whole_numbers(axes: Axes, values: Sequence[int]) -> None:
    low, high = min(values, default=0), max(values, default=0)
    step = max(1, math.ceil((high - low + 1) / 8))
    axes.set_xticks(list(range(low, high + 1, step)))
    room = max(0.6, 0.04 * (high - low))
    axes.set_xlim(low - room, high + room)


def _bars(names: Sequence[str], values: Sequence[float], label: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        axes.barh(range(len(names)), values, height=0.6, color=TUNED)
        axes.set_yticks(range(len(names)), _shortened(names))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=4)

    return draw


def _shortened(names: Sequence[str], most: int = 24) -> list[str]:
    """Module paths without the pieces that all begin with; one that is still long is cut at a dot."""
    pieces = [n.split(".") for n in names]
    shared = 0
    while len(names) > 1 and all(len(p) > shared + 1 and p[shared] == pieces[0][shared] for p in pieces):
        shared += 1
    out = []
    for p in pieces:
        kept = p[shared:]
        while len(kept) > 1 and len(".".join(kept)) > most:
            kept = kept[1:]
        out.append(".".join(kept)[-most:])
    return out


def _norms(f: Finding) -> Drawn:
    def ranks(axes: Axes) -> None:
        rows = [r for r in f.rows if r.get("effective_rank")]
        axes.scatter([r["effective_rank"] for r in rows], [r["relative"] or 0 for r in rows], s=18, color=TUNED, alpha=0.7,
                     linewidths=0)  # fmt: skip
        axes.set_xlabel("effective rank of the change")
        axes.set_ylabel("relative norm")
        axes.margins(0.1)

    grid = ("change relative to the weight, by depth and role", _grid(f.rows, "relative", "relative change"))
    return [grid, ("each tensor: size against rank", ranks)] if any(r.get("effective_rank") for r in f.rows) else [grid]


def _localisation(f: Finding) -> Drawn:
    curve = [(c["share"], c["carried"]) for c in f.facts["curve"] if c["carried"] is not None]

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*curve, strict=True), color=TUNED, linewidth=1.8, marker="o", markersize=3)
        axes.axvline(f.facts["share"], color=SOFT, linewidth=1, linestyle=(0, (4, 4)))
        axes.set_xscale("log")
        axes.set_xticks([1e-4, 1e-2, 1], ["0.01%", "1%", "100%"])
        axes.minorticks_off()
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("share of all entries, largest first")
        axes.set_ylabel("squared norm carried")

    grid = ("share of the squared norm, by depth and role", _grid(f.rows, "share_of_norm", "share"))
    return [("squared norm carried by the largest entries", draw), grid] if curve else [grid]


def _drift(f: Finding) -> Drawn:
    top = f.rows[:10]
    return [("the ten modules that moved most", _bars([r["module"] or "model" for r in top], [r["drift"] for r in top],
                                                     "mean |change| of an entry"))]  # fmt: skip


def _spectra(f: Finding) -> Drawn:
    turned = sorted(f.rows, key=lambda r: r["overlap"])[:_LINES]

    def change(axes: Axes) -> None:
        for i, r in enumerate(turned):
            S = [v for v in r["change"] if v > r["change"][0] * 1e-6] if r["change"] else []
            axes.plot(
                range(1, len(S) + 1), S, color=TUNED, linewidth=1.3, alpha=1 - 0.12 * i, marker="o", markersize=2.5
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))  # matplotlib's own is mathematics markup
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.locator_params(axis="x", integer=True, nbins=8)
        axes.set_xlabel("rank of the singular value")
        axes.set_ylabel("of the change")

    first = turned[0]

    def weights(axes: Axes) -> None:
        for name, colour, width in (("before", BASE, 3.0), ("after", TUNED, 1.4)):
            axes.plot(range(1, len(first[name]) + 1), first[name], color=colour, linewidth=width, label=name)
        axes.set_xlabel("rank of the singular value")
        axes.set_ylabel("of the weight")
        axes.set_ylim(bottom=0)
        axes.legend()

    return [
        (f"spectrum of the change, the {len(turned)} most turned matrices", change),
        (f"before and after: {first['tensor']}", weights),
        ("1 - overlap of the leading vectors, by depth and role",
         _grid([{**r, "turned": 1 - r["overlap"]} for r in f.rows], "turned", "turn")),
    ]  # fmt: skip


def _intruders(f: Finding) -> Drawn:
    def matched(axes: Axes) -> None:
        for r in f.rows:
            axes.plot(range(1, len(r["m"]) + 1), r["m"], color=BASE, linewidth=1.0, alpha=0.7)
            bad = [(j + 1, r["m"][j]) for j in r["at"]]
            if bad:
                axes.scatter(*zip(*bad, strict=True), s=12, color=BAD, linewidths=0, zorder=3)
        axes.axhline(f.facts["eps"], color=SOFT, linewidth=1, linestyle=(0, (4, 4)))
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("singular vector, after")
        axes.set_ylabel("best cosine to the base")

    grid = ("intruders, by depth and role", _grid(f.rows, "intruders", "mean count"))
    return [("each line a matrix; red below eps", matched), *([grid] if f.values["intruders"] else [])]


def _depth(f: Finding) -> Drawn:
    t = [r["t"] for r in f.rows]

    def divergence(axes: Axes) -> None:
        axes.bar(t, [r["kl"] for r in f.rows], width=0.7, color=TUNED)
        axes.set_xlabel("answer token")
        axes.set_ylabel("nats")
        axes.grid(axis="x", visible=False)

    def loss(axes: Axes) -> None:
        for name, colour in (("base", BASE), ("delta", TUNED)):
            axes.plot(t, [r[f"{name}_loss"] for r in f.rows], color=colour, linewidth=1.6, marker="o", markersize=2.5,
                      label=name)  # fmt: skip
        axes.set_xlabel("answer token")
        axes.set_ylabel("cross-entropy, nats")
        axes.legend()

    made: Drawn = [("KL(with delta || base) by answer token", divergence), ("loss by answer token", loss)]
    layers = f.facts.get("by_layer")
    if layers:
        depth = [r["depth"] for r in layers]

        def deep(axes: Axes) -> None:
            axes.plot(depth, [r["kl"] for r in layers], color=TUNED, linewidth=1.6, marker="o", markersize=3)
            axes.set_ylabel("nats")
            axes.set_xlabel("read after block")
            _whole_numbers(axes, depth)

        made.append(("the same read at every depth (lens)", deep))
    return made


def _prior(f: Finding) -> Drawn:
    made: Drawn = []
    rows = [r for r in f.rows if r.get("base_c") is not None]
    if rows:
        layers = [r["layer"] for r in rows]

        def by_layer(axes: Axes) -> None:
            axes.plot(layers, [r["base_c"] for r in rows], color=WARN, linewidth=1.6, label="follows the prior")
            axes.plot(layers, [r["base_a"] for r in rows], color=TUNED, linewidth=1.6, label="right")
            for l in f.facts.get("suggested", ()):
                axes.axvline(l, color=SOFT, linewidth=0.8, linestyle=(0, (3, 3)))
            axes.set_xlabel("layer; dashed: suggested")
            axes.legend()
            _whole_numbers(axes, layers)

        made.append(("base, read at every layer", by_layer))

    def strata(axes: Axes) -> None:
        for name, colour in (("base", BASE), ("delta", TUNED)):
            found = f.facts[f"{name}_strata"]
            axes.plot(range(1, len(found) + 1), [s["accuracy"] for s in found], color=colour, linewidth=1.6, marker="o",
                      label=name)  # fmt: skip
        axes.set_ylim(-0.02, 1.05)
        axes.set_xticks(range(1, len(f.facts["base_strata"]) + 1))
        axes.set_xlabel("quantile of the prior, rising")
        axes.set_ylabel("accuracy")
        axes.legend()

    return [*made, ("accuracy by prior of the answer", strata)]


def _novelty(f: Finding) -> Drawn:
    def draw(axes: Axes) -> None:
        for r in f.rows:
            axes.scatter([r["novelty"]], [r["cluster"]], s=22, color=TUNED, alpha=0.6, linewidths=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(sorted({r["cluster"] for r in f.rows}))
        axes.set_ylabel("cluster")
        axes.set_xlabel("novelty, nats a token")
        axes.margins(0.15)

    return [("each text by cluster", draw)]


def _back(over: str, label: str) -> Callable[[Finding], Drawn]:
    """The old task's loss over steps or rows, between that of the base and that of the delta."""

    def drawn(f: Finding) -> Drawn:
        def draw(axes: Axes) -> None:
            at = [r[over] for r in f.rows]
            axes.plot(at, [r["loss"] for r in f.rows], color=TUNED, linewidth=1.6, marker="o", markersize=3)
            for name, colour in (("base", BASE), ("delta", WARN)):
                axes.axhline(f.values[f"loss_{name}"], color=colour, linewidth=0.8, label=name)
            axes.set_xlabel(label)
            axes.set_ylabel("loss of a batch")
            axes.legend()

        return [("the old task's loss", draw)] if f.rows else []

    return drawn


_PLOTS: dict[str, Callable[[Finding], Drawn]] = {
    "norms": _norms,
    "localisation": _localisation,
    "drift": _drift,
    "spectra": _spectra,
    "intruders": _intruders,
    "depth-kl": _depth,
    "prior": _prior,
    "novelty": _novelty,
    "revival": _back("step", "steps of training on it"),
    "wrapper": _back("k", "rows set to zero"),
}
