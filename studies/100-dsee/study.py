# SPDX-License-Identifier: Apache-2.0
"""Study 100: do sparse entries beside LoRA help, does a delta know what to prune, and is a quarter of the FLOPs free?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from tunesmith.core.delta import Delta
    from tunesmith.study.worlds.text import TextWorld

TASKS = ("sst2", "clinc150-domains")
FORMS = ("lora", "robust", "random", "size")
SCORES = ("abs", "wabs", "w", "random")
RATIOS = (20, 40, 60)
PRUNED = tuple(f"{score} {ratio} %" for ratio in RATIOS for score in SCORES)
HEADS = ("heads by abs", "heads by w", "heads by random", "heads and neurons")
ARMS = (*FORMS, *PRUNED, *HEADS, "unpruned")
LRS = (1e-3, 3e-3)

RULE = """\
Accuracies are in percent of 500 test sentences, averaged over both tasks; a seed draws the rows, the first values and the
order. Intervals are 95 % Student t over the 5 seeds.
Sparse entries: "robust" - "lora" after stage A. Reproduced if the interval lies above 0, reversed if below.
Delta-guided pruning: "abs r %" - "w r %" after tuning on, at r = 40 and 60. Reproduced if the interval lies above 0 at one
of them and below 0 at none, reversed if it lies below 0 at one and above 0 at none.
A quarter of the FLOPs: the mean of "heads and neurons" minus that of "unpruned", on each task. Reproduced if it is -1 or
more on both tasks with at least 25 % of the blocks' multiplications gone, reversed if it is below -3 on both.
"reproduced" if all three are; "not reproduced" if any is reversed; "inconclusive" otherwise.
"""


def run(ctx: Context) -> Raw:
    """Stage A by task, seed and form, rates chosen on dev with the first seed; then every pruned base, one cell each."""
    from tunesmith.study.fair import choose_lr

    from . import stages

    sizes = stages.SMOKE if ctx.smoke else stages.FULL
    worlds: dict[tuple[str, int], TextWorld] = {}
    deltas: dict[tuple[str, int, str], Delta] = {}
    raw: Raw = {"arms": {}, "tasks": {t: {arm: [] for arm in ARMS} for t in TASKS}, "tuning": {}, "flops": {}}

    def world(task: str, seed: int) -> TextWorld:
        if (task, seed) not in worlds:
            base = next((w.base for w in worlds.values()), None)
            worlds.clear()
            worlds[task, seed] = stages.world_of(ctx, task, seed, sizes, base)
        return worlds[task, seed]

    def formed(task: str, seed: int, arm: str, lr: float) -> dict[str, float]:
        out = stages.first(world(task, seed), arm, lr, seed, sizes)
        deltas[task, seed, f"{arm} {lr}"] = out.delta
        return {"dev": 100 * out.dev().metric, "metric": 100 * out.test().metric, "trainable": out.trainable}

    def trained(task: str, seed: int, lr: float) -> Delta:
        """The delta that is pruned with; trained again where its cell was remembered."""
        if (task, seed, f"robust {lr}") not in deltas:
            formed(task, seed, "robust", lr)
        return deltas[task, seed, f"robust {lr}"]

    def cell(task: str, seed: int, arm: str, lr: float) -> dict[str, float]:
        key = {"task": task, "seed": seed, "arm": arm, "lr": lr}
        if arm in FORMS:
            found = ctx.cell(key, lambda: formed(task, seed, arm, lr))
        else:
            found = ctx.cell(
                key, lambda: stages.again(world(task, seed), trained(task, seed, lr), arm, lr, seed, sizes)
            )
        shown = f"dev {found['dev']:.1f} %" if arm in FORMS else f"dev {found['dev_before']:.1f} % before tuning on"
        ctx.log(f"{task}, seed {seed}, {arm}, lr {lr:g}: {shown}")
        return found  # type: ignore[no-any-return]

    total, done = len(TASKS) * len(ctx.seeds) * len(ARMS), 0
    for task in TASKS:
        rates: dict[str, float] = {}
        for seed in ctx.seeds:
            for arm in ARMS:
                if arm in FORMS and arm not in rates:
                    trials: dict[float, dict[str, float]] = {}

                    def dev(
                        lr: float, task: str = task, seed: int = seed, arm: str = arm, trials: Any = trials
                    ) -> float:
                        trials[lr] = cell(task, seed, arm, lr)
                        return float(trials[lr]["dev"])

                    choice = choose_lr(dev, LRS, lambda v: v)
                    rates[arm], row = choice.lr, trials[choice.lr]
                    raw["tuning"][f"{task}, {arm}"] = choice.as_json()
                else:
                    row = cell(task, seed, arm, rates[arm if arm in FORMS else "robust"])
                raw["tasks"][task][arm].append({"seed": seed, **row})
                done += 1
                ctx.progress(done, total)
            deltas.clear()
    base = world(TASKS[0], ctx.seeds[0]).base
    H = next(s.heads[0] for s in base.sites.all() if s.kind == "attention" and s.heads)
    whole = stages.flops(base, 16)
    less = stages.flops(base, 16, heads=sizes.heads / H, neurons=0.4)
    raw["flops"] = {"tokens": 16, "whole": whole, "heads and neurons": less, "saved": 1 - less / whole}
    for arm in ARMS:
        both = zip(*(raw["tasks"][t][arm] for t in TASKS), strict=True)
        raw["arms"][arm] = [{"seed": r[0]["seed"], "metric": sum(x["metric"] for x in r) / len(r)} for r in both]
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def values(rows: list[dict[str, Any]]) -> list[float]:
        return [r["metric"] for r in sorted(rows, key=lambda r: r["seed"])]

    statistics: dict[str, Any] = {}
    reasons: list[str] = []

    def compare(a: str, b: str) -> Any:
        t = paired_t([x - y for x, y in zip(values(raw["arms"][a]), values(raw["arms"][b]), strict=True)])
        statistics[f"{a} - {b}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        reasons.append(f"{a} - {b} {t.mean:+.2f} [{t.low:+.2f}, {t.high:+.2f}]")
        return t

    entries = compare("robust", "lora")
    for other in ("random", "size"):
        compare("robust", other)
    guided = [compare(f"abs {r} %", f"w {r} %") for r in (40, 60)]
    for arm in ("heads by w", "heads by random"):
        compare("heads by abs", arm)
    gap = {
        t: mean(values(raw["tasks"][t]["heads and neurons"])) - mean(values(raw["tasks"][t]["unpruned"]))
        for t in raw["tasks"]
    }
    saved = raw["flops"]["saved"]
    for task, value in gap.items():
        statistics[f"heads and neurons - unpruned, {task}"] = value
    shown = ", ".join(f"{t} {v:+.2f}" for t, v in gap.items())
    reasons.append(f"heads and neurons - unpruned: {shown}, with {100 * saved:.0f} % of multiplications saved")
    for arm in raw["arms"]:
        statistics[f"mean of {arm}"] = mean(values(raw["arms"][arm]))
    up, down = any(t.low > 0 for t in guided), any(t.high < 0 for t in guided)
    claims = {
        "entries": "reproduced" if entries.low > 0 else "reversed" if entries.high < 0 else "open",
        "guided": "reproduced" if up and not down else "reversed" if down and not up else "open",
        "flops": "reproduced" if min(gap.values()) >= -1 and saved >= 0.25
        else "reversed" if max(gap.values()) < -3 else "open",
    }  # fmt: skip
    statistics["claims"] = claims
    if "reversed" in claims.values():
        return Verdict("not reproduced", reasons, statistics)
    return Verdict("reproduced" if set(claims.values()) == {"reproduced"} else "inconclusive", reasons, statistics)


STUDY = Study(
    id=100,
    slug="dsee",
    paper="DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models, arXiv 2111.00160",
    claim="A few sparse entries where the pre-trained weight is not low-rank help LoRA, the learnt update says which weights of "
    "the base can be pruned, and a quarter of the inference FLOPs can go with no loss.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("sst2", "clinc150", "ag_news"),
    minutes=18,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "MiniLM-L6 instead of BERT-base; SST-2 and the 10 domains of CLINC150, 4,000 training rows each, of which stage A sees "
        "1,600 (100 steps of 16) and tuning on 480 (30 steps instead of the card's 200).",
        "Stage A compares at nearly equal size: 16 entries beside rank 8 add 0.3 % numbers. Rates 1e-3 and 3e-3 by dev on the "
        "first seed; the head has 5e-3 in every arm.",
        "The decomposition's rank ends at 65 % of full, as 100 growths of 5 do on BERT-base.",
        "Neurons are taken by the size of their output weights, not by slimming coefficients trained with an L1 penalty.",
        "Heads and neurons are masked; that they could be cut is counted in multiplications of 16 tokens, not timed.",
        "Scores are of the whole dW with its scale; the released code adds the low-rank part unscaled in one mode.",
    ),
)
