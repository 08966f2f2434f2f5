# SPDX-License-Identifier: Apache-2.0
"""Pictures as inline SVG that takes its colours from the page.

Matplotlib draws with placeholder colours, which become the page's CSS variables, so one picture serves light and dark.
Text stays text. Name spaces, metadata and document headers are removed: inside HTML they have no use, and the page then
holds no address at all.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, SOFT, LINE = "#010101", "#010102", "#010103"
BASE, TUNED = "#010104", "#010105"
GOOD, BAD, WARN = "#010106", "#010107", "#010108"
_VARIABLES = {
    INK: "--ink", SOFT: "--soft", LINE: "--line", BASE: "--base", TUNED: "--tuned", GOOD: "--good", BAD: "--bad",
    WARN: "--warn",
}  # fmt: skip
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.unicode_minus": False,
}


def svg(draw: Callable[[Axes], None], name: str) -> str:
    """What `draw` puts on the axes, as an <svg> element; `name` keeps its ids apart from those of other pictures."""
    settings: Any = {**_SETTINGS, "svg.hashsalt": name}  # any, as mypy knows the keys one by one
    with mpl.rc_context(settings):
        figure = Figure(figsize=(3.6, 2.55), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """The <svg> element alone, with ids made unique to `name` and colours from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\s+xmlns(?::\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'(<[^<>]*?\s)id="', rf'\1id="{name}-', svg)
    for size in ("width", "height"):  # the page gives the width, the view box the shape
        svg = re.sub(rf'(<svg[^>]*?)\s+{size}="[^"]*"', r"\1", svg, count=1)
    # Only in style attributes: text written by others must not change with the colours.
    for placeholder, variable in _VARIABLES.items():
        svg = re.sub(rf'(?<=: ){placeholder}(?=[;"])', f"var({variable})", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    return svg.replace("<svg ", '<svg role="img" ', 1).strip()
