# SPDX-License-Identifier: Apache-2.0
"""Study 050: does hashed parameter sharing beat pruning at equal memory, stably, and is its map a good delta?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from .nets import Data, Shape

AT_INIT = ("random mask", "magnitude", "snip", "synflow")
BUDGETS = (0.1, 0.03, 0.01, 0.003)
HIGH = (0.03, 0.01, 0.003)
STDS = (0.001, 0.01, 0.1, 1.0)
DELTAS = ("hashed delta", "lora", "random sparse delta")
ARMS = ("ordinary net", "narrower net", *AT_INIT, "ltr", "roast", "stable-rps", *DELTAS)

DELTA_LRS = {"hashed delta": (1e-4, 1e-3), "lora": (1e-3, 1e-2), "random sparse delta": (1e-3, 1e-2)}


@dataclass(frozen=True)
class Setup:
    """What a smoke run has less of: widths, epochs, side of ROAST's tiles, rounds of SynFlow, rates, sizes of deltas, steps."""

    widths: tuple[int, int, int, int]
    epochs: int
    tile: int
    rounds: int
    lrs: tuple[float, ...]
    sizes: tuple[int, ...]
    steps: int


FULL = Setup((16, 32, 64, 128), 5, 16, 100, (0.01, 0.05, 0.2), (2304, 7680, 32256), 60)
SMOKE = Setup((4, 8, 8, 16), 1, 2, 5, (0.05, 0.2), (64,), 3)

RULE = """\
Accuracies are in percent of the 2,000 test images; a seed draws the first values, masks, hashes and the order. All arms
have the same number of stored weights at a budget s (a share of 98,192), biases apart. Intervals are 95 % Student t over
the 3 seeds.
(a) For each seed take the mean over s = 0.03, 0.01, 0.003. Reproduced if stable-rps is, in means, at least as good as every
pruning-at-init arm (random mask, magnitude, snip, synflow), and the interval of its difference to the best of them lies
above 0. Reversed if that interval lies below 0.
(b) stable-rps - ltr at s = 0.003: reproduced if the interval lies above 0, reversed if below.
(c) At s = 0.1 with init_std in {0.001, 0.01, 0.1, 1}, mean accuracies: reproduced if those of stable-rps span less than 1
point, those of roast more than 5, and stable-rps at s = 1 is within 0.3 points of the ordinary net. Reversed if stable-rps
spans more than roast, or is more than 1 point below the ordinary net at s = 1.
"reproduced" if all three are; "not reproduced" if any is reversed; "inconclusive" otherwise. The deltas on MiniLM are
reported and take no part.
"""


def data_of(ctx: Context) -> tuple[Data, Data, Data]:
    """Training, dev and test images; 1,000 of the 8,000 training images are for choosing rates."""
    import numpy as np
    import torch

    from .nets import Data

    folder = ctx.data_folder("mnist_10k")
    if folder is None:
        rng = np.random.default_rng(0)
        shapes = rng.integers(0, 255, size=(10, 28, 28))
        y = np.arange(200) % 10
        x = (shapes[y] * 0.7 + rng.integers(0, 76, size=(200, 28, 28))).astype(np.float32)
        parts = [(x[:120], y[:120]), (x[120:160], y[120:160]), (x[160:], y[160:])]
    else:
        with np.load(folder / "mnist_10k.npz") as file:
            x, y = file["X_train"], file["y_train"]
            parts = [(x[:7000], y[:7000]), (x[7000:], y[7000:]), (file["X_test"], file["y_test"])]
    made = [
        (torch.from_numpy(np.asarray(a, np.float32))[:, None] / 255, torch.from_numpy(np.asarray(b))) for a, b in parts
    ]
    train, dev, test = (Data((a - 0.13) / 0.31, b.long()) for a, b in made)
    return train, dev, test


def source_of(
    arm: str, shape: Shape, budget: float, seed: int, train: Data, setup: Setup, init_std: float = 0.04
) -> Any:
    """Where an arm's weights come from at a budget."""
    import torch

    from . import nets

    m = int(budget * shape.total)
    if arm == "narrower net":
        return nets.Plain(nets.first_values(nets.narrower(m), seed))
    if arm in ("roast", "stable-rps"):
        return nets.Shared(shape, m, seed, init_std, fold=arm == "stable-rps", tile=setup.tile)
    values = nets.first_values(shape, seed)
    if arm == "ordinary net":
        return nets.Plain(values)
    none = [torch.zeros(v.shape[0]) for v in values]
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:256]
    masks = {
        "random mask": lambda: nets.random_masks(shape, m, seed),
        "magnitude": lambda: nets.keep_largest([v.abs() for v in values], m),
        "snip": lambda: nets.snip(values, none, train.x[rows], train.y[rows], m),
        "synflow": lambda: nets.synflow(values, m, setup.rounds),
    }[arm]()
    return nets.Plain(values, masks)


def trained(source: Any, parts: tuple[Data, Data, Data], lr: float, seed: int, epochs: int) -> dict[str, float]:
    from . import nets

    biases = nets.fit(source, parts[0], lr=lr, epochs=epochs, batch=100, seed=seed)
    return {"dev": nets.accuracy(source, biases, parts[1]), "test": nets.accuracy(source, biases, parts[2])}


def rewound(shape: Shape, parts: tuple[Data, Data, Data], lr: float, seed: int, epochs: int) -> dict[str, Any]:
    """LTR: train all weights, keep the largest, go back to the values after the first epoch, train again; by budget."""
    from . import nets

    early: list[Any] = []
    source = nets.Plain(nets.first_values(shape, seed))
    nets.fit(source, parts[0], lr=lr, epochs=epochs, batch=100, seed=seed,
             on_epoch=lambda e, W, b: early.extend((W, b)) if e == 1 else None)  # fmt: skip
    out = {}
    for budget in BUDGETS:
        masks = nets.keep_largest([v.detach().abs() for v in source.values], int(budget * shape.total))
        again = nets.Plain(early[0], masks)
        biases = nets.fit(again, parts[0], lr=lr, epochs=epochs, batch=100, seed=seed, biases=early[1])
        out[str(budget)] = {
            "dev": nets.accuracy(again, biases, parts[1]),
            "test": nets.accuracy(again, biases, parts[2]),
        }
    return out


def run(ctx: Context) -> Raw:
    """The nets, the stability test and the deltas; one cell for each run. Rates are chosen on dev with the first seed."""
    from tunesmith.study.fair import choose_lr

    from . import nets

    setup = SMOKE if ctx.smoke else FULL
    shape, parts = nets.Shape(setup.widths), data_of(ctx)
    arms = ["narrower net", *AT_INIT, "ltr", "roast", "stable-rps"]
    raw: Raw = {"arms": {}, "budgets": {}, "full": {}, "stability": {}, "deltas": {}, "tuning": {}, "stored": {}}
    made: dict[Any, Any] = {}

    def cell(arm: str, budget: float, seed: int, lr: float, std: float = 0.04) -> dict[str, float]:
        key: dict[str, Any] = {"arm": arm, "seed": seed, "lr": lr}
        if arm != "ltr":
            key = {**key, "budget": budget, "init_std": std}
        at = tuple(key.values())
        if at in made:
            return made[at][str(budget)] if arm == "ltr" else made[at]  # type: ignore[no-any-return]
        if arm == "ltr":
            made[at] = ctx.cell(key, lambda: rewound(shape, parts, lr, seed, setup.epochs))
        else:
            source = lambda: source_of(arm, shape, budget, seed, parts[0], setup, std)  # noqa: E731
            made[at] = ctx.cell(key, lambda: trained(source(), parts, lr, seed, setup.epochs))
        found = made[at][str(budget)] if arm == "ltr" else made[at]
        ctx.log(f"{arm}, s {budget:g}, seed {seed}, lr {lr:g}, init_std {std:g}: dev {found['dev']:.1f} %")
        return found  # type: ignore[no-any-return]

    def chosen(arm: str, budget: float) -> float:
        choice = choose_lr(lambda lr: cell(arm, budget, ctx.seeds[0], lr)["dev"], setup.lrs, lambda v: v)
        raw["tuning"][f"{arm}, {budget:g}"] = choice.as_json()
        return choice.lr

    def rows(arm: str, budget: float, lr: float, std: float = 0.04) -> list[dict[str, Any]]:
        return [{"seed": s, "metric": cell(arm, budget, s, lr, std)["test"]} for s in ctx.seeds]

    for arm in arms:
        raw["budgets"][arm] = {str(b): rows(arm, b, chosen(arm, b)) for b in BUDGETS}
    raw["full"] = {arm: rows(arm, 1.0, chosen(arm, 1.0)) for arm in ("ordinary net", "stable-rps")}
    for arm in ("roast", "stable-rps"):
        lr = raw["tuning"][f"{arm}, 0.1"]["lr"]
        raw["stability"][arm] = {str(std): rows(arm, 0.1, lr, std) for std in STDS}
    for b in BUDGETS:
        m = int(b * shape.total)
        raw["stored"][str(b)] = {"budget": m, "narrower net": nets.narrower(m).total}
    raw["deltas"] = deltas(ctx, setup)
    for arm in arms:
        raw["arms"][arm] = _mean_rows([raw["budgets"][arm][str(b)] for b in HIGH])
    raw["arms"]["ordinary net"] = raw["full"]["ordinary net"]
    for arm in DELTAS:
        raw["arms"][arm] = _mean_rows([table[arm] for table in raw["deltas"].values()])
    return raw


def _mean_rows(tables: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"seed": r[0]["seed"], "metric": sum(x["metric"] for x in r) / len(r)} for r in zip(*tables, strict=True)]


def delta_methods(size: int, smoke: bool) -> dict[str, list[Any]]:
    """The three deltas of one size on MiniLM-L6; LoRA on value projections sets it, the others meet it."""
    import tunesmith as ts

    if smoke:
        return {"hashed delta": [ts.HashShared(budget=64)], "lora": [ts.LoRA(rank=1, targets="v")],
                "random sparse delta": [ts.SparseDelta(select="random", count=8)]}  # fmt: skip
    rank, layers = {2304: (1, "345"), 7680: (2, "12345"), 32256: (7, "012345")}[size]
    lora = ts.LoRA(rank=rank, alpha=2.0 * rank, targets=f"re:layer\\.[{layers}]\\.attention\\.self\\.value$")
    return {"hashed delta": [ts.HashShared(budget=size)], "lora": [lora],
            "random sparse delta": [ts.SparseDelta(select="random", count=round(size / 36))]}  # fmt: skip


def deltas(ctx: Context, setup: Setup) -> dict[str, Any]:
    """The same map as a delta: CLINC150 domains with MiniLM-L6, test accuracy in percent by size and arm."""
    from tunesmith.study.worlds.arms import sweep
    from tunesmith.study.worlds.text import few_shot

    out: dict[str, Any] = {}
    for size in setup.sizes:
        inner = _prefixed(ctx, size)
        found = sweep(
            inner, lambda seed: few_shot(ctx, "clinc150-domains", 40, seed, dev=200, test=600, general=40),
            delta_methods(size, ctx.smoke), lrs=DELTA_LRS, steps=setup.steps, head_lr=5e-3,
        )  # fmt: skip
        out[str(size)] = {
            arm: [{"seed": r["seed"], "metric": 100 * r["metric"], "trainable": r["trainable"], "cosine": r["retention"]["cosine"]}
                  for r in rows] for arm, rows in found["arms"].items()
        }  # fmt: skip
        out[str(size)]["tuning"] = found["tuning"]
    return out


def _prefixed(ctx: Context, size: int) -> Context:
    """The context with the size in every cell's key."""
    from dataclasses import replace

    class Keyed:
        def get(self, key: Mapping[str, Any], fn: Any) -> Any:
            return ctx.cells.get({"size": size, **key}, fn)

    return replace(ctx, cells=Keyed())  # type: ignore[arg-type]


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    def values(rows: list[dict[str, Any]]) -> list[float]:
        return [r["metric"] for r in sorted(rows, key=lambda r: r["seed"])]

    def pooled(arm: str) -> list[float]:
        return [mean(v) for v in zip(*(values(raw["budgets"][arm][str(b)]) for b in HIGH), strict=True)]

    statistics: dict[str, Any] = {}
    reasons: list[str] = []

    def compare(name: str, a: list[float], b: list[float]) -> Any:
        t = paired_t([x - y for x, y in zip(a, b, strict=True)])
        statistics[name] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        reasons.append(f"{name} {t.mean:+.2f} [{t.low:+.2f}, {t.high:+.2f}]")
        return t

    means = {arm: mean(pooled(arm)) for arm in AT_INIT}
    best = max(means, key=lambda arm: means[arm])
    a = compare(f"(a) stable-rps - {best} (best at init)", pooled("stable-rps"), pooled(best))
    at_least = mean(pooled("stable-rps")) >= max(means.values())
    smallest = {arm: values(raw["budgets"][arm]["0.003"]) for arm in ("stable-rps", "ltr")}
    b = compare("(b) stable-rps - ltr at 0.003", smallest["stable-rps"], smallest["ltr"])
    spans = {arm: [mean(values(rows)) for rows in raw["stability"][arm].values()] for arm in ("stable-rps", "roast")}
    span = {arm: max(v) - min(v) for arm, v in spans.items()}
    gap = mean(values(raw["full"]["stable-rps"])) - mean(values(raw["full"]["ordinary net"]))
    statistics.update({"span of stable-rps": span["stable-rps"], "span of roast": span["roast"], "gap at s = 1": gap})
    reasons.append(f"(c) spans {span['stable-rps']:.2f} and {span['roast']:.2f} (roast), gap at s = 1 {gap:+.2f}")
    for arm in raw["budgets"]:
        statistics[f"{arm}, by budget"] = {b_: mean(values(rows)) for b_, rows in raw["budgets"][arm].items()}
    claims = {
        "a": "reproduced" if a.low > 0 and at_least else "reversed" if a.high < 0 else "open",
        "b": "reproduced" if b.low > 0 else "reversed" if b.high < 0 else "open",
        "c": "reproduced" if span["stable-rps"] < 1 and span["roast"] > 5 and abs(gap) <= 0.3
        else "reversed" if span["stable-rps"] > span["roast"] or gap < -1 else "open",
    }  # fmt: skip
    statistics["claims"] = claims
    for size, table in raw["deltas"].items():
        shown = ", ".join(f"{arm} {mean(values(table[arm])):.1f} %" for arm in DELTAS)
        reasons.append(f"deltas of {size} numbers: {shown}")
    reversed_, all_ = "reversed" in claims.values(), set(claims.values()) == {"reproduced"}
    return Verdict("not reproduced" if reversed_ else "reproduced" if all_ else "inconclusive", reasons, statistics)


STUDY = Study(
    id=50,
    slug="stable-rps",
    paper="In defense of parameter sharing for model-compression, arXiv 2310.11611 (ICLR 2024)",
    claim="Reading all weights from one small hashed vector beats pruning at initialisation and, at the smallest budgets, "
    "pruning after training; with gradient scaling and the fold map it does not depend on the first values' spread and "
    "is the ordinary net at full budget.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("mnist_10k", "clinc150", "ag_news"),
    minutes=20,
    seeds=(0, 1, 2),
    smoke_seeds=(0, 1),
    deviations=(
        "A net of four convolutions and a linear layer (98,192 weights, no norms) on 7,000 MNIST images, 5 epochs instead of "
        "the card's 20, SGD with momentum 0.9 and two tenfold drops; no ResNet, no CIFAR.",
        "The budget 0.3, which no claim uses, is left out.",
        "Rates (0.01, 0.05, 0.2) are chosen for each arm and budget on 1,000 held-out images of the first seed.",
        "ROAST's tiles take their start from a hash of the tile's number, and its signs from the same hash as the other's.",
        "The second part: 60 steps on 40 sentences of each of the 10 CLINC150 domains; LoRA on value projections has 2,304, "
        "7,680 or 32,256 numbers and the other deltas are set to the same; two rates for each arm.",
    ),
)
