# SPDX-License-Identifier: Apache-2.0
"""Study 030: is the greedy soup of a sweep better than its best model, at no cost at inference?"""

from __future__ import annotations

from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

GREEDY, SINGLE = "greedy", "best single"
ARMS = (SINGLE, "uniform", GREEDY, "learned", "ensemble")

RULE = """\
The metric of an arm on a sweep is the mean of its accuracies, in percent, on the clean and on the shifted test rows. The
best single model is the one with the best accuracy on dev; so is the first ingredient of the greedy soup. d is greedy - best
single by sweep, its mean with a 95% bootstrap interval over the 5 sweeps.
"reproduced" if the mean of d and its lower bound are above 0 and greedy is at least the best single model on the clean rows
in at least 4 of 5 sweeps (4/5 of them); "not reproduced" if the mean of d is 0 or less; "inconclusive" otherwise.
"""


def sizes_of(smoke: bool) -> Any:
    from .sweeps import Sizes

    if smoke:
        return Sizes(1, 3, 8, 16, 3, (1,), 2)
    return Sizes(2, 12, 385, 700, 8, (1, 2, 3), 28)


def run(ctx: Context) -> Raw:
    """Every sweep as one cell; the pairs of the formula on the first only."""
    from dataclasses import replace

    from . import sweeps

    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "sweeps": [], "pairs": []}
    for k, sweep in enumerate(ctx.seeds):
        sizes = sizes_of(ctx.smoke)
        sizes = sizes if k == 0 else replace(sizes, pairs=0)
        found = ctx.cell({"sweep": sweep, "pairs": sizes.pairs}, lambda s=sweep, z=sizes: sweeps.one_sweep(ctx, s, z))
        for arm in ARMS:
            raw["arms"][arm].append({"seed": sweep, **found["arms"][arm]})
        raw["sweeps"].append(
            {key: found[key] for key in ("configs", "dev", "ingredients", "dev of the soup", "learned")}
        )
        raw["pairs"] += found["pairs"]
        ctx.progress(k + 1, len(ctx.seeds))
        ctx.log(f"sweep {sweep}: {len(found['ingredients'])} of {len(found['dev'])} models in the greedy soup")
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    import numpy as np

    from tunesmith.evaluate.stats import bootstrap_mean

    def of(arm: str, key: str = "metric") -> list[float]:
        return [row[key] for row in sorted(raw["arms"][arm], key=lambda row: row["seed"])]

    statistics: dict[str, Any] = {arm: {k: mean(of(arm, k)) for k in ("metric", "test", "shift")} for arm in ARMS}
    reasons: list[str] = []
    for arm in ARMS[1:]:
        found = bootstrap_mean([a - b for a, b in zip(of(arm), of(SINGLE), strict=True)])
        low, high = (None if not np.isfinite(v) else float(v) for v in (found.low, found.high))
        statistics[f"{arm} - {SINGLE}"] = {"mean": found.mean, "low": low, "high": high, "n": found.n}
        shown = "unbounded" if low is None or high is None else f"{low:+.2f}, {high:+.2f}"
        reasons.append(f"{arm} - {SINGLE} {found.mean:+.2f} [{shown}] points, clean and shifted")
    clean = sum(a >= b for a, b in zip(of(GREEDY, "test"), of(SINGLE, "test"), strict=True))
    statistics["sweeps where greedy is at least as good on clean rows"] = clean
    reasons.append(f"greedy is at least as good on clean rows in {clean} of {len(of(GREEDY))} sweeps")
    if len(raw["pairs"]) > 2:
        said, measured = ([row[k] for row in raw["pairs"]] for k in ("formula", "measured"))
        if np.std(said) > 0 and np.std(measured) > 0:
            statistics["correlation of formula and measurement"] = float(np.corrcoef(said, measured)[0, 1])
    d = statistics[f"{GREEDY} - {SINGLE}"]
    holds = d["mean"] > 0 and d["low"] is not None and d["low"] > 0 and 5 * clean >= 4 * d["n"]
    label = "reproduced" if holds else "not reproduced" if d["mean"] <= 0 else "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=30,
    slug="model-soups",
    paper="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time, "
    "ICML 2022, arXiv 2203.05482",
    claim="The greedy soup of a sweep over hyper-parameters is more accurate than the best model of the sweep, on clean and on "
    "shifted data, at no cost at inference.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("banking77",),
    minutes=15,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "MiniLM-L6 with its last 2 blocks and the head fine-tuned, on states of the lower blocks computed once, where the card "
        "fine-tunes all of it and the paper CLIP ViT-B/32 and others.",
        "924 training rows of Banking77 (12 of each intent), 385 to choose on and 700 test rows; the card has 2,500, 500 and "
        "1,000. The rows to learn from and to choose on are drawn anew for each sweep.",
        "Weight decay acts on the difference from the start, as deltas are stored, so it pulls to the start and not to zero.",
        "The learned soup is the one with a row of weights for each tensor, trained on the rows that choose.",
        "The formula for soup against ensemble was written down from memory and not checked against the paper.",
    ),
)
