# SPDX-License-Identifier: Apache-2.0
"""Study 038: are a diffusion model's smallest weights unused, and does training them adapt it better than LoRA (SaRA)?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from tunesmith.core.base import Base

    from .world import LetterWorld, Pictures, Sizes

ARMS = ("sara", "sara, one phase", "sara, no nuclear norm", "lora", "full")
SHARE = 0.05
NUCLEAR = 5e-4
PLACES = "everything,!classes"
DEAD = (0.05, 0.1, 0.2, 0.4)
LIGHT = (1e-3, 3e-3, 1e-2)
LRS = {arm: LIGHT for arm in ARMS} | {"full": (1e-4, 3e-4, 1e-3)}

RULE = """\
Losses are squared errors of the predicted noise: on 500 Omniglot letters (target) and on 500 MNIST digits 0-7 (prior).
A: the share q of the weights, over all convolutions and linear layers, is set to zero: the smallest, or random ones. The
increase of the prior loss is relative to the base's, mean over 3 seeds of times, noise and random weights. A holds if at
q = 10 % the smallest ones cost less than 1 % and less than a fifth of what random ones cost; fails if neither is so.
B: a seed draws 200 training letters, order, noise and first values. d is LoRA - SaRA in target loss by seed. B holds if
the lower bound of its 95 % Student t interval is above 0 or mean SaRA <= 1.01 mean LoRA, and on every seed the prior loss
rises less with SaRA than with LoRA; fails if in means LoRA has both the lower target loss and the smaller rise.
"reproduced" if A and B hold; "not reproduced" if A or B fails; "inconclusive" otherwise.
"""


def threshold(base: Base, share: float) -> float:
    """The one t below which lies this share of all the entries that SaRA may choose from."""
    import torch

    from tunesmith.deltas import SaRA

    sites = base.sites.select(PLACES, SaRA.info.kinds)  # type: ignore[attr-defined]
    sizes = torch.cat([p.reshape(-1).abs() for s in sites for n, p in s.params().items() if n in ("weight", "bias")])
    return float(sizes.kthvalue(max(1, round(share * len(sizes)))).values)


def methods(base: Base, smoke: bool) -> dict[str, list[Any]]:
    """The methods of every arm: SaRA at 5 % of all entries, a LoRA of the nearest rank, and full fine-tuning."""
    from tunesmith.core.delta import Delta
    from tunesmith.deltas import Full, LoRA, SaRA
    from tunesmith.study.fair import match_rank

    t = threshold(base, SHARE)
    smallest = 8 if smoke else 64

    def sara(**options: Any) -> list[Any]:
        return [SaRA(threshold=t, targets=PLACES, nuclear=NUCLEAR, smallest=smallest, **options)]

    def lora(rank: int) -> LoRA:
        return LoRA(rank=rank, alpha=2.0 * rank, targets="all-linear,convs")

    def count(*made: Any) -> int:
        return Delta.create(base, *made).trainable_parameters

    rank = match_rank(lambda r: count(lora(r)), count(*sara()), range(1, 17)).rank
    return {
        "sara": sara(),
        "sara, one phase": sara(progressive=1.0),
        "sara, no nuclear norm": [SaRA(threshold=t, targets=PLACES)],
        "lora": [lora(rank)],
        "full": [Full(targets=PLACES)],
    }


def zeroed(base: Base, pictures: Pictures, sizes: Sizes, seed: int) -> dict[str, Any]:
    """The prior loss of the base, and without its smallest or some random weights, on one draw of times and noise."""
    from tunesmith.deltas.weight.prune import prune

    from .world import denoising

    x, y = pictures.held_digits[: sizes.held], pictures.held_labels[: sizes.held]

    def loss() -> float:
        rows = denoising(base, x, y, seed=1000 + seed)
        return sum(rows) / len(rows)

    out: dict[str, Any] = {"base": loss(), "smallest": {}, "random": {}}
    for name, score in (("smallest", "weight"), ("random", "random")):
        for q in DEAD:
            with base.using(prune(base, None, score, q, targets="all-linear,convs", seed=seed)):
                out[name][f"{q:g}"] = loss()
    return out


def run(ctx: Context) -> Raw:
    """Part A on every seed, then every arm on every seed at the rate that is best for it on dev on the first seed."""
    from functools import cache

    from tunesmith.study.worlds.arms import sweep

    from . import world as w

    sizes = w.SMOKE if ctx.smoke else w.FULL
    pictures = w.load(ctx.data_folder("mnist_10k"), ctx.data_folder("omniglot"))
    ctx.log(f"training the U-Net for {sizes.pretrain} steps")
    base = w.pretrained(pictures, sizes)
    judge = w.critic(pictures, pictures.letters[pictures.drawers <= 10], 4 if ctx.smoke else 400)
    arms = methods(base, ctx.smoke)

    @cache
    def made(seed: int) -> LetterWorld:
        return w.world(base, pictures, judge, sizes, seed)

    def untouched() -> dict[str, Any]:
        first = made(ctx.seeds[0])
        return {"target": first.score("test").metric, **first.retention()}

    dead = [
        {"seed": s, **ctx.cell({"part": "dead", "seed": s}, lambda s=s: zeroed(base, pictures, sizes, s))}
        for s in ctx.seeds
    ]
    start = ctx.cell({"arm": "base"}, untouched)
    found = sweep(ctx, made, arms, lrs=LRS, steps=sizes.steps, weight_decay=0.01)
    return {"base": start, "dead": dead, "threshold": threshold(base, SHARE), **found}


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    statistics: dict[str, Any] = {}
    reasons = []
    cost: dict[str, dict[str, float]] = {"smallest": {}, "random": {}}
    for which, by_share in cost.items():
        for q in raw["dead"][0][which]:
            by_share[q] = 100 * mean(row[which][q] / row["base"] - 1 for row in raw["dead"])
        statistics[f"rise of the prior loss in %, {which} set to zero"] = by_share
    a, b = cost["smallest"]["0.1"], cost["random"]["0.1"]
    small, less = a < 1, a < b / 5
    reasons.append(f"A: 10 % of the weights set to zero: {a:+.2f} % for the smallest, {b:+.2f} % for random ones")

    rows = {arm: sorted(found, key=lambda row: row["seed"]) for arm, found in raw["arms"].items()}
    target = {arm: [row["metric"] for row in found] for arm, found in rows.items()}
    rise = {arm: [row["retention"]["loss"] - raw["base"]["loss"] for row in found] for arm, found in rows.items()}
    for arm in rows:
        distance = mean(row["retention"]["frechet"] for row in rows[arm])
        statistics[f"{arm}: target, rise of prior, Frechet"] = [mean(target[arm]), mean(rise[arm]), distance]
        if arm != "sara":
            t = paired_t([x - y for x, y in zip(target[arm], target["sara"], strict=True)])
            statistics[f"{arm} - SaRA, target"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
            reasons.append(
                f"B: {arm} - SaRA on the target {t.mean:+.4f} [{t.low:+.4f}, {t.high:+.4f}]; the prior loss rises by "
                f"{mean(rise[arm]):+.4f} against {mean(rise['sara']):+.4f}"
            )
    d = statistics["lora - SaRA, target"]
    as_good = d["low"] > 0 or mean(target["sara"]) <= 1.01 * mean(target["lora"])
    keeps = all(x < y for x, y in zip(rise["sara"], rise["lora"], strict=True))
    worse = mean(target["lora"]) < mean(target["sara"]) and mean(rise["lora"]) < mean(rise["sara"])
    fails = worse or not (small or less)
    label = "not reproduced" if fails else "reproduced" if small and less and as_good and keeps else "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=38,
    slug="sara",
    paper="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation, arXiv 2409.06633",
    claim="The smallest tenth of a diffusion model's weights can be set to zero at no cost, and training them adapts the "
    "model to new pictures as well as LoRA or better, while it keeps more of what it could do.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("mnist_10k", "omniglot"),
    minutes=14,
    seeds=(0, 1, 2),
    smoke_seeds=(0, 1),
    deviations=(
        "A class-conditional U-Net of 0.9 M parameters at 28x28, trained on the spot on the 6,000 or so digits 0-7 of "
        "`mnist_10k` for 1,800 steps of 32 pictures, instead of Stable Diffusion; the card's has 1.5 M and 6 minutes.",
        "Omniglot letters under one new class instead of five styles; 200 letters by drawers 1-10, 250 steps of 16 instead of "
        "400, tested on 500 by drawers 14-20.",
        "The row of the new class trains in every arm and is not counted; SaRA, LoRA and full fine-tuning leave the other "
        "rows of that table alone.",
        "t is the value below which 5 % of all other weights and biases lie; LoRA has the rank whose count is nearest.",
        "Matrices with both sides above 64 are the linear layers of width 128; the nuclear norm has the weight of the "
        "released example, 5e-4, and weight decay is 0.01 in every arm, where it pulls LoRA and full fine-tuning to the base.",
        "Frechet distance on 300 letters drawn in 10 DDIM steps, in the features of a classifier of digits and letters; it "
        "does not enter the verdict.",
        "Rates are chosen on 250 letters by drawers 11-13 on the first seed, three trials for every arm.",
    ),
)
