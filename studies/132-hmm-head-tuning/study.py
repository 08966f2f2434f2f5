# SPDX-License-Identifier: Apache-2.0
"""Study 132: does the risk of a linear head on frozen features peak where there are as many features as labels?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

BELIEFS, GRU = "random features of the belief", "recurrent model"
RIDGE = "random features of the belief, ridge"
ARMS = (BELIEFS, GRU, RIDGE)

RULE = """\
The risk is the squared error against noise-free targets on 5,000 test sequences, over 20 draws of n = 128 labelled ones, on the
log scale. R(p) is the risk of the min-norm head on p features.
"reproduced" if for both kinds of features the lower bounds of the 95% Student t intervals over draws of log R(n) - log R(n/8) and log
R(n) - log R(4n) are above 0, the Spearman correlation of p with mean log risk over p < n is above 0.8 for features of the belief, and
there ridge chosen by leaving one out removes at least 80 % of the peak R(n) - R(4n). "not reproduced" if for either kind the mean log R(n) is
below both others; "inconclusive" otherwise.
"""


@dataclass(frozen=True)
class Sizes:
    """Hidden states, symbols, length; labelled and test sequences; feature counts of both kinds; steps of the models."""

    hidden: int
    symbols: int
    length: int
    n: int
    test: int
    belief_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    steps: int


FULL = Sizes(16, 32, 20, 128, 5000, (8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024),
             (8, 16, 32, 64, 128, 256, 512), 400)  # fmt: skip
SMOKE = Sizes(4, 6, 6, 16, 50, (2, 4, 8, 16, 64), (2, 16, 64), 3)


def run(ctx: Context) -> Raw:
    """Models of every width once, then every draw; one cell for each."""
    from . import hmm

    sizes = SMOKE if ctx.smoke else FULL
    world = hmm.made(sizes.hidden, sizes.symbols)
    x_test = world.sample(sizes.test, sizes.length, hmm.seeded("test"))
    models: dict[int, Any] = {}
    raw: Raw = {
        "arms": {arm: [] for arm in ARMS},
        "n": sizes.n,
        "curves": {arm: [] for arm in ARMS},
        "loss": {},
        "rank": {},
    }
    total, done = len(ctx.seeds) * 2, 0
    for width in sizes.widths:
        models[width], raw["loss"][str(width)] = hmm.pretrained(world, sizes.length, width, sizes.steps)
        ctx.log(f"width {width}: {raw['loss'][str(width)]:.4f} nats a symbol")
    made = {
        "belief": lambda x, p: hmm.expanded(world.beliefs(x), p),
        "gru": lambda x, p: models[p].features(x),
    }
    tests = {
        kind: {p: made[kind](x_test, p) for p in ps}
        for kind, ps in (("belief", sizes.belief_sizes), ("gru", sizes.widths))
    }
    for seed in ctx.seeds:
        for kind, arms in (("belief", (BELIEFS, RIDGE)), ("gru", (GRU,))):
            found = ctx.cell(
                {"seed": seed, "features": kind},
                lambda s=seed, k=kind, a=arms: _one(hmm, world, x_test, tests[k], made[k], s, sizes, len(a) > 1),
            )
            done += 1
            ctx.progress(done, total)
            ctx.log(f"draw {seed}, {kind}")
            raw["rank"][kind] = found["rank"]
            for arm, curve in zip(arms, found["curves"], strict=True):
                raw["curves"][arm].append({"seed": seed, "risk": curve})
                raw["arms"][arm].append({"seed": seed, "metric": curve[str(sizes.n)]})
    return raw


def _one(
    hmm: Any, world: Any, x_test: Any, tests: Any, features: Any, seed: int, sizes: Sizes, ridge: bool
) -> dict[str, Any]:
    import torch

    from tunesmith.inspect.head_descent import double_descent

    g = hmm.seeded("draw", seed)
    x = world.sample(sizes.n, sizes.length, g)
    M = torch.randn(sizes.hidden, 3, generator=hmm.seeded("targets"), dtype=torch.float64)
    _, y = hmm.labels(world.beliefs(x), M, 2.0, g)
    given = {p: (features(x, p), tests[p]) for p in tests}
    y_test = world.beliefs(x_test) @ M
    found = [double_descent(given, y, y_test, ridge=r) for r in (0.0, "cv")[: 1 + ridge]]
    return {
        "curves": [{str(r["p"]): r["risk"] for r in f.rows} for f in found],
        "rank": {str(r["p"]): r["effective_rank"] for r in found[0].rows},
    }


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from math import log
    from statistics import mean

    from scipy.stats import spearmanr

    from tunesmith.evaluate.stats import paired_t

    n = raw["n"]

    def risks(arm: str, p: int) -> list[float]:
        return [row["risk"][str(p)] for row in sorted(raw["curves"][arm], key=lambda r: r["seed"])]

    statistics: dict[str, Any] = {}
    reasons: list[str] = []
    above, below = [], []
    for arm in ("random features of the belief", "recurrent model"):
        gaps = []
        for other in (n // 8, 4 * n):
            t = paired_t([log(a) - log(b) for a, b in zip(risks(arm, n), risks(arm, other), strict=True)])
            statistics[f"log R({n}) - log R({other}), {arm}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
            above.append(t.low > 0)
            gaps.append(t.mean)
            reasons.append(f"{arm}: log R({n}) - log R({other}) {t.mean:+.2f} [{t.low:+.2f}, {t.high:+.2f}]")
        below.append(all(g < 0 for g in gaps))
    small = sorted(int(p) for p in raw["curves"]["random features of the belief"][0]["risk"] if int(p) < n)
    logs = [mean(log(r) for r in risks("random features of the belief", p)) for p in small]
    rho = float(spearmanr(small, logs).statistic)
    statistics["Spearman correlation below n"] = rho

    def peak(arm: str) -> float:
        return mean(risks(arm, n)) - mean(risks(arm, 4 * n))

    whole = peak("random features of the belief")
    removed = 1 - peak("random features of the belief, ridge") / whole if whole > 0 else 0.0
    statistics["share of the peak that ridge removes"] = removed
    reasons.append(f"below n the risk rises with Spearman {rho:.2f}; ridge removes {100 * removed:.0f} % of the peak")
    holds = all(above) and rho > 0.8 and removed >= 0.8
    return Verdict("reproduced" if holds else "not reproduced" if any(below) else "inconclusive", reasons, statistics)


STUDY = Study(
    id=132,
    slug="hmm-head-tuning",
    paper="Investigating the Impact of Model Complexity in Large Language Models, arXiv 2410.00699",
    claim="The risk of a linear head on frozen features rises with their number until it equals the number of labels, and falls after.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    minutes=10,
    seeds=tuple(range(20)),
    smoke_seeds=(0, 1),
    deviations=(
        "The theorems of the paper were not at hand; what is tested is the shape that its abstract describes.",
        "Recurrent models only, 400 steps of 64 sequences for every width, and no GPT.",
        "Beliefs lie on a simplex: the effective rank of the features is recorded beside their number.",
        "The 20 draws share one HMM, one set of models and one set of random features.",
    ),
)
