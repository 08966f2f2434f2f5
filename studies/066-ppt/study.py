# SPDX-License-Identifier: Apache-2.0
"""Study 066: does pivotal parameters tuning learn a musical concept without copying its examples or losing the prior?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from .personal import World

FULL, ATTENTION, TOKENS, LORA, RANDOM, PPT = "full", "attention-only", "token-only", "lora", "random 10 %", "ppt 10 %"
SINGLE = (FULL, ATTENTION, TOKENS, LORA, RANDOM, PPT)
CURVE = ("ppt 1 %", "ppt 5 %", "ppt 30 %")
JOINT = ("ppt, 1 token", "ppt, 4 tokens")
ARMS = (*SINGLE, *CURVE, *JOINT)
SHARES = {PPT: 0.1, "ppt 1 %": 0.01, "ppt 5 %": 0.05, "ppt 30 %": 0.3, **dict.fromkeys(JOINT, 0.1)}
RATES: Mapping[str, tuple[float, float]] = {
    FULL: (3e-4, 1e-3), ATTENTION: (1e-3, 3e-3), TOKENS: (1e-2, 3e-2), LORA: (3e-3, 1e-2), RANDOM: (3e-3, 1e-2),
    PPT: (3e-3, 1e-2),
}  # fmt: skip

RULE = """\
Fidelity is the mean score in 0..1 that a classifier, trained on fresh draws of the concepts, gives 200 samples for the
concept asked for; distance is the mean share of cells in which a sample differs from the nearest of the 24 references
(memorisation is its opposite); prior loss is the denoising loss on test chorales minus the base's. All are means over the
two concepts, learnt apart. PPT trains 10 % of the self-attention entries, the random mask as many.
First claim: holds if mean PPT fidelity >= mean full fine-tuning fidelity - 0.05, and in every seed PPT's distance is larger
and its prior loss smaller than full fine-tuning's, and mean PPT fidelity > mean random-mask fidelity; reversed if in every
seed PPT's distance is not larger, or in every seed its prior loss not smaller, than full fine-tuning's, or in every seed
the random mask's fidelity is at least PPT's.
Second claim, token groups: both concepts learnt together; holds if the joint prompt gives more samples in which both
concepts score above 0.5 with 4 tokens for each than with 1, in every seed; reversed if fewer in every seed.
"reproduced" if both claims hold; "not reproduced" if either is reversed; "inconclusive" otherwise.
"""


@dataclass(frozen=True)
class Sizes:
    """Amounts of data and lengths of runs; `steps` are those of every arm, the trial of a mask included."""

    references: int
    held_out: int
    prior: int
    samples: int
    levels: int
    pretrain: int
    pretrain_batch: int
    listener: int
    steps: int
    batch: int
    draws: int
    narrow: int
    wide: int


FULL_SIZE = Sizes(24, 12, 200, 200, 15, 1500, 64, 400, 200, 16, 8, 24, 64)
SMOKE = Sizes(4, 2, 6, 4, 2, 3, 4, 3, 4, 4, 1, 8, 16)


def one(world: World, arm: str, seed: int, lr: float) -> dict[str, Any]:
    """Learn each concept by itself; all measures, mean over the concepts."""
    from statistics import mean

    from . import personal

    rows = [personal.learnt(world, arm, SHARES.get(arm, 0.1), name, seed, lr) for name in personal.CONCEPTS]
    return {key: mean(row[key] for row in rows) for key in rows[0]} | {"by_concept": rows}


def run(ctx: Context) -> Raw:
    """Rates on the first seed by the loss on held-out patches of the concepts, then every arm on every seed."""
    from tunesmith.study.fair import choose_lr

    from . import personal

    sizes = SMOKE if ctx.smoke else FULL_SIZE
    world = personal.build(ctx.data_folder("jsb_chorales"), sizes)
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "tuning": {}, "base_prior_loss": world.prior_loss}
    first = ctx.seeds[0]
    total, done = len(SINGLE) * (len(ctx.seeds) + 1) + (len(CURVE) + len(JOINT)) * len(ctx.seeds), 0

    def cell(arm: str, seed: int, lr: float) -> dict[str, Any]:
        nonlocal done
        joint = arm in JOINT
        row = ctx.cell(
            {"arm": arm, "seed": seed, "lr": lr},
            lambda: personal.together(world, JOINT.index(arm) * 3 + 1, SHARES[arm], seed, lr) if joint else one(world, arm, seed, lr),
        )  # fmt: skip
        done += 1
        ctx.progress(done, total)
        ctx.log(
            f"seed {seed}, {arm}, lr {lr:g}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items() if k != "by_concept")
        )
        return row

    tried = {(arm, lr): cell(arm, first, lr) for arm in SINGLE for lr in RATES[arm]}
    choice = {arm: choose_lr(lambda lr, a=arm: tried[a, lr]["held_out"], RATES[arm], lambda v: v, higher_is_better=False)
              for arm in SINGLE}  # fmt: skip
    raw["tuning"] = {arm: c.as_json() for arm, c in choice.items()}
    for seed in ctx.seeds:
        for arm in ARMS:
            lr = choice[arm if arm in SINGLE else PPT].lr
            row = tried[arm, lr] if arm in SINGLE and seed == first else cell(arm, seed, lr)
            raw["arms"][arm].append(
                {"seed": seed, "lr": lr, "metric": row["both" if arm in JOINT else "fidelity"], **row}
            )
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def values(arm: str, key: str) -> list[float]:
        return [row[key] for row in sorted(raw["arms"][arm], key=lambda row: row["seed"])]

    def pairs(key: str, arm: str, other: str) -> list[tuple[float, float]]:
        return list(zip(values(arm, key), values(other, key), strict=True))

    fidelity = {arm: mean(values(arm, "fidelity")) for arm in (*SINGLE, *CURVE) if arm in raw["arms"]}
    distance, prior = pairs("distance", PPT, FULL), pairs("prior", PPT, FULL)
    random = pairs("fidelity", PPT, RANDOM)
    both = pairs("both", JOINT[1], JOINT[0])
    holds = [
        fidelity[PPT] >= fidelity[FULL] - 0.05 and all(a > b for a, b in distance) and all(a < b for a, b in prior)
        and fidelity[PPT] > fidelity[RANDOM],
        all(a > b for a, b in both),
    ]  # fmt: skip
    reversed_ = [
        all(a <= b for a, b in distance) or all(a >= b for a, b in prior) or all(a <= b for a, b in random),
        all(a < b for a, b in both),
    ]
    label = "reproduced" if all(holds) else "not reproduced" if any(reversed_) else "inconclusive"

    def said(rows: list[tuple[float, float]], digits: int = 3) -> str:
        return ", ".join(f"{a:.{digits}f} against {b:.{digits}f}" for a, b in rows)

    def state(i: int) -> str:
        return "holds" if holds[i] else "is reversed" if reversed_[i] else "is open"

    reasons = [
        f"the first claim {state(0)}: fidelity {fidelity[PPT]:.3f} with PPT, {fidelity[FULL]:.3f} with full fine-tuning, "
        f"{fidelity[RANDOM]:.3f} with a random mask",
        f"distance to the nearest reference, PPT against full fine-tuning by seed: {said(distance)}",
        f"rise of the prior loss, PPT against full fine-tuning by seed: {said(prior, 4)}",
        f"the second claim {state(1)}: share of samples with both concepts, 4 tokens against 1 by seed: {said(both)}",
    ]
    statistics: dict[str, Any] = {"first claim": state(0), "second claim": state(1)}
    for arm in fidelity:
        statistics[arm] = {
            key: mean(values(arm, key)) for key in ("fidelity", "distance", "prior", "diversity", "obeyed")
        }
    for key, other in (("fidelity", FULL), ("fidelity", RANDOM), ("distance", FULL), ("prior", FULL)):
        t = paired_t([a - b for a, b in pairs(key, PPT, other)])
        statistics[f"{key}, {PPT} - {other}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=66,
    slug="ppt",
    paper="JEN-1 DreamStyler: Customized Musical Concept Learning via Pivotal Parameters Tuning, arXiv 2406.12292",
    claim="Tuning only the self-attention parameters that a trial mask finds, with new identifier tokens, learns a concept "
    "from a few examples as well as full fine-tuning, with less copying and less loss of the prior, and several tokens for "
    "each concept keep two concepts apart.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("jsb_chorales",),
    minutes=12,
    seeds=(0, 1, 2),
    smoke_seeds=(0, 1),
    deviations=(
        "Piano rolls of 16 steps by 36 pitches instead of audio latents; the two concepts are made up.",
        "The U-Net has about half a million numbers instead of one million, and is pre-trained once for all seeds: a seed "
        "draws references, held-out patches, first values, order and samples.",
        "200 steps for every arm instead of 300; the trial of the mask is the first fifth of them.",
        "The rows of the identifiers train at 1e-2 in every arm; the rate of the rest is the better of two on 12 held-out "
        "patches of each concept, on the first seed; PPT at other shares and with two concepts uses the rate found at 10 %.",
        "Single concepts have one identifier; with two concepts the mask has a trial on each and the union is trained.",
    ),
)
