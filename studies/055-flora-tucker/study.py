# SPDX-License-Identifier: Apache-2.0
"""Study 055: does a Tucker change that keeps the kernel axes of a convolution (FLoRA) beat a flattened low-rank one?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

ARMS = ("flora", "lora", "loha", "loha-tucker")
FLAT = ("lora", "loha")
TARGETS = ("cifar10 5-9", "omniglot")
RATES = (1e-3, 3e-3, 1e-2)
SCALES = (1.0, 4.0)

RULE = """\
Accuracies are in percent of the 1,000 test pictures of CIFAR-10 classes 5-9. Each arm has the rate and scale with the best
dev accuracy on the first seed. d is FLoRA - the flattened arm (LoRA or LoHa) of the higher mean, by seed, with a 95% Student
t interval over the 5 seeds. The share is how many of the 25 layers (5 layers, 5 seeds) of a full fine-tuning change have
a smaller relative error when truncated in Tucker form than as a matrix of rank 4 with at least as many numbers.
"reproduced" if the lower bound of d is above 0 and the share is above 2/3; "not reproduced" if the upper bound of d is
below 0 and the share is below 1/3; "inconclusive" otherwise. Omniglot and the Tucker form of LoHa decide nothing.
"""


@dataclass(frozen=True)
class Sizes:
    """Widths and pre-training steps of the network, rows of a class, steps of a run, ranks of the arms and of truncation."""

    widths: tuple[int, ...]
    source_steps: int
    train: dict[str, int]
    dev: int
    steps: dict[str, int]
    ranks: dict[str, int]
    rank: int


FULL = Sizes((64, 64, 96, 96, 128, 128), 240, {"cifar10 5-9": 200, "omniglot": 10}, 60, {"cifar10 5-9": 80, "omniglot": 40},
             {"flora": 12, "lora": 4, "loha": 2, "loha-tucker": 7}, 4)  # fmt: skip
SMOKE = Sizes((8, 8, 8, 8, 8, 8), 4, {"cifar10 5-9": 4, "omniglot": 2}, 2, {"cifar10 5-9": 3, "omniglot": 2},
              {"flora": 2, "lora": 1, "loha": 1, "loha-tucker": 1}, 1)  # fmt: skip


def run(ctx: Context) -> Raw:
    """Rate and scale of each arm on the first seed's dev rows, then every arm and full fine-tuning on every seed."""
    from . import pictures

    sizes = SMOKE if ctx.smoke else FULL
    folders = [ctx.data_folder(name) for name in ("cifar10", "mnist_10k", "omniglot")]
    data = pictures.toy() if any(f is None for f in folders) else pictures.load(*folders)  # type: ignore[arg-type]
    base, source = pictures.pretrained(data.source, sizes.source_steps, sizes.widths)
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "omniglot": {arm: [] for arm in ARMS}, "tuning": {}, "layers": []}
    raw["source accuracy"] = source
    total = len(ARMS) * (len(RATES) * len(SCALES) + 2 * len(ctx.seeds) - 1) + len(ctx.seeds)
    done = 0
    kept: dict[str, Any] = {}

    def cell(arm: str, seed: int, lr: float, scale: float, target: str = TARGETS[0]) -> Any:
        nonlocal done
        key = {"arm": arm, "seed": seed, "lr": lr, "scale": scale, "target": target}
        if str(key) not in kept:
            kept[str(key)] = ctx.cell(key, lambda: _one(pictures, base, data, sizes, key))
            done += 1
            ctx.progress(min(done, total), total)
            ctx.log(", ".join(f"{k} {v}" for k, v in key.items()))
        return kept[str(key)]

    first = ctx.seeds[0]
    for arm in ARMS:
        trials = [{"lr": lr, "scale": s, "dev": cell(arm, first, lr, s)["dev"]} for s in SCALES for lr in RATES]
        raw["tuning"][arm] = trials
        best = max(trials, key=lambda t: (t["dev"], -t["lr"] * t["scale"]))
        for seed in ctx.seeds:
            row = cell(arm, seed, best["lr"], best["scale"])
            raw["arms"][arm].append({"seed": seed, "metric": row["test"], **{k: row[k] for k in ("dev", "numbers")}})
            other = cell(arm, seed, best["lr"], best["scale"], TARGETS[1])
            raw["omniglot"][arm].append({"seed": seed, "metric": other["test"]})
    for seed in ctx.seeds:
        raw["layers"] += [{"seed": seed, **row} for row in cell("full", seed, 1e-3, 1.0)["layers"]]
    return raw


def _one(pictures: Any, base: Any, data: Any, sizes: Sizes, key: dict[str, Any]) -> dict[str, Any]:
    target, seed = key["target"], key["seed"]
    dev = sizes.dev if target == TARGETS[0] else 0
    rows, held = pictures.split(data.train[target], sizes.train[target], dev, seed)
    how = pictures.method(key["arm"], key["scale"], sizes.ranks)
    delta = pictures.train(base, how, rows, lr=key["lr"], steps=sizes.steps[target], seed=seed)
    found = {"test": pictures.accuracy(base, delta, data.test[target]), "numbers": pictures.numbers(delta)}
    if dev:
        found["dev"] = pictures.accuracy(base, delta, held)
    if key["arm"] == "full":
        found["layers"] = pictures.truncations(delta, sizes.rank)
    return found


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def scores(arm: str, where: str = "arms") -> list[float]:
        return [row["metric"] for row in sorted(raw[where][arm], key=lambda row: row["seed"])]

    statistics: dict[str, Any] = {}
    reasons: list[str] = []
    for where in ("arms", "omniglot"):
        for other in (arm for arm in raw[where] if arm != "flora"):
            t = paired_t([a - b for a, b in zip(scores("flora", where), scores(other, where), strict=True)])
            name = f"FLoRA - {other}" + (", Omniglot" if where == "omniglot" else "")
            statistics[name] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
    best = max(FLAT, key=lambda arm: mean(scores(arm)))
    d = statistics[f"FLoRA - {best}"]
    reasons.append(
        f"FLoRA - {best}, the better flattened arm, {d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}] points"
    )
    share = mean(float(row["tucker"] < row["matrix"]) for row in raw["layers"])
    statistics["share of layers where Tucker truncates better"] = share
    reasons.append(f"the Tucker form truncates better in {100 * share:.0f} % of {len(raw['layers'])} layers")
    for arm, rows in raw["arms"].items():
        statistics[f"numbers, {arm}"] = rows[0]["numbers"]
    statistics["source accuracy"] = raw["source accuracy"]
    holds, fails = d["low"] > 0 and share > 2 / 3, d["high"] < 0 and share < 1 / 3
    return Verdict("reproduced" if holds else "not reproduced" if fails else "inconclusive", reasons, statistics)


STUDY = Study(
    id=55,
    slug="flora-tucker",
    paper="FLoRA: Low-Rank Core Space for N-dimension, arXiv 2405.14739",
    claim="A change of a convolution in Tucker form, which keeps the kernel axes, is better than a flattened low-rank one of as "
    "many parameters.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("cifar10", "mnist_10k", "omniglot"),
    minutes=12,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "The plain network of six 3 x 3 convolutions only: EfficientNet-Lite0 has no dense kernels, no verdict depends on it, and "
        "it would take most of the time.",
        "Pre-training is 240 steps of 64 pictures instead of 3 minutes; the first convolution (one input channel) stays frozen.",
        "The card's two LoRA arms, a k x k convolution to r channels followed by a 1 x 1 one and a matrix on W reshaped to (out, "
        "in * k * k), are one and the same function; in place of the second stands LoHa in its Tucker form.",
        "1,000 training rows of CIFAR-10 classes 5-9 and 80 steps of 32; Omniglot is 20 characters with 10 drawings each, "
        "40 steps, at the rate and scale chosen on CIFAR-10, and has no verdict.",
        "Ranks 12, 4, 2 and 7 give 18,090, 18,176, 18,176 and 17,850 numbers: within 2 %.",
        "Rate and scale are chosen on the first seed's dev rows and kept for the other seeds.",
        "Truncation compares a matrix of rank 4 with the largest Tucker rank that has no more numbers.",
    ),
)
