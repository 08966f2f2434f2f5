# SPDX-License-Identifier: Apache-2.0
"""Study 040: is Block-LoRA as good as LoRA of its nominal rank with less to train and compute, and what makes it so?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from tunesmith.core.delta import Delta
    from tunesmith.study.worlds.world import World

RANK = 8
LORA, BLOCK, COLLAPSED, EQUAL = "lora 8", "block 4", "lora 2 x4", "lora 5"
ARMS = (LORA, "block 2", BLOCK, "block 8", "lora 4", "lora 2", "lora 1", COLLAPSED, EQUAL)
LRS = (1e-3, 4e-3, 1.6e-2)
HEAD = 5e-3
MARGIN = -0.5

RULE = """\
Accuracies are in percent of the test rows, averaged over seven settings: digits with 1, 4 and 16 shots, letters with 1, 4 and
10, Banking77 with 5. A seed draws the shots, the first values and the order. d is block 4 - lora 8 by seed, with a 95%
Student t interval over the 5 seeds.
Competitive with fewer parameters: holds if the lower bound of d is above -0.5 points and block 4 trains fewer numbers;
reversed if the upper bound of d is below -0.5; open otherwise.
Less compute: holds if both the multiply-adds of the change and the median time of a training step (measured in turns) are
below those of lora 8; reversed otherwise.
Mechanism (ours, reported beside it): LoRA of rank r/n with n times the rate on B has the same A and the same sum of blocks to
within 1e-4 after a run from the same seed, for n = 2, 4, 8 in all three domains. If it holds, the method gets no credit
beyond it.
"reproduced" if both claims hold; "not reproduced" if one is reversed; "inconclusive" otherwise.
"""


@dataclass(frozen=True)
class Sizes:
    """Steps of a run, shots by domain, test pictures, sentences for choosing and testing, and timed rounds."""

    steps: int
    shots: Mapping[str, tuple[int, ...]]
    tune: int
    test: int
    sentences: tuple[int, int]
    rounds: int


FULL = Sizes(45, {"digits": (1, 4, 16), "letters": (1, 4, 10), "words": (5,)}, 4, 400, (154, 400), 15)
SMOKE = Sizes(3, {"digits": (1, 2), "letters": (1,), "words": (2,)}, 2, 20, (8, 16), 2)


def methods(arm: str, domain: str) -> list[Any]:
    """The method of an arm. The scale is 1 / sqrt(8) in all, so that ranks, blocks and rates are what differs."""
    from tunesmith.deltas import BlockLoRA, LoRA

    targets = "query,key,value" if domain == "words" else "*.attention.q,*.attention.k,*.attention.v"
    kind, size, *times = arm.split()
    if kind == "block":
        return [BlockLoRA(rank=RANK, blocks=int(size), alpha=1.0, targets=targets)]
    ratio = float(times[0].removeprefix("x")) if times else 1.0
    return [LoRA(rank=int(size), alpha=int(size) / RANK**0.5, lr_ratio=ratio, targets=targets)]


def trained(world: World, arm: str, domain: str, lr: float, steps: int, seed: int, **settings: Any) -> Any:
    """One run, without clipping: a norm over all blocks counts the same gradient several times."""
    from tunesmith.study.worlds.arms import train

    head = HEAD if domain == "words" else None
    return train(world, methods(arm, domain), lr=lr, head_lr=head, steps=steps, seed=seed, clip=1e9, **settings)


def gap(world: World, domain: str, n: int, steps: int) -> dict[str, float]:
    """How far Block-LoRA and its collapsed form are apart after a run in fp32: A, sum of blocks, and how far it moved."""
    block, plain = (
        trained(world, arm, domain, LRS[0], steps, 0, precision="fp32").delta.parts[0]
        for arm in (f"block {n}", f"lora {RANK // n} x{n}")
    )
    largest = {"A": 0.0, "B": 0.0, "moved": 0.0}
    for path in plain.kind_of:
        t, u = block.tensors(path), plain.tensors(path)
        B = t["B"].sum(0)
        for name, mine, other in (("A", t["A"], u["A"]), ("B", B, u["B"]), ("moved", B, 0 * B)):
            largest[name] = max(largest[name], float((mine - other).detach().abs().max()))
    return largest


def cost(world: World, deltas: Mapping[str, Delta], rounds: int) -> dict[str, Any]:
    """Seconds of a training step of each delta, the median over rounds taken in turns, and the numbers it trains."""
    import time
    from statistics import median

    import torch

    batch = world.task.batch(range(min(world.batch, len(world.task))), 0)
    seconds: dict[str, list[float]] = {arm: [] for arm in deltas}
    for turn in range(rounds + 2):
        for arm, delta in deltas.items():
            moving = [t for _, t in delta.items() if t.requires_grad]
            optimiser = torch.optim.AdamW(moving, lr=0.0)
            begun = time.perf_counter()
            with world.base.frozen(), world.base.using(delta):
                world.task.objective.loss(world.base, batch).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if turn >= 2:  # the first ones warm up
                seconds[arm].append(time.perf_counter() - begun)
    return {
        arm: {"seconds": median(seconds[arm]), "trainable": delta.trainable_parameters}
        for arm, delta in deltas.items()
    }  # fmt: skip


def multiply_adds(arm: str, d: int, k: int) -> int:
    """Multiply-adds of the change for one token of a layer [k, d] in the forward pass; blocks are summed once a batch."""
    kind, size, *_ = arm.split()
    rank = RANK // int(size) if kind == "block" else int(size)
    return rank * (d + k)


def run(ctx: Context) -> Raw:
    """Rates on the first seed at one number of shots per domain, then every arm in every setting on every seed."""
    from tunesmith.core.delta import Delta
    from tunesmith.core.errors import TrainingError
    from tunesmith.study.fair import choose_lr
    from tunesmith.study.worlds.text import few_shot

    from . import vision

    sizes, precision = (SMOKE, "fp32") if ctx.smoke else (FULL, "auto")
    folders = {name: ctx.data_folder(name) for name in ("cifar10", "mnist_10k", "omniglot")}
    encoder = None if ctx.smoke else vision.sentences()
    targets = {t.name: t for t in vision.build(folders, encoder, precision, sizes.test)}
    ctx.log("the picture model is aligned")
    kept: dict[Any, Any] = {}

    def world(domain: str, shots: int, seed: int) -> Any:
        if (domain, shots, seed) not in kept:
            kept.clear()
            if domain == "words":
                dev, test = sizes.sentences
                made: Any = few_shot(ctx, "banking77", shots, seed, dev=dev, test=test, general=4, base=encoder)
            else:
                made = targets[domain].few(shots, seed, 6, 32, precision)
            kept[domain, shots, seed] = made
        return kept[domain, shots, seed]

    def one(domain: str, shots: int, seed: int, arm: str, lr: float, split: str) -> Any:
        here = world(domain, shots, seed)
        try:
            out = trained(here, arm, domain, lr, sizes.steps, seed)
        except TrainingError:
            return None
        score = out.dev() if split == "dev" else out.test()
        return {"accuracy": 100 * score.metric, "trainable": out.trainable}

    def cell(domain: str, shots: int, seed: int, arm: str, lr: float, split: str) -> Any:
        key = {"domain": domain, "shots": shots, "seed": seed, "arm": arm, "lr": lr, "split": split}
        return ctx.cell(key, lambda: one(domain, shots, seed, arm, lr, split))

    first = ctx.seeds[0]
    tuning: dict[str, dict[str, Any]] = {}
    rates: dict[Any, float] = {}
    for domain, shots in sizes.shots.items():
        at = sizes.tune if sizes.tune in shots else shots[0]
        for arm in ARMS:

            def dev(lr: float, arm: str = arm, domain: str = domain, at: int = at) -> float:
                row = cell(domain, at, first, arm, lr, "dev")
                return float("nan") if row is None else float(row["accuracy"])

            choice = choose_lr(dev, LRS, lambda metric: metric)
            tuning.setdefault(domain, {})[arm], rates[domain, arm] = choice.as_json(), choice.lr
        ctx.log(f"{domain}: rates {[rates[domain, arm] for arm in ARMS]}")
    arms: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in ctx.seeds:
        found: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
        for domain, shots in sizes.shots.items():
            for k in shots:
                for arm in ARMS:
                    row = cell(domain, k, seed, arm, rates[domain, arm], "test")
                    if row is None:
                        raise TrainingError(f"{arm} diverges on {domain}, seed {seed}", hint="offer smaller rates")
                    found[arm][f"{domain} {k}"] = row["accuracy"]
        for arm in ARMS:
            arms[arm].append({"seed": seed, "metric": sum(found[arm].values()) / len(found[arm]), "by": found[arm]})
        ctx.progress(len(arms[LORA]), len(ctx.seeds))
        ctx.log(f"seed {seed}: " + ", ".join(f"{arm} {rows[-1]['metric']:.1f}" for arm, rows in arms.items()))
    mechanism = [
        {"domain": domain, "n": n, **ctx.cell({"mechanism": domain, "n": n}, lambda d=domain, k=n, s=shots[-1]: gap(
            world(d, s, first), d, k, sizes.steps))}
        for domain, shots in sizes.shots.items() for n in (2, 4, 8)
    ]  # fmt: skip

    def timed() -> Any:
        here = world("digits", sizes.shots["digits"][-1], first)
        deltas = {arm: Delta.create(here.base, *methods(arm, "digits"), name="d") for arm in ARMS}
        found = cost(here, deltas, sizes.rounds)
        width = here.base.model.vit.token.shape[-1]
        return {arm: {**row, "multiply_adds": multiply_adds(arm, width, width)} for arm, row in found.items()}

    return {"arms": arms, "tuning": tuning, "mechanism": mechanism, "cost": ctx.cell({"cost": 1}, timed)}


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    right = {arm: {row["seed"]: row["metric"] for row in rows} for arm, rows in raw["arms"].items()}
    statistics: dict[str, Any] = {}
    found = {}
    for arm in (a for a in raw["arms"] if a != BLOCK):
        t = paired_t([right[BLOCK][seed] - right[arm][seed] for seed in sorted(right[BLOCK])])
        statistics[f"{BLOCK} - {arm}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        found[arm] = t
    for setting in raw["arms"][LORA][0]["by"]:
        statistics[f"{setting}: {BLOCK}, {LORA}, {EQUAL}"] = [
            mean(row["by"][setting] for row in raw["arms"][arm]) for arm in (BLOCK, LORA, EQUAL)
        ]
    cost_ = raw["cost"]
    for what in ("trainable", "multiply_adds", "seconds"):
        statistics[f"{what}: {BLOCK}, {LORA}"] = [cost_[arm][what] for arm in (BLOCK, LORA)]
    less = {what: cost_[BLOCK][what] < cost_[LORA][what] for what in ("trainable", "multiply_adds", "seconds")}
    t = found[LORA]
    good = "holds" if t.low > MARGIN and less["trainable"] else "reversed" if t.high < MARGIN else "open"
    light = "holds" if less["multiply_adds"] and less["seconds"] else "reversed"
    apart = max(max(row["A"], row["B"]) for row in raw["mechanism"])
    same = apart < 1e-4 and min(row["moved"] for row in raw["mechanism"]) > 1e-3
    statistics["collapsed form: largest gap in the weights"] = apart
    statistics["mechanism"] = "holds" if same else "does not hold"
    statistics["claims: competitive, less compute"] = [good, light]
    reasons = [
        f"competitive {good}: block 4 - lora 8 is {t.mean:+.2f} [{t.low:+.2f}, {t.high:+.2f}] points",
        f"less compute {light}: a step takes {cost_[BLOCK]['seconds']:.4f} s, lora 8 {cost_[LORA]['seconds']:.4f} s",
        f"mechanism {'holds' if same else 'does not hold'}: the weights of the collapsed form differ by {apart:.1e} at most",
    ]
    claims = (good, light)
    label = "reproduced" if set(claims) == {"holds"} else "not reproduced" if "reversed" in claims else "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=40,
    slug="block-lora",
    paper="One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-Based Few-Shot Learning, arXiv 2501.16720",
    claim="LoRA cut into blocks that share the down-projection is as good as LoRA of the same nominal rank in few-shot "
    "learning, with fewer trained parameters and less computation.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("cifar10", "mnist_10k", "omniglot", "banking77", "ag_news"),
    minutes=17,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "A ViT of 6 layers, width 192 and 7x7 patches on 28x28 grey pictures, aligned for 12 epochs with MiniLM-L6 vectors of CIFAR-10 class "
        "names, instead of CLIP ViT-B/16; only the picture side is adapted.",
        "45 steps of up to 32 pictures for any number of shots instead of 500 times the shots, no dropout on the branch, no "
        "weight decay; rates 1e-3, 4e-3 and 1.6e-2 instead of 1e-4, 3e-4 and 1e-3.",
        "The scale is 1 / sqrt(8) in every arm, so that rank, blocks and rates are what differs.",
        "The rate is chosen on the first seed at 4 shots (Banking77: 5) for each arm and domain, on held-out rows of the pool.",
        "The collapsed form with n times the rate is an arm for n = 4; for n = 2 and 8 its weights are compared only.",
        "Gradients are not clipped: a common norm would count the blocks several times.",
        "20 Omniglot characters by a fixed draw, drawers 1 to 10 to learn from and 11 to 20 to test on.",
    ),
)
