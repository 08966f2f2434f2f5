# SPDX-License-Identifier: Apache-2.0
"""Study 087: does CorDA forget less than LoRA (knowledge) and learn more than LoRA and PiSSA (instruction)?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from tunesmith.study.worlds.language import LanguageWorld

    from .probe import Probe

LORA, PISSA, KEEP, LEARN, MINOR = "lora", "pissa", "corda knowledge", "corda instruction", "minor components"
ARMS = (LORA, PISSA, KEEP, LEARN, MINOR)
RANK = 16
LRS = (2e-4, 6e-4, 2e-3)

RULE = """\
Losses are mean next-token losses in nats: target on the answers of 120 GSM8K test rows, knowledge on the answers to
factual questions that the base answers right. Forgetting is the knowledge loss minus that of the base. A seed draws the
order of the training rows and the first values; differences are taken by seed.
Knowledge claim: holds if CorDA in knowledge mode forgets less than LoRA on every seed and its mean target loss is at most
LoRA's + 0.01; reversed if it forgets as much as LoRA or more in the mean over seeds; open otherwise.
Instruction claim: holds if the target loss of CorDA in instruction mode is below LoRA's and below PiSSA's, each with the
whole 95% Student t interval of the difference over the 3 seeds; reversed if one of the two mean differences is 0 or more;
open otherwise.
"reproduced" if both claims hold; "not reproduced" if one is reversed; "inconclusive" otherwise.
"""


def arms(world: LanguageWorld, probe: Probe, rank: int, samples: int) -> Mapping[str, Any]:
    """Methods by arm, all with scale 1 and as many trained numbers."""
    from tunesmith.deltas import LoRA, PiSSA

    from .probe import measured_on

    same: dict[str, Any] = {"rank": rank, "alpha": float(rank)}
    task = world.task.subset(range(min(samples, len(world.task))))
    return {
        LORA: [LoRA(**same)],
        PISSA: [PiSSA(**same)],
        KEEP: [measured_on(probe.other)(mode="knowledge", **same)],
        LEARN: [measured_on(task)(mode="instruction", **same)],
        MINOR: [PiSSA(start="smallest", **same)],
    }


def run(ctx: Context) -> Raw:
    """Every arm on every seed at the rate that is best for it on dev on the first seed; the base measured once."""
    from tunesmith.study.worlds.arms import sweep
    from tunesmith.study.worlds.language import gsm8k_top

    from .probe import probe as made

    world = gsm8k_top(ctx, blocks=4, train=480, dev=48, test=120, general=60, length=192)
    samples = 4 if ctx.smoke else 64
    probe = made(ctx, world, most=200, samples=samples)
    ctx.log(f"the base answers {probe.counts['known']} of {probe.counts['facts']} questions")

    def knowledge(outcome: Any) -> dict[str, float]:
        with world.base.using(outcome.delta):
            found = world.measure(probe.known)
        return {"knowledge": found.metric, "right": found.values["accuracy"]}

    base = ctx.cell(
        {"arm": "base"},
        lambda: {
            "target": world.score("test").metric, "knowledge": world.measure(probe.known).metric, **world.retention(),
        },
    )  # fmt: skip
    methods = arms(world, probe, 2 if ctx.smoke else RANK, samples)
    found = sweep(ctx, world, methods, lrs=LRS, steps=4 if ctx.smoke else 50, extra=knowledge)
    return {"base": base, "facts": probe.counts, **found}


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def by_seed(arm: str, value: Any) -> list[float]:
        return [value(row) for row in sorted(raw["arms"][arm], key=lambda row: row["seed"])]

    target = {arm: by_seed(arm, lambda row: row["metric"]) for arm in raw["arms"]}
    lost = {arm: by_seed(arm, lambda row: row["extra"]["knowledge"] - raw["base"]["knowledge"]) for arm in raw["arms"]}
    drift = {arm: mean(by_seed(arm, lambda r: r["retention"]["loss"] - raw["base"]["loss"])) for arm in raw["arms"]}
    statistics: dict[str, Any] = {"base: target, knowledge": [raw["base"]["target"], raw["base"]["knowledge"]]}
    for arm in raw["arms"]:
        statistics[f"{arm}: target, forgetting, general"] = [mean(target[arm]), mean(lost[arm]), drift[arm]]

    def gap(what: str, of: dict[str, list[float]], arm: str, other: str) -> Any:
        t = paired_t([a - b for a, b in zip(of[arm], of[other], strict=True)])
        statistics[f"{arm} - {other}, {what}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        return t

    forgets = gap("forgetting", lost, KEEP, LORA)
    gap("forgetting", lost, KEEP, MINOR)
    learns = gap("target", target, KEEP, LORA)
    others = [gap("target", target, LEARN, other) for other in (LORA, PISSA)]
    every = all(a < b for a, b in zip(lost[KEEP], lost[LORA], strict=True))
    keeps = "holds" if every and learns.mean <= 0.01 else "reversed" if forgets.mean >= 0 else "open"
    gains = "holds" if all(t.high < 0 for t in others) else "reversed" if any(t.mean >= 0 for t in others) else "open"
    statistics["claims: knowledge, instruction"] = [keeps, gains]
    reasons = [
        f"knowledge claim {keeps}: CorDA forgets {forgets.mean:+.4f} compared with LoRA, lower on every seed: "
        f"{'yes' if every else 'no'}; target {learns.mean:+.4f}",
        f"instruction claim {gains}: target compared with LoRA {others[0].mean:+.4f} "
        f"[{others[0].low:+.4f}, {others[0].high:+.4f}], with PiSSA {others[1].mean:+.4f} "
        f"[{others[1].low:+.4f}, {others[1].high:+.4f}]",
    ]
    claims = (keeps, gains)
    label = "reproduced" if set(claims) == {"holds"} else "not reproduced" if "reversed" in claims else "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=87,
    slug="corda",
    paper="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models, arXiv 2406.05223",
    claim="Started from the components of the weights that a sample of general knowledge uses least, LoRA learns a task at "
    "least as well and forgets less; started from those that the task uses most, it learns more than LoRA and PiSSA.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("gsm8k", "ag_news"),
    minutes=15,
    seeds=(0, 1, 2),
    smoke_seeds=(0, 1),
    deviations=(
        "SmolLM2-135M-Instruct instead of LLaMA-2-7B, with deltas on all linear layers of its top 4 of 30 blocks; the blocks "
        "below run once.",
        "50 steps of 4 rows of at most 192 tokens from 480 GSM8K rows instead of the card's 150 steps of up to 256 tokens.",
        "Knowledge is measured on those of 328 questions (capitals, chemical symbols, authors, continents, languages, "
        "formulas) that the base answers right after two worked examples, instead of 200 fixed prompts.",
        "CorDA in knowledge mode measures on 64 rows of 5 questions that the base does not answer right, with the right "
        "answers; no question is used for both. In instruction mode on 64 GSM8K training rows, question and answer.",
        "Rates 2e-4, 6e-4 and 2e-3 instead of 5e-5, 2e-4 and 5e-4: a third of the card's steps needs larger ones. The rate of "
        "each arm is the best on dev on the first seed.",
        "Rank 16 with scale 1 in every arm; the paper's is 128.",
    ),
)
