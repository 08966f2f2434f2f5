# SPDX-License-Identifier: Apache-2.0
"""Study 002: does fine-tuning hide an ability behind a thin wrapper, so that a few steps bring it back?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

TUNED, NEVER = "fine-tuned", "never could"
ARMS = (TUNED, NEVER)
RATES = {"small": 1e-4, "large": 1e-3}
KS = (1, 5, 15, 30)
GOAL = 0.9

RULE = """\
All of this at the small rate, over the 3 seeds. Steps are those of training on the old task (rate: half of the fine-tuning
rate) until 90 % of 512 held-out strings are right, at most 400; never counts as 400. The ratio is steps of the fine-tuned
model over steps of the control, which was never taught to count a, on the log scale with a 95% Student t interval.
"reproduced" if on every seed the base is right on more than 97 %, the fine-tuned model answers fewer than 10 % as before while a
linear read-out after some block keeps 80 % of the best read-out accuracy of the base, and the geometric mean ratio is at most 1/5 with
its upper bound below 1/3. "not reproduced" if the geometric mean ratio is above 1/1.5. "inconclusive" otherwise. The large rate and
the pruning of rows decide nothing.
"""


@dataclass(frozen=True)
class Sizes:
    """Letters, largest count, width, blocks and batch; steps of each training; rows and steps of read-outs; pruned rows."""

    world: tuple[int, int, int, int, int]
    pretrain: int
    tune: int
    back: int
    rows: int
    readout: int
    ks: tuple[int, ...]


FULL = Sizes((16, 5, 64, 2, 64), 800, 250, 400, 1024, 400, KS)
SMOKE = Sizes((7, 2, 16, 2, 8), 3, 2, 2, 32, 4, (1,))


def run(ctx: Context) -> Raw:
    """One cell for a model, a rate and a seed; a model is trained again where its cells are not all remembered."""
    from . import counting

    sizes = SMOKE if ctx.smoke else FULL
    world = counting.World(*sizes.world)
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "base": [], "large": {arm: [] for arm in ARMS}, "goal": GOAL}
    total, done = len(ctx.seeds) * (1 + len(ARMS) * len(RATES)), 0
    made: dict[tuple[int, bool], Any] = {}

    def model(seed: int, knows: bool) -> Any:
        if (seed, knows) not in made:
            made.clear()
            made[seed, knows] = counting.pretrained(world, seed, sizes.pretrain, knows_a=knows)
        return made[seed, knows]

    def cell(key: dict[str, Any], fn: Any) -> Any:
        nonlocal done
        found = ctx.cell(key, fn)
        done += 1
        ctx.progress(done, total)
        ctx.log(", ".join(f"{k} {v}" for k, v in key.items()))
        return found

    for seed in ctx.seeds:

        def of_base(seed: int = seed) -> dict[str, Any]:
            base = model(seed, True)
            rows = counting.task(world, 512, counting.A, "test", seed)
            return {
                "accuracy": counting.accuracy(base, rows),
                "probes": counting.probes(world, base, None, seed, sizes.rows, sizes.readout),
            }

        raw["base"].append({"seed": seed, **cell({"model": "base", "seed": seed}, of_base)})
        for arm in ARMS:
            for name, lr in RATES.items():

                def one(arm: str = arm, lr: float = lr, seed: int = seed) -> dict[str, Any]:
                    base = model(seed, arm == TUNED)
                    delta = counting.tuned(world, base, lr, sizes.tune, seed)
                    out: dict[str, Any] = {}
                    for key, letter in (("old", counting.A), ("new", counting.B)):
                        with base.using(delta):
                            out[key] = counting.accuracy(base, counting.task(world, 512, letter, "test", seed))
                    out["back"] = counting.back(world, base, delta, lr / 2, seed, sizes.back, GOAL)
                    if arm == TUNED:
                        out["probes"] = counting.probes(world, base, delta, seed, sizes.rows, sizes.readout)
                        out["pruned"] = counting.pruned(world, base, delta, seed, sizes.ks)
                    return out

                found = cell({"model": arm, "rate": name, "seed": seed}, one)
                steps = found["back"]["reached"]
                row = {"seed": seed, "metric": sizes.back if steps is None else steps, **found}
                raw["arms" if name == "small" else "large"][arm].append(row)
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from math import exp, log
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def by_seed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(rows, key=lambda r: r["seed"])

    statistics: dict[str, Any] = {}
    reasons: list[str] = []
    base = by_seed(raw["base"])
    for name, arms in (("small", raw["arms"]), ("large", raw["large"])):
        ours, theirs = by_seed(arms["fine-tuned"]), by_seed(arms["never could"])
        t = paired_t([log(max(a["metric"], 1) / max(b["metric"], 1)) for a, b in zip(ours, theirs, strict=True)])
        statistics[f"log ratio of steps, {name} rate"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        kept = [max(a["probes"]) / max(b["probes"]) for a, b in zip(ours, base, strict=True)]
        statistics[f"read-out kept, {name} rate"] = mean(kept)
        statistics[f"old behaviour left, {name} rate"] = mean(r["old"] for r in ours)
        best = [max(row["old"] for row in r["pruned"]) for r in ours]
        statistics[f"old behaviour with rows pruned, {name} rate"] = mean(best)
        if name == "small":
            hidden = all(r["old"] < 0.1 for r in ours) and all(k >= 0.8 for k in kept)
            ratio = t
            reasons.append(
                f"after fine-tuning {100 * mean(r['old'] for r in ours):.0f} % of the old behaviour is left and a read-out "
                f"keeps {100 * min(kept):.0f} % or more of its accuracy"
            )
            reasons.append(
                f"training on the old task takes {exp(t.mean):.2f} [{exp(t.low):.2f}, {exp(t.high):.2f}] of the control's steps"
            )
    able = all(r["accuracy"] > 0.97 for r in base)
    if not able:
        reasons.append("a base is right on less than 97 %")
    holds = able and hidden and ratio.mean <= log(1 / 5) and ratio.high < log(1 / 3)
    fails = ratio.mean > log(1 / 1.5)
    return Verdict("reproduced" if holds else "not reproduced" if fails else "inconclusive", reasons, statistics)


STUDY = Study(
    id=2,
    slug="mechanistic-finetuning",
    paper="Mechanistically analyzing the effects of fine-tuning on procedurally defined tasks, ICLR 2024, arXiv 2311.12786",
    claim="Fine-tuning hides an ability behind a thin wrapper rather than removing it: a linear read-out still finds it, and a few "
    "steps of training on the old task bring it back.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    minutes=14,
    seeds=(0, 1, 2),
    smoke_seeds=(0, 1),
    deviations=(
        "2 blocks of width 64, 16 letters and counts 0 to 5, 800 steps of 64 strings, instead of the card's 4 blocks of width 128, "
        "30 letters, counts 0 to 9 and 3,000 steps, which one thread does not do in the time.",
        "Counts of a and b are uniform and independent by construction, so that no class is frequent; the other letters are skewed. "
        "Fine-tuning and test strings have count(a) != count(b): an answer then tells which was counted.",
        "250 steps of fine-tuning instead of 300 with the card's two rates; in one trial run of 150 steps at the small rate, on the "
        "first seed, 12 % of the old behaviour was left.",
        "Read-outs are trained 400 steps at 1e-2 on 1,024 strings, standardised; the paper: 4,000 steps at 1e-3.",
        "The control of read-outs is the base; a random model is tested in the library.",
        "Attention maps are not compared.",
    ),
)
