# SPDX-License-Identifier: Apache-2.0
"""Study 096: does scaling a change by depth (LiNeS) forget less at equal target accuracy, and help merging?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

TASKS = ("digits-rotated", "things-inverted", "alphabets", "glyphs")
LINES, WISE = "lines", "uniform scaling"
MERGES = ("sum", "sum, lines", "ties", "ties, lines")
ARMS = (LINES, WISE, *MERGES)
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
STRENGTHS = tuple(i / 20 for i in range(21))
SUMS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
TIED = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5)
LRS = (1e-4, 4e-4)

RULE = """\
(a) For each of four tasks, its own change is scaled by depth with alpha .. 1, alpha from a grid of 11 by 2/3 target + 1/3
control accuracy on dev rows, control being the mean over the other three tasks under their heads for the base. The same change
scaled uniformly has the strength, of 21, whose target accuracy on dev is nearest to that; of equally near ones the smaller. The
control gain is the difference of control accuracies on test rows, in points, mean over the tasks, by seed; the target gap that
of target accuracies.
(b) Sums and TIES merges of the four changes, alone and with LiNeS, each with its coefficient from one grid of 10 on dev rows;
normalised accuracy is the mean over tasks of test accuracy over that of the task's own model, in percent.
Intervals are 95% Student t over 5 seeds. "reproduced" if the control gain is above 0 in its lower bound, the mean target gap is
at least -0.5 points, and the sum with LiNeS is above the sum in its lower bound; "not reproduced" if both means are 0 or less;
"inconclusive" otherwise.
"""


def run(ctx: Context) -> Raw:
    """The rate chosen on the first seed's dev rows, then every seed: four fine-tunings, their scalings and their merges."""
    from tunesmith.study.worlds.pictures import Size, chosen_rate, when_asked

    steps, stride = (4, 5) if ctx.smoke else (120, 1)
    world = when_asked(ctx, TASKS, Size(epochs=6, train=2000, dev=300, test=800))
    lr, tuning = chosen_rate(ctx, world, TASKS, LRS, steps)
    raw: Raw = {
        "arms": {arm: [] for arm in ARMS},
        "choices": [],
        "lr": lr,
        "tuning": tuning,
    }
    for i, seed in enumerate(ctx.seeds):
        found = ctx.cell({"seed": seed, "lr": lr}, lambda s=seed: one_seed(world, s, lr, steps, stride))
        for arm in ARMS:
            raw["arms"][arm].append({"seed": seed, **found["arms"][arm]})
        raw["choices"].append({"seed": seed, **found["choices"]})
        ctx.progress(i + 1, len(ctx.seeds))
        ctx.log(f"seed {seed}: " + ", ".join(f"{arm} {found['arms'][arm]['metric']:.1f}" for arm in ARMS))
    return raw


def one_seed(world: Callable[[str, int], Any], seed: int, lr: float, steps: int, stride: int) -> dict[str, Any]:
    """Every task tuned, its change scaled both ways, and all changes merged four ways."""
    from statistics import mean

    worlds = [world(name, seed) for name in TASKS]
    deltas = [w.tuned(lr, steps, seed) for w in worlds]
    singles = [{s: under(worlds, d, i, s) for s in ("dev", "test")} for i, d in enumerate(deltas)]
    rows = [forgetting(worlds, deltas[i], i, stride) for i in range(len(TASKS))]
    arms: dict[str, Any] = {}
    for arm in (LINES, WISE):
        kept = [row[arm] for row in rows]
        arms[arm] = {
            "metric": mean(r["control"] for r in kept),
            "target": mean(r["target"] for r in kept),
            "tasks": kept,
        }
    merged, chosen = merging(worlds, deltas, singles, stride)
    arms.update(merged)
    return {"arms": arms, "choices": {"merges": chosen, "singles": [100 * s["test"] for s in singles]}}


def under(worlds: Sequence[Any], delta: Any, i: int, split: str) -> float:
    """Accuracy of task `i` with `delta` in use, 0..1."""
    with worlds[i].base.using(delta):
        return worlds[i].score(split).metric


def both(worlds: Sequence[Any], delta: Any, i: int, split: str) -> tuple[float, float]:
    """Accuracy of the target `i` and the mean over the other tasks, in percent."""
    found = [100 * under(worlds, delta, j, split) for j in range(len(worlds))]
    others = [a for j, a in enumerate(found) if j != i]
    return found[i], sum(others) / len(others)


def forgetting(worlds: Sequence[Any], delta: Any, i: int, stride: int) -> dict[str, Any]:
    """The change of one task scaled by depth and uniformly, at dev target accuracies as near as can be."""
    from tunesmith.compose.merge import scale

    base = worlds[i].base

    def lines(a: float) -> Any:
        return scale(base, delta, depth="linear", start=a, end=1.0)

    tried = {a: both(worlds, lines(a), i, "dev") for a in ALPHAS[::stride]}
    alpha = max(tried, key=lambda a: (2 * tried[a][0] + tried[a][1], -a))
    aim = tried[alpha][0]
    targets = {s: 100 * under(worlds, delta.at(s), i, "dev") for s in STRENGTHS[::stride]}
    strength = min(targets, key=lambda s: (abs(targets[s] - aim), s))
    out = {}
    for arm, made, knob in ((LINES, lines(alpha), alpha), (WISE, delta.at(strength), strength)):
        target, control = both(worlds, made, i, "test")
        out[arm] = {"target": target, "control": control, "knob": knob}
    out["dev"] = {"alpha": [[a, *v] for a, v in tried.items()], "strength": list(targets.items())}
    return out


def merging(
    worlds: Sequence[Any], deltas: Sequence[Any], singles: Sequence[dict[str, float]], stride: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Four merges, each at the coefficient that is best on dev: normalised accuracy on test, and what was chosen."""
    from statistics import mean

    from tunesmith.compose.lines import Lines
    from tunesmith.compose.merge import merge, scale
    from tunesmith.study.worlds.probed import shares

    base = worlds[0].base
    plain = {"sum": merge(base, deltas, "task-arithmetic"), "ties": merge(base, deltas, "ties:density=0.2")}
    grids = {"sum": SUMS[::stride], "ties": TIED[::stride]}
    inner = {"sum": "task-arithmetic", "ties": "ties:density=0.2"}

    def made(name: str, c: float) -> Any:
        kind = name.partition(",")[0]
        if name == kind:
            return scale(base, plain[kind], c)
        return merge(base, deltas, Lines(of=inner[kind], beta=c))  # alpha from the norms

    out, chosen = {}, {}
    for name in MERGES:
        grid = grids[name.partition(",")[0]]
        trials = [100 * mean(shares(worlds, made(name, c), [s["dev"] for s in singles], "dev")) for c in grid]
        c = grid[max(range(len(grid)), key=lambda k: (trials[k], -k))]
        each = shares(worlds, made(name, c), [s["test"] for s in singles], "test")
        out[name] = {"metric": 100 * mean(each), "tasks": [100 * e for e in each]}
        chosen[name] = {"coefficient": c, "trials": trials}
    return out, chosen


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def of(arm: str, key: str = "metric") -> list[float]:
        return [row[key] for row in sorted(raw["arms"][arm], key=lambda row: row["seed"])]

    def gap(a: str, b: str, key: str = "metric") -> list[float]:
        return [x - y for x, y in zip(of(a, key), of(b, key), strict=True)]

    statistics: dict[str, Any] = {}
    pairs = {
        "control gain": gap(LINES, WISE), "sum, lines - sum": gap("sum, lines", "sum"),
        "ties, lines - ties": gap("ties, lines", "ties"),
    }  # fmt: skip
    reasons = []
    for name, values in pairs.items():
        t = paired_t(values)
        statistics[name] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        reasons.append(f"{name} {t.mean:+.2f} [{t.low:+.2f}, {t.high:+.2f}] points")
    target = mean(gap(LINES, WISE, "target"))
    statistics["target gap"] = target
    reasons.append(f"target accuracy of LiNeS less that of uniform scaling {target:+.2f} points")
    a, b = statistics["control gain"], statistics["sum, lines - sum"]
    holds = a["low"] > 0 and target >= -0.5 and b["low"] > 0
    label = "reproduced" if holds else "not reproduced" if a["mean"] <= 0 and b["mean"] <= 0 else "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=96,
    slug="lines",
    paper="LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging, ICLR 2025, arXiv 2410.17146",
    claim="Scaling a fine-tuned change down in shallow blocks and not in deep ones keeps the target task, forgets less than scaling "
    "all of it, and makes merges of several changes better.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("mnist_10k", "cifar10", "omniglot"),
    minutes=20,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "The tiny ViT (4 blocks) and the four picture tasks of study 052, as in the paper's kind of data; the card has MiniLM-L6 "
        "on four text sets, whose grids of scales take ten times as long.",
        "The class token and the position table are not tuned: deltas change layers only. The patch embedding gets alpha.",
        "Uniform scaling is matched to LiNeS on dev target accuracy; a target gap down to -0.5 points on test is allowed.",
    ),
)
