# SPDX-License-Identifier: Apache-2.0
"""Study 080: do gates over many LoRA deltas (MeteoRA) do as well as being told which one, and switch within one text?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

ARMS = ("oracle", "meteora k=2", "meteora k=1", "average", "nearest task", "multi-task")
WEIGHTS = (1.0, 50.0)
RATES = (2e-3, 1e-2)
TEMPERATURES = (1.0, 15.0)

RULE = """\
Accuracies are in percent of whole answers. "Single" is the mean over the eight tasks of their test questions; "composite" is
the mean over the questions of test prompts that ask three of different tasks. Four runs: two sets of deltas (rows, order and
first values drawn anew) by two seeds of gates. The weight c of the gate loss, the rate of the gates and the temperature for
composites are chosen on dev rows of the first run.
1. Single: "meteora k=2" - "oracle", in mean over the four runs, is at least -3 points.
2. Composite: "meteora k=2" - "nearest task", each prompt's difference averaged over the runs, is above 0 by the 95% paired
bootstrap interval over prompts.
"reproduced" if both hold; "not reproduced" if the first difference is below -10 points or the second is 0 or less in mean;
"inconclusive" otherwise.
"""


@dataclass(frozen=True)
class Sizes:
    """Upper blocks that are adapted, rank, steps of each kind of run and rate of the deltas, and rows kept of each split and task."""

    blocks: int
    rank: int
    steps: int
    lr: float
    gate_steps: int
    multi_steps: int
    batch: int
    counts: dict[str, int]


FULL = Sizes(6, 8, 60, 3e-3, 80, 160, 16,
             {"train": 160, "dev": 16, "test": 32, "composite dev": 24, "composite test": 80})  # fmt: skip
SMOKE = Sizes(1, 2, 2, 1e-2, 2, 2, 4, {"train": 3, "dev": 2, "test": 2, "composite dev": 2, "composite test": 3})


def run(ctx: Context) -> Raw:
    """Each set of deltas is one cell; the first also chooses c and the temperature."""
    from . import runs

    sizes = SMOKE if ctx.smoke else FULL
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "gates": []}
    use: Any = None
    chosen: dict[str, float] | None = None
    sets = sorted({seed // 2 for seed in ctx.seeds})
    for done, which in enumerate(sets):

        def one(which: int = which, chosen: dict[str, float] | None = chosen) -> dict[str, Any]:
            nonlocal use
            use = use or runs.opened(ctx.smoke, sizes.blocks)
            seeds = [s for s in ctx.seeds if s // 2 == which]
            return of_set(runs.world(use, sizes.counts, which), sizes, which, seeds, chosen, ctx.log)

        found = ctx.cell({"set": which, "chosen": chosen}, one)
        chosen = found["chosen"]
        raw.setdefault("tuning", found.get("tuning"))
        for arm in ARMS:
            raw["arms"][arm] += found["arms"][arm]
        raw["gates"] += found["gates"]
        ctx.progress(done + 1, len(sets))
    raw["chosen"] = chosen
    return raw


def of_set(
    w: Any, sizes: Sizes, which: int, seeds: list[int], chosen: dict[str, float] | None, log: Any
) -> dict[str, Any]:
    """Every arm on one set of deltas, gates for every seed."""
    import tunesmith as ts
    from tunesmith.compose import reset
    from tunesmith.core.delta import Delta

    from . import runs
    from .tasks import TASKS

    deltas = runs.adapters(w, sizes.rank, sizes.steps, sizes.batch, sizes.lr, which)
    log(f"set {which}: deltas trained")
    multi = Delta.create(w.base, runs.lora(sizes.rank * len(TASKS)), name="multi", seed=which)
    train = w.sets["train"]
    runs.learn(w, multi, train.task(train.mixture()), sizes.multi_steps, sizes.batch, sizes.lr, which)
    mean = ts.merge(w.base, deltas, "linear")

    def own(split: str) -> Any:
        return lambda i: deltas[w.sets[split].rows[i].expert[0]]

    def near(split: str) -> Any:
        names = w.nearest.choose([r.text for r in w.sets[split].rows])
        return lambda i: deltas[TASKS.index(names[i])]

    def both(single: Any, composite: Any) -> dict[str, Any]:
        hits = runs.right(w, "test", single)
        by_task: dict[str, list[bool]] = {t: [] for t in TASKS}
        for row, hit in zip(w.sets["test"].rows, hits, strict=True):
            by_task[TASKS[row.expert[0]]] += hit
        tasks = {t: 100 * sum(v) / len(v) for t, v in by_task.items()}
        prompts = [100 * sum(v) / len(v) for v in runs.right(w, "composite test", composite)]
        return {"metric": sum(tasks.values()) / len(tasks), "tasks": tasks, "prompts": prompts,
                "composite": sum(prompts) / len(prompts)}  # fmt: skip

    fixed = {
        "oracle": both(own("test"), own("composite test")), "average": both(lambda i: mean, lambda i: mean),
        "nearest task": both(near("test"), near("composite test")), "multi-task": both(lambda i: multi, lambda i: multi),
    }  # fmt: skip
    log(f"set {which}: " + ", ".join(f"{a} {r['metric']:.0f}/{r['composite']:.0f}" for a, r in fixed.items()))

    def gated(c: float, lr: float, seed: int) -> Any:
        return runs.gates(w, deltas, c, sizes.gate_steps, sizes.batch, lr, 10 * which + seed % 2)

    def share(hits: list[list[bool]]) -> float:
        return 100 * sum(map(sum, hits)) / sum(map(len, hits))

    out: dict[str, Any] = {"arms": {arm: [] for arm in ARMS}, "gates": []}
    made: dict[int, Any] = {}
    if chosen is None:
        trials = {(c, lr): gated(c, lr, seeds[0]) for c in WEIGHTS for lr in RATES}
        scores = {k: share(runs.right(w, "dev", lambda i, g=g: g)) for k, g in trials.items()}
        best = max(trials, key=lambda k: scores[k])
        made[seeds[0]] = trials[best]
        warm = {T: reset(trials[best], temperature=T) for T in TEMPERATURES}
        heat = {T: share(runs.right(w, "composite dev", lambda i, g=g: g)) for T, g in warm.items()}
        chosen = {"c": best[0], "lr": best[1], "T": max(TEMPERATURES, key=lambda T: heat[T])}
        out["tuning"] = {
            "gates": [{"c": c, "lr": lr, "dev": s} for (c, lr), s in scores.items()],
            "temperature": [{"T": T, "dev": s} for T, s in heat.items()],
        }  # fmt: skip
    for seed in seeds:
        g = made.get(seed) or gated(chosen["c"], chosen["lr"], seed)
        one, wide = reset(g, top_k=1), reset(g, temperature=chosen["T"])
        found = {**fixed, "meteora k=2": both(lambda i, g=g: g, lambda i, g=wide: g),
                 "meteora k=1": both(lambda i, g=one: g, lambda i, g=one: g)}  # fmt: skip
        for arm in ARMS:
            out["arms"][arm].append({"seed": seed, **found[arm]})
        out["gates"].append({"seed": seed, "accuracy": runs.gate_accuracy(w, g)})
        log(f"seed {seed}: k=2 {found['meteora k=2']['metric']:.0f}/{found['meteora k=2']['composite']:.0f}")
    out["chosen"] = chosen
    return out


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_bootstrap

    rows = {arm: sorted(found, key=lambda r: r["seed"]) for arm, found in raw["arms"].items()}
    single = {arm: mean(r["metric"] for r in found) for arm, found in rows.items()}
    prompts = {
        arm: [mean(each) for each in zip(*(r["prompts"] for r in found), strict=True)] for arm, found in rows.items()
    }
    gap = single["meteora k=2"] - single["oracle"]
    test = paired_bootstrap(prompts["nearest task"], prompts["meteora k=2"])
    statistics: dict[str, Any] = {
        "single, k=2 - oracle, points": gap,
        "composite, k=2 - nearest task": {"mean": test.difference, "low": test.low, "high": test.high, "n": test.n},
    }
    statistics.update({f"single, {arm}": value for arm, value in single.items()})
    statistics.update({f"composite, {arm}": mean(found) for arm, found in prompts.items()})
    blocks = sorted({b for g in raw["gates"] for b in g["accuracy"]}, key=int)
    statistics.update({f"gates right, block {b}": mean(g["accuracy"][b] for g in raw["gates"]) for b in blocks})
    statistics.update({"c": raw["chosen"]["c"], "rate of the gates": raw["chosen"]["lr"]})
    statistics["temperature for composites"] = raw["chosen"]["T"]
    reasons = [
        f"single questions: gates {gap:+.1f} points from being told the task",
        f"composites: gates {test.difference:+.1f} [{test.low:+.1f}, {test.high:+.1f}] points from one delta for the text",
    ]
    holds, fails = gap >= -3 and test.low > 0, gap < -10 or test.difference <= 0
    return Verdict("reproduced" if holds else "not reproduced" if fails else "inconclusive", reasons, statistics)


STUDY = Study(
    id=80,
    slug="meteora",
    paper="MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models, arXiv 2405.13053",
    claim="Small trained gates that choose among many LoRA deltas token by token do as well as choosing the right delta by hand, "
    "and better than one delta for the whole text where it holds several tasks.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    minutes=20,
    seeds=(0, 1, 2, 3),
    smoke_seeds=(0, 1),
    deviations=(
        "Deltas and gates lie in the upper 6 of the 30 blocks; the lower ones run once and their states are kept.",
        "Deltas are trained 60 steps, gates 80 at the better of two rates (the paper: 15,000 at 5e-4), the multi-task LoRA of rank 64 160 "
        "steps on the mixture.",
        "Every question stands on a line of its own, then each is answered after a cue with the name of its task; cues are given, "
        "and in composites an answer is scored with the right ones before it.",
        "Reverse, upper, vowels and first work on four letters that stand apart, sort on three digits: the model does not spell "
        "its tokens. In a pilot upper case of whole words was learnt by heart and not generalised.",
        "Questions of the test rows were seen by no delta of their task; the word lists of plural and opposite are short.",
        "Gates start with variance 1 / width instead of 1; deltas have no dropout.",
        "The temperature for composites is the better of 1 and the paper's 15 on dev rows of the first run.",
        "Answers right by greedy decoding are found without writing: every token of the answer is the likeliest one.",
    ),
)
