# SPDX-License-Identifier: Apache-2.0
"""Study 141: is LoRA with gates pruned in training (SoRA) as good as LoRA at 70 % of its parameters, and better than a
smaller LoRA?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from tunesmith.study.fair import LrChoice
    from tunesmith.study.worlds.encoder import UpperWorld

SORA, WHOLE, SMALL, RANDOM = "sora", "lora r=8", "lora, as few", "lora pruned at random"
ARMS = (SORA, WHOLE, SMALL, RANDOM)
SETS = ("clinc150-domains", "sst2")
LRS = (1e-3, 4e-3)
RANK = 8
SHARE = 0.7

RULE = """\
Accuracies are in percent of the test rows; the metric of an arm on a seed is the mean of its accuracies on the two sets.
a is SoRA - LoRA r=8 and b is SoRA - LoRA of as few parameters, by seed, each with a 95% Student t interval over the 5
seeds. The share is SoRA's stored parameters over those of LoRA r=8, mean over sets and seeds.
"reproduced" if the share is at most 0.75, the lower bound of a is above -0.5, and b is above 0 in mean and in its lower
bound; "not reproduced" if the upper bounds of a and of b are both below 0; "inconclusive" otherwise.
"""


@dataclass(frozen=True)
class Sizes:
    """Blocks that are adapted, rows, lengths of the runs, and the thresholds of the sweep and of the rising schedule."""

    blocks: int
    train: Mapping[str, int]
    dev: int
    test: int
    steps: int
    more: int
    xis: tuple[float, ...]
    levels: tuple[float, ...]
    length: int = 64


XIS, LEVELS = (0.0, 3e-5, 1e-4, 3e-4, 1e-3), (3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3)
FULL = Sizes(2, {"clinc150-domains": 200, "sst2": 1000}, 300, 1800, 200, 40, XIS, LEVELS)
SMOKE = Sizes(1, {"clinc150-domains": 2, "sst2": 3}, 8, 16, 4, 1, (0.0, 0.1), (0.01, 0.1))


def worlds(ctx: Context, name: str, sizes: Sizes) -> Callable[[int], UpperWorld]:
    """The world of a set by seed; the encoder and the states of its test rows are made once."""
    from tunesmith.study.worlds.encoder import upper
    from tunesmith.study.worlds.text import few_shot

    made: dict[str, Any] = {}

    def of(seed: int) -> UpperWorld:
        if made.get("seed") != seed:
            text = few_shot(
                ctx, name, sizes.train[name], seed, dev=sizes.dev, test=sizes.test, length=sizes.length,
                precision="fp32", base=made.get("base"),
            )  # fmt: skip
            made.update(seed=seed, base=text.base, world=upper(text, sizes.blocks, known=made.get("world")))
        return made["world"]

    return of


def run(ctx: Context) -> Raw:
    """Rates and the threshold chosen on the first seed's dev rows, then every arm on every seed; one cell for each run."""
    sizes = SMOKE if ctx.smoke else FULL
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "sweep": {}, "tuning": {}, "xi": {}, "schedule": []}
    total = len(SETS) * (len(sizes.xis) * len(LRS) + 3 * len(LRS) + 4 * (len(ctx.seeds) - 1)) + 1
    done = 0

    def cell(key: dict[str, Any], fn: Callable[[], Any]) -> Any:
        nonlocal done
        found = ctx.cell(key, fn)
        done += 1
        ctx.progress(min(done, total), total)
        shown = "diverged" if found is None else f"dev {found['dev']:.1f} %" if "dev" in found else "done"
        ctx.log(", ".join(f"{k} {v}" for k, v in key.items()) + f": {shown}")
        return found

    for name in SETS:
        one_set(ctx, name, sizes, raw, cell)
    return raw


def one_set(ctx: Context, name: str, sizes: Sizes, raw: Raw, cell: Callable[..., Any]) -> None:
    """All runs on one set."""
    from tunesmith.core.errors import TrainingError

    from . import runs

    world, first = worlds(ctx, name, sizes), ctx.seeds[0]
    kept: dict[Any, Any] = {}

    def run_of(arm: str, seed: int, lr: float, **what: Any) -> Any:
        key = {"set": name, "arm": arm, "seed": seed, "lr": lr, **what}
        if str(key) not in kept:
            kept[str(key)] = cell(key, lambda: _run(runs, world(seed), arm, seed, lr, sizes.steps, **what))
        return kept[str(key)]

    by_xi = {xi: _chosen(lambda lr, xi=xi: run_of(SORA, first, lr, xi=xi)) for xi in sizes.xis}
    raw["sweep"][name] = [
        {"xi": xi, "lr": c.lr, "dev": c.metric, "share": run_of(SORA, first, c.lr, xi=xi)["share"]}
        for xi, c in by_xi.items()
    ]
    xi = min(raw["sweep"][name], key=lambda row: (abs(row["share"] - SHARE), row["xi"]))["xi"]
    raw["xi"][name] = xi
    budget = run_of(SORA, first, by_xi[xi].lr, xi=xi)["parameters"]
    choice = {
        SORA: by_xi[xi],
        WHOLE: _chosen(lambda lr: run_of(WHOLE, first, lr)),
        SMALL: _chosen(lambda lr: run_of(SMALL, first, lr, parameters=budget)),
        RANDOM: _chosen(lambda lr: run_of(RANDOM, first, lr, parameters=budget)),
    }
    raw["tuning"][name] = {arm: c.as_json() for arm, c in choice.items()}
    for seed in ctx.seeds:
        mine = run_of(SORA, seed, choice[SORA].lr, xi=xi)
        rows = {SORA: mine, WHOLE: run_of(WHOLE, seed, choice[WHOLE].lr)}
        for arm in (SMALL, RANDOM) if mine is not None else ():
            rows[arm] = run_of(arm, seed, choice[arm].lr, parameters=mine["parameters"])
        for arm, row in rows.items():
            if row is None:
                raise TrainingError(f"{arm} diverges on seed {seed} of {name}", hint="offer smaller rates")
            shown = {k: row[k] for k in ("dev", "parameters", "forward_ms", "seconds")}
            raw["arms"][arm].append({"seed": seed, "set": name, "metric": row["test"], **shown})
    if name == SETS[0]:
        raw["schedule"] = cell(
            {"set": name, "schedule": list(sizes.levels), "seed": first},
            lambda: runs.rising(world(first), RANK, sizes.levels, choice[SORA].lr, sizes.steps, sizes.more, first),
        )


def _run(runs: Any, world: UpperWorld, arm: str, seed: int, lr: float, steps: int, **what: Any) -> Any:
    if arm == SORA:
        return runs.sora(world, RANK, what["xi"], lr, steps, seed)
    every = runs.sizes(world, RANK)
    if arm == RANDOM:
        return runs.random_pruned(world, RANK, what["parameters"], lr, steps, seed)
    rank = dict.fromkeys(every, RANK) if arm == WHOLE else runs.spread(every, what["parameters"])
    return runs.lora(world, rank, lr, steps, seed)


def _chosen(run_at: Callable[[float], Any]) -> LrChoice:
    from tunesmith.study.fair import choose_lr

    return choose_lr(run_at, LRS, lambda found: float("nan") if found is None else found["dev"])


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def by_seed(arm: str, key: str = "metric") -> dict[int, float]:
        rows = raw["arms"][arm]
        return {s: mean(r[key] for r in rows if r["seed"] == s) for s in sorted({r["seed"] for r in rows})}

    sora = by_seed(SORA)
    statistics: dict[str, Any] = {}
    reasons: list[str] = []
    for other in (WHOLE, SMALL, RANDOM):
        theirs = by_seed(other)
        t = paired_t([sora[s] - theirs[s] for s in sora])
        statistics[f"SoRA - {other}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        reasons.append(f"SoRA - {other} {t.mean:+.2f} [{t.low:+.2f}, {t.high:+.2f}] points")
    whole = {(r["set"], r["seed"]): r["parameters"] for r in raw["arms"][WHOLE]}
    share = mean(r["parameters"] / whole[r["set"], r["seed"]] for r in raw["arms"][SORA])
    statistics["share of the parameters"] = share
    reasons.append(f"SoRA stores {100 * share:.0f} % of the parameters of LoRA r=8")
    a, b = statistics[f"SoRA - {WHOLE}"], statistics[f"SoRA - {SMALL}"]
    holds = share <= 0.75 and a["low"] > -0.5 and b["mean"] > 0 and b["low"] > 0
    fails = a["high"] < 0 and b["high"] < 0
    return Verdict("reproduced" if holds else "not reproduced" if fails else "inconclusive", reasons, statistics)


STUDY = Study(
    id=141,
    slug="sora",
    paper="Sparse Low-rank Adaptation of Pre-trained Language Models, EMNLP 2023, arXiv 2311.11696",
    claim="LoRA with a gate on every component, pruned in training by soft thresholding, is as good as LoRA of the full rank "
    "with 70 % of its parameters, and better than a LoRA of as few parameters.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("clinc150", "sst2"),
    minutes=12,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "MiniLM-L6 with its last 2 blocks adapted (12 linear layers) on states of the lower blocks computed once, instead of "
        "DeBERTaV3-base with all blocks; the card asks for all 6 blocks of MiniLM.",
        "CLINC150 domains and SST-2 with 2,000 training rows each instead of GLUE (the card: 5,400 rows of the former); "
        "200 steps of batch 32 instead of the card's 600, cosine schedule with 10 % warm-up for every arm.",
        "The gates follow the same schedule as A and B; xi stays constant, as published.",
        "Layer norms stay frozen in every arm; the head trains in every arm at the same rate as the rest.",
        "The threshold and each arm's rate (2 trials) are chosen on the first seed's 300 dev rows of each set and kept for "
        "the other seeds.",
        "LoRA of as few parameters has nearly equal ranks (one more in the first layers, to come nearest to SoRA's count on "
        "that seed); every arm has the scale 2 = alpha / r of SoRA.",
        "Random pruning cuts LoRA r=8 after half the steps and trains on for the other half, so that its steps are those of "
        "the other arms (the card: equal extra steps).",
        "The sparsity schedule runs on one seed of the first set, 40 steps at each level at a constant rate; no verdict "
        "depends on it, nor on the times of a forward pass that are recorded.",
    ),
)
