# SPDX-License-Identifier: Apache-2.0
"""Study 039: does training a random half of the matrices in each round forget less than training all of them?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from .sequence import Sequence4, Sizes

FULL, HFT = "full", "hft, category"
ARMS = (FULL, HFT, "hft, model", "hft, layer", "half of the entries", "fixed half", "full, averaged", "lora")
RATES: Mapping[str, tuple[float, float]] = {**dict.fromkeys(ARMS, (3e-5, 1e-4)), "lora": (3e-4, 1e-3)}

RULE = """\
Four tasks in a row, in an order drawn by the seed; scores are percentages on test rows. OP is the mean final score, BWT the
mean over the first three tasks of the final score minus the score just after learning; general loss is the mean loss of a
token on plain texts, at the end.
First claim, which decides the verdict: "reproduced" if in all seeds HFT (category) has a higher BWT and a lower general
loss than full fine-tuning, and its mean OP is not more than 1 point lower; "not reproduced" if in all seeds its BWT is not
higher, or in all seeds its general loss is not lower, or its mean OP is more than 1 point lower; "inconclusive" otherwise.
Time claim: holds if the median step of HFT is at least 15 % shorter than that of full fine-tuning, mean over seeds; fails
if it is not shorter; open otherwise.
Half-Reset, on the final model of full fine-tuning, mean over random category-balanced halves and over seeds: holds if at
least 50 % of the rise in general loss is undone and at least 80 % of the last task's gain over the base is kept; fails if
under 25 % is undone or under 50 % kept; open otherwise, and where full fine-tuning does not raise the general loss.
"""


def sizes_of(smoke: bool) -> Sizes:
    """Amounts and lengths of a smoke run or a full one."""
    from .sequence import Sizes

    return Sizes(8, 4, 4, 4, 2, 20, 2, 2, 4, 2) if smoke else Sizes(240, 60, 150, 200, 60, 96, 4, 30, 8, 5)


def one(world: Sequence4, sizes: Sizes, arm: str, seed: int, lr: float) -> dict[str, Any]:
    """All rounds of one arm; OP and BWT on test, OP on dev, general loss, and for `full` the Half-Reset."""
    from statistics import mean, median

    from . import rounds
    from .sequence import TASKS

    order = rounds.order(seed)
    done = rounds.chain(world, sizes, arm, order, seed, lr)
    final = {task: world.score(done.base, task, "test") for task in TASKS}
    out = {
        "OP": mean(final.values()),
        "BWT": mean(final[task] - done.learnt[task] for task in order[:-1]),
        "general": world.forgotten(done.base),
        "dev": mean(world.score(done.base, task, "dev") for task in TASKS),
        "step_seconds": median(done.seconds),
        "trainable": done.trainable,
        "final": final,
        "learnt": done.learnt,
        "order": list(order),
    }
    return out | ({"reset": rounds.half_reset(world, sizes, done, order[-1], seed)} if arm == FULL else {})


def run(ctx: Context) -> Raw:
    """Rates on the first seed by the mean final score on dev rows, then every arm on every seed."""
    from tunesmith.study.fair import choose_lr

    from . import sequence

    sizes = sizes_of(ctx.smoke)
    world = sequence.build(ctx, sizes)
    base = ctx.cell({"base": True}, lambda: {
        "test": {t: world.score(world.base, t, "test") for t in sequence.TASKS}, "general": world.forgotten(world.base)
    })  # fmt: skip
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "tuning": {}, "base": base}
    first, done = ctx.seeds[0], 0

    def cell(arm: str, seed: int, lr: float) -> dict[str, Any]:
        nonlocal done
        row = ctx.cell({"arm": arm, "seed": seed, "lr": lr}, lambda: one(world, sizes, arm, seed, lr))
        done += 1
        ctx.progress(done, len(ARMS) * (len(ctx.seeds) + 1))
        ctx.log(f"seed {seed}, {arm}, lr {lr:g}: OP {row['OP']:.1f}, BWT {row['BWT']:+.1f}, general {row['general']:.4f}, "
                f"dev {row['dev']:.1f}, {row['step_seconds']:.2f} s a step")  # fmt: skip
        return row

    for arm in ARMS:
        tried = {lr: cell(arm, first, lr) for lr in RATES[arm]}
        choice = choose_lr(lambda lr, t=tried: t[lr]["dev"], RATES[arm], lambda v: v)
        raw["tuning"][arm] = choice.as_json()
        raw["arms"][arm].append({"seed": first, "lr": choice.lr, "metric": tried[choice.lr]["OP"], **tried[choice.lr]})
    for seed in ctx.seeds[1:]:
        for arm in ARMS:
            lr = raw["tuning"][arm]["lr"]
            row = cell(arm, seed, lr)
            raw["arms"][arm].append({"seed": seed, "lr": lr, "metric": row["OP"], **row})
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def values(arm: str, key: str) -> list[float]:
        return [row[key] for row in sorted(raw["arms"][arm], key=lambda row: row["seed"])]

    bwt = list(zip(values(HFT, "BWT"), values(FULL, "BWT"), strict=True))
    general = list(zip(values(HFT, "general"), values(FULL, "general"), strict=True))
    gap = mean(values(HFT, "OP")) - mean(values(FULL, "OP"))
    holds = all(a > b for a, b in bwt) and all(a < b for a, b in general) and gap >= -1
    fails = all(a <= b for a, b in bwt) or all(a >= b for a, b in general) or gap < -1
    label = "reproduced" if holds else "not reproduced" if fails else "inconclusive"
    saved = mean(1 - a / b for a, b in zip(values(HFT, "step_seconds"), values(FULL, "step_seconds"), strict=True))
    time = "holds" if saved >= 0.15 else "fails" if saved <= 0 else "open"
    damage = mean(values(FULL, "general")) - raw["base"]["general"]
    resets = [row["reset"] for row in raw["arms"][FULL]]

    def half(which: str) -> tuple[float, float]:
        """Shares of the damage undone and of the last task's gain kept, over all seeds."""
        lost = sum(r["general"] - r["base_general"] for r in resets)
        back = sum(r["general"] - mean(r[which]["general"]) for r in resets)
        gain = sum(r["task"] - r["base_task"] for r in resets)
        kept = sum(mean(r[which]["task"]) - r["base_task"] for r in resets)
        return back / lost if lost > 0 else 0.0, kept / gain if gain > 0 else 0.0

    undone, kept = half("category")
    harmed = damage > 0 and sum(r["general"] - r["base_general"] for r in resets) > 0
    reset = "open" if not harmed else "holds" if undone >= 0.5 and kept >= 0.8 else "open"
    if harmed and (undone < 0.25 or kept < 0.5):
        reset = "fails"
    control = half("any")
    reasons = [
        "BWT, HFT against full fine-tuning by seed: " + ", ".join(f"{a:+.1f} against {b:+.1f}" for a, b in bwt),
        "general loss by seed: " + ", ".join(f"{a:.4f} against {b:.4f}" for a, b in general)
        + f" (base {raw['base']['general']:.4f})",
        f"mean OP is {gap:+.1f} points from that of full fine-tuning",
        f"time claim {time}: a step is {saved:.0%} shorter",
        f"Half-Reset {reset}: {undone:.0%} of the rise in general loss undone, {kept:.0%} of the last task's gain kept; "
        f"with matrices of any kind {control[0]:.0%} and {control[1]:.0%}",
    ]  # fmt: skip
    statistics: dict[str, Any] = {"OP gap": gap, "time saved": saved, "time claim": time, "half-reset": reset,
                                  "reset undone": undone, "reset kept": kept}  # fmt: skip
    for key in ("BWT", "general", "OP"):
        t = paired_t([a - b for a, b in zip(values(HFT, key), values(FULL, key), strict=True)])
        statistics[f"{key}, {HFT} - {FULL}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
    for arm in raw["arms"]:
        statistics[arm] = {key: mean(values(arm, key)) for key in ("OP", "BWT", "general", "step_seconds")}
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=39,
    slug="hft",
    paper="HFT: Half Fine-Tuning for Large Language Models, ACL 2025, arXiv 2404.18466",
    claim="Training a random half of the matrices in each round forgets less than training all of them and scores as well, "
    "in less time; resetting half of a tuned model's matrices gives back what the base knew at little cost.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("ag_news", "clinc150", "sst2", "gsm8k", "books"),
    minutes=12,
    seeds=(0, 1, 2),
    smoke_seeds=(0, 1),
    deviations=(
        "Only the last 4 of the 30 blocks of SmolLM2-135M-Instruct train; the states that enter them are computed once, and "
        "embedding, output head and last norm, which the paper trains, stay frozen in every arm.",
        "30 steps of 8 rows of at most 96 tokens for each task instead of 40 steps of 4 rows of 128.",
        "Rates 3e-5 and 1e-4 (LoRA 3e-4 and 1e-3) instead of 1e-5 and 3e-5, since few blocks train for few steps; the rate of "
        "each arm is the better of its two by the mean final score on dev rows, on the first seed.",
        "GSM8K is scored by the share of next tokens of the rationale, cut to the same length, that are right; the general loss is of "
        "passages of four novels, since AG News is a task here.",
        "LoRA trains one adapter through all rounds; every other arm adds a delta in each round.",
        "5 draws of the Half-Reset and of its control (any matrices) on each seed, on 60 of the plain texts.",
    ),
)
