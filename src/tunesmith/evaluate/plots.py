# SPDX-License-Identifier: Apache-2.0
"""Plots of a receipt as inline SVG; see `svg`."""

from __future__ import annotations

import math

from matplotlib.axes import Axes

from tunesmith.evaluate import summary
from tunesmith.evaluate.calibration import Bin
from tunesmith.evaluate.receipt import Calibration, Number, Receipt, Training
from tunesmith.evaluate.summary import visible
from tunesmith.evaluate.svg import BASE, INK, SOFT, TUNED, svg


def all_plots(receipt: Receipt) -> list[tuple[str, str]]:
    """(caption, svg) of every plot this receipt has data for."""
    made = [(f"{visible(receipt.target.metric)}, with 95 % intervals", score_bars(receipt))]
    if receipt.training and _points(receipt.training.loss):
        made.append(("loss", loss_curve(receipt.training)))
    if receipt.calibration and any(b.n for b in receipt.calibration.bins_base + receipt.calibration.bins_tuned):
        made.append(("reliability: accuracy at each confidence", reliability_plot(receipt.calibration)))
    return made


def score_bars(receipt: Receipt) -> str:
    """Base, tuned and controls as bars with their intervals."""
    t = receipt.target
    arms = [("base", t.base.mean, t.base.low, t.base.high), ("tuned", t.tuned.mean, t.tuned.low, t.tuned.high)]
    arms += [(visible(c.name)[:18], c.mean, c.low, c.high) for c in receipt.controls]

    def draw(axes: Axes) -> None:
        for i, (_, mean, low, high) in enumerate(arms):
            if mean is None or not math.isfinite(mean):
                continue
            axes.bar(i, mean, width=0.55, color=TUNED if i == 1 else BASE, alpha=1.0 if i < 2 else 0.55)
            top = mean
            if low is not None and high is not None and math.isfinite(low + high):
                axes.plot([i, i], [low, high], color=INK, linewidth=1.6)
                top = max(mean, high)
            axes.annotate(
                summary.score(mean, t.metric),
                (i, top),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=INK,
            )
        axes.set_xticks(range(len(arms)), [name for name, *_ in arms], rotation=0 if len(arms) < 4 else 20)
        axes.set_xlim(-0.6, len(arms) - 0.4)
        axes.margins(y=0.15)
        axes.grid(axis="x", visible=False)
        if summary.is_rate(t.metric):
            axes.set_ylim(0, 1.12)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])

    return svg(draw, "score")


def _points(curve: list[tuple[int, Number]]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in curve if value is not None and math.isfinite(value)]


def loss_curve(training: Training) -> str:
    """Training and validation loss over steps."""
    loss, validation = _points(training.loss), _points(training.validation)

    def draw(axes: Axes) -> None:
        axes.plot(
            *zip(*loss, strict=True), color=BASE, linewidth=1.4, label="training", marker="o" if len(loss) == 1 else ""
        )
        if validation:
            axes.plot(
                *zip(*validation, strict=True),
                color=TUNED,
                linewidth=1.8,
                marker="o",
                markersize=3.5,
                label="validation",
            )
            axes.legend()
        axes.set_xlabel("step")

    return svg(draw, "loss")


def reliability_plot(calibration: Calibration) -> str:
    """Accuracy against confidence for both arms, with the diagonal of perfect calibration."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 4)))
        for bins, colour, error, name in (
            (calibration.bins_base, BASE, calibration.ece_base, "base"),
            (calibration.bins_tuned, TUNED, calibration.ece_tuned, "tuned"),
        ):
            _reliability_line(axes, bins, colour, f"{name}, error {summary.number(error)}")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("confidence")
        axes.legend(loc="upper left")

    return svg(draw, "reliability")


def _reliability_line(axes: Axes, bins: list[Bin], colour: str, label: str) -> None:
    full = [(b.confidence, b.accuracy, b.n) for b in bins if b.confidence is not None and b.accuracy is not None]
    if not full:
        return
    total = sum(n for *_, n in full)
    x, y = [c for c, _, _ in full], [a for _, a, _ in full]
    axes.plot(x, y, color=colour, linewidth=1.4, label=label)
    axes.scatter(x, y, s=[16 + 160 * n / total for *_, n in full], color=colour, alpha=0.8, linewidths=0)
