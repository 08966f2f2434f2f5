# SPDX-License-Identifier: Apache-2.0
"""Study 029: does LoRA put singular vectors into weights that full fine-tuning does not, and does forgetting live there?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from tunesmith.core.delta import Delta
    from tunesmith.study.worlds.language import LanguageWorld

FULL, ONE, EIGHT, MANY, STABLE = "full", "lora r=1", "lora r=8", "lora r=64", "rslora r=64"
ARMS = (FULL, ONE, EIGHT, MANY, STABLE)
LAM = 0.7

RULE = """\
Every arm trains at three rates on the first seed; the common target is the lowest of the arms' best dev accuracies, and an
arm keeps the rate whose dev accuracy is nearest to it, the smaller of equals. Intruders are counted in every changed matrix
with k = 10 and eps = 0.5. Forgetting is the rise of the loss on AG News over the base's. For LoRA r=8 the intruders are
scaled by 0.7; the control scales as many other leading singular vectors of the same matrices, drawn at random.
Part 1 holds if on every seed LoRA r=8 has more intruders than full, and full at most 10% of LoRA's. Part 2 holds if the
mean count falls from LoRA r=8 to rsLoRA r=64. Part 3 holds if scaling cuts the mean rise of LoRA r=8 by at least 20%, costs
at most 1 point of mean test accuracy, and cuts more than the control.
"reproduced" if all three hold; "not reproduced" if the mean count of LoRA r=8 is not above that of full; "inconclusive"
otherwise, and where the mean test accuracies of full and LoRA r=8 differ by more than 3 points, since a comparison of
forgetting at other accuracies says nothing.
"""


@dataclass(frozen=True)
class Sizes:
    """Blocks that train, rows of each split, tokens of a row, steps and batch."""

    blocks: int
    counts: dict[str, int]
    length: int
    steps: int
    batch: int
    rates: dict[str, tuple[float, ...]]


_LORA, _FULL = (2e-4, 6e-4, 2e-3), (2e-5, 6e-5, 2e-4)
RATES = {arm: _FULL if arm == FULL else _LORA for arm in ARMS}
FULL_SIZES = Sizes(4, {"train": 640, "dev": 200, "test": 400, "general": 150}, 48, 40, 16, RATES)
SMOKE = Sizes(2, {"train": 16, "dev": 8, "test": 8, "general": 4}, 16, 3, 8, {arm: (1e-2, 1e-1) for arm in ARMS})


def method(arm: str) -> Any:
    """The method of an arm on all linear layers of the blocks; alpha = 2 r, as published."""
    from tunesmith.core import method as methods

    if arm == FULL:
        return methods.build("full", {"targets": "all-linear", "bias": False})
    rank = int(arm.rpartition("=")[2])
    stable = arm.startswith("rs")
    return methods.build("lora", {"rank": rank, "alpha": 2.0 * rank, "rslora": stable})


def measured(world: LanguageWorld, delta: Delta, plain: float) -> dict[str, float]:
    """Test accuracy in percent and the rise of the general loss over the base's."""
    with world.base.using(delta):
        accuracy = 100 * world.score("test").values["accuracy"]
        return {"accuracy": accuracy, "forgetting": world.score("general").values["loss"] - plain}


def one(world: LanguageWorld, arm: str, seed: int, lr: float, sizes: Sizes, plain: float) -> dict[str, Any] | None:
    """One run: accuracies, forgetting, intruders, and for LoRA r=8 the same after scaling. None where it diverges."""
    import torch

    from tunesmith.core.errors import TrainingError
    from tunesmith.core.probe import PROBES
    from tunesmith.study.worlds.arms import train

    try:
        out = train(world, [method(arm)], lr=lr, steps=sizes.steps, seed=seed)
    except TrainingError:
        return None
    found = PROBES.parse("intruders").measure(world.base, out.delta)
    row: dict[str, Any] = {
        "dev": 100 * out.dev().values["accuracy"], **measured(world, out.delta, plain),
        "intruders": found.values["intruders"], "by_space": found.values["by_space"],
        "matrices": found.values["matrices"], "trainable": out.trainable,
    }  # fmt: skip
    if arm == EIGHT:
        from tunesmith.inspect import dampened

        chosen = {r["path"]: r["at"] for r in found.rows if r["at"]}
        g = torch.Generator().manual_seed(seed)
        others = {r["path"]: [j for j in range(len(r["m"])) if j not in r["at"]] for r in found.rows if r["at"]}
        random = {
            p: [js[i] for i in torch.randperm(len(js), generator=g)[: len(chosen[p])]] for p, js in others.items()
        }
        for name, components in (("scaled", chosen), ("control", random)):
            row[name] = measured(world, dampened(world.base, out.delta, components, LAM), plain)
    return row


def run(ctx: Context) -> Raw:
    """Rates on the first seed, then every arm on every seed; one cell for each run."""
    from tunesmith.core.errors import TrainingError

    from .world import sst2_top

    sizes = SMOKE if ctx.smoke else FULL_SIZES
    world = sst2_top(ctx, sizes.blocks, sizes.counts, sizes.length, sizes.batch)
    plain = world.score("general").values["loss"]
    known: dict[Any, Any] = {}
    total = sum(len(sizes.rates[a]) + len(ctx.seeds) - 1 for a in ARMS)

    def cell(arm: str, seed: int, lr: float) -> Any:
        if (arm, seed, lr) not in known:
            known[arm, seed, lr] = ctx.cell(
                {"arm": arm, "seed": seed, "lr": lr}, lambda: one(world, arm, seed, lr, sizes, plain)
            )
            ctx.progress(len(known), total)
            ctx.log(f"{arm}, seed {seed}, lr {lr:g}: {known[arm, seed, lr]}")
        return known[arm, seed, lr]

    first = ctx.seeds[0]
    trials = {arm: {lr: cell(arm, first, lr) for lr in sizes.rates[arm]} for arm in ARMS}
    best = {arm: max((r["dev"] for r in rows.values() if r), default=None) for arm, rows in trials.items()}
    failed = [arm for arm, value in best.items() if value is None]
    if failed:
        raise TrainingError(f"{failed[0]} diverges at every rate", hint="offer smaller rates")
    target = min(value for value in best.values() if value is not None)
    lr_of = {
        arm: min((lr for lr, r in rows.items() if r), key=lambda lr, rows=rows: (abs(rows[lr]["dev"] - target), lr))
        for arm, rows in trials.items()
    }
    raw: Raw = {
        "arms": {arm: [] for arm in ARMS}, "target": target, "base_loss": plain,
        "tuning": {arm: [{"lr": lr, "dev": r and r["dev"]} for lr, r in rows.items()] for arm, rows in trials.items()},
    }  # fmt: skip
    for seed in ctx.seeds:
        for arm in ARMS:
            row = cell(arm, seed, lr_of[arm])
            if row is None:
                raise TrainingError(f"{arm} diverges on seed {seed}", hint="offer smaller rates")
            raw["arms"][arm].append({"seed": seed, "lr": lr_of[arm], "metric": row["intruders"], **row})
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    rows = raw["arms"]
    count = {arm: [r["intruders"] for r in rows[arm]] for arm in rows}
    eight, full = count[EIGHT], count[FULL]
    more = all(a > b and b <= 0.1 * a for a, b in zip(eight, full, strict=True))
    falls = mean(count[STABLE]) < mean(eight)
    rise = mean(r["forgetting"] for r in rows[EIGHT])
    after = {name: mean(r[name]["forgetting"] for r in rows[EIGHT]) for name in ("scaled", "control")}
    cut = {name: (rise - value) / rise if rise > 0 else 0.0 for name, value in after.items()}
    cost = mean(r["accuracy"] - r["scaled"]["accuracy"] for r in rows[EIGHT])
    scaling = rise > 0 and cut["scaled"] >= 0.2 and cost <= 1 and cut["scaled"] > cut["control"]
    apart = abs(mean(r["accuracy"] for r in rows[EIGHT]) - mean(r["accuracy"] for r in rows[FULL]))
    reasons = [
        f"intruders by seed: LoRA r=8 {eight}, full {full}",
        f"mean intruders: LoRA r=8 {mean(eight):.1f}, rsLoRA r=64 {mean(count[STABLE]):.1f}",
        f"scaling cuts the rise of {rise:.4f} nats by {100 * cut['scaled']:.0f} %, the control by "
        f"{100 * cut['control']:.0f} %, at a cost of {cost:.1f} points",
        f"test accuracies of full and LoRA r=8 are {apart:.1f} points apart",
    ]
    t = paired_t([a - b for a, b in zip(eight, full, strict=True)])
    statistics = {
        "intruders, LoRA r=8 - full": {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n},
        "mean intruders": {arm: mean(v) for arm, v in count.items()}, "rise": rise, "cut": cut, "cost": cost,
        "accuracy apart": apart,
    }  # fmt: skip
    if mean(eight) <= mean(full):
        return Verdict("not reproduced", reasons, statistics)
    holds = more and falls and scaling and apart <= 3
    return Verdict("reproduced" if holds else "inconclusive", reasons, statistics)


STUDY = Study(
    id=29,
    slug="intruder-dimensions",
    paper="LoRA vs Full Fine-tuning: An Illusion of Equivalence, arXiv 2410.21228",
    claim="LoRA puts leading singular vectors into the weights that resemble none of the base's and full fine-tuning does not; "
    "high rank-stabilised ranks have fewer, and scaling them down undoes much of the forgetting at little cost.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("sst2", "ag_news"),
    minutes=15,
    deviations=(
        "The top 4 of the 30 blocks of SmolLM2-135M-Instruct train, on states that the blocks below gave once, and intruders "
        "are counted in all 28 of their linear layers; the card trains the whole model and counts in every third layer.",
        "640 training rows in 40 steps of 16 in fp32 instead of 1,500 rows in bf16; full fine-tuning leaves out norms and the "
        "tied head.",
        "Singular vectors are read on the side that spans (left where out <= in), as the card prefers; the published code reads "
        "left vectors only.",
        "Accuracy counts the label's token among the whole vocabulary.",
    ),
)
