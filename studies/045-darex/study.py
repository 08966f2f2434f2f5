# SPDX-License-Identifier: Apache-2.0
"""Study 045: does a chosen q rescue random pruning of a fine-tuned change at 99 %, and does training with AdamR?"""

from __future__ import annotations

from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

SETS = ("sst2", "ag_news")
RATES = {"small": 5e-5, "large": 3e-4}
DARE, LABELLED = "dare", "global, labelled"
ARMS = ("no rescale", DARE, LABELLED, "global, unlabelled", "by layer, analytic", "by size")
PULLS = (0.0, 0.03, 0.1, 0.3)
EXTREME = 0.99

RULE = """\
Accuracies are in percent of the test rows, the mean over 3 masks. d is DAREx-q (one q for all, chosen by accuracy on dev under
another mask) - DARE at p = 0.99 for the change tuned at the large rate, by set, mask and fine-tuning seed, its mean on each set
with a 95% bootstrap interval over the 6 values.
"reproduced" if the mean and the lower bound are above 0 on both sets; "not reproduced" if the mean over both sets is 0 or
less; "inconclusive" otherwise. The second claim (AdamR raises DARE's accuracy at p = 0.99 at no more than 1 point unpruned, its
strength chosen on dev) is reported and not part of the verdict.
"""


def sizes_of(smoke: bool) -> Any:
    from .runs import Sizes

    if smoke:
        return Sizes(1, {"sst2": 3, "ag_news": 3}, 8, 16, 3, 2, 0.5, (0.3,))
    return Sizes(2, {"sst2": 800, "ag_news": 400}, 200, 600, 100, 3, 0.1, (0.1, 0.3, 0.5, 0.7, 1.0))


def run(ctx: Context) -> Raw:
    """Every set, seed and rate as one cell, then AdamR at the large rate."""
    from . import runs

    sizes = sizes_of(ctx.smoke)
    pulls = PULLS[::3] if ctx.smoke else PULLS
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "changes": [], "adamr": []}
    total, done = len(SETS) * len(ctx.seeds) * (len(RATES) + 1), 0
    for name in SETS:
        for seed in ctx.seeds:
            made: dict[str, Any] = {}

            def world(name: str = name, seed: int = seed, made: dict[str, Any] = made) -> Any:
                if not made:
                    made["w"] = runs.world_of(ctx, name, sizes, seed)
                return made["w"]

            def one(rate: str, seed: int = seed, world: Any = world) -> Any:
                delta = world().tuned(RATES[rate], sizes.steps, seed)
                return runs.one_change(world(), delta, (0.9, EXTREME), sizes)

            for rate in RATES:
                found = ctx.cell({"set": name, "seed": seed, "rate": rate}, lambda r=rate, one=one: one(r))
                done += 1
                ctx.progress(done, total)
                for p, rows in found["p"].items():
                    for arm in ARMS:
                        raw["arms"][arm].append(
                            {"seed": seed, "set": name, "rate": rate, "p": float(p), **rows["arms"][arm]}
                        )
                    raw["changes"].append({"seed": seed, "set": name, "rate": rate, "p": float(p), "unpruned": found["unpruned"],
                                           "base": found["base"], **rows["chosen"]})  # fmt: skip
                shown = found["p"][str(EXTREME)]["arms"]
                ctx.log(
                    f"{name}, seed {seed}, {rate} change: DARE {shown[DARE]['metric']:.1f}, q {shown[LABELLED]['metric']:.1f}"
                )
            rows = ctx.cell(
                {"set": name, "seed": seed, "adamr": list(pulls)},
                lambda w=world, s=seed: runs.adamr(w(), RATES["large"], sizes.steps, s, pulls, EXTREME, sizes.masks),
            )
            done += 1
            ctx.progress(done, total)
            raw["adamr"].append({"seed": seed, "set": name, "trials": rows})
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import bootstrap_mean

    def of(arm: str, name: str) -> list[float]:
        rows = [r for r in raw["arms"][arm] if r["set"] == name and r["rate"] == "large" and r["p"] == EXTREME]
        return [m for r in sorted(rows, key=lambda r: r["seed"]) for m in r["masks"]]

    statistics: dict[str, Any] = {}
    reasons: list[str] = []
    gains, holds = [], []
    for name in SETS:
        found = bootstrap_mean([a - b for a, b in zip(of(LABELLED, name), of(DARE, name), strict=True)])
        statistics[f"{name}, q - DARE"] = {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}
        reasons.append(
            f"{name}: q - DARE at p = {EXTREME} {found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}] points"
        )
        gains.append(found.mean)
        holds.append(found.mean > 0 and found.low > 0)
    for arm in ARMS:
        for p in (0.9, EXTREME):
            rows = [r["metric"] for r in raw["arms"][arm] if r["rate"] == "large" and r["p"] == p]
            statistics[f"{arm}, p = {p}, large change"] = mean(rows)
    raised, cost = [], []
    for row in raw["adamr"]:
        plain = next((t for t in row["trials"] if t["pull"] == 0), None)
        able = [t for t in row["trials"] if plain is not None and t["unpruned dev"] >= plain["unpruned dev"] - 1]
        if plain is not None and able:
            best = max(able, key=lambda t: (t["dare dev"], -t["pull"]))
            raised.append(best["dare"] - plain["dare"])
            cost.append(plain["unpruned"] - best["unpruned"])
    if raised:
        statistics["AdamR"] = {"raises DARE by": mean(raised), "costs unpruned": mean(cost), "n": len(raised)}
        reasons.append(f"AdamR raises DARE by {mean(raised):+.1f} points and costs {mean(cost):.1f} unpruned")
    label = "reproduced" if all(holds) else "not reproduced" if mean(gains) <= 0 else "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=45,
    slug="darex",
    paper="DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models, ICLR 2025, arXiv 2410.09344",
    claim="At 99 % random pruning of a large fine-tuned change, dividing what is left by a chosen q instead of 1 - p keeps far more "
    "of its accuracy; training with a pull to the base (AdamR) lets plain DARE do so.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("sst2", "ag_news"),
    minutes=25,
    seeds=(0, 1),
    smoke_seeds=(0,),
    deviations=(
        "The last 2 blocks of MiniLM-L6 are tuned under a fixed probe head, on states of the lower blocks computed once, where the "
        "card tunes all of it; 1,600 training rows of each set, 100 steps of 32.",
        "q and eta are searched under one mask of their own and reported under three others; q in steps of 0.1.",
        "The output change of the unlabelled search is that of the mean over tokens of the last states, on the 200 dev rows.",
        "Pruning by size ranks all entries together. The choice of q by layer that is learned by gradient is in the toolkit and "
        "not in this study.",
        "AdamR's mean runs over the tuned layers; its strengths are 0, .03, .1 and .3, since 1e-4 moves nothing in 100 steps.",
    ),
)
