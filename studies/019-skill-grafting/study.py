# SPDX-License-Identifier: Apache-2.0
"""Study 019: do 0.01 % of the entries that fine-tuning changes carry the skill, better calibrated than all of them?"""

from __future__ import annotations

from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

FULL, GRAFT = "fine-tuned", "learnt graft"
ARMS = (FULL, GRAFT, "largest movement", "random entries", "norm gains")
KEYS = ("test", "ece", "shifted")

RULE = """\
By task, means over 3 seeds: recovery is the accuracy of the learnt graft over that of the fine-tuned model on 1,000 test rows;
the fall of ECE is 1 less the graft's expected calibration error (15 bins) over the fine-tuned model's; d is the graft's accuracy
on shifted rows less the fine-tuned model's.
"reproduced" if recovery is at least 95 % on both tasks, and on one of them the fall of ECE is at least 40 % with d at least
0; "not reproduced" if recovery is below 85 % on a task; "inconclusive" otherwise.
"""


def run(ctx: Context) -> Raw:
    """Each task and seed as one cell: fine-tuning, the search, and grafts of the same size."""
    from . import words

    sizes = words.TOY if ctx.smoke else words.Sizes()
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "tasks": [], "base": {}, "tuning": {}}
    full, found = None, {}
    total, done = len(words.TASKS) * len(ctx.seeds), 0
    for name in words.TASKS:
        world = words.made(ctx, name, sizes, full)
        full = world.full
        raw["base"][name] = world.measured(None)[0]
        ctx.log(f"{name}, base: {raw['base'][name]}")
        tried = ctx.cell({"task": name, "rates": list(sizes.rates)}, lambda w=world: trials(w, ctx.seeds[0]))
        lr = max(tried, key=lambda t: (t["training rows"], -t["lr"]))["lr"]
        raw["tuning"][name] = tried
        for seed in ctx.seeds:
            key = {"task": name, "seed": seed, "lr": lr}
            found[name, seed] = ctx.cell(key, lambda w=world, s=seed, lr=lr: one(words, w, s, lr))
            raw["tasks"].append({"task": name, "seed": seed, **found[name, seed]})
            done += 1
            ctx.progress(done, total)
            shown = {arm: round(row["test"], 1) for arm, row in found[name, seed]["arms"].items()}
            ctx.log(f"{name}, seed {seed}: {shown}, {found[name, seed]['search']['entries']} entries")
    for seed in ctx.seeds:
        for arm in ARMS:
            values = [found[name, seed]["arms"][arm]["test"] for name in words.TASKS]
            raw["arms"][arm].append({"seed": seed, "metric": sum(values) / len(values)})
    return raw


def trials(world: Any, seed: int) -> list[dict[str, float]]:
    """Rates in turn until one gets more than 95 % of the training rows right; nothing else is looked at."""
    learn, _ = world.drawn(seed)
    out: list[dict[str, float]] = []
    for lr in world.sizes.rates:
        out.append({"lr": lr, **world.fine_tuned(learn, seed, lr)[1]})
        if out[-1]["training rows"] > 95:
            break
    return out


def one(words: Any, world: Any, seed: int, lr: float) -> dict[str, Any]:
    """A fine-tuned model, its learnt graft and the grafts it is compared with."""
    learn, dev = world.drawn(seed)
    delta, facts = world.fine_tuned(learn, seed, lr)
    arms: dict[str, Any] = {}
    arms[FULL], said = world.measured(delta)
    graft = world.grafted(delta, learn, dev, seed)
    masks = {GRAFT: graft.masks, **words.baselines(delta, world.base, world.sizes.share, seed)}
    for arm, some in masks.items():
        arms[arm], _ = world.measured(world.only(delta, some, arm), said)
        arms[arm]["entries"] = sum(len(at) for at in some.values())
    search = {
        "entries": graft.entries, "of": graft.total, "score": graft.score, "curve": graft.curve,
        "by depth": {str(k): v for k, v in graft.by_depth.items()},
    }  # fmt: skip
    return {"arms": arms, "tuning": facts, "search": search}


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    statistics: dict[str, Any] = {}
    reasons: list[str] = []
    recovered, better = [], []
    for task in dict.fromkeys(row["task"] for row in raw["tasks"]):
        rows = [row["arms"] for row in raw["tasks"] if row["task"] == task]
        of = {arm: {k: mean(row[arm][k] for row in rows) for k in KEYS} for arm in ARMS}
        base = raw["base"][task]
        recovery = of[GRAFT]["test"] / max(of[FULL]["test"], 1e-9)
        fall = 1 - of[GRAFT]["ece"] / max(of[FULL]["ece"], 1e-9)
        d = of[GRAFT]["shifted"] - of[FULL]["shifted"]
        recovered.append(recovery)
        better.append(fall >= 0.4 and d >= 0)
        gain = of[FULL]["test"] - base["test"]
        statistics[f"{task}: recovery"] = recovery
        t = paired_t([row[GRAFT]["test"] - row[FULL]["test"] for row in rows])
        statistics[f"{task}: accuracy, graft - fine-tuned"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        statistics[f"{task}: share of the gain recovered"] = (of[GRAFT]["test"] - base["test"]) / gain if gain else None
        statistics[f"{task}: fall of ECE"] = fall
        statistics[f"{task}: shifted, graft - fine-tuned"] = d
        statistics[f"{task}: base, accuracy and ECE"] = [base["test"], base["ece"]]
        for arm in ARMS:
            statistics[f"{task}: {arm}, accuracy, ECE, shifted"] = [of[arm][k] for k in KEYS]
        reasons.append(
            f"{task}: recovery {100 * recovery:.1f} %, ECE {100 * fall:.0f} % lower, shifted rows {d:+.1f} points"
        )
    holds, fails = min(recovered) >= 0.95 and any(better), min(recovered) < 0.85
    return Verdict("reproduced" if holds else "not reproduced" if fails else "inconclusive", reasons, statistics)


STUDY = Study(
    id=19,
    slug="skill-grafting",
    paper="Task-Specific Skill Localization in Fine-tuned Language Models, ICML 2023, arXiv 2302.06600",
    claim="A learnt graft of 0.01 % of the entries has almost the accuracy of the fine-tuned model, is better calibrated and no "
    "worse on shifted data.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("sst2", "ag_news", "amazon_domains"),
    minutes=15,
    seeds=(0, 1, 2),
    smoke_seeds=(0, 1),
    deviations=(
        "The last 3 of SmolLM2's 30 blocks and the final norm are fine-tuned, on states of the lower blocks computed once; 0.01 % "
        "is of their entries.",
        "The loss is over the label words at the last position; texts are cut to 24 tokens.",
        "The search takes 15 steps from half the budget by movement, and is scored on training and dev rows (32 of each class).",
        "The paper's rate of the search (1e7) belongs to the size of its gradients; here it follows from the first gradient, so that the "
        "last entry within the budget flips after 5 steps.",
        "BitFit has no biases to train here; in its place the gains of norms are grafted, those that moved most.",
        "Shifted rows are kitchen reviews for SST-2, and for AG News its own test rows with 15 % of the characters exchanged.",
    ),
)
