# SPDX-License-Identifier: Apache-2.0
"""Study 116: does adding the instruction residual to a base trained on new text keep the format and the new facts?"""

from __future__ import annotations

from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

S1, S2, S3, S4 = "S1 base, then instructed", "S2 instructed", "S3 instructed twice", "S4 base, then residual"
START = "instructed, no new text"
ARMS = (START, S1, S2, S3, S4)
ALPHAS = (0.25, 0.5, 0.75, 1.25)

RULE = """\
In percent, on entities that the format was not taught with: `rules` is the share of answers that keep the rules of the
format; `new` the share of new facts answered rightly in the format; the joint score is their product over 100. Intervals are
95% Student t over 5 seeds, paired by seed.
"reproduced" if the mean rules of S4 are at least 90% of those of the instructed model, the joint score of S4 - S2 is above 0 in
its lower bound, and the rules of S2 are below those of the instructed model in the whole interval; "not reproduced" if the
joint score of S4 - S2 has its upper bound at 0 or below; "inconclusive" otherwise.
"""


def run(ctx: Context) -> Raw:
    """Every seed as one cell."""
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "alphas": [], "ranks": [], "doses": [], "facts": []}
    for i, seed in enumerate(ctx.seeds):
        found = ctx.cell({"seed": seed}, lambda s=seed: one_seed(ctx.smoke, s))
        for arm in ARMS:
            raw["arms"][arm].append({"seed": seed, **found["arms"][arm]})
        for key in ("alphas", "ranks", "doses"):
            raw[key] += [{"seed": seed, **row} for row in found[key]]
        raw["facts"].append({"seed": seed, **found["facts"]})
        ctx.progress(i + 1, len(ctx.seeds))
        ctx.log(f"seed {seed}: " + ", ".join(f"{arm[:2]} {found['arms'][arm]['metric']:.1f}" for arm in ARMS[1:]))
    return raw


def one_seed(smoke: bool, seed: int) -> dict[str, Any]:
    """A base of its own, the residual, new text on both, and the four strategies."""
    from tunesmith.compose.merge import compress, merge

    from . import facts as world_of

    sizes = world_of.TOY if smoke else world_of.Sizes()
    w = world_of.made(sizes, seed)
    f, base = w.facts, w.base
    residual = w.tuned(f.instruction(), sizes.instruct, seed, name="instruct")
    news = f.plain(list(f.news))
    on_base = w.tuned(news, sizes.corpus, seed + 1, name="corpus")
    doses: list[dict[str, Any]] = []

    def look(step: int, loss: float) -> None:
        if step in sizes.doses:
            doses.append({"tokens": 5 * w.batch * step, **w.measured()})

    on_instructed = w.tuned(
        news, sizes.corpus, seed + 1, residual, name="S2", on_step=look, schedule="constant", warmup=0.0
    )
    plain = w.tuned(news, sizes.corpus, seed + 1, residual, name="S2")

    def summed(alpha: float, r: Any = residual) -> Any:
        return merge(base, [on_base, r], "task-arithmetic", weights=[1.0, alpha], name="S4")

    again = {S1: on_base, S3: plain}
    deltas = {START: residual, S2: plain, S4: summed(1.0)}
    for arm, start in again.items():
        deltas[arm] = w.tuned(f.instruction(), sizes.instruct, seed + 2, start, name=arm[:2])
    ranks = []
    for rank in sizes.ranks:
        small = compress(base, residual, rank=rank)
        found = summed(1.0, small.delta)
        ranks.append({"rank": rank, "error": small.error, "ratio": small.ratio, **w.measured(found)})
    return {
        "arms": {arm: w.measured(delta) for arm, delta in deltas.items()},
        "alphas": [{"alpha": a, **w.measured(summed(a))} for a in ALPHAS], "ranks": ranks, "doses": doses,
        "facts": {**geometry(base, on_base, residual), "recited by the base": 100 * w.recited(list(f.olds)),
                  "S2 at a constant rate": w.measured(on_instructed)},
    }  # fmt: skip


def geometry(base: Any, corpus: Any, residual: Any) -> dict[str, float]:
    """||corpus|| / ||residual||, their cosine, and the share of entries of the residual that are exactly zero."""
    import math

    from tunesmith.compose.collect import DeltaChanges

    changes = DeltaChanges(base, [corpus, residual])
    a2 = b2 = ab = 0.0
    zeros = total = 0
    for place in changes.places():
        a, b = (u.dense().double() if u is not None else None for u in changes.at(place))
        if a is not None:
            a2 += float(a.square().sum())
        if b is not None:
            b2 += float(b.square().sum())
            zeros, total = zeros + int((b == 0).sum()), total + b.numel()
        if a is not None and b is not None:
            ab += float((a * b).sum())
    return {"ratio": math.sqrt(a2 / b2), "cosine": ab / math.sqrt(a2 * b2), "zeros": zeros / total}


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    import numpy as np

    from tunesmith.evaluate.stats import paired_t

    def of(arm: str, key: str) -> list[float]:
        return [row[key] for row in sorted(raw["arms"][arm], key=lambda row: row["seed"])]

    statistics: dict[str, Any] = {arm: {k: mean(of(arm, k)) for k in ("rules", "new", "old", "metric")} for arm in ARMS}
    reasons: list[str] = []

    def compared(label: str, a: str, b: str, key: str) -> dict[str, float]:
        t = paired_t([x - y for x, y in zip(of(a, key), of(b, key), strict=True)])
        statistics[label] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        reasons.append(f"{label} {t.mean:+.1f} [{t.low:+.1f}, {t.high:+.1f}] points")
        return statistics[label]

    joint = compared("joint score, S4 - S2", S4, S2, "metric")
    lost = compared("rules, S2 - instructed", S2, START, "rules")
    for arm in (S1, S3):
        compared(f"joint score, S4 - {arm[:2]}", S4, arm, "metric")
    kept = statistics[S4]["rules"] / max(statistics[START]["rules"], 1e-9)
    statistics["rules of S4 over those of the instructed model"] = kept
    reasons.append(f"S4 keeps {100 * kept:.0f} % of the instructed model's rate of rules kept")
    if raw.get("doses") and len({row["tokens"] for row in raw["doses"]}) > 1:
        x = np.log([row["tokens"] for row in raw["doses"]])
        statistics["slope of S2's rules over log tokens"] = float(
            np.polyfit(x, [row["rules"] for row in raw["doses"]], 1)[0]
        )
    holds = kept >= 0.9 and joint["low"] > 0 and lost["high"] < 0
    return Verdict(
        "reproduced" if holds else "not reproduced" if joint["high"] <= 0 else "inconclusive", reasons, statistics
    )


STUDY = Study(
    id=116,
    slug="instruction-residual",
    paper="Balancing Continuous Pre-Training and Instruction Fine-Tuning: Optimizing Instruction-Following in LLMs, arXiv 2410.10739",
    claim="New text is best learnt by the base; adding the difference between the instructed model and the base afterwards brings "
    "back the format at no cost and keeps what was learnt, where training the instructed model on the text loses the format.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=(),
    minutes=12,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "The card's small world only (its part a): a model of 4 blocks, 128 wide, that knows 400 facts; the part with a real "
        "checkpoint is not run.",
        "Words are single tokens, so upper case is a rule that has to be learnt for each value.",
        "One rate (1e-3) and schedule for every stage, the same for all arms; nothing is chosen on data.",
        "The dose response is measured along one run of S2 at a constant rate, the arm itself has the schedule of the others.",
    ),
)
