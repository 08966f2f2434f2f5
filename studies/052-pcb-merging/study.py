# SPDX-License-Identifier: Apache-2.0
"""Study 052: is merging by competition (PCB) better than task arithmetic and TIES on four picture tasks?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

TASKS = ("digits-rotated", "things-inverted", "alphabets", "glyphs")
TA, TIES, PCB = "task arithmetic", "ties", "pcb"
ARMS = (TA, TIES, PCB)
METHODS = {TA: "task-arithmetic", TIES: "ties:density=0.2", PCB: "pcb:ratio=0.1"}
ABLATIONS = {
    "ratio 0.05": "pcb:ratio=0.05", "ratio 0.2": "pcb:ratio=0.2", "ratio 0.5": "pcb:ratio=0.5",
    "others scaled to one size": "pcb:ratio=0.1,agree=normed",
    "size alone": "pcb:ratio=0.1,use=size", "agreement alone": "pcb:ratio=0.1,use=agreement",
}  # fmt: skip
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.5, 2.0)
LRS = (1e-4, 4e-4)

RULE = """\
The metric of a method on a seed is the mean over the four tasks of test accuracy over the test accuracy of the task's own
fine-tuned model, times 100. Each method's scale comes from one grid of 10, by the same mean on 300 dev rows of each task. d is
PCB - the better of task arithmetic and TIES (the better one in mean over seeds), with a 95% Student t interval over 5 seeds.
"reproduced" if the lower bound of d is above 0; "not reproduced" if the mean of d is 0 or less; "inconclusive" otherwise.
"""


def run(ctx: Context) -> Raw:
    """The rate chosen on the first seed's dev rows, then every seed: four fine-tunings and all merges."""
    from tunesmith.study.worlds.pictures import Size, chosen_rate, when_asked

    steps, scales = (4, SCALES[::4]) if ctx.smoke else (120, SCALES)
    world = when_asked(ctx, TASKS, Size(epochs=6, train=2000, dev=300, test=800))
    lr, tuning = chosen_rate(ctx, world, TASKS, LRS, steps)
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "ablations": [], "singles": [], "tuning": tuning,
                "lr": lr}  # fmt: skip
    for i, seed in enumerate(ctx.seeds):
        methods = {**METHODS, **(ABLATIONS if i == 0 else {})}
        key = {"seed": seed, "lr": lr, "methods": sorted(methods)}
        found = ctx.cell(key, lambda s=seed, m=methods: one_seed(world, s, lr, steps, m, scales))
        for arm in ARMS:
            raw["arms"][arm].append({"seed": seed, **found["methods"][arm]})
        raw["ablations"] += [{"name": n, **found["methods"][n]} for n in methods if n in ABLATIONS]
        raw["singles"].append({"seed": seed, "test": found["singles"], "base": found["base"]})
        ctx.progress(i + 1, len(ctx.seeds))
        ctx.log(f"seed {seed}: " + ", ".join(f"{arm} {found['methods'][arm]['metric']:.1f}" for arm in ARMS))
    return raw


def one_seed(
    world: Any, seed: int, lr: float, steps: int, methods: Mapping[str, str], scales: Sequence[float]
) -> dict[str, Any]:
    """Tune every task, choose each method's scale on dev rows, report on test rows."""
    from statistics import mean

    from tunesmith.compose.merge import merge
    from tunesmith.study.worlds.probed import shares

    worlds = [world(name, seed) for name in TASKS]
    deltas = [w.tuned(lr, steps, seed) for w in worlds]
    base = worlds[0].base
    singles: dict[str, list[float]] = {"dev": [], "test": []}
    for w, delta in zip(worlds, deltas, strict=True):
        with base.using(delta):
            for split, found in singles.items():
                found.append(w.score(split).metric)
    out: dict[str, Any] = {}
    for name, method in methods.items():
        whole = merge(base, deltas, method, seed=seed)
        trials = [100 * mean(shares(worlds, _scaled(base, whole, s), singles["dev"], "dev")) for s in scales]
        scale = scales[max(range(len(scales)), key=lambda i: (trials[i], -i))]
        each = shares(worlds, _scaled(base, whole, scale), singles["test"], "test")
        out[name] = {
            "metric": 100 * mean(each),
            "tasks": [100 * e for e in each],
            "scale": scale,
            "dev": max(trials),
            "trials": trials,
        }
    return {"methods": out, "singles": singles["test"], "base": shares(worlds, None, singles["test"], "test")}


def _scaled(base: Any, delta: Any, s: float) -> Any:
    from tunesmith.compose.merge import scale

    return scale(base, delta, s)


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def of(arm: str) -> list[float]:
        return [row["metric"] for row in sorted(raw["arms"][arm], key=lambda row: row["seed"])]

    statistics: dict[str, Any] = {arm: mean(of(arm)) for arm in ARMS}
    best = max((TA, TIES), key=lambda arm: statistics[arm])
    reasons: list[str] = []
    for other in (TA, TIES):
        t = paired_t([a - b for a, b in zip(of(PCB), of(other), strict=True)])
        statistics[f"{PCB} - {other}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        reasons.append(f"PCB - {other} {t.mean:+.2f} [{t.low:+.2f}, {t.high:+.2f}] points of normalised accuracy")
    reasons.append(f"the better of the two others is {best}")
    statistics["ablations"] = {row["name"]: row["metric"] for row in raw["ablations"]}
    d = statistics[f"{PCB} - {best}"]
    label = "reproduced" if d["low"] > 0 else "not reproduced" if d["mean"] <= 0 else "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=52,
    slug="pcb-merging",
    paper="Parameter Competition Balancing for Model Merging, NeurIPS 2024, arXiv 2410.02396",
    claim="Weighing every entry of every task's change by its size within the task and its agreement with the others merges "
    "tasks better than task arithmetic and TIES.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("mnist_10k", "cifar10", "omniglot"),
    minutes=15,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "A tiny ViT (4 blocks, 128 wide, patches of 7) pre-trained here on 14,000 pictures instead of CLIP, T5 and LLaMA.",
        "The head of each task is a linear probe on the base's features and stays fixed while the backbone is tuned, as CLIP's "
        "are; the card keeps heads that were tuned too.",
        "The class token and the position table are not tuned: deltas change layers only.",
        "Scores of size or agreement alone, other ratios and the form of the vision script are measured on the first seed.",
    ),
)
