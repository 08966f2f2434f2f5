# SPDX-License-Identifier: Apache-2.0
"""Study 075: are errors on exact tasks the prior's, and does light tuning of the layers it speaks from mend them?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.core.base import Base
    from tunesmith.core.delta import Delta

PRIOR, RANDOM, LOWEST, ALL, SINGLE = "prior layers", "random layers", "lowest c", "all layers", "single layer"
ARMS = (PRIOR, RANDOM, LOWEST, ALL)
DRAWS = 3

RULE = """\
Accuracies are in percent of held-out items; no answer of theirs was trained on. rho is the correlation of correctness with
the prior of the answer, over all items of the 3 seeds, with its 95% interval by Fisher's z. The prior layers are the 4 with
the largest rise of c and fall of a against the layer before, on the tuning items of the base; random layers are 3 draws of
4 among all layers but these.
a is the accuracy on low-prior items of the prior layers less the mean of random layers and lowest c, by seed, with a 95%
Student t interval. The gain on an item set is the accuracy after tuning the prior layers less the base's.
"reproduced" if the base's rho is above 0.1 with an interval above 0, the interval of rho after tuning the prior layers holds
0, a is above 0 with its interval, and the mean gain on acronyms is above that on the control task. "not reproduced" if the
mean of a is at or below 0. "inconclusive" otherwise, and where the base's accuracy on acronyms is below 5%.
"""


@dataclass(frozen=True)
class Sizes:
    """The model, its pre-training, items, and the tuning."""

    layers: int
    width: int
    steps: int
    batch: int
    common: int
    tune: int
    test: int
    epochs: int
    chosen: int
    sweep: int


FULL = Sizes(8, 64, 2000, 32, 1600, 300, 300, 3, 4, 1)
SMOKE = Sizes(4, 32, 8, 8, 60, 16, 16, 1, 1, 2)
LIKELY, RANK, LR, TUNE_BATCH = 0.9, 8, 1e-3, 16
NEUTRAL = [26, 30]  # the start and the equals sign: a bare string follows


def tuned(base: Base, rows: Sequence[Any], layers: Sequence[int], seed: int, epochs: int, rank: int = RANK) -> Delta:
    """LoRA on the attention and MLP layers of some blocks, on the answers of the rows."""
    import random

    import torch
    import torch.nn.functional as F

    from tunesmith.core import method as methods
    from tunesmith.core.delta import Delta

    from .world import padded

    targets = "re:layers\\.(" + "|".join(map(str, layers)) + ")\\."
    delta = Delta.create(
        base, methods.build("lora", {"rank": rank, "alpha": 2.0 * rank, "targets": targets}), seed=seed
    )
    optimiser = torch.optim.AdamW([t for t in delta.parameters() if t.requires_grad], lr=LR, weight_decay=0.0)
    rng = random.Random(f"075:order:{seed}")
    for _ in range(epochs):
        order = rng.sample(range(len(rows)), len(rows))
        for i in range(0, len(order), TUNE_BATCH):
            some = [rows[j] for j in order[i : i + TUNE_BATCH]]
            ids, mask = padded([r for r, _ in some])
            at = torch.arange(ids.shape[1])[None]
            answer = (mask & (at >= torch.tensor([a for _, a in some])[:, None]))[:, 1:]
            with base.using(delta):
                loss = F.cross_entropy(base(input_ids=ids).logits[:, :-1][answer], ids[:, 1:][answer])
                loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return delta


def measured(base: Base, delta: Delta | None, tests: dict[str, Any]) -> dict[str, Any]:
    """Accuracy on acronyms, their low-prior half and the control task; each item's prior and correctness."""
    from contextlib import nullcontext

    from tunesmith.inspect.prior import items_of, prior_of, said

    from .world import sample_of

    found: dict[str, Any] = {}
    for name, rows in tests.items():
        asked = items_of(base, sample_of(rows))
        with base.using(delta) if delta is not None else nullcontext():
            right = [a == x.answer for a, x in zip(said(base, asked), asked, strict=True)]
        found[name] = 100 * sum(right) / len(right)
        if name == "acronym":
            prior = prior_of(base, [x.answer for x in asked], NEUTRAL).tolist()
            half = sorted(prior)[len(prior) // 2]
            low = [ok for ok, p in zip(right, prior, strict=True) if p < half]
            found |= {"low": 100 * sum(low) / max(1, len(low)), "prior": prior, "right": [int(ok) for ok in right]}
    return found


def ranked(base: Base, rows: Sequence[Any]) -> tuple[list[int], list[int], list[float]]:
    """Layers by rise of c and fall of a, layers by rising c, and c by layer, on the tuning items."""
    from tunesmith.inspect.prior import correlation, items_of, prior_of, read_layers

    from .world import sample_of

    asked = items_of(base, sample_of(rows))
    prior = prior_of(base, [x.answer for x in asked], NEUTRAL)
    seen = read_layers(base, asked)
    c = [correlation(logp, prior) or 0.0 for logp in seen.logp]
    a = [float(right.double().mean()) for right in seen.correct]
    score = {l: (c[l] - c[l - 1]) - (a[l] - a[l - 1]) for l in range(1, len(c))}
    by_rise = sorted(score, key=lambda l: (-score[l], l))
    return by_rise, sorted(range(len(c)), key=lambda l: (c[l], l)), c


def one_seed(seed: int, sizes: Sizes, first: bool) -> dict[str, Any]:
    """The base of a seed, its prior layers, and every arm on it."""
    import random

    from .world import acronym, any_string, items, pretrained, strings, third

    s = strings(sizes.common, seed)
    base = pretrained(
        seed, s, layers=sizes.layers, width=sizes.width, steps=sizes.steps, batch=sizes.batch, likely=LIKELY
    )  # fmt: skip
    taken: set[tuple[int, ...]] = set()
    rng = random.Random(f"075:rows:{seed}")
    test, tune = (items(s, n, f"{what}:{seed}", taken) for what, n in (("test", sizes.test), ("tune", sizes.tune)))
    rows = [acronym(answer, rng) for answer in tune]
    tests = {
        "acronym": [acronym(answer, rng) for answer in test],
        "control": [third(any_string(rng), rng) for _ in range(sizes.test)],
    }
    by_rise, by_c, c = ranked(base, rows)
    prior, others = by_rise[: sizes.chosen], [l for l in range(sizes.layers) if l not in by_rise[: sizes.chosen]]
    arms: dict[str, list[list[int]]] = {
        PRIOR: [prior],
        RANDOM: [sorted(rng.sample(others, min(sizes.chosen, len(others)))) for _ in range(DRAWS)],
        LOWEST: [by_c[: sizes.chosen]],
        ALL: [list(range(sizes.layers))],
        SINGLE: [[l] for l in range(0, sizes.layers, sizes.sweep)] if first else [],
    }
    found: dict[str, Any] = {"base": measured(base, None, tests), "c": c, "arms": {}}
    for arm, choices in arms.items():
        found["arms"][arm] = []
        for layers in choices:
            rank = max(1, RANK * sizes.chosen // len(layers))  # as many parameters in every arm
            delta = tuned(base, rows, layers, seed, sizes.epochs, rank)
            row = measured(base, delta, tests)
            found["arms"][arm].append({"layers": layers, "trainable": delta.trainable_parameters, **row})
    return found


def run(ctx: Context) -> Raw:
    """One cell for each seed."""
    sizes = SMOKE if ctx.smoke else FULL
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "base": [], "sweep": []}
    for done, seed in enumerate(ctx.seeds):
        found = ctx.cell({"seed": seed}, lambda seed=seed: one_seed(seed, sizes, seed == ctx.seeds[0]))
        raw["base"].append({"seed": seed, "c": found["c"], **found["base"]})
        for arm, rows in found["arms"].items():
            place = raw["sweep"] if arm == SINGLE else raw["arms"][arm]
            place += [{"seed": seed, "metric": r["low"], **r} for r in rows]
        shown = {arm: [round(r["low"]) for r in rows] for arm, rows in found["arms"].items()}
        ctx.log(
            f"seed {seed}: base {found['base']['acronym']:.0f} %, low-prior {found['base']['low']:.0f} %, after {shown}"
        )
        ctx.progress(done + 1, len(ctx.seeds))
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    import torch

    from tunesmith.evaluate.stats import paired_t
    from tunesmith.inspect.prior import correlation, interval

    def rho(rows: Any) -> tuple[float | None, tuple[float, float] | None]:
        right = torch.tensor([v for r in rows for v in r["right"]])
        prior = torch.tensor([v for r in rows for v in r["prior"]])
        r = correlation(right, prior)
        return r, interval(r, len(right))

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    seeds = [r["seed"] for r in raw["base"]]
    low = {arm: {s: [r["low"] for r in rows if r["seed"] == s] for s in seeds} for arm, rows in raw["arms"].items()}
    a = paired_t([mean(low[PRIOR][s]) - mean([mean(low[RANDOM][s]), mean(low[LOWEST][s])]) for s in seeds])
    gain = {
        task: mean([r[task] for r in raw["arms"][PRIOR]]) - mean([r[task] for r in raw["base"]])
        for task in ("acronym", "control")
    }
    base, base_at = rho(raw["base"])
    after, after_at = rho(raw["arms"][PRIOR])
    level = mean([r["acronym"] for r in raw["base"]])
    # Without any variation left (every item right) nothing follows the prior.
    free = after is None or (after_at is not None and after_at[0] <= 0 <= after_at[1])
    leans = base is not None and base > 0.1 and base_at is not None and base_at[0] > 0

    def told(r: float | None, at: tuple[float, float] | None) -> str:
        return "not defined" if r is None or at is None else f"{r:+.2f} [{at[0]:+.2f}, {at[1]:+.2f}]"

    reasons = [
        f"rho of the base {told(base, base_at)}, after tuning the prior layers {told(after, after_at)}",
        f"prior layers less other choices on low-prior items {a.mean:+.1f} [{a.low:+.1f}, {a.high:+.1f}] points",
        f"gain on acronyms {gain['acronym']:+.1f}, on the control task {gain['control']:+.1f} points",
        f"the base has {level:.1f} % of the acronyms right",
    ]
    statistics: dict[str, Any] = {
        "prior layers - others": {"mean": a.mean, "low": a.low, "high": a.high, "n": a.n},
        "rho base": base, "rho after": after, "gain": gain, "base accuracy": level,
    }  # fmt: skip
    if level < 5:
        return Verdict("inconclusive", reasons, statistics)
    if a.mean <= 0:
        return Verdict("not reproduced", reasons, statistics)
    holds = leans and free and a.low > 0 and gain["acronym"] > gain["control"]
    return Verdict("reproduced" if holds else "inconclusive", reasons, statistics)


STUDY = Study(
    id=75,
    slug="prior-influence",
    paper="Identifying and Mitigating the Influence of the Prior Distribution in Large Language Models, arXiv 2504.12585",
    claim="Errors on exact tasks follow the prior of the answer; layers that speak it can be found, and light tuning of these "
    "alone mends the errors better than tuning other layers, after which errors no longer follow the prior.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    minutes=12,
    deviations=(
        "A Llama of 8 layers and width 64, trained in the study on strings of a skewed prior, instead of SmolLM2-135M-Instruct: "
        "the card names it as the way out where the large model is too weak, and only it fits the time.",
        "Pre-training supervises what follows the equals sign only, since the made-up words cannot be foreseen.",
        "A quarter of the words of pre-training acronyms are misspelt in their first letter, so that leaning on what is likely "
        "pays there; items to tune and test on are spelt rightly. The amount was chosen on items of neither, by the base alone.",
        "Answers are four letters, each one token; the unspelled version with multi-letter tokens is not run.",
        "Low-prior answers are common strings with their letters in another order, so that pairs are as hard.",
        "Rank times number of layers is the same in every arm, so arms have as many parameters.",
        "The prompt that asks not to rely on what is likely is left out: the small model reads no instructions.",
    ),
)
