# SPDX-License-Identifier: Apache-2.0
"""Study 085: does a model pre-trained under a fixed random mask (SPDF) fine-tune as well as a dense one?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.core.base import Base

    from .gpt import Packed

SIZES = ("small", "large")
# task: (share of zeros while pre-training, whether fine-tuning drops the mask), None for no pre-training
CASES: dict[str, tuple[tuple[int | None, str], ...]] = {
    "easy": ((0, "dense"), (50, "dense"), (75, "dense"), (75, "sparse"), (90, "dense"), (None, "dense")),
    "hard": ((0, "dense"), (75, "dense"), (75, "sparse")),
}
SHARES: tuple[int | None, ...] = (0, 50, 75, 90, None)
LRS = (1e-3, 2e-3, 4e-3)
TASKS = tuple(CASES)


def arm_name(size: str, task: str, share: int | None, how: str) -> str:
    """`large, easy, 75% zeros, dense`, as arms are called in the result."""
    return f"{size}, {task}, " + ("no pre-training" if share is None else f"{share}% zeros, {how}")


ARMS = tuple(arm_name(size, task, *case) for size in SIZES for task, cases in CASES.items() for case in cases)

RULE = """\
NLL is nats a byte of the answers of held-out rows; the gap of an arm is (NLL - NLL of the model pre-trained and fine-tuned
dense) / the latter, on the same seed, size and task, in percent. Three seeds draw masks, first values and order.
Main claim, at 75 % zeros, three conditions.
1. The gap of the larger model on the easy task is at most 2 % in mean; fails if it is above 2 % on every seed.
2. On the larger model and easy task, dense fine-tuning - sparse fine-tuning in NLL is below 0 by the 95% Student t interval
over seeds; fails if its mean is above 0.
3. On the easy task the gap of the larger model is below that of the smaller one on every seed; fails if it is above on
every seed.
"reproduced" if all three hold; "not reproduced" if one fails; "inconclusive" otherwise.
Difficulty, reported beside it: holds if on the larger model the gap on the hard task is above that on the easy one on every
seed, is reversed if it is below on every seed.
"""


@dataclass(frozen=True)
class Shape:
    layers: int
    d: int
    heads: int


@dataclass(frozen=True)
class Sizes:
    """Models, texts and lengths of one run; `steps` is pre-training, `tuned` fine-tuning."""

    shapes: dict[str, Shape]
    context: int
    batch: int
    steps: int
    lr: float
    tuned: int
    tuned_batch: int
    easy: tuple[int, int, int]
    hard: tuple[int, int, int]
    keep: int
    precision: str


FULL = Sizes(
    {"small": Shape(2, 96, 2), "large": Shape(3, 192, 3)}, context=320, batch=4, steps=1000, lr=2e-3, tuned=240,
    tuned_batch=8, easy=(2000, 150, 300), hard=(1100, 80, 220), keep=200, precision="bf16",
)  # fmt: skip
SMOKE = Sizes(
    {"small": Shape(1, 16, 2), "large": Shape(2, 16, 2)}, context=320, batch=2, steps=3, lr=2e-3, tuned=2,
    tuned_batch=4, easy=(12, 4, 6), hard=(12, 4, 6), keep=60, precision="fp32",
)  # fmt: skip


@dataclass
class World:
    """Texts: `corpus` to pre-train on, `unseen` windows of it, and the rows of each task by split."""

    sizes: Sizes
    corpus: Tensor
    unseen: Packed
    tasks: dict[str, dict[str, Packed]]


def build(ctx: Context, sizes: Sizes) -> World:
    """Texts of the shared data sets, or made-up ones in a smoke run."""
    from tunesmith.study.fair import assert_disjoint

    from . import gpt, texts

    text = texts.corpus(ctx.data_folder("ag_news"), ctx.data_folder("counterfact"))
    cut = len(text) * 49 // 50
    rows = {"easy": texts.easy(*sizes.easy), "hard": texts.hard(ctx.data_folder("cranfield"), *sizes.hard, sizes.keep)}
    for splits in rows.values():
        assert_disjoint(train=[r.source for r in splits.train], dev=[r.source for r in splits.dev],
                        test=[r.source for r in splits.test])  # fmt: skip
    tasks = {
        task: {name: gpt.packed(getattr(splits, name)) for name in ("train", "dev", "test")}
        for task, splits in rows.items()
    }
    ids, labels = gpt.windows(text[cut:], 16 if not ctx.smoke else 2, sizes.context, seed=7)(0)
    return World(sizes, text[:cut], gpt.Packed(ids, labels, [[] for _ in ids]), tasks)


def pretrained(world: World, size: str, share: int | None, seed: int) -> tuple[Base, dict[str, Any]]:
    """A model trained on the corpus under a mask of `share` percent zeros (None: not trained), and what it cost."""
    from tunesmith.derive import Schedule, flops, sparsify, train_own
    from tunesmith.train.attention import BlockAttention

    from . import gpt

    sizes, shape = world.sizes, world.sizes.shapes[size]
    start = gpt.fresh(shape.layers, shape.d, shape.heads, sizes.context, seed)
    if share is None:
        return start, {"flops": 0.0, "unseen": None}
    sparse = sparsify(start, share / 100, seed=seed)
    plan = Schedule(
        sizes.steps, sizes.lr, weight_decay=0.1, warmup=0.05, floor=0.1, precision=sizes.precision, seed=seed
    )
    batches = gpt.windows(world.corpus, sizes.batch, sizes.context, seed)
    with BlockAttention():
        done = train_own(sparse, batches, gpt.loss, plan)
    tokens = sizes.steps * sizes.batch * sizes.context
    return done.base, {
        "flops": 3 * flops(done.base, sizes.context).total * tokens,
        "unseen": gpt.score(done.base, world.unseen, 8, sizes.precision)["nll"],
    }


def one(world: World, size: str, share: int | None, seed: int, lrs: dict[str, list[float]]) -> dict[str, Any]:
    """Pre-train once and fine-tune for every case of this share, each at the best of its rates on dev."""
    from tunesmith.derive import Schedule, densify, mask_of, masks, train_own
    from tunesmith.study.fair import choose_lr
    from tunesmith.train.attention import BlockAttention

    from . import gpt

    sizes = world.sizes
    base, cost = pretrained(world, size, share, seed)
    out: dict[str, Any] = {"pretrained": cost, "cases": {}}
    for task, cases in CASES.items():
        data = world.tasks[task]
        for case in (c for c in cases if c[0] == share):
            dense = case[1] == "dense" and mask_of(base) is not None
            start = densify(base) if dense else base
            trained: dict[float, Base] = {}

            def dev(lr: float, start: Base = start, data: Any = data, trained: Any = trained) -> float:
                plan = Schedule(sizes.tuned, lr, warmup=0.1, precision=sizes.precision, seed=seed)
                batches = gpt.shuffled(data["train"], sizes.tuned_batch, seed)
                with BlockAttention():
                    trained[lr] = train_own(start, batches, gpt.loss, plan).base
                return gpt.score(trained[lr], data["dev"], 32, sizes.precision)["nll"]

            arm = arm_name(size, task, *case)
            choice = choose_lr(dev, lrs[arm], lambda m: m, higher_is_better=False)
            found = gpt.score(trained[choice.lr], data["test"], 32, sizes.precision)
            found["tuning"] = choice.as_json()
            if dense and share:
                found["revived"] = gpt.revived(start, trained[choice.lr], masks(base))
            out["cases"][arm] = found
    return out


def run(ctx: Context) -> Raw:
    """One cell for each size, share and seed: pre-training and all the fine-tuning that starts from it."""
    sizes = SMOKE if ctx.smoke else FULL
    world = build(ctx, sizes)
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "pretrained": {}, "tuning": {}}
    rates: dict[str, list[float]] = {arm: list(LRS[: 2 if ctx.smoke else None]) for arm in ARMS}
    total, done = len(ctx.seeds) * len(SIZES) * len(SHARES), 0
    for seed in ctx.seeds:
        for size in SIZES:
            for share in SHARES:
                key = {"size": size, "share": share, "seed": seed}
                row = ctx.cell(key, lambda a=size, b=share, c=seed: one(world, a, b, c, rates))
                for arm, found in row["cases"].items():
                    raw["arms"][arm].append({"seed": seed, "metric": found["nll"], **found})
                    if seed == ctx.seeds[0]:  # the first seed chooses the rate, the others use it
                        raw["tuning"][arm] = found["tuning"]
                        rates[arm] = [found["tuning"]["lr"]]
                    ctx.log(f"seed {seed}, {arm}: {found['nll']:.4f} at lr {found['tuning']['lr']:g}")
                raw["pretrained"].setdefault(f"{size}, {share}", []).append({"seed": seed, **row["pretrained"]})
                done += 1
                ctx.progress(done, total)
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def nll(size: str, task: str, share: int | None, how: str = "dense") -> list[float]:
        rows = sorted(raw["arms"][arm_name(size, task, share, how)], key=lambda row: row["seed"])
        return [row["metric"] for row in rows]

    def gaps(size: str, task: str, share: int | None = 75, how: str = "dense") -> list[float]:
        return [100 * (a - b) / b for a, b in zip(nll(size, task, share, how), nll(size, task, 0), strict=True)]

    statistics: dict[str, Any] = {}
    for size in SIZES:
        for task, cases in CASES.items():
            for share, how in cases:
                if (share, how) != (0, "dense"):
                    t = paired_t(gaps(size, task, share, how))
                    name = f"gap in %, {arm_name(size, task, share, how)}"
                    statistics[name] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
    large, small, hard = gaps("large", "easy"), gaps("small", "easy"), gaps("large", "hard")
    pairs = zip(nll("large", "easy", 75), nll("large", "easy", 75, "sparse"), strict=True)
    t = paired_t([a - b for a, b in pairs])
    statistics["dense - sparse fine-tuning, large, easy, 75%"] = {
        "mean": t.mean,
        "low": t.low,
        "high": t.high,
        "n": t.n,
    }
    holds = [mean(large) <= 2, t.high < 0, all(a < b for a, b in zip(large, small, strict=True))]
    fails = [all(g > 2 for g in large), t.mean > 0, all(a > b for a, b in zip(large, small, strict=True))]
    reasons = [
        f"1. gap of the larger model on the easy task {mean(large):+.2f} % ({_said(holds[0], fails[0])})",
        f"2. dense - sparse fine-tuning {t.mean:+.4f} [{t.low:+.4f}, {t.high:+.4f}] nats ({_said(holds[1], fails[1])})",
        f"3. gap of the larger model {mean(large):+.2f} %, of the smaller {mean(small):+.2f} % ({_said(holds[2], fails[2])})",
    ]
    above = [a > b for a, b in zip(hard, large, strict=True)]
    said = _said(all(above), not any(above) and all(a < b for a, b in zip(hard, large, strict=True)))
    reasons.append(
        f"difficulty: gap on the hard task {mean(hard):+.2f} %, on the easy one {mean(large):+.2f} % ({said})"
    )
    statistics["difficulty"] = said
    for name, rows in raw.get("pretrained", {}).items():
        dense = raw["pretrained"][f"{name.split(',')[0]}, 0"]
        if rows[0]["flops"]:
            statistics[f"pre-training FLOPs over dense, {name}"] = rows[0]["flops"] / dense[0]["flops"]
    label = "reproduced" if all(holds) else "not reproduced" if any(fails) else "inconclusive"
    return Verdict(label, reasons, statistics)


def _said(holds: bool, fails: bool) -> str:
    return "holds" if holds else "fails" if fails else "open"


STUDY = Study(
    id=85,
    slug="spdf",
    paper="SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models, arXiv 2303.10464",
    claim="A model pre-trained with three quarters of its weights at a fixed random zero, then fine-tuned dense, is as good "
    "on an easy task as one pre-trained dense; keeping the mask while fine-tuning is worse; the gap shrinks with size.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("ag_news", "counterfact", "cranfield"),
    minutes=28,
    seeds=(0, 1, 2),
    smoke_seeds=(0, 1),
    deviations=(
        "Byte-level GPTs of 2 layers of width 96 and 3 layers of width 192, where the card has 3 of 128 and 4 of 256, so that "
        "3 seeds fit; 1,000 steps of 1,280 bytes where the card has 2,000.",
        "Rendered facts are CounterFact's prompts with their true answers, beside AG News.",
        "Sparse fine-tuning is run at 75 % only, and the hard task at 0 and 75 %; the verdict needs no other.",
        "Titles from the first 200 bytes of an abstract instead of 400, so that a row fits the context of 320.",
        "Slot accuracy counts slot values all of whose bytes are the likeliest ones given the true text before; nothing is "
        "generated.",
        "Fine-tuning is 240 steps of 8 rows with a cosine schedule and no early stopping; the rate is chosen among three on "
        "dev with the first seed, for each arm, and used for the other seeds.",
        "FLOPs are counted with masked products at their kept share; nothing is faster on a CPU.",
    ),
)
