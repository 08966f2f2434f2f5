# SPDX-License-Identifier: Apache-2.0
"""Study 104: does the distance of graphons say before any training where pre-training on graphs will help (W2PGNN)?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

W2PGNN, MEAN, DEGREE, RANDOM = "W2PGNN", "mean of the bases", "mean degree", "random"
ARMS = (W2PGNN, MEAN, DEGREE, RANDOM)
SINGLE = ("er", "sbm2", "sbm4", "pa", "ws", "geometric")
MIXES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in SINGLE},
    "er+sbm2": ("er", "sbm2"),
    "sbm2+sbm4": ("sbm2", "sbm4"),
    "pa+ws": ("pa", "ws"),
    "ws+geometric": ("ws", "geometric"),
    "er+pa": ("er", "pa"),
    "all": SINGLE,
}

RULE = """\
The gain of a pair (12 source mixes, 6 targets) is accuracy after fine-tuning the pre-trained network less accuracy of the same
network from scratch, in points on 400 test graphs, mean over 5 draws of 20 labels and 3 seeds. rho of a score is its Spearman
correlation with the gain over the 72 pairs; its interval and that of a difference are 95% bootstraps over pairs (2,000
resamples, the same for both scores).
"reproduced" if rho of W2PGNN is above 0.3 with its lower bound above 0, and the lower bound of rho of W2PGNN - rho of mean
degree is above 0; "not reproduced" if rho of W2PGNN is 0 or less, or the upper bound of its interval is below 0.3;
"inconclusive" otherwise.
"""


@dataclass(frozen=True)
class Sizes:
    """Graphs of a source, unlabelled, labelled and test graphs of a target, the network, steps, draws, and the
    resolution and epochs of the scores."""

    source: int
    pool: int
    labels: int
    test: int
    dim: int
    batch: int
    pretrain: int
    tune: int
    draws: int
    resolution: int
    epochs: int
    targets: tuple[str, ...] = SINGLE
    mixes: tuple[str, ...] = tuple(MIXES)


FULL = Sizes(200, 200, 20, 400, 32, 32, 300, 60, 5, 20, 100)
SMOKE = Sizes(6, 12, 4, 8, 8, 4, 4, 2, 2, 6, 2, ("er", "ws"), ("er", "pa+ws"))


def run(ctx: Context) -> Raw:
    """Scores of all pairs first, then every mix pre-trained with every seed and fine-tuned on every target."""
    from . import graphs

    sizes = SMOKE if ctx.smoke else FULL
    mixes = {mix: MIXES[mix] for mix in sizes.mixes}
    pools = {name: graphs.target(name, sizes.pool, 11) for name in sizes.targets}
    tests = {name: graphs.target(name, sizes.test, 12) for name in sizes.targets}
    sources = {name: graphs.source(name, sizes.source) for name in SINGLE}
    goals = {name: (graphs.batched(g), y) for name, (g, y) in tests.items()}
    total, done = len(mixes) + len(ctx.seeds) * (1 + len(mixes)), 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        ctx.progress(done, total)
        ctx.log(what)

    scores: dict[str, dict[str, Any]] = {}
    for mix, names in mixes.items():
        some = {name: sources[name] for name in names}
        scores[mix] = ctx.cell({"scores": mix}, lambda s=some: _scores(s, {n: g for n, (g, _) in pools.items()}, sizes))
        step(f"scores of {mix}")
    gains: dict[tuple[str, str, int], float] = {}
    pretext = []
    for seed in ctx.seeds:
        scratch = ctx.cell({"seed": seed, "mix": ""}, lambda s=seed: _tuned(graphs, None, pools, goals, sizes, s))
        step(f"seed {seed}, from scratch: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in scratch.items()))
        for mix, names in mixes.items():
            every = [g for name in names for g in sources[name]]
            found = ctx.cell(
                {"seed": seed, "mix": mix}, lambda e=every, s=seed: _one(graphs, e, pools, goals, sizes, s)
            )
            pretext.append({"seed": seed, "mix": mix, **found["pretext"]})
            for name, value in found["tuned"].items():
                gains[mix, name, seed] = 100 * (value - scratch[name])
            step(f"seed {seed}, {mix}: " + ", ".join(f"{n} {gains[mix, n, seed]:+.1f}" for n in sizes.targets))
    pairs = [
        {"mix": mix, "target": name, **scores[mix][name], RANDOM: _random(i, j),
         "gains": [gains[mix, name, seed] for seed in ctx.seeds]}
        for i, mix in enumerate(mixes) for j, name in enumerate(sizes.targets)
    ]  # fmt: skip
    arms = {
        arm: [{"seed": s, "metric": correlation([p[arm] for p in pairs], [p["gains"][k] for p in pairs])}
              for k, s in enumerate(ctx.seeds)]
        for arm in ARMS
    }  # fmt: skip
    return {"arms": arms, "pairs": pairs, "pretext": pretext}


def _scores(some: dict[str, Any], pools: dict[str, Any], sizes: Sizes) -> dict[str, dict[str, float]]:
    """By target, what each score says of these sources; higher is better. No label is looked at."""
    import numpy as np

    from tunesmith.inspect.gromov import gromov_wasserstein
    from tunesmith.inspect.transferability import families, graphon, nearest_mixture

    settings = {"resolution": sizes.resolution}
    bases = families(some, **settings)  # type: ignore[arg-type]
    mean_degree = float(np.mean([A.sum(1).mean() for graphs in some.values() for A in graphs]))
    out = {}
    for name, graphs in pools.items():
        goal = graphon(graphs, **settings)  # type: ignore[arg-type]
        best = min(nearest_mixture(family, goal, epochs=sizes.epochs)[0] for family in bases.values())
        plain = min(
            gromov_wasserstein(np.mean(list(family.values()), 0), goal)[0]
            for family in bases.values()
        )  # fmt: skip
        degree = float(np.mean([A.sum(1).mean() for A in graphs]))
        out[name] = {W2PGNN: -best, MEAN: -plain, DEGREE: -abs(degree - mean_degree)}
    return out


def _random(i: int, j: int) -> float:
    import random

    return random.Random(f"104:{i}:{j}").random()


def _one(graphs: Any, source: Any, pools: Any, goals: Any, sizes: Sizes, seed: int) -> dict[str, Any]:
    body, right = graphs.pretrained(source, sizes.dim, sizes.pretrain, sizes.batch, seed)
    return {"pretext": right, "tuned": _tuned(graphs, body, pools, goals, sizes, seed)}


def _tuned(graphs: Any, body: Any, pools: Any, goals: Any, sizes: Sizes, seed: int) -> dict[str, float]:
    """Accuracy by target, mean over draws of labels; a fresh network for each draw where `body` is None."""
    import copy
    import random

    import torch

    out = {}
    for name, (every, y) in pools.items():
        found = []
        for draw in range(sizes.draws):
            rng = random.Random(f"labels:{seed}:{draw}")
            rows = [i for c in (0, 1) for i in rng.sample(range(c, len(every), 2), sizes.labels // 2)]
            learn = graphs.batched([every[i] for i in rows])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1000 * seed + draw)
                start = graphs.GIN(sizes.dim) if body is None else copy.deepcopy(body)
            test, y_test = goals[name]
            found.append(graphs.tuned(start, sizes.dim, learn, y[rows], test, y_test, sizes.tune, 1000 * seed + draw))
        out[name] = sum(found) / len(found)
    return out


def correlation(x: list[float], y: list[float]) -> float:
    """Spearman's; 0 where one of them is constant."""
    import numpy as np
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_statistic

    pairs = raw["pairs"]
    gain = [mean(p["gains"]) for p in pairs]
    statistics: dict[str, Any] = {}
    reasons: list[str] = []
    ours = [p[W2PGNN] for p in pairs]
    for arm in ARMS[1:]:
        other = [p[arm] for p in pairs]

        def both(index: Any, other: list[float] = other) -> tuple[float, float]:
            y = [gain[i] for i in index]
            return correlation([other[i] for i in index], y), correlation([ours[i] for i in index], y)

        gap, theirs, mine = paired_statistic(both, other, ours, n_boot=2000)
        for name, found in ((arm, theirs), (W2PGNN, mine)):
            statistics[f"rho, {name}"] = {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}
        statistics[f"rho, {W2PGNN} - {arm}"] = {"mean": gap.difference, "low": gap.low, "high": gap.high, "n": gap.n}
        reasons.append(f"rho of {W2PGNN} - {arm} {gap.difference:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]")
    rho, gap = statistics[f"rho, {W2PGNN}"], statistics[f"rho, {W2PGNN} - {DEGREE}"]
    reasons.insert(
        0, f"rho of {W2PGNN} {rho['mean']:+.2f} [{rho['low']:+.2f}, {rho['high']:+.2f}] over {rho['n']} pairs"
    )
    for arm in ARMS:
        inside = [
            correlation([p[arm] for p in pairs if p["target"] == t], [g for p, g in zip(pairs, gain, strict=True) if p["target"] == t])
            for t in dict.fromkeys(p["target"] for p in pairs)
        ]  # fmt: skip
        statistics[f"rho within a target, mean, {arm}"] = mean(inside)
    statistics["gain, mean over pairs"] = mean(gain)
    statistics["pairs with a gain above 0"] = sum(g > 0 for g in gain)
    holds = rho["mean"] > 0.3 and rho["low"] > 0 and gap["low"] > 0
    fails = rho["mean"] <= 0 or rho["high"] < 0.3
    return Verdict("reproduced" if holds else "not reproduced" if fails else "inconclusive", reasons, statistics)


STUDY = Study(
    id=104,
    slug="w2pgnn",
    paper="When to Pre-Train Graph Neural Networks? From Data Generation Perspective!, KDD 2023, arXiv 2303.16458",
    claim="The Gromov-Wasserstein distance from the nearest mixture of source graphons to the target's says before any training "
    "where pre-training will help.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    minutes=8,
    seeds=(0, 1, 2),
    smoke_seeds=(0, 1),
    deviations=(
        "Pre-training is 300 steps of 32 graphs, some seconds, where the card has a minute for each mix.",
        "Nodes start with a constant, the logarithm of their degree and the chances that walks of 2, 3 and 4 steps return: with "
        "degrees alone a network of this kind cannot tell blocks from a random graph of the same density.",
        "Gains are means over 5 draws of the 20 labels for each seed, because one draw varies by more than most gains.",
        "Gromov-Wasserstein distances are exact with square loss, on step functions of 20 x 20; sizes are not binned, all sets "
        "having 30 to 60 nodes.",
        "Learning rates (3e-3) are the same everywhere and chosen by nobody.",
        "ER is one source with both densities, so that there are six generators.",
    ),
)
