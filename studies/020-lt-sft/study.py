# SPDX-License-Identifier: Apache-2.0
"""Study 020: do sparse deltas for a language and a task add up better than adapters or dense ones?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from .transfer import World

SPARSE, RANDOM, ADAPTERS, DENSE, TASK_ONLY = "lt-sft", "random mask", "adapters", "dense composition", "task only"
ARMS = (SPARSE, RANDOM, ADAPTERS, DENSE, TASK_ONLY)
SHARE = 0.05
CURVE = (0.005, 0.02, 0.2)
CURVE_SEEDS = 2
RATES: Mapping[str, tuple[float, float]] = {
    SPARSE: (1e-3, 3e-3), RANDOM: (1e-3, 3e-3), ADAPTERS: (1e-3, 3e-3), DENSE: (3e-4, 1e-3), TASK_ONLY: (1e-3, 3e-3),
}  # fmt: skip

RULE = """\
The score is the percentage of tokens tagged right, averaged over the test sentences of B, C and D, with the delta of the
target language in place of the source's. Differences are LT-SFT minus the other arm by seed, with a 95 % Student t interval
over the seeds.
"reproduced" if LT-SFT - adapters and LT-SFT - dense composition both have a lower bound above 0; "not reproduced" if either
has an upper bound below 0; "inconclusive" otherwise.
"""


def build(ctx: Context, seed: int) -> World:
    """The languages, the pre-trained base and the data of one seed."""
    from .transfer import Lengths, World
    from .world import SMOKE, Size

    return World.of(SMOKE, Lengths(2, 2), seed) if ctx.smoke else World.of(Size(), Lengths(150, 100), seed)


def tuned(world: World, arm: str) -> dict[str, Any]:
    """The better of two rates for languages (masked words of held-out raw B) and for the task (tags of held-out A)."""
    from tunesmith.study.fair import choose_lr

    from . import transfer

    out: dict[str, Any] = {}
    lr, source = 0.0, None
    if arm != TASK_ONLY:

        def surprise(rate: float) -> float:
            return transfer.surprise(world, world.heard["B"], transfer.language(world, arm, SHARE, "B", rate))

        choice = choose_lr(surprise, RATES[arm], lambda v: v, higher_is_better=False)
        out["language"], lr = choice.as_json(), choice.lr
        source = transfer.language(world, arm, SHARE, transfer.SOURCE, lr)
    kind, under = ("lt-sft", "nothing") if arm == TASK_ONLY else (arm, f"{arm} {SHARE:g} {lr:g}")

    def tags(rate: float) -> float:
        return transfer.accuracy(
            world, world.dev, source, transfer.tagging(world, kind, SHARE, source, rate, under)
        )  # fmt: skip

    out["task"] = choose_lr(tags, RATES[arm], lambda v: v).as_json()
    return out


def run(ctx: Context) -> Raw:
    """Rates on the first seed, then every arm on every seed; other shares of entries on the first two."""
    from . import transfer

    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "tuning": {}, "curve": []}
    total = len(ARMS) * (len(ctx.seeds) + 1) + len(CURVE) * min(CURVE_SEEDS, len(ctx.seeds))
    done = 0
    made: dict[int, World] = {}

    def world(seed: int) -> World:
        if seed not in made:
            made.clear()  # one at a time
            made[seed] = build(ctx, seed)
        return made[seed]

    def told(text: str) -> None:
        nonlocal done
        done += 1
        ctx.progress(done, total)
        ctx.log(text)

    for arm in ARMS:
        raw["tuning"][arm] = ctx.cell({"tune": arm}, lambda a=arm: tuned(world(ctx.seeds[0]), a))
        told(f"{arm}: " + ", ".join(f"{k} lr {v['lr']:g}" for k, v in raw["tuning"][arm].items()))
    for i, seed in enumerate(ctx.seeds):
        shares = [(arm, SHARE) for arm in ARMS] + [(SPARSE, share) for share in CURVE if i < CURVE_SEEDS]
        for arm, share in shares:
            rates = raw["tuning"][arm]
            lrs = rates.get("language", rates["task"])["lr"], rates["task"]["lr"]
            row = ctx.cell({"arm": arm, "share": share, "seed": seed},
                           lambda a=arm, s=share, n=seed, r=lrs: transfer.transferred(world(n), a, s, *r))  # fmt: skip
            row = {"seed": seed, "share": 1.0 if arm == DENSE else share, **row}
            (raw["arms"][arm] if share == SHARE else raw["curve"]).append(row)
            told(f"seed {seed}, {arm} {row['share']:.1%}: {row['metric']:.1f} %, source {row['source_dev']:.1f} %")
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def scores(arm: str) -> list[float]:
        return [row["metric"] for row in sorted(raw["arms"][arm], key=lambda row: row["seed"])]

    statistics: dict[str, Any] = {arm: {"mean": mean(scores(arm))} for arm in raw["arms"]}
    reasons: list[str] = []
    bounds: dict[str, tuple[float, float]] = {}
    for arm in (a for a in raw["arms"] if a != SPARSE):
        t = paired_t([a - b for a, b in zip(scores(SPARSE), scores(arm), strict=True)])
        bounds[arm] = (t.low, t.high)
        statistics[f"LT-SFT - {arm}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        reasons.append(f"LT-SFT - {arm} {t.mean:+.2f} [{t.low:+.2f}, {t.high:+.2f}]")
    decisive = [bounds[ADAPTERS], bounds[DENSE]]
    label = "inconclusive"
    if all(low > 0 for low, _ in decisive):
        label = "reproduced"
    elif any(high < 0 for _, high in decisive):
        label = "not reproduced"
    reasons.append("means: " + ", ".join(f"{arm} {mean(scores(arm)):.1f} %" for arm in raw["arms"]))
    for share in sorted({row["share"] for row in raw.get("curve", [])}):
        statistics[f"LT-SFT, {share:.1%} of entries"] = {
            "mean": mean(r["metric"] for r in raw["curve"] if r["share"] == share)
        }
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=20,
    slug="lt-sft",
    paper="Composable Sparse Fine-Tuning for Cross-Lingual Transfer, ACL 2022, arXiv 2110.07560",
    claim="Sparse deltas for a language and for a task, learnt apart and added, tag other languages better than stacked "
    "adapters and than dense deltas added up.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    minutes=12,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "The tiny BERT has 4 layers of width 32 instead of 128 and states have 20 words instead of 40; it is pre-trained for "
        "1,000 steps at a mask rate of 25 %, anew for every seed.",
        "One word in four of each state is the same in all languages (names, numerals). With vocabularies wholly apart, a "
        "linear tagger on the features of the source was at chance on the other languages in pilots at width 64, so that "
        "no arm could have transferred anything.",
        "150 steps for a language and 100 for the task, batch 32; the trial has the length of the run.",
        "Adapters are one bottleneck behind each block, without the invertible ones of MAD-X at the embedding.",
        "Rates are the better of two for each arm, on the first seed: for languages by masked words of held-out raw B, for "
        "the task by tags of held-out A.",
        "Shares of 0.5, 2 and 20 % are run on the first two seeds; 100 % is the arm of dense composition.",
    ),
)
