# SPDX-License-Identifier: Apache-2.0
"""Study 147: does a block affine change of weights (Bone) learn faster than LoRA and PiSSA at equal size?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from tunesmith.study.worlds.arms import Outcome
    from tunesmith.study.worlds.world import World

ARMS = ("bat", "tile", "lora", "pissa")
RATES = (3e-4, 1e-3, 3e-3)
TUNING_SEED = 0
STEPS, LOOKS = 60, (15, 30)  # and at the end
BLOCK, RANK = 32, 16

RULE = """\
Losses are mean next-token losses on the answers of the test rows of GSM8K, after 15, 30 and 60 of 60 steps. The rate of each
arm is the one with the best dev loss after 60 steps on seed 0; the numbers are those of seeds 1, 2 and 3. d is BAT - other,
by seed, with a 95% Student t interval, for LoRA and PiSSA at steps 30 and 60.
"reproduced" if all four intervals lie below 0; "not reproduced" if BAT's mean is above both others' at both steps;
"inconclusive" otherwise. The tile form (MiSS) is reported beside it and decides nothing.
"""


def methods_of(arm: str, block: int = BLOCK, rank: int = RANK) -> list[Any]:
    """The method of an arm."""
    import tunesmith as ts

    return [
        {
            "bat": lambda: ts.Bone(block=block),
            "tile": lambda: ts.MiSS(rank=block),
            "lora": lambda: ts.LoRA(rank=rank, alpha=float(rank)),
            "pissa": lambda: ts.PiSSA(rank=rank, alpha=float(rank)),
        }[arm]()
    ]


@dataclass
class Watch:
    """Test losses in mid-run. They are written down and used for no choice."""

    world: World
    looks: tuple[int, ...]
    seen: list[list[float]] = field(default_factory=list)

    def on_step(self, step: int, loss: float) -> None:
        if step == 1:
            self.seen = []
        if step in self.looks:
            self.seen.append([step, self.world.score("test").metric])

    def curve(self, out: Outcome) -> list[list[float]]:
        """(step, test loss) of the run just ended."""
        return [list(pair) for pair in self.seen]


def run(ctx: Context) -> Raw:
    """Every arm at three rates on the tuning seed, then on the study's seeds at the best."""
    from tunesmith.study.worlds.arms import sweep
    from tunesmith.study.worlds.language import gsm8k_top

    steps, looks = (4, (1, 2)) if ctx.smoke else (STEPS, LOOKS)
    world = gsm8k_top(ctx, blocks=4, train=240, dev=32, test=48, length=192, general=12)
    watch = Watch(world, looks)
    sizes = (8, 4) if ctx.smoke else (BLOCK, RANK)  # the toy's sides are 16, 32 and 48
    found = sweep(
        ctx, world, {arm: methods_of(arm, *sizes) for arm in ARMS}, lrs=RATES[:2] if ctx.smoke else RATES, steps=steps,
        tune_on=(TUNING_SEED,), extra=watch.curve, on_step=watch.on_step, warmup=0.0,
    )  # fmt: skip
    raw: Raw = {"arms": {}, "tuning": found["tuning"], "looks": [*looks, steps]}
    for arm in ARMS:
        raw["arms"][arm] = [
            {**{k: r[k] for k in ("seed", "dev", "lr", "seconds", "trainable", "retention")},
             "metric": 1000 * r["metric"], "curve": [*r["extra"], [steps, r["metric"]]]}
            for r in found["arms"][arm]
        ]  # fmt: skip
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def losses(arm: str, step: int) -> list[float]:
        rows = sorted(raw["arms"][arm], key=lambda row: row["seed"])
        return [dict(map(tuple, row["curve"]))[step] for row in rows]

    statistics: dict[str, Any] = {}
    reasons: list[str] = []
    below, above = [], []
    for step in raw["looks"]:
        bat = losses("bat", step)
        for arm in raw["arms"]:
            statistics[f"loss after {step} steps, {arm}"] = mean(losses(arm, step))
        for other in ("lora", "pissa", "tile"):
            t = paired_t([a - b for a, b in zip(bat, losses(other, step), strict=True)])
            statistics[f"BAT - {other} after {step} steps"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
            if other != "tile" and step in raw["looks"][-2:]:
                below.append(t.high < 0)
                above.append(t.mean > 0)
                reasons.append(f"after {step} steps BAT - {other} {t.mean:+.4f} [{t.low:+.4f}, {t.high:+.4f}]")
    for arm, rows in raw["arms"].items():
        statistics[f"numbers trained, {arm}"] = rows[0]["trainable"]
        statistics[f"seconds a run, {arm}"] = mean(row["seconds"] for row in rows)
        statistics[f"KL to the base on AG News, {arm}"] = mean(row["retention"]["kl"] for row in rows)
    label = "reproduced" if all(below) else "not reproduced" if all(above) else "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=147,
    slug="bone",
    paper="Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models, arXiv "
    "2409.15371",
    claim="A block affine change of the weights learns faster and better than LoRA and PiSSA with as many numbers, with no "
    "special first values.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("gsm8k", "ag_news"),
    minutes=14,
    seeds=(1, 2, 3),
    smoke_seeds=(1, 2),
    deviations=(
        "The top 4 of SmolLM2-135M-Instruct's 30 blocks, on rows of at most 192 tokens, and 60 steps, instead of 30 (or 15) "
        "blocks, 256 tokens and 120 steps; looks after 15, 30 and 60 steps instead of 30, 60 and 120.",
        "Blocks and slices of 32, LoRA and PiSSA of rank 16 with alpha 16: 663,552 and 651,264 numbers (1.9 % fewer), the "
        "nearest ranks allow.",
        "Rates 3e-4, 1e-3 and 3e-3 instead of 1e-4, 3e-4 and 1e-3: a run is half as long. Only 1e-3 was tried "
        "before the run, for 8 steps of each arm, on dev rows.",
        "No warm-up, as in the released script; cosine schedule; batch of 4 rows. On the CPU bf16 means autocast over fp32 "
        "weights, where W' is formed in fp32 and rounded for the product.",
    ),
)
