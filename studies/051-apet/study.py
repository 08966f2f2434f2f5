# SPDX-License-Identifier: Apache-2.0
"""Study 051: does it matter less which parameters are trained, and are fewer needed, the larger the model is (APET)?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tunesmith.core.base import Base

DESIGNED = ("lora", "bitfit", "prompt", "adapter")
ARMS = ("arbitrary", *DESIGNED, "full")
SETTINGS = ("1 %", "2,048")
STRUCTURES = 8
SWEEP = (16, 64, 256, 1024, 4096, 16384)
RATES = {"full": (1e-3, 3e-3), "prompt": (1e-1, 3e-1)}
OTHERS = (3e-2, 1e-1)

RULE = """\
Accuracies are shares of 1,000 test rows. A seed draws the training rows, the order and first values. A task counts where
full fine-tuning beats the commonest class by 2 binomial standard errors on every scale and seed.
Spread: for each scale, task and seed the standard deviation over 8 arbitrary parameter sets of 1 % of the model's size of
(accuracy / accuracy of full fine-tuning); mean over tasks and seeds.
N_high of a scale, task and seed is the first number of random single entries, of 16, 64, 256, 1024, 4096 and 16384, that
reaches 98 % of full fine-tuning, or all parameters where none does. Slope is that of log2(N_high / parameters) on
log2(parameters) over all points, with a 95 % bootstrap interval over (task, seed) pairs.
"reproduced" if the spread falls from scale to scale, the largest model's is below half the smallest's, and the upper bound
of the slope is below 0.
"not reproduced" if the slope is above 0.
"inconclusive" otherwise, and where no task counts.
"""


def designed(base: Base, kind: str, budget: int) -> list[Any]:
    """A designed method of about `budget` numbers: the nearest rank or length; biases from the output downwards that fit."""
    from tunesmith.core.delta import Delta
    from tunesmith.deltas import BitFit, Hydra, LoRA, PromptTuning
    from tunesmith.deltas.weight.trial import exactly
    from tunesmith.study.fair import match_rank

    make: dict[str, Callable[[int], Any]] = {
        "lora": lambda r: LoRA(rank=r, alpha=2.0 * r, targets="q,v"),
        "adapter": lambda r: Hydra(rank=0, output_rank=r, bias=True, targets="o,down"),
        "prompt": lambda n: PromptTuning(tokens=n),
    }
    if kind == "bitfit":
        chosen = []
        for site in reversed(base.sites.select("biases", ("linear", "norm"))):
            size = site.params()["bias"].numel()
            if size <= budget:
                chosen.append(site)
                budget -= size
        return [BitFit(targets=exactly(chosen))]
    sizes = range(1, 65)
    return [
        make[kind](match_rank(lambda r: Delta.create(base, make[kind](r)).trainable_parameters, budget, sizes).rank)
    ]


def methods(base: Base, family: str, structure: int) -> list[Any]:
    """The methods of a family: arbitrary sets, single entries, a designed method or full fine-tuning."""
    from tunesmith.deltas import Full
    from tunesmith.deltas.weight.apet import arbitrary

    total = sum(p.numel() for p in base.model.parameters())
    kind, _, n = family.partition(" ")
    if kind == "full":
        return [Full()]
    if kind == "raw":
        return arbitrary(base, min(int(n), total), structure, ("raw",))
    if kind == "arbitrary":
        return arbitrary(base, total // 100 if n == "1 %" else min(2048, total // 2), structure, rank=1)
    return designed(base, kind, total // 100)


def rates(family: str) -> tuple[float, ...]:
    """The two rates a family chooses from."""
    return RATES.get(family.split(" ")[0], OTHERS)


def run(ctx: Context) -> Raw:
    """Two rates for every family and scale on the first seed, then every family, task and seed at the better one."""
    from functools import cache

    import torch

    from . import world as w

    sizes = w.SMOKE if ctx.smoke else w.FULL
    structures = 2 if ctx.smoke else STRUCTURES
    sweep = [n for n in SWEEP if n <= 64] if ctx.smoke else list(SWEEP)
    held = cache(lambda task, split: w.rows(task, split, sizes.dev if split == "dev" else sizes.test, sizes.length))
    drawn = cache(lambda task, seed: w.rows(task, "train", sizes.train, sizes.length, seed))

    @cache
    def base(scale: str) -> Base:
        ctx.log(f"training the {scale} GPT")
        return w.pretrained(scale, sizes)

    families = ["full", *(f"arbitrary {s}" for s in SETTINGS), *DESIGNED, *(f"raw {n}" for n in sweep)]
    many = {f: structures if f.startswith("arbitrary") else 1 for f in families}
    first = ctx.seeds[0]
    per = len(families) * len(rates("")) + sum(many.values()) * len(ctx.seeds) - len(families)
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def one(scale: str, task: str, family: str, structure: int, seed: int, lr: float) -> dict[str, Any]:
        key = (scale, task, family, structure, seed, lr)

        def measured() -> dict[str, Any]:
            made = methods(base(scale), family, structure)
            delta = w.train(base(scale), made, drawn(task, seed), sizes, lr, seed)
            found = {s: w.accuracy(base(scale), delta, held(task, s), w.CLASSES[task]) for s in ("dev", "test")}
            return {**found, "trained": delta.trainable_parameters}

        if key not in known:
            names = ("scale", "task", "family", "structure", "seed", "lr")
            known[key] = ctx.cell(dict(zip(names, key, strict=True)), measured)
            ctx.progress(len(known), per * len(sizes.scales) * len(sizes.tasks))
        return known[key]

    raw: Raw = {"arms": {}, "sizes": {}, "tuning": {}, "tasks": {}, "trained": {}, "test_rows": sizes.test}
    for scale in sizes.scales:
        with torch.random.fork_rng(devices=[]):
            raw["sizes"][scale] = sum(p.numel() for p in w.GPT(*sizes.scales[scale]).parameters())
        best: dict[str, float] = {}
        for family in families:
            tried = {
                lr: sum(one(scale, task, family, 0, first, lr)["dev"] for task in sizes.tasks) / len(sizes.tasks)
                for lr in rates(family)
            }
            best[family] = max(tried, key=lambda lr: (tried[lr], -lr))
            trials = [{"lr": lr, "metric": value} for lr, value in tried.items()]
            raw["tuning"].setdefault(scale, {})[family] = {"lr": best[family], "trials": trials}
            raw["trained"].setdefault(scale, {})[family] = one(scale, sizes.tasks[0], family, 0, first, best[family])[
                "trained"
            ]
        raw["tasks"][scale] = {}
        for task in sizes.tasks:
            share = torch.bincount(held(task, "test").y).max().item() / sizes.test
            found = {
                family: [
                    [one(scale, task, family, k, seed, best[family])["test"] for k in range(many[family])]
                    for seed in ctx.seeds
                ]
                for family in families
            }
            raw["tasks"][scale][task] = {"commonest": share, "accuracy": found}
            ctx.log(f"{scale}, {task}: full {found['full'][0][0]:.3f}, arbitrary 1 % {found['arbitrary 1 %'][0]}")
    for arm in ARMS:
        family = "arbitrary 1 %" if arm == "arbitrary" else arm
        cells = [by_task["accuracy"][family] for scale in raw["tasks"].values() for by_task in scale.values()]
        raw["arms"][arm] = [
            {"seed": seed, "metric": 100 * sum(sum(c[i]) / len(c[i]) for c in cells) / len(cells)}
            for i, seed in enumerate(ctx.seeds)
        ]
    return raw


def budget_curve(by_size: Mapping[int, float], full: float, commonest: float, rows: int, total: int) -> tuple[int, int]:
    """N_low, the first size better than the commonest class by 2 standard errors, and N_high, the first with 98 % of full.

    `total`, the number of all parameters, stands where no size gets there.
    """
    bar = commonest + 2 * (commonest * (1 - commonest) / rows) ** 0.5
    order = sorted(by_size)
    low = next((n for n in order if by_size[n] > bar), total)
    return low, next((n for n in order if by_size[n] >= 0.98 * full), total)


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from itertools import pairwise
    from math import log2
    from statistics import mean, stdev

    import numpy as np

    from tunesmith.evaluate.stats import paired_t

    scales, sizes, rows = list(raw["sizes"]), raw["sizes"], raw["test_rows"]
    seeds = range(len(next(iter(raw["arms"].values()))))

    def of(scale: str, task: str, family: str, i: int) -> list[float]:
        return raw["tasks"][scale][task]["accuracy"][family][i]

    def learnt(scale: str, task: str) -> bool:
        c = raw["tasks"][scale][task]["commonest"]
        return all(of(scale, task, "full", i)[0] > c + 2 * (c * (1 - c) / rows) ** 0.5 for i in seeds)

    tasks = [t for t in raw["tasks"][scales[0]] if all(learnt(s, t) for s in scales)]
    reasons = [f"tasks that full fine-tuning learns on every scale: {', '.join(tasks) or 'none'}"]
    last = raw["tasks"][scales[-1]]
    t = paired_t(
        [of(scales[-1], task, "full", i)[0] - found["commonest"] for task, found in last.items() for i in seeds]
    )
    gained = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
    statistics: dict[str, Any] = {"parameters": sizes, "largest model, full - commonest class": gained}
    if not tasks:
        return Verdict("inconclusive", reasons, statistics)
    settings = sorted(f for f in raw["tasks"][scales[0]][tasks[0]]["accuracy"] if f.startswith("arbitrary"))
    spread = {
        f: {
            s: mean(stdev(a / of(s, t, "full", i)[0] for a in of(s, t, f, i)) for t in tasks for i in seeds)
            for s in scales
        }
        for f in settings
    }
    swept = sorted(int(f.split()[1]) for f in raw["tasks"][scales[0]][tasks[0]]["accuracy"] if f.startswith("raw"))
    pairs = [(t, i) for t in tasks for i in seeds]
    high: dict[str, list[int]] = {}
    low: dict[str, list[int]] = {}
    for s in scales:
        for t, i in pairs:
            curve = {n: of(s, t, f"raw {n}", i)[0] for n in swept}
            found = budget_curve(curve, of(s, t, "full", i)[0], raw["tasks"][s][t]["commonest"], rows, sizes[s])
            low.setdefault(s, []).append(found[0])
            high.setdefault(s, []).append(found[1])
    x = np.array([log2(sizes[s]) for s in scales])
    y = np.array([[log2(n / sizes[s]) for n in high[s]] for s in scales])  # [scales, pairs]

    def slope(columns: Any) -> float:
        return float(np.polyfit(x, y[:, columns].mean(1), 1)[0])

    drawn = np.random.default_rng(0).integers(len(pairs), size=(2000, len(pairs)))
    lower, upper = np.quantile([slope(c) for c in drawn], (0.025, 0.975))
    at = slope(np.arange(len(pairs)))
    one = list(spread["arbitrary 1 %"].values())
    falls = all(a > b for a, b in pairwise(one)) and one[-1] < 0.5 * one[0]
    label = "not reproduced" if at > 0 else "reproduced" if falls and upper < 0 else "inconclusive"
    statistics |= {
        "spread over arbitrary sets": spread,
        "slope": {"mean": at, "low": float(lower), "high": float(upper), "n": len(pairs)},
        "median N_low": {s: float(np.median(low[s])) for s in scales},
        "median N_high": {s: float(np.median(high[s])) for s in scales},
        "accuracy by arm": {arm: mean(row["metric"] for row in found) for arm, found in raw["arms"].items()},
    }
    reasons += [
        "spread at 1 %: " + ", ".join(f"{s} {v:.4f}" for s, v in spread["arbitrary 1 %"].items()),
        f"slope of log2(N_high / parameters) {at:+.2f} [{lower:+.2f}, {upper:+.2f}]",
        "median N_high: " + ", ".join(f"{s} {np.median(high[s]):.0f} of {sizes[s]}" for s in scales),
    ]
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=51,
    slug="apet",
    paper="Arbitrary Few Parameters are Good Enough for Adapting Large-scale Pre-trained Language Models, arXiv 2306.02320",
    claim="The larger a pre-trained model, the less it matters which of its parameters are trained, and the smaller the share "
    "of them that is needed to match full fine-tuning.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    minutes=20,
    seeds=(0, 1),
    smoke_seeds=(0, 1),
    deviations=(
        "GPTs of 27 thousand, 0.1 and 0.6 million parameters (2, 2 and 3 layers; the card has 0.1, 0.9 and 5 million) trained "
        "on the spot on text of a hidden Markov model, instead of BERT, T5 and BLOOM: far below the scales of the claim.",
        "120 steps of 24 rows of 23 tokens; six sizes of single entries, 2^4 to 2^14 by factors of 4.",
        "Labels are words of the vocabulary, as for T5 and BLOOM in the paper; loss over the whole vocabulary, accuracy over "
        "the words of the labels.",
        "The text of pre-training says after the second marker whether the two differ, or no model of this size would learn "
        "the parity task at all; the rows of the task do not say it.",
        "An adapter is the linear bottleneck of `hydra`; all designed methods have the size nearest to 1 % of the model, BitFit "
        "the biases nearest the output that fit.",
        "Arbitrary sets draw from LoRA pairs and bottlenecks of rank 1, prompt vectors, whole tensors and single entries; no "
        "dropout in any arm.",
        "One of two rates for every family and scale, by mean accuracy on dev rows of the three tasks, on the first seed and "
        "the first structure.",
    ),
)
