# SPDX-License-Identifier: Apache-2.0
"""Study 036: how much of what fine-tuning takes away does a transformed prompt bring back?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

SCALES = (1.5, 2.0, 3.0)
STRENGTHS = (0.25, 0.5, 0.75)
PLAIN, TURNED, BLEND = "fine-tuned", "fine-tuned, labels scaled", "delta at part strength"
ARMS = (PLAIN, TURNED, BLEND)

RULE = """\
The excess risk of an arm is its squared error minus that of ridge regression on the same rows with w ~ N(0, I), mean over 4
examples and more. On each of the 5 fine-tuning seeds (two pre-trained models) the scale is the one that is best on the first
half of the rows; everything is measured on the second half. The increase is fine-tuned minus base; the share is how much
of it the scaled prompt removes.
"reproduced" if the increase is above 0 by a 95% Student t interval over seeds and the share is at least 0.25 on at least 4/5 of the
seeds; "not reproduced" if the increase is above 0 in mean and the mean share is at most 0.05, or the increase is not above 0 in mean;
"inconclusive" otherwise. What the scale does to the base and what part strength removes are reported beside it.
"""


@dataclass(frozen=True)
class Sizes:
    """Dimension, pairs, fixed vectors, width, blocks and batch; steps and rates of both trainings; test rows; fewest examples."""

    world: tuple[int, int, int, int, int, int]
    pretrain: int
    tune: int
    rate: float
    tune_rate: float
    rows: int
    low: int


FULL = Sizes((2, 8, 4, 48, 2, 64), 5000, 300, 2e-3, 3e-4, 4096, 4)
SMOKE = Sizes((2, 4, 3, 16, 1, 8), 3, 2, 1e-3, 1e-3, 24, 1)


def run(ctx: Context) -> Raw:
    """Two pre-trained models by turns over the seeds of fine-tuning; one cell a seed."""
    from . import regression

    sizes = SMOKE if ctx.smoke else FULL
    world = regression.World(*sizes.world)
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "rows": []}
    made: dict[int, Any] = {}

    def base_of(which: int) -> Any:
        if which not in made:
            made.clear()
            made[which] = regression.pretrained(world, which, sizes.pretrain, sizes.rate)
        return made[which]

    for done, seed in enumerate(sorted(ctx.seeds, key=lambda s: (s % 2, s)), 1):
        row = ctx.cell({"seed": seed}, lambda s=seed: _one(regression, world, base_of(s % 2), s, sizes))
        raw["rows"].append(row)
        for arm, key in ((PLAIN, "delta"), (TURNED, "turned"), (BLEND, "blend")):
            raw["arms"][arm].append({"seed": seed, "metric": row[key]})
        ctx.progress(done, len(ctx.seeds))
        ctx.log(f"seed {seed}: base {row['base']:.3f}, fine-tuned {row['delta']:.3f}, scaled {row['turned']:.3f}")
    for rows in (raw["rows"], *raw["arms"].values()):
        rows.sort(key=lambda r: r["seed"])
    return raw


def _one(regression: Any, world: Any, base: Any, seed: int, sizes: Sizes) -> dict[str, Any]:
    from tunesmith.inspect.forgetting import forgetting

    delta = regression.tuned(world, base, seed, sizes.tune, sizes.tune_rate)
    abilities = [regression.ability(world, share, sizes.rows, sizes.low, "items", seed, share) for share in (0.0, 1.0)]
    transforms = [regression.scaled(g) for g in SCALES]
    cont, disc = forgetting(base, delta, abilities, transforms, strengths=STRENGTHS).rows
    curves = {
        name: regression.curve(world, base, d, regression.scaled(g), sizes.rows, "curve", seed)
        for name, d, g in (
            ("base", None, 1.0), ("fine-tuned", delta, 1.0), *((f"times {g:g}", delta, g) for g in SCALES)
        )
    }  # fmt: skip
    return {
        "seed": seed, "base": -cont["base"], "delta": -cont["delta"], "turned": -cont["delta"] - cont["recoverable"],
        "blend": -cont["delta"] - cont["recovered_by_strength"], "transform": cont["transform"],
        "strength": cont["strength"], "gain_of_base": cont["gain_of_base"],
        "discrete_base": -disc["base"], "discrete_delta": -disc["delta"], "curves": curves,
    }  # fmt: skip


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    rows = sorted(raw["rows"], key=lambda r: r["seed"])
    increase = [r["delta"] - r["base"] for r in rows]
    t = paired_t(increase)
    statistics: dict[str, Any] = {"increase of excess risk": {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}}
    shares = {
        name: [(r["delta"] - r[key]) / d if d > 0 else 0.0 for r, d in zip(rows, increase, strict=True)]
        for name, key in (("scaled labels", "turned"), ("part strength", "blend"))
    }
    for name, found in shares.items():
        statistics[f"share removed by {name}"] = mean(found)
    statistics["gain of the base by the scale"] = mean(r["gain_of_base"] for r in rows)
    statistics["gain on the fixed vectors"] = mean(r["discrete_base"] - r["discrete_delta"] for r in rows)
    mine = shares["scaled labels"]
    enough = sum(s >= 0.25 for s in mine)
    reasons = [
        f"fine-tuning adds {t.mean:.3f} [{t.low:.3f}, {t.high:.3f}] to the excess risk",
        f"scaled labels remove {100 * mean(mine):.0f} % of it, a quarter or more on {enough} of {len(mine)} seeds",
        "recoverable is not the same as not lost: with the plain prompt the ability has dropped",
    ]
    holds = t.low > 0 and 5 * enough >= 4 * len(mine)
    fails = t.mean <= 0 or mean(mine) <= 0.05
    return Verdict("reproduced" if holds else "not reproduced" if fails else "inconclusive", reasons, statistics)


STUDY = Study(
    id=36,
    slug="conjugate-prompting",
    paper="Understanding Catastrophic Forgetting in Language Models via Implicit Inference, ICLR 2024, arXiv 2309.10105",
    claim="What fine-tuning seems to take away is partly a wrong guess of the task: a prompt that looks less like the fine-tuning data "
    "brings part of it back.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    minutes=14,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "d = 2, 8 pairs and 4 fixed vectors, 2 blocks of width 48 and 5,000 steps at 2e-3, instead of the card's d = 8, 20 pairs, 64 "
        "vectors, 4 blocks of width 128 and 8,000 steps, which one thread does not do in the time. Rows have all 8 pairs, and "
        "errors are means over 4 examples and more (the card: 5 to 20). Two trials of at most 1,000 steps on other rows set "
        "these sizes; the model was still learning, and scaled labels removed nothing of an increase of 0.3.",
        "The two pre-trained models are used by turns over the 5 seeds of fine-tuning (300 steps, rate 3e-4).",
        "The linear world only: none of the language-model tests. The label scales are 1.5, 2 and 3.",
        "sigma = 1 and the number of fixed vectors are from memory in the card.",
    ),
)
