# SPDX-License-Identifier: Apache-2.0
"""Study 061: does the regime of a pruned network say whether the dense one should be trained hotter or colder?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

EPOCHS = (2, 5, 10, 20)
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.5)
BARRIER = 2.0
ARMS = tuple(f"density {d:g}" for d in DENSITIES)

RULE = """\
A cell is a dense seed, a number of dense epochs (fewer is hotter) and a density. Its regime is I where LMC of the training error
is below -2 points, II-A where it is not and the CKA of the two retrained models is below the median of the seed's cells, else II-B.
(a) On a dense seed: the lowest density has a cell of regime I, and the number of epochs with the least test error is smaller at the
lowest density than at the highest.
(b) Over all cells of regimes I and II-A with a neighbour on both sides: the neighbour that the rule names (I: fewer epochs, II-A:
more) has less test error than the opposite one; a one-sided sign test without ties.
"reproduced" if (a) holds on every dense seed and p < 0.05 in (b); "not reproduced" if the neighbour named is the better one in at
most half of the cells; "inconclusive" otherwise.
"""


@dataclass(frozen=True)
class Sizes:
    """Widths, pictures, their side, dense epochs, densities, retraining epochs, rows of the path, and rates."""

    widths: tuple[int, int, int]
    train: int
    test: int
    side: int
    epochs: tuple[int, ...]
    densities: tuple[float, ...]
    retrain: int
    path: int
    rate: float


FULL = Sizes((32, 64, 64), 2000, 2000, 16, EPOCHS, DENSITIES, 4, 500, 0.05)
SMOKE = Sizes((4, 4, 4), 40, 40, 8, (1, 2, 3), DENSITIES, 1, 20, 0.05)


def run(ctx: Context) -> Raw:
    """A dense run with its states after each number of epochs, then every density, retrained with two seeds."""
    from . import pruning

    sizes = SMOKE if ctx.smoke else FULL
    folder = ctx.data_folder("cifar10")
    how = (sizes.train, sizes.test, sizes.side)
    learn, held = pruning.toy(*how) if folder is None else pruning.load(folder, *how)
    model = pruning.network(sizes.widths, 0)
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "cells": []}
    total, done = len(ctx.seeds) * len(sizes.epochs) * len(sizes.densities), 0
    dense: dict[int, list[Any]] = {}

    def states(seed: int) -> list[Any]:
        if seed not in dense:
            dense.clear()
            dense[seed] = pruning.train(pruning.network(sizes.widths, seed), learn, sizes.epochs, sizes.rate, seed)
        return dense[seed]

    def one(seed: int, which: int, density: float) -> dict[str, Any]:
        pair = []
        for again in (0, 1):
            masks = pruning.pruned(model, states(seed)[which], density)
            pair += pruning.train(model, learn, [sizes.retrain], sizes.rate / 2, 100 * seed + again, masks)
        found = pruning.measured(model, pair[0], pair[1], learn.first(sizes.path), held)
        return {**found, "error": sum(pruning.error(model, s, held) for s in pair) / 2}

    for seed in ctx.seeds:
        for density in sizes.densities:
            errors = []
            for which, epochs in enumerate(sizes.epochs):
                key = {"seed": seed, "epochs": epochs, "density": density}
                found = ctx.cell(key, lambda s=seed, w=which, d=density: one(s, w, d))
                done += 1
                ctx.progress(done, total)
                ctx.log(
                    f"seed {seed}, {epochs} epochs, density {density:g}: error {found['error']:.1f} %, LMC {found['lmc']:+.1f}"
                )
                raw["cells"].append({**key, **found})
                errors.append(found["error"])
            raw["arms"][f"density {density:g}"].append({"seed": seed, "metric": min(errors), "errors": errors})
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean, median

    from scipy.stats import binomtest

    from tunesmith.evaluate.stats import paired_t
    from tunesmith.inspect.regimes import regime

    cells = raw["cells"]
    seeds = sorted({c["seed"] for c in cells})
    densities, epochs = (sorted({c[k] for c in cells}) for k in ("density", "epochs"))
    right, wrong, shifted = 0, 0, []
    gains: dict[int, list[float]] = {s: [] for s in seeds}  # of the rule's move over the opposite one
    counts: dict[str, int] = {"I": 0, "II-A": 0, "II-B": 0}
    for seed in seeds:
        mine = {(c["epochs"], c["density"]): c for c in cells if c["seed"] == seed}
        middle = median(c["cka"] for c in mine.values())
        of = {k: regime(c["lmc"], c["cka"], barrier=BARRIER, similar=middle) for k, c in mine.items()}
        for name in of.values():
            counts[name] += 1
        low, high = (min(epochs, key=lambda e: (mine[e, d]["error"], e)) for d in (densities[0], densities[-1]))
        shifted.append(any(of[e, densities[0]] == "I" for e in epochs) and low < high)
        for (e, d), name in of.items():
            i = epochs.index(e)
            if name == "II-B" or not 0 < i < len(epochs) - 1:
                continue
            hotter, colder = mine[epochs[i - 1], d]["error"], mine[epochs[i + 1], d]["error"]
            named, other = (hotter, colder) if name == "I" else (colder, hotter)
            right += named < other
            wrong += named > other
            gains[seed].append(other - named)
    p = float(binomtest(right, right + wrong, alternative="greater").pvalue) if right + wrong else 1.0
    t = paired_t([mean(g) if g else 0.0 for g in gains.values()])
    statistics = {
        "points of error that the rule's move gains over the opposite one, by dense seed": {
            "mean": t.mean, "low": t.low, "high": t.high, "n": t.n
        },
        "cells where the rule's move is better": right, "cells where the opposite move is better": wrong,
        "p of the sign test": p, "dense seeds with the predicted shift": sum(shifted),
        **{f"cells in regime {k}": v for k, v in counts.items()},
    }  # fmt: skip
    reasons = [
        f"the rule's move is better in {right} of {right + wrong} cells (sign test p = {p:.3g})",
        f"the best training length is shorter at the lowest density, with a barrier, on {sum(shifted)} of {len(seeds)} dense seeds",
    ]
    holds = all(shifted) and p < 0.05
    fails = right <= wrong
    return Verdict("reproduced" if holds else "not reproduced" if fails else "inconclusive", reasons, statistics)


STUDY = Study(
    id=61,
    slug="three-regime-pruning",
    paper="A Three-regime Model of Network Pruning, ICML 2023, arXiv 2305.18383",
    claim="Connectivity and similarity of pruned, retrained models tell whether the dense model should be trained hotter or colder.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("cifar10",),
    minutes=14,
    seeds=(0, 1),
    smoke_seeds=(0, 1),
    deviations=(
        "CIFAR-10 averaged down to 16 x 16, 2,000 training pictures; three convolutions (32, 64, 64) instead of PreResNet-20; the "
        "rate is constant (0.05, retraining 0.025), so that states of one dense run are the temperature axis.",
        "Dense epochs 2, 5, 10 and 20, 4 epochs of retraining with two seeds, as in the card.",
        "Paths are measured on 500 training pictures. The barrier threshold (2 points of training error) and the median as the threshold "
        "of CKA were fixed without looking at results; the paper reads both from pictures.",
        "The add-on with the density of a MiniLM delta is left out.",
    ),
)
