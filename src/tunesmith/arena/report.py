# SPDX-License-Identifier: Apache-2.0
"""A comparison as files: `compare.json` with everything, a Markdown table, and one picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.evaluate.receipt import write_text

FORMAT = "tunesmith-compare/1"
_KEYS = (
    "created",
    "data",
    "base",
    "target",
    "retention",
    "equal",
    "plan",
    "rows",
    "controls",
    "left_out",
    "recommendation",
)
COLUMNS = ("method", "target", "kept", "trained", "stored", "sec", "peak", "lr", "vs best")


def write(result: Mapping[str, Any], folder: Path) -> None:
    """Write the three files into `folder`. Raises ResourceError."""
    plain = _plain(result)
    write_text(folder / "compare.json", json.dumps(plain, allow_nan=False) + "\n")
    write_text(folder / "table.md", table_md(plain))
    write_text(folder / "picture.svg", picture(plain))


def load_comparison(path: str | Path) -> dict[str, Any]:
    """A `compare.json`, or the one in a folder. Raises DataError where it is missing, damaged or of another format."""
    file = Path(path)
    file = file / "compare.json" if file.is_dir() else file
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"this comparison cannot be read: {error}", where=str(file)) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"this is no {FORMAT} file", where=str(file))
    missing = [k for k in _KEYS if k not in found]
    if missing or not isinstance(found["rows"], list) or not found["rows"]:
        raise DataError(f"this comparison lacks {', '.join(missing) or 'rows'}", where=str(file))
    return found


def _plain(value: Any) -> Any:
    """JSON data in which what is not finite is null and whole numbers of long lists are written short."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value in (0.0, 1.0) else value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


# Words


def spread(value: Mapping[str, Any]) -> str:
    """A mean over seeds with half the width of its interval."""
    half = "" if value["high"] is None else f" ±{value['high'] - value['mean']:.2g}"
    return f"{value['mean']:.3g}{half}"


def short(count: float, step: int, units: Sequence[str]) -> str:
    """A count with a unit, three digits at most."""
    for unit in units[:-1]:
        if abs(count) < step:
            return f"{count:.3g}{unit}" if count < 100 else f"{count:.0f}{unit}"
        count /= step
    return f"{count:.3g}{units[-1]}"


def number(count: float) -> str:
    """A count in thousands or millions."""
    return short(count, 1000, ("", "k", "M", "G"))


def amount(count: float) -> str:
    """Bytes in binary units, by their first letter."""
    return short(count, 1024, ("B", "K", "M", "G"))


def against(row: Mapping[str, Any]) -> str:
    """How a method stands to the best, with the adjusted p."""
    v = row["versus"]
    return "best" if v is None else f"{v['verdict']} ({v['difference']:+.2g}, p {v['p']:.1g})"


def cells_of(result: Mapping[str, Any], *, narrow: bool = False) -> list[list[str]]:
    """The rows of the table as text, in the order of `COLUMNS`; `*` marks the Pareto front, `!` a rate at an end."""
    return [
        [
            f"{r['label']}{' *' if r['pareto'] else ''}", spread(r["target"]), f"{r['retention']['mean']:.3f}",
            number(r["trainable"]), amount(r["stored"]), f"{r['seconds']:.3g}", amount(r["peak_memory"]),
            f"{r['lr']:g}{'!' if r['lr_at_the_edge'] else ''}", against(r).split(" (")[0] if narrow else against(r),
        ]
        for r in result["rows"]
    ]  # fmt: skip


LEGEND = (
    "* on the Pareto front of target and retention (kept); ± half the 95 % interval over seeds; sec of one training; "
    "bytes in binary units; ! the rate lies at an end of those tried"
)


def controls_of(result: Mapping[str, Any]) -> list[list[str]]:
    """Control, its score, and how the recommended method stands to it."""
    out = []
    for c in result["controls"]:
        if c["verdict"] is None:
            out.append([c["name"], "-", c["reason"]])
        else:
            out.append([c["name"], f"{c['value']:.4g}", f"{c['verdict']} ({c['difference']:+.3g}, p {c['p']:.2g})"])
    return out


def heading(result: Mapping[str, Any]) -> str:
    """One line: what was compared on what, and how."""
    d, p, t = result["data"], result["plan"], result["target"]
    return (
        f"{result['base']['name']} on {d['name']} ({d['train']} training, {d['dev']} dev, {d['test']} test rows); "
        f"{t['metric']} ({'higher' if t['higher_is_better'] else 'lower'} is better), {p['seeds']} seeds, "
        f"{p['rates']} learning rates a method, equal {result['equal']}, {result['minutes']:.1f} min"
    )


def table_md(result: Mapping[str, Any]) -> str:
    """The whole comparison as Markdown."""

    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        body = ["| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in rows]
        return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *body]

    told = result["recommendation"]
    lines = [heading(result), "", f"Retention: {result['retention']['measure']}; 1 means nothing was lost.", ""]
    lines += table(COLUMNS, cells_of(result))
    lines += ["", f"{LEGEND}.", ""]
    lines += [f"**Recommendation: {told['method']}**, learning rate {told['lr']:g}. {told['reason']}", ""]
    lines += table(("control", result["target"]["metric"], f"{told['method']} against it"), controls_of(result))
    sizes = [[r["label"], r["size"]] for r in result["rows"] if r["size"]]
    if sizes:
        lines += ["", *table(("method", "matched size"), sizes)]
    if result["left_out"]:
        lines += ["", *table(("left out", "why"), [[x["label"], x["reason"]] for x in result["left_out"]])]
    if result["notes"]:
        lines += ["", *(f"- {note}" for note in result["notes"])]
    return "\n".join(lines) + "\n"


# The picture


def picture(result: Mapping[str, Any]) -> str:
    """Target against retention as SVG: one point a method with its spread over seeds, the Pareto front as a line."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    up = result["target"]["higher_is_better"]
    with mpl.rc_context({"svg.hashsalt": "compare", "svg.fonttype": "none", "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        points: list[tuple[float, float, str]] = []
        spans: tuple[list[float], list[float]] = ([], [])
        for r in result["rows"]:
            x, y = r["retention"]["mean"], r["target"]["mean"]
            xs, ys = r["retention"]["values"], r["target"]["values"]
            spans[0].extend(xs)
            spans[1].extend(ys)
            colour = "#b4462c" if r["label"] == result["recommendation"]["method"] else "#2c5f8a"
            axes.errorbar(
                x, y, xerr=[[x - min(xs)], [max(xs) - x]], yerr=[[y - min(ys)], [max(ys) - y]],
                fmt="o" if r["pareto"] else "x", color=colour, ecolor="#9a9a9a", elinewidth=0.9, markersize=6,
            )  # fmt: skip
            points.append((x, y, r["label"]))
        line = sorted((r["retention"]["mean"], r["target"]["mean"]) for r in result["rows"] if r["pareto"])
        axes.plot(*zip(*line, strict=True), color="#2c5f8a", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        limits = _limits(spans[0]), _limits(spans[1])
        axes.set_xlim(*limits[0])
        axes.set_ylim(*(limits[1] if up else limits[1][::-1]))
        for c in result["controls"]:  # those far below would press all methods together; the table has them
            if c["verdict"] is not None and limits[1][0] < c["value"] < limits[1][1]:
                axes.axhline(c["value"], color="#9a9a9a", linewidth=0.7, linestyle=(0, (1, 2)), zorder=-1)
                axes.annotate(c["name"], (1, c["value"]), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                              fontsize=7, color="#666666")  # fmt: skip
        _labels(axes, points)
        axes.set_xlabel(f"retention: {result['retention']['measure']}")
        axes.set_ylabel(f"{result['target']['metric']} on test rows ({'higher' if up else 'lower'} is better)")
        axes.set_title(
            "o on the Pareto front (dashed), x not; red: recommended; bars: range over seeds; dotted: controls",
            fontsize=8,
            loc="left",
        )
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: that of the values of all seeds, with room for labels."""
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.05 * max(1.0, abs(high))
    return low - room, high + room


def _labels(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside points, each moved up until it lies on no other."""
    placed: list[tuple[float, float, int]] = []
    for x, y, name in sorted(
        points, key=lambda p: axes.transAxes.inverted().transform(axes.transData.transform(p[:2]))[1]
    ):
        across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        shift = 0
        while any(
            -0.013 * len(name) < across - a < 0.013 * n and abs(up + 0.035 * shift - b) < 0.033 for a, b, n in placed
        ):
            shift += 1
        placed.append((across, up + 0.035 * shift, len(name)))
        axes.annotate(name, (x, y), xytext=(5, 3 + 10 * shift), textcoords="offset points", fontsize=8,
                      bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.6})  # fmt: skip
