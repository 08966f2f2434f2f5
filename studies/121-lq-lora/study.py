# SPDX-License-Identifier: Apache-2.0
"""Study 121: does splitting weights into a quantised and a low-rank part (LQ-LoRA) beat a LoRA from zero below 3 bits?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from .parts import Whole

ARMS = ("qlora", "loftq", "lq-uniform", "lq-ilp", "lq-ilp-fisher")
TUNED_AT = "2.5"
LRS = (5e-4, 2e-3)

RULE = """\
All losses are mean next-token losses in nats; lower is better. The whole model is measured on 200 AG News items; the
fine-tuned upper blocks on 120 GSM8K test answers, a seed drawing first values and order. 2.5 bits are those of the uniform
format with 2 bits in blocks of 16, so that every arm may spend the same.
First component: on every seed, lq-ilp after fine-tuning at 2.5 bits is below qlora (NF codes and a LoRA from zero), and the
95% Student t interval of the difference over the 3 seeds is below 0. It reverses if the mean difference is above 0.
Second component: at 2.5 bits, before fine-tuning, lq-ilp is below lq-uniform on the items: the mean paired difference and
its 95% bootstrap interval are below 0. Third component: the same for lq-ilp-fisher against lq-ilp.
"reproduced" if all three hold; "not reproduced" if the first reverses; "inconclusive" otherwise.
"""


@dataclass(frozen=True)
class Sizes:
    """Counts and lengths of one run."""

    items: int
    sample: int
    rank: int
    rounds: int
    trial_rounds: int
    blocks: int
    train: int
    dev: int
    test: int
    steps: int


FULL = Sizes(items=200, sample=256, rank=16, rounds=6, trial_rounds=2, blocks=8, train=240, dev=48, test=120, steps=60)
SMOKE = Sizes(items=6, sample=3, rank=4, rounds=2, trial_rounds=1, blocks=2, train=12, dev=4, test=6, steps=3)


def needs(arm: str, label: str) -> str:
    """Arms without a programme are the same at budgets that give them the same format: one cell serves them."""
    from . import parts

    if arm.startswith("lq-ilp"):
        return label
    return next(other for other in parts.LABELS if parts.uniform(other) == parts.uniform(label))


def quality(ctx: Context, w: Whole) -> dict[str, Any]:
    """Loss on general text of every arm at every budget, before any fine-tuning."""
    from . import parts

    for fisher in (False, True):
        w.tables[fisher] = parts.table_of(
            ctx.cell({"part": "errors", "fisher": fisher}, lambda f=fisher: parts.measure_table(w, f))
        )
        ctx.log(f"errors of every matrix in every format, Fisher {fisher}")

    def one(arm: str, label: str) -> dict[str, Any]:
        fisher = arm.endswith("fisher")
        base, delta = parts.split(
            w.base, arm, label, w, fisher=w.fisher if fisher else None, table=w.tables[fisher]
        )  # fmt: skip
        return {"losses": parts.losses(w, base, delta), **parts.facts(base, delta)}

    out: dict[str, Any] = {
        "none": {"16": {"losses": ctx.cell({"part": "quality", "arm": "none"}, lambda: parts.losses(w, w.base, None))}}
    }
    cells: dict[tuple[str, str], Any] = {}
    for label in parts.LABELS:
        for arm in ARMS:
            key = (arm, needs(arm, label))
            if key not in cells:
                cells[key] = ctx.cell(
                    {"part": "quality", "arm": arm, "budget": key[1]}, lambda a=arm, b=key[1]: one(a, b)
                )
            out.setdefault(arm, {})[label] = cells[key]
            found = cells[key]["losses"]
            ctx.log(f"{arm} at {label} bits: {sum(found) / len(found):.4f} ({cells[key]['bits']:.3f} bits)")
    return out


def tuning(ctx: Context, w: Whole, sizes: Sizes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fine-tuned losses of every arm and seed at one budget, each at the rate that is best for it on dev."""
    from tunesmith.core.delta import Delta
    from tunesmith.study.fair import choose_lr
    from tunesmith.study.worlds import arms
    from tunesmith.study.worlds.language import gsm8k_top

    from . import parts

    made: dict[str, Any] = {}
    rows: dict[str, Any] = {arm: [] for arm in ARMS}
    choices: dict[str, Any] = {}

    def world() -> Any:
        if "world" not in made:
            made["world"] = gsm8k_top(
                ctx, blocks=sizes.blocks, train=sizes.train, dev=sizes.dev, test=sizes.test, length=192, general=0
            )
        return made["world"]

    def start(arm: str) -> Any:
        """The derived upper blocks of an arm and a function of the seed that gives their first delta."""
        if arm not in made:
            top, fisher = world(), arm.endswith("fisher")
            total = sum(s.kind == "block" for s in w.base.sites.all())
            table = parts.at_top(top, w.tables[fisher], sizes.blocks, total) if arm.startswith("lq-ilp") else None
            F = parts.at_top(top, w.fisher, sizes.blocks, total) if fisher else None
            base, delta = parts.split(top.base, arm, TUNED_AT, w, fisher=F, table=table)
            values = {k: t.detach().clone() for k, t in delta.items()}
            made[arm] = (base, delta.parts[0].method, values)
        return made[arm]

    def one(arm: str, seed: int, lr: float) -> dict[str, Any]:
        import torch

        base, method, values = start(arm)
        delta = Delta.create(base, method, name=arm, seed=seed)
        if arm != "qlora":  # the others start from the split, whatever the seed
            with torch.no_grad():
                for key, t in delta.items():
                    t.copy_(values[key])
        here = parts.on(world(), base)
        out = arms.train(here, [], lr=lr, steps=sizes.steps, seed=seed, start=delta, evaluate_at=(0,))
        dev, test = out.dev(), out.test()
        return {"dev": dev.metric, "metric": test.metric, "rows": test.rows, "before": out.curve[0][1].metric,
                "seconds": out.seconds, **parts.facts(base, delta)}  # fmt: skip

    first = ctx.seeds[0]
    for arm in ARMS:
        known: dict[tuple[int, float], Any] = {}

        def cell(seed: int, lr: float, arm: str = arm, known: dict[tuple[int, float], Any] = known) -> Any:
            if (seed, lr) not in known:
                key = {"part": "tune", "arm": arm, "seed": seed, "lr": lr}
                known[seed, lr] = ctx.cell(key, lambda: one(arm, seed, lr))
                ctx.log(f"{arm}, seed {seed}, lr {lr:g}: dev {known[seed, lr]['dev']:.4f}")
            return known[seed, lr]

        choice = choose_lr(lambda lr, cell=cell: cell(first, lr)["dev"], LRS, lambda m: m, higher_is_better=False)
        choices[arm] = choice.as_json()
        for seed in ctx.seeds:
            rows[arm].append({"seed": seed, "lr": choice.lr, **cell(seed, choice.lr)})
        made.pop(arm, None)
    return rows, choices


def run(ctx: Context) -> Raw:
    """Quality of the whole model at every budget, then fine-tuning of its upper blocks at 2.5 bits."""
    from . import parts

    sizes = SMOKE if ctx.smoke else FULL
    w = parts.whole(ctx, sizes.items, sizes.sample, sizes.rank, sizes.rounds, sizes.trial_rounds)
    found = quality(ctx, w)
    rows, choices = tuning(ctx, w, sizes)
    return {"quality": found, "arms": rows, "tuning": choices, "budgets": parts.BUDGETS, "tuned_at": TUNED_AT}


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_bootstrap, paired_t

    at = raw["tuned_at"]
    statistics: dict[str, Any] = {}
    reasons: list[str] = []

    def tuned(arm: str) -> list[float]:
        return [row["metric"] for row in sorted(raw["arms"][arm], key=lambda row: row["seed"])]

    gaps = [a - b for a, b in zip(tuned("lq-ilp"), tuned("qlora"), strict=True)]
    t = paired_t(gaps)
    statistics["fine-tuned, lq-ilp - qlora"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
    first = all(g < 0 for g in gaps) and t.high < 0
    reasons.append(f"fine-tuned at {at} bits, lq-ilp - qlora {t.mean:+.4f} [{t.low:+.4f}, {t.high:+.4f}]")

    def better(a: str, b: str, label: str) -> bool:
        p = paired_bootstrap(
            raw["quality"][b][label]["losses"], raw["quality"][a][label]["losses"], higher_is_better=False
        )
        statistics[f"{label} bits, {a} - {b}"] = {"mean": p.difference, "low": p.low, "high": p.high, "n": p.n}
        reasons.append(f"at {label} bits, {a} - {b} {p.difference:+.4f} [{p.low:+.4f}, {p.high:+.4f}]")
        return p.difference < 0 and p.high < 0

    second, third = better("lq-ilp", "lq-uniform", at), better("lq-ilp-fisher", "lq-ilp", at)
    for label in raw["budgets"]:
        if label != at:
            better("lq-ilp", "lq-uniform", label)
            better("lq-ilp-fisher", "lq-ilp", label)
        better("lq-ilp", "qlora", label)
    names = {"fine-tuning": first, "integer programme": second, "Fisher weights": third}
    statistics["components"] = {k: "holds" if v else "does not hold" for k, v in names.items()}
    for arm in raw["quality"]:
        statistics[f"loss, {arm}"] = {k: mean(v["losses"]) for k, v in raw["quality"][arm].items()}
    label = "reproduced" if all(names.values()) else "not reproduced" if t.mean > 0 else "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=121,
    slug="lq-lora",
    paper="LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning, arXiv 2311.12023",
    claim="Splitting each weight into a quantised and a low-rank part before fine-tuning, with bit widths chosen by an "
    "integer programme and errors weighted by Fisher information, beats a LoRA from zero on an NF-quantised model below "
    "3 bits.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("ag_news", "gsm8k"),
    minutes=30,
    seeds=(0, 1, 2),
    smoke_seeds=(0, 1),
    deviations=(
        "SmolLM2-135M-Instruct instead of RoBERTa and LLaMA-2 7B and 70B; rank 16 instead of 64. Its bundled weights were "
        "themselves stored in 8 bits.",
        "Weights are packed in the low bits and read back in every pass, where the card allows rounded floats.",
        "The grid is 2, 3 and 4 bits in blocks of 16 and 64, scales in 8 bits with a bf16 number for each 256 of them.",
        "Budgets are 2.504 (2 bits in blocks of 16), 2.75, 3 and 4.126 bits (4 bits in blocks of 64), so that at the first "
        "and the last a uniform format has the bits of the budget; the low-rank part comes on top and is the same for all.",
        "At most 6 rounds of the alternation (2 when formats are compared), where the paper has up to 100.",
        "Fisher weights from 256 AG News training items of at most 96 tokens, where the paper has 10,000 C4 texts; they are "
        "of the same kind as the 200 items of the test.",
        "Fine-tuning changes the upper 8 of 30 blocks, quantised at 2.5 bits by each arm, over lower blocks in full precision "
        "whose states are computed once; 60 steps of 4 rows instead of 100.",
        "The rate is chosen for each arm on the first seed, of two, on dev rows, and used for the other seeds.",
    ),
)
