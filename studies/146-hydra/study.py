# SPDX-License-Identifier: Apache-2.0
"""Study 146: does a branch on a layer's output pay beside LoRA's at equal size, and does it keep general features?"""

from __future__ import annotations

from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

TASKS = ("clinc150-domains", "banking77")
RANKS = {"hydra": (4, 7), "parallel": (8, 0), "sequential": (0, 14)}  # r_p, r_s: all train 21,504 numbers a block
RATES = (3e-4, 1e-3, 3e-3)
HEAD_RATE = 1e-2
PER_CLASS = 10

RULE = """\
Accuracies are in percent of the test rows of CLINC150 domains and Banking77. d is Hydra - parallel, one number for each
task and seed (10), with a 95% Student t interval.
"reproduced" if the mean of Hydra over tasks and seeds is above those of the parallel and of the sequential branch alone and
the lower bound of d is above 0; "not reproduced" if the mean of Hydra is at most that of the parallel branch;
"inconclusive" otherwise.
Reported beside it: the sequential branch keeps general features if its CKA with the base on AG News is above the parallel
branch's on at least 4 of 5 seeds, on both tasks.
"""


def methods_of(arm: str) -> list[Any]:
    """The method of an arm, without the head that every arm has."""
    import tunesmith as ts

    r_p, r_s = RANKS[arm]
    return [ts.Hydra(rank=r_p, output_rank=r_s)]


def run(ctx: Context) -> Raw:
    """Every arm on every task and seed; its rate is chosen on the dev rows of the first seed."""
    from tunesmith.models.open import load
    from tunesmith.study.worlds.arms import Outcome, sweep
    from tunesmith.study.worlds.text import MODEL, few_shot, toy_base

    from . import kept

    base = toy_base() if ctx.smoke else load(MODEL, dtype="fp32", device="cpu")
    toy = few_shot(ctx, TASKS[0], 4, 0, base=base).held["test"] if ctx.smoke else []
    news = kept.news(ctx, base, "fp32" if ctx.smoke else "auto", 300, 200, toy)

    def general(out: Outcome) -> dict[str, float]:
        with base.using(out.delta):
            return news.measure()

    raw: Raw = {"arms": {arm: [] for arm in RANKS}, "tuning": {}, "base": ctx.cell({"arm": "base"}, news.measure)}
    for task in TASKS:
        found = sweep(
            ctx,
            lambda seed, t=task: few_shot(ctx, t, PER_CLASS, seed, test=1000, general=20, length=32, base=base),
            {f"{task}/{arm}": methods_of(arm) for arm in RANKS},
            lrs=RATES[:2] if ctx.smoke else RATES, steps=3 if ctx.smoke else 100, head_lr=HEAD_RATE, extra=general,
        )  # fmt: skip
        for arm in RANKS:
            for row in found["arms"][f"{task}/{arm}"]:
                part = {k: row[k] for k in ("seed", "dev", "lr", "seconds", "trainable")}
                raw["arms"][arm].append({**part, "task": task, "metric": 100 * row["metric"], **row["extra"]})
            raw["tuning"][f"{task}/{arm}"] = found["tuning"][f"{task}/{arm}"]
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def values(arm: str, what: str) -> dict[tuple[str, int], float]:
        return {(row["task"], row["seed"]): row[what] for row in raw["arms"][arm]}

    accuracy = {arm: values(arm, "metric") for arm in raw["arms"]}
    statistics: dict[str, Any] = {}
    for other in ("parallel", "sequential"):
        t = paired_t([accuracy["hydra"][key] - accuracy[other][key] for key in sorted(accuracy["hydra"])])
        statistics[f"Hydra - {other}, points"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
    means = {arm: mean(found.values()) for arm, found in accuracy.items()}
    low = statistics["Hydra - parallel, points"]["low"]
    if means["hydra"] <= means["parallel"]:
        label = "not reproduced"
    else:
        label = "reproduced" if means["hydra"] > means["sequential"] and low > 0 else "inconclusive"
    sequential, parallel = values("sequential", "cka"), values("parallel", "cka")
    tasks, seeds = sorted({task for task, _ in parallel}), sorted({seed for _, seed in parallel})
    wins = {task: sum(sequential[task, s] > parallel[task, s] for s in seeds) for task in tasks}
    keeps = all(won >= 0.8 * len(seeds) for won in wins.values())
    for arm in raw["arms"]:
        for what in ("cka", "knn"):
            statistics[f"{what} on AG News, {arm}"] = mean(values(arm, what).values())
    statistics["knn on AG News, base"] = raw["base"]["knn"]
    for task, won in wins.items():
        statistics[f"seeds with a higher CKA of sequential, {task}"] = won
    statistics["the sequential branch keeps general features"] = "yes" if keeps else "no"
    reasons = [
        ", ".join(f"{arm} {value:.2f} %" for arm, value in means.items()),
        *(f"Hydra - {other} {s['mean']:+.2f} [{s['low']:+.2f}, {s['high']:+.2f}] points over {s['n']} runs"
          for other in ("parallel", "sequential") for s in [statistics[f"Hydra - {other}, points"]]),
        "CKA of the sequential branch above the parallel one's on "
        + ", ".join(f"{won} of {len(seeds)} seeds ({task})" for task, won in wins.items()),
    ]  # fmt: skip
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=146,
    slug="hydra",
    paper="Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning, arXiv 2309.06922",
    claim="At equal size, a low-rank branch on a layer's output beside LoRA's on its input beats either alone; the branch on "
    "the output keeps more of the general features.",
    verdict_rule=RULE,
    arms=tuple(RANKS),
    run=run,
    verdict=verdict,
    data=("clinc150", "banking77", "ag_news"),
    minutes=11,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "MiniLM-L6 with 10 training rows a class instead of RoBERTa-base on GLUE and ViT-B on VTAB-1k and ELEVATER.",
        "100 steps instead of the card's 300, and a rate of its own (1e-2) for the head in every arm. Each arm tries three "
        "rates on the dev rows of the first seed.",
        "Ranks (4, 7), (8, 0) and (0, 14) for exactly 21,504 numbers in each block; no dropout, no biases in the branches.",
        "Nearest-neighbour accuracy looks up 200 validation rows of AG News among 300 training rows, cut to 48 tokens.",
    ),
)
