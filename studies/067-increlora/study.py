# SPDX-License-Identifier: Apache-2.0
"""Study 067: does growing the rank where it matters (IncreLoRA) beat LoRA of the same average rank when data is scarce?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from tunesmith.study.worlds.encoder import UpperWorld

GROWN, LORA, PRUNED, RANDOM, PLAIN = "increlora", "lora", "adalora", "random growth", "no advance learning"
ARMS = (GROWN, LORA, PRUNED, RANDOM, PLAIN)
SETS = ("clinc150", "ag_news")
FEW, ALL = "200", "all"
LRS = (1e-3, 4e-3)
HEAD_LR = 5e-3
RANK, ALPHA = 2, 32.0

RULE = """\
Accuracies are in percent of the test rows. The gap on a seed at n training rows is IncreLoRA - LoRA, mean over the two
sets; its 95% Student t interval is over the 5 seeds.
"reproduced" if the interval of the gap at n = 200 lies above 0 and the mean gap at n = 200 is larger than at n = all;
"not reproduced" if the mean gap is 0 or below at both n; "inconclusive" otherwise.
Random growth is a control: if IncreLoRA is not above it, the score by which layers are chosen has not been shown to matter.
"""


@dataclass(frozen=True)
class Sizes:
    """Blocks that are adapted, rows (per class for training; `few` of them in the small setting), and the schedule."""

    blocks: int
    train: Mapping[str, int]
    few: int
    dev: int
    test: int
    steps: int
    every: int
    length: int


FULL = Sizes(2, {"clinc150": 20, "ag_news": 850}, 200, 300, 1500, 100, 8, 24)
SMOKE = Sizes(1, {"clinc150": 2, "ag_news": 2}, 3, 8, 16, 7, 1, 24)


def method(arm: str, sizes: Sizes) -> Any:
    """The arm's method, of average rank 2 at the end."""
    from tunesmith.deltas import AdaLoRA, IncreLoRA, LoRA

    if arm == LORA:
        return LoRA(rank=RANK, alpha=ALPHA)
    if arm == PRUNED:
        return AdaLoRA(rank=RANK, initial=RANK + 1, alpha=ALPHA, every=sizes.every)
    grow = IncreLoRA(rank=RANK, initial=1, alpha=ALPHA, top=3, every=sizes.every, warmup=sizes.every)
    changed: dict[str, dict[str, Any]] = {RANDOM: {"choice": "random"}, PLAIN: {"advance": False}}
    return replace(grow, **changed.get(arm, {}))


def worlds(ctx: Context, name: str, sizes: Sizes) -> Callable[[int], UpperWorld]:
    """The world of a set by seed; the encoder and the states of its test rows are made once."""
    from tunesmith.study.worlds.encoder import upper
    from tunesmith.study.worlds.text import few_shot

    made: dict[str, Any] = {}

    def of(seed: int) -> UpperWorld:
        if made.get("seed") != seed:
            text = few_shot(
                ctx, name, sizes.train[name], seed, dev=sizes.dev, test=sizes.test, length=sizes.length,
                precision="fp32", base=made.get("base"),
            )  # fmt: skip
            made.update(seed=seed, base=text.base, world=upper(text, sizes.blocks, known=made.get("world")))
        return made["world"]

    return of


def one(world: UpperWorld, arm: str, n: str, lr: float, seed: int, sizes: Sizes) -> dict[str, Any] | None:
    """One run, measured as the plain LoRA that is stored. None where it diverges."""
    from tunesmith.core.delta import bake
    from tunesmith.core.errors import TrainingError
    from tunesmith.study.fair import nested_budgets
    from tunesmith.study.worlds.arms import train
    from tunesmith.study.worlds.encoder import States, StatesTask

    rows = world.task.rows
    drawn = nested_budgets(range(len(rows)), [sizes.few, len(rows)], seed)[sizes.few if n == FEW else len(rows)]
    task = StatesTask(States([rows.states[i] for i in drawn], [rows.labels[i] for i in drawn]))
    # The head learns at one rate in every arm, so that an arm's rate is about what it adds to the encoder.
    head = replace(world.companions[0], lr_ratio=HEAD_LR / lr)
    try:
        out = train(
            replace(world, companions=(head,)), [method(arm, sizes)], lr=lr, steps=sizes.steps, seed=seed, task=task
        )
    except TrainingError:
        return None
    bake(world.base, out.delta)
    part = out.delta.parts[0]
    ranks = {path: len(part.parameter(path, "A")) for path in part.kind_of}
    return {
        "dev": 100 * out.dev().metric, "test": 100 * out.test().metric, "seconds": out.seconds, "ranks": ranks,
        "parameters": sum(t.numel() for _, _, t in part.items()),
    }  # fmt: skip


def run(ctx: Context) -> Raw:
    """Rates chosen on the first seed's dev rows, then every arm on every seed; one cell for each run."""
    from tunesmith.core.errors import TrainingError
    from tunesmith.study.fair import choose_lr

    sizes = SMOKE if ctx.smoke else FULL
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "tuning": {}}
    total, done = len(SETS) * 2 * len(ARMS) * (len(LRS) + len(ctx.seeds) - 1), 0
    for name in SETS:
        world = worlds(ctx, name, sizes)
        known: dict[Any, Any] = {}

        def cell(
            arm: str, n: str, seed: int, lr: float, name: str = name, world: Any = world, known: Any = known
        ) -> Any:
            nonlocal done
            key = (arm, n, seed, lr)
            if key not in known:
                what = {"set": name, "n": n, "arm": arm, "seed": seed, "lr": lr}
                known[key] = ctx.cell(what, lambda: one(world(seed), arm, n, lr, seed, sizes))
                done += 1
                ctx.progress(done, total)
                shown = "diverged" if known[key] is None else f"dev {known[key]['dev']:.1f} %"
                ctx.log(f"{name}, n {n}, {arm}, seed {seed}, lr {lr:g}: {shown}")
            return known[key]

        rates: dict[tuple[str, str], float] = {}
        for seed in ctx.seeds:
            for n in (FEW, ALL):
                for arm in ARMS:
                    if seed == ctx.seeds[0]:
                        choice = choose_lr(
                            lambda lr, arm=arm, n=n, cell=cell: cell(arm, n, ctx.seeds[0], lr),
                            LRS,
                            lambda found: float("nan") if found is None else found["dev"],
                        )
                        raw["tuning"][f"{name}, n {n}, {arm}"] = choice.as_json()
                        rates[arm, n] = choice.lr
                    found = cell(arm, n, seed, rates[arm, n])
                    if found is None:
                        raise TrainingError(f"{arm} diverges on seed {seed} of {name}", hint="offer smaller rates")
                    rest = {k: found[k] for k in ("dev", "seconds", "parameters", "ranks")}
                    raw["arms"][arm].append({"seed": seed, "set": name, "n": n, "metric": found["test"], **rest})
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def by_seed(arm: str, n: str) -> dict[int, float]:
        rows = [r for r in raw["arms"][arm] if r["n"] == n]
        return {s: mean(r["metric"] for r in rows if r["seed"] == s) for s in sorted({r["seed"] for r in rows})}

    statistics: dict[str, Any] = {}
    reasons: list[str] = []
    gaps: dict[tuple[str, str], Any] = {}
    for n in (FEW, ALL):
        mine = by_seed(GROWN, n)
        for other in (a for a in raw["arms"] if a != GROWN):
            theirs = by_seed(other, n)
            t = gaps[other, n] = paired_t([mine[s] - theirs[s] for s in mine])
            statistics[f"IncreLoRA - {other}, n {n}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
            reasons.append(f"n {n}: IncreLoRA - {other} {t.mean:+.2f} [{t.low:+.2f}, {t.high:+.2f}] points")
    few, everything, control = gaps[LORA, FEW], gaps[LORA, ALL], gaps[RANDOM, FEW]
    statistics["the score matters at n 200"] = (
        "shown" if control.low > 0 else "not shown" if control.high >= 0 else "random growth is better"
    )
    holds = few.low > 0 and few.mean > everything.mean
    fails = few.mean <= 0 and everything.mean <= 0
    return Verdict("reproduced" if holds else "not reproduced" if fails else "inconclusive", reasons, statistics)


STUDY = Study(
    id=67,
    slug="increlora",
    paper="IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning, arXiv 2308.12043",
    claim="Starting every layer at rank 1 and growing the most sensitive ones until a budget is spent is better than LoRA of "
    "the same average rank, above all where training data is scarce.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("clinc150", "ag_news"),
    minutes=12,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "MiniLM-L6 with its last 2 blocks adapted (12 linear layers) on states of the lower blocks computed once, instead of "
        "all 36 linear layers; the paper uses DeBERTaV3-base.",
        "n = 200 and n = all (3,000 rows of CLINC150, 3,400 of AG News); the card's n = 1,000 is left out for time, and the "
        "rule is about the two ends.",
        "100 steps of batch 32 (the card: 500), so growth comes every 8 steps (the card: 20) from step 16 to step 40; AG "
        "News texts are cut to 24 tokens.",
        "Every arm has alpha 32, the value of the published script; LoRA's scale is 32 / 2.",
        "AdaLoRA is Tunesmith's, which the tests hold against PEFT's; it prunes between a tenth and half of the run.",
        "The head learns at 5e-3 in every arm; the rate of the rest (2 trials) is chosen for each arm, set and n on the first "
        "seed's 300 dev rows and kept for the other seeds.",
    ),
)
