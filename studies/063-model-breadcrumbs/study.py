# SPDX-License-Identifier: Apache-2.0
"""Study 063: with settings found on two tasks, do Model Breadcrumbs keep their quality as more tasks are merged?"""

from __future__ import annotations

from itertools import product
from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

TASKS = (
    "digits-rotated", "things-inverted", "things-rotated", "digits-inverted", "digits-blurred", "things-permuted",
    "things-blurred", "digits-permuted",
)  # fmt: skip
COUNTS = (2, 4, 6, 8)
CRUMBS, TA, TIES, PLAIN = "breadcrumbs", "task arithmetic", "ties", "magnitude only"
ARMS = (CRUMBS, TA, TIES, PLAIN)
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0)
FEW = (0.3, 0.5, 0.8, 1.2)
LRS = (1e-4, 4e-4)

RULE = """\
The metric of a method at a count of tasks is the mean over these tasks of test accuracy over the test accuracy of the task's
own fine-tuned model, times 100. Every method has 12 settings; the one with the best mean on the dev rows of the first two
tasks, on the seed itself, is used at every count. a is breadcrumbs - task arithmetic at 8 tasks by seed, with a 95% Student t
interval over 5 seeds; b is the drop of task arithmetic from 2 to 8 tasks less that of breadcrumbs, mean over seeds.
"reproduced" if the lower bound of a is above 0 and b is above 0; "not reproduced" if the mean of a is 0 or less;
"inconclusive" otherwise.
"""


def settings() -> dict[str, list[tuple[str, float]]]:
    """12 merges with a scale for each method."""
    bands = ((0.1, 0.002), (0.1, 0.01), (0.2, 0.01))
    return {
        CRUMBS: [(f"breadcrumbs:density={d},drop_top={g}", s) for (d, g), s in product(bands, FEW)],
        TA: [("task-arithmetic", s) for s in ALPHAS],
        TIES: [(f"ties:density={d}", s) for d, s in product((0.1, 0.2, 0.4), FEW)],
        PLAIN: [(f"breadcrumbs:density={d},drop_top=0.0", s) for d, s in product((0.05, 0.1, 0.2), FEW)],
    }


def run(ctx: Context) -> Raw:
    """The rate chosen on the first seed's dev rows, then every seed: eight fine-tunings and all merges."""
    from tunesmith.study.worlds.pictures import Size, chosen_rate, when_asked

    steps, stride = (4, 6) if ctx.smoke else (100, 1)
    world = when_asked(ctx, TASKS, Size(epochs=6, train=1600, dev=300, test=500))
    lr, tuning = chosen_rate(ctx, world, TASKS[:2], LRS, steps)
    raw: Raw = {
        "arms": {arm: [] for arm in ARMS},
        "singles": [],
        "lr": lr,
        "tuning": tuning,
    }
    for i, seed in enumerate(ctx.seeds):
        found = ctx.cell({"seed": seed, "lr": lr}, lambda s=seed: one_seed(world, s, lr, steps, stride))
        for arm in ARMS:
            raw["arms"][arm].append({"seed": seed, **found["methods"][arm]})
        raw["singles"].append({"seed": seed, "test": found["singles"]})
        ctx.progress(i + 1, len(ctx.seeds))
        ctx.log(f"seed {seed}, 8 tasks: " + ", ".join(f"{arm} {found['methods'][arm]['metric']:.1f}" for arm in ARMS))
    return raw


def one_seed(world: Any, seed: int, lr: float, steps: int, stride: int = 1) -> dict[str, Any]:
    """Tune every task, choose each method's setting on the dev rows of the first two, report on test rows at all counts."""
    from statistics import mean

    from tunesmith.compose.merge import merge, scale
    from tunesmith.study.worlds.probed import shares

    worlds = [world(name, seed) for name in TASKS]
    deltas = [w.tuned(lr, steps, seed) for w in worlds]
    base = worlds[0].base
    singles: dict[str, list[float]] = {"dev": [], "test": []}
    for w, delta in zip(worlds, deltas, strict=True):
        with base.using(delta):
            for split, found in singles.items():
                found.append(w.score(split).metric)
    out: dict[str, Any] = {}
    for arm, every in settings().items():
        tried = every[::stride]
        merged = {method: merge(base, deltas[:2], method) for method, _ in tried}
        trials = [
            100 * mean(shares(worlds[:2], scale(base, merged[m], s), singles["dev"][:2], "dev")) for m, s in tried
        ]
        best = max(range(len(tried)), key=lambda i: (trials[i], -i))
        method, s = tried[best]
        at = {}
        for n in COUNTS:
            found = shares(worlds[:n], scale(base, merge(base, deltas[:n], method), s), singles["test"][:n], "test")
            at[str(n)] = 100 * mean(found)
        out[arm] = {
            "metric": at[str(COUNTS[-1])],
            "counts": at,
            "method": method,
            "scale": s,
            "dev": trials[best],
            "trials": trials,
        }
    return {"methods": out, "singles": singles["test"]}


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def of(arm: str, n: int) -> list[float]:
        return [row["counts"][str(n)] for row in sorted(raw["arms"][arm], key=lambda row: row["seed"])]

    first, last = COUNTS[0], COUNTS[-1]
    statistics: dict[str, Any] = {arm: {str(n): mean(of(arm, n)) for n in COUNTS} for arm in ARMS}
    reasons: list[str] = []
    for other in ARMS[1:]:
        t = paired_t([a - b for a, b in zip(of(CRUMBS, last), of(other, last), strict=True)])
        statistics[f"{CRUMBS} - {other} at {last}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        reasons.append(f"at {last} tasks breadcrumbs - {other} {t.mean:+.2f} [{t.low:+.2f}, {t.high:+.2f}] points")
    drop = {arm: statistics[arm][str(first)] - statistics[arm][str(last)] for arm in ARMS}
    statistics["drop from 2 to 8 tasks"] = drop
    reasons.append(f"from {first} to {last} tasks breadcrumbs lose {drop[CRUMBS]:.2f}, task arithmetic {drop[TA]:.2f}")
    a = statistics[f"{CRUMBS} - {TA} at {last}"]
    holds = a["low"] > 0 and drop[TA] - drop[CRUMBS] > 0
    return Verdict(
        "reproduced" if holds else "not reproduced" if a["mean"] <= 0 else "inconclusive", reasons, statistics
    )


STUDY = Study(
    id=63,
    slug="model-breadcrumbs",
    paper="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, ECCV 2024, arXiv 2312.06795",
    claim="Changes without their largest and their small entries merge better than whole ones, and settings found on a few tasks "
    "stay good as tasks are added.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("mnist_10k", "cifar10"),
    minutes=18,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "A tiny ViT (4 blocks, 128 wide, patches of 7) pre-trained here on 14,000 pictures instead of CLIP and T5.",
        "The head of each task is a linear probe on the base's features and stays fixed while the backbone is tuned.",
        "The class token and the position table are not tuned: deltas change layers only.",
        "Tasks are added in one fixed order; settings are found on the first two, with 12 trials for every method.",
        "One-dimensional tensors are one row, as in the released code; kernels are rows [out, in * kernel].",
    ),
)
