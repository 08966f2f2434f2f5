# SPDX-License-Identifier: Apache-2.0
"""Study 049: is a Hadamard-updated weight (HUT) as good as LoRA at equal size, and does it compute less?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from tunesmith.study.worlds.arms import Outcome

ARMS = ("hut", "lora", "rank-1", "full")
TASKS = {"sst2": 1000, "clinc150-domains": 200, "banking77": 10}  # training rows of each class
RATES = {
    "hut": (1e-2, 3e-2, 1e-1),
    "lora": (1e-3, 3e-3, 1e-2),
    "rank-1": (1e-2, 3e-2, 1e-1),
    "full": (3e-5, 1e-4, 3e-4),
}
HEAD_RATE = 1e-2
RANK = 8
TOKENS = [32, 128, 288, 512, 2048, 8192]
WIDTH = 576

RULE = """\
Quality: accuracies are in percent of the test rows of SST-2, CLINC150 domains and Banking77. d is HUT - LoRA at rank 8 on
the same queries and values, one number for each task and seed (15), with a 95% Student t interval. Holds if its lower
bound is above -0.5; fails if its upper bound is below -0.5; open otherwise.
Computation: one 576 x 576 layer in fp32, x with a gradient. The counted forward cost of HUT must be below LoRA's at every
measured number of tokens above in * out / (in + out) = 288. Seconds are medians. Holds if the counts do so and HUT is
measured faster than LoRA at 2048 and at 8192 tokens, both in the forward pass and in forward and backward together; fails
if forward and backward together are slower at every number of tokens; open otherwise.
"reproduced" if both hold; "not reproduced" if one fails; "inconclusive" otherwise. The language task (SmolLM2, loss), the
correlation of W' with W and the agreement with PEFT's HiRA are reported beside it and decide nothing.
"""


def methods_of(arm: str) -> list[Any]:
    """The method of an arm, without the head that every arm has."""
    import tunesmith as ts

    return [
        {
            "hut": lambda: ts.HUT(rank=RANK),
            "lora": lambda: ts.LoRA(rank=RANK, alpha=float(RANK), targets="q,v"),
            "rank-1": lambda: ts.HUT(rank=1),
            "full": lambda: ts.Full(targets="all-linear"),
        }[arm]()
    ]


def correlation(out: Outcome) -> float:
    """Mean over the changed layers of the correlation of W' with W, for every arm on the q and v layers it changed."""
    import torch

    from tunesmith.core.delta import Delta

    part, base = out.delta.parts[0], out.world.base
    after = base.merged(Delta("adapted", [part])).modules
    found = []
    for path, kind in part.kind_of.items():
        W = base.sites.of(path, kind).params()["weight"].detach().float()
        both = torch.stack([W.flatten(), after[path].weight.detach().float().flatten()])
        found.append(float(torch.corrcoef(both)[0, 1]))
    return sum(found) / len(found)


def short(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A row of a sweep without its per-example scores."""
    kept = {k: row[k] for k in ("seed", "metric", "dev", "lr", "retention", "seconds", "trainable")}
    return {**kept, "correlation": row["extra"], **more}


def run(ctx: Context) -> Raw:
    """Every arm on every task and seed, the language task on three seeds, then the cost of a layer and PEFT's HiRA."""
    from tunesmith.data import collate
    from tunesmith.models.open import load
    from tunesmith.study.worlds.arms import sweep
    from tunesmith.study.worlds.language import gsm8k_top
    from tunesmith.study.worlds.text import MODEL, few_shot, toy_base

    from . import cost, twin

    steps, tasks = (3, dict(list(TASKS.items())[1:])) if ctx.smoke else (40, TASKS)
    rates = {arm: RATES[arm][: 2 if ctx.smoke else 3] for arm in ARMS}
    base = toy_base() if ctx.smoke else load(MODEL, dtype="fp32", device="cpu")
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "tuning": {}, "language": {}}
    for task, per_class in tasks.items():
        found = sweep(
            ctx,
            lambda seed, t=task, n=per_class: few_shot(ctx, t, n, seed, test=600, general=50, length=32, base=base),
            {f"{task}/{arm}": methods_of(arm) for arm in ARMS},
            lrs={f"{task}/{arm}": rates[arm] for arm in ARMS},
            steps=steps, head_lr=HEAD_RATE, extra=correlation,
        )  # fmt: skip
        for arm in ARMS:
            rows = [short(r, task=task) for r in found["arms"][f"{task}/{arm}"]]
            raw["arms"][arm] += [{**r, "metric": 100 * r["metric"]} for r in rows]
            raw["tuning"][f"{task}/{arm}"] = found["tuning"][f"{task}/{arm}"]
    world = gsm8k_top(ctx, blocks=2, train=300, dev=24, test=40, length=192, general=10)
    found = sweep(
        replace(ctx, seeds=ctx.seeds[:3]), world, {f"gsm8k/{arm}": methods_of(arm) for arm in ARMS},
        lrs={f"gsm8k/{arm}": rates[arm] for arm in ARMS}, steps=2 if ctx.smoke else 30, extra=correlation,
    )  # fmt: skip
    for arm in ARMS:
        raw["language"][arm] = [short(r) for r in found["arms"][f"gsm8k/{arm}"]]
        raw["tuning"][f"gsm8k/{arm}"] = found["tuning"][f"gsm8k/{arm}"]
    tokens, width, repeats = ([8, 16], 24, 2) if ctx.smoke else (TOKENS, WIDTH, 9)
    raw["cost"] = ctx.cell({"what": "cost"}, lambda: cost.measured(width, tokens, RANK, repeats))
    raw["crossover"] = cost.crossover(width, width)

    def against_peft() -> dict[str, Any]:
        task = few_shot(ctx, "clinc150-domains", 8, 0, length=32, base=base)
        batches = [collate(task.task.rows[i : i + 8], pad_id=task.pad) for i in range(0, 16 if ctx.smoke else 80, 8)]
        return twin.coincide(base, batches, RANK, 1e-2)

    raw["peft"] = ctx.cell({"what": "peft"}, against_peft)
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def scores(arm: str) -> dict[tuple[str, int], float]:
        return {(row["task"], row["seed"]): row["metric"] for row in raw["arms"][arm]}

    hut = scores("hut")
    statistics: dict[str, Any] = {}
    for arm in (a for a in raw["arms"] if a != "hut"):
        other = scores(arm)
        t = paired_t([hut[key] - other[key] for key in sorted(hut)])
        statistics[f"HUT - {arm}, points"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
    d = statistics["HUT - lora, points"]
    quality = "holds" if d["low"] > -0.5 else "fails" if d["high"] < -0.5 else "open"
    cost = {(row["arm"], row["tokens"]): row for row in raw["cost"]}
    tokens = sorted({row["tokens"] for row in raw["cost"]})

    def saved(kind: str, what: str, T: int) -> float:
        a, b = cost["hut", T][kind][what], cost["lora", T][kind][what]
        return 1 - a / b

    ways = ("forward", "forward and backward")
    counted = all(saved("counts", "forward", T) > 0 for T in tokens if raw["crossover"] < T)
    faster = all(saved("seconds", way, T) > 0 for way in ways for T in tokens[-2:])
    slower = all(saved("seconds", "forward and backward", T) < 0 for T in tokens)
    computation = "holds" if counted and faster else "fails" if slower else "open"
    for way in ways:
        for T in tokens:
            statistics[f"{way}, {T} tokens: share saved, counted"] = saved("counts", way, T)
            statistics[f"{way}, {T} tokens: share saved, measured"] = saved("seconds", way, T)
    for arm, rows in raw["language"].items():
        statistics[f"language loss, {arm}"] = mean(row["metric"] for row in rows)
    for arm, rows in raw["arms"].items():
        statistics[f"correlation of W' with W, {arm}"] = mean(row["correlation"] for row in rows)
    gap = raw["peft"]["gap"]
    statistics["largest gap to PEFT's HiRA while training"] = "not measured" if gap is None else gap
    reasons = [
        f"quality {quality}: HUT - LoRA {d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}] points over {d['n']} runs",
        f"computation {computation}: from {raw['crossover']:.0f} tokens on the counted forward cost is "
        f"{'below' if counted else 'not below'} LoRA's; measured share saved at {tokens[-1]} tokens "
        f"{saved('seconds', ways[0], tokens[-1]):+.0%} forward and {saved('seconds', ways[1], tokens[-1]):+.0%} with backward",
    ]
    both = (quality, computation)
    label = "not reproduced" if "fails" in both else "reproduced" if both == ("holds", "holds") else "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=49,
    slug="hut",
    paper="HUT: A More Computation Efficient Fine-Tuning Method With Hadamard Updated Transformation, arXiv 2409.13501",
    claim="Multiplying every entry of a weight by one plus an entry of a low-rank matrix is as good as LoRA with as many "
    "numbers, and computes less.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("sst2", "clinc150", "banking77", "gsm8k", "ag_news"),
    minutes=14,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "The paper's text was not available: the formula and first values are those of the card, which equal HiRA in PEFT.",
        "MiniLM-L6 and the top 2 of SmolLM2's 30 blocks instead of RoBERTa-large and GPT-2; 40 and 30 steps of batch 32 "
        "and 4.",
        "Banking77 has 10 training rows a class and the other tasks 2,000 rows, of which 1,280 are seen; 600 test rows.",
        "Rates from 1e-2 to 1e-1 for HUT and from 1e-3 to 1e-2 for LoRA instead of 1e-3 to 1e-2 and 1e-4 to 1e-3, because "
        "so few steps want larger ones; 3e-5 to 3e-4 for full fine-tuning. The grids were set on dev rows of another seed; "
        "each arm then tries its three on the dev rows of the first seed.",
        "The head has a rate of its own, 1e-2, in every arm, so that an arm with a larger rate gains nothing by its head.",
        "The IA3-like arm is HUT with r = 1 on queries and values, where IA3 scales keys, values and the MLP.",
        "The forward pass is timed on its own as well: HUT's saving is there, its backward needs a dense gradient.",
    ),
)
