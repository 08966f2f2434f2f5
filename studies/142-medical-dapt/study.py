# SPDX-License-Identifier: Apache-2.0
"""Study 142: do a shared prompt and missing intervals make adapted models without any gain look like progress?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from tunesmith.core.base import Base
    from tunesmith.core.delta import Delta
    from tunesmith.evaluate.grammar import Format, Shot

    from .tasks import Task, Tokenise

ARMS = ("dapt", "random", "shuffled")
SHOTS = (0, 3)
CONTROL_TASK = "sst2"
SHORTEST = 6

RULE = """\
A cell is one adapted model on one task with 0 or 3 shots; 12 adapted models without any task training have 8 cells each.
Prompts are chosen on 100 validation items among 8 formats, the first of equals. Scores are of 300 test items.
P1: each model has its own best format; a win is a 95% paired-bootstrap interval (10,000 resamples) of adapted - base
above 0. P2: both use the adapted model's best format. P3: as P1, any positive difference is a win. P4: as P2 and P3.
For each adapted model the share of its 8 cells that are wins is taken, in percent; differences of shares are paired over
the 12 models with a 95% Student t interval. The control is a delta fine-tuned on training items of SST-2 without shots.
"reproduced" if mean P4 - P1 is at least 10 points with an interval above 0, mean P2 > mean P1, mean P3 > mean P1, mean
P1 <= 10%, and P1 calls the control a win on SST-2 without shots. "not reproduced" if mean P4 - P1 is below 10 points or
its interval reaches 0, or mean P1 > 10%. "inconclusive" otherwise.
"""


@dataclass(frozen=True)
class Sizes:
    """Counts of one run; `blocks` is how many last blocks the twelve deltas change."""

    formats: int
    val: int
    test: int
    blocks: int
    steps: int
    batch: int
    control_steps: int
    control_batch: int


FULL = Sizes(formats=8, val=100, test=300, blocks=4, steps=40, batch=8, control_steps=150, control_batch=16)
SMOKE = Sizes(formats=2, val=6, test=10, blocks=2, steps=2, batch=2, control_steps=2, control_batch=2)


@dataclass
class World:
    """The base, tasks, formats and models; `models` are bases with one delta folded in, "base" is the base itself."""

    base: Base
    tokenise: Tokenise
    start: int
    tasks: dict[str, Task]
    formats: list[Format]
    texts: list[str]
    models: dict[str, nn.Module]


def build(ctx: Context, sizes: Sizes) -> World:
    """SmolLM2 and the shared data, or a tiny Llama and made-up texts in a smoke run."""
    from tunesmith.evaluate.grammar import sample_formats

    from . import adapt, tasks

    folders = {name: ctx.data_folder(name) for name in tasks.TASKS}
    if ctx.smoke:
        base = adapt.toy_base()
    else:
        import tunesmith as ts

        base = ts.load("smollm2-135m-instruct", dtype="fp32", device="cpu")
    made, texts = {}, []
    for name, folder in folders.items():
        if folder is None:
            splits = tasks.toy_splits(name, 40)
        else:
            splits = {s: tasks.read(folder, s) for s in {"train", "test", tasks.VALIDATION[name]}}
            if name == CONTROL_TASK:  # SST-2 trains on phrases of sentences too; the shortest say little
                splits["train"] = [r for r in splits["train"] if len(r["text"].split()) >= SHORTEST]
        n_train = sizes.control_steps * sizes.control_batch if name == CONTROL_TASK else 0
        made[name] = tasks.build(name, splits, n_train, sizes.val, sizes.test)
        if name == "ag_news":
            used = {s.question for s in (*made[name].shots, *made[name].val, *made[name].test)}
            plain = [" ".join(r["text"].split()) for r in splits["train"] if r["label"] in tasks.DOMAIN]
            texts = [t for t in plain if t not in used]
    tokenizer = base.tokenizer

    def tokenise(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    count = len(base.model.model.layers)  # type: ignore[union-attr, arg-type]
    formats = sample_formats(sizes.formats, seed=0)
    return World(base, tokenise, count - sizes.blocks, made, formats, texts, {"base": base.model})


def obtain(ctx: Context, base: Base, name: str, make: Callable[[], Delta]) -> Delta:
    """The delta `name`: trained once and kept beside the cells until the study is done, so a killed run continues."""
    from tunesmith.core.delta import Delta
    from tunesmith.core.errors import TrainingError

    folder = ctx.out / "deltas" / name
    fresh: list[Delta] = []

    def trained() -> str:
        fresh.append(make())
        fresh[0].save(folder)
        return fresh[0].digest

    digest = ctx.cell({"delta": name}, trained)
    delta = fresh[0] if fresh else Delta.load(folder, base) if folder.is_dir() else make()
    if delta.digest != digest:
        raise TrainingError(f"the delta {name} is not the one the finished cells were computed with", where=str(folder))
    return delta


def adapt_all(ctx: Context, world: World, sizes: Sizes) -> dict[str, str]:
    """Make the twelve deltas and the control, fold each into the base, and say which arm each belongs to."""
    from . import adapt

    base, tok = world.base, world.tokenise
    arm_of: dict[str, str] = {}

    def keep(name: str, make: Callable[[], Delta]) -> Delta:
        delta = obtain(ctx, base, name, make)
        world.models[name] = base.merged(delta).model
        arm_of[name] = name.rsplit("-", 1)[0]
        ctx.log(f"{name} is ready")
        return delta

    for seed in ctx.seeds:
        common = {"start": world.start, "seed": seed, "steps": sizes.steps, "batch": sizes.batch}
        plain = keep(
            f"dapt-{seed}", lambda c=common: adapt.pretrained(base, world.texts, tok, shuffle=False, **c)
        )  # fmt: skip
        keep(f"random-{seed}", lambda p=plain, s=seed: adapt.matched_random(base, p, s))
        keep(f"shuffled-{seed}", lambda c=common: adapt.pretrained(base, world.texts, tok, shuffle=True, **c))
    items = world.tasks[CONTROL_TASK].train
    keep(
        "control",
        lambda: adapt.control(base, items, world.formats[0], tok, steps=sizes.control_steps, batch=sizes.control_batch),
    )
    del arm_of["control"]
    return arm_of


def score(world: World, task: str, shots: int, format: int, items: list[Shot], models: list[str]) -> dict[str, str]:
    """Which items each model answers rightly, as bits. What the base's lower blocks give is shared by all but the control."""
    from . import protocols, split, tasks

    worked = world.tasks[task].shots if shots else []
    p = tasks.prompted(items, worked, world.formats[format], world.tokenise)
    out = {}
    for start, names in (
        (world.start, [m for m in models if m != "control"]),
        (0, [m for m in models if m == "control"]),
    ):
        if not names:
            continue
        prompts = split.lower(world.base.model if start else world.models[names[0]], start, p.prefix, p.own)
        for name in names:
            logits = split.option_logits(world.models[name], prompts, p.options)
            out[name] = protocols.to_bits(logits.argmax(-1).numpy() == p.answers)
    return out


def run(ctx: Context) -> Raw:
    """Make the deltas, score validation items under every format, then test items under the formats chosen."""
    import shutil

    from . import protocols

    sizes = SMOKE if ctx.smoke else FULL
    world = build(ctx, sizes)
    arm_of = adapt_all(ctx, world, sizes)
    val: dict[str, dict[str, str]] = {}
    test: dict[str, dict[str, str]] = {}
    places = [(t, k) for t in world.tasks for k in SHOTS]
    total, done = len(places) * sizes.formats * 2, 0

    def models(task: str) -> list[str]:
        return ["base", *arm_of, *(["control"] if task == CONTROL_TASK else [])]

    def step(text: str) -> None:
        nonlocal done
        done += 1
        ctx.progress(done, total)
        ctx.log(text)

    for task, k in places:
        for f in range(sizes.formats):
            key = {"val": task, "shots": k, "format": f}
            val[protocols.cell(task, k, f)] = ctx.cell(
                key, lambda t=task, k=k, f=f: score(world, t, k, f, world.tasks[t].val, models(t))
            )
            step(f"validation {task}, {k} shots, format {f}")
    for task, k in places:
        chosen = protocols.needed(val, task, k, models(task), asdict(sizes))
        total -= sizes.formats - len(chosen)
        for f, names in chosen.items():
            key = {"test": task, "shots": k, "format": f, "models": names}
            test[protocols.cell(task, k, f)] = ctx.cell(
                key, lambda t=task, k=k, f=f, n=names: score(world, t, k, f, world.tasks[t].test, n)
            )
            step(f"test {task}, {k} shots, format {f}, {len(names)} models")
    raw: Raw = {
        "arms": {arm: [] for arm in ARMS},
        "sizes": asdict(sizes),
        "tasks": list(world.tasks),
        "shots": list(SHOTS),
        "models": arm_of,
        "control_task": CONTROL_TASK,
        "formats": [asdict(f) for f in world.formats],
        "val": val,
        "test": test,
    }
    for name, arm in arm_of.items():
        found = protocols.shares(val, test, name, raw["tasks"], SHOTS, raw["sizes"])
        wins = {p: found[p] for p in protocols.PROTOCOLS}
        raw["arms"][arm].append({"seed": int(name.rsplit("-", 1)[1]), "metric": found["p4"] - found["p1"], **wins})
    shutil.rmtree(ctx.out / "deltas", ignore_errors=True)
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers: everything is recomputed from the bits."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    from . import protocols

    val, test, sizes = raw["val"], raw["test"], raw["sizes"]
    by_model = {m: protocols.shares(val, test, m, raw["tasks"], raw["shots"], sizes) for m in raw["models"]}
    share = {p: [found[p] for found in by_model.values()] for p in protocols.PROTOCOLS}
    statistics: dict[str, Any] = {}
    reasons: list[str] = []

    def interval(name: str, values: list[float]) -> Any:
        t = paired_t(values)
        statistics[name] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
        reasons.append(f"{name} {t.mean:.1f} [{t.low:.1f}, {t.high:.1f}]")
        return t

    both = interval("P4 - P1, points", [a - b for a, b in zip(share["p4"], share["p1"], strict=True)])
    for p in protocols.PROTOCOLS:
        interval(f"{p.upper()} wins, %", share[p])
    interval("P2 - P1, points", [a - b for a, b in zip(share["p2"], share["p1"], strict=True)])
    interval("P3 - P1, points", [a - b for a, b in zip(share["p3"], share["p1"], strict=True)])
    losses = [o["p1"]["outcome"] == "loss" for found in by_model.values() for o in found["cells"].values()]
    statistics["P1 losses, %"] = 100 * sum(losses) / len(losses)
    statistics["cells"] = len(losses)
    control = {k: protocols.judge(val, test, "control", raw["control_task"], k, sizes)["p1"] for k in raw["shots"]}
    for k, found in control.items():
        points = 100 * found["difference"]
        reasons.append(f"control, {k} shots: {points:+.1f} points, {found['outcome']}")
        statistics[f"control, {k} shots: difference in points"] = points
        statistics[f"control, {k} shots: outcome"] = found["outcome"]
    p1, p2, p3 = (mean(share[p]) for p in ("p1", "p2", "p3"))
    inflated = both.mean >= 10 and both.low > 0
    won = control[0]["outcome"] == "win"
    if inflated and p2 > p1 and p3 > p1 and p1 <= 10 and won:
        label = "reproduced"
    elif not inflated or p1 > 10:
        label = "not reproduced"
    else:
        label = "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=142,
    slug="medical-dapt",
    paper="Medical Adaptation of Large Language and Vision-Language Models: Are We Making Progress?, arXiv 2411.04118",
    claim="Choosing the prompt for the adapted model only, and ignoring sampling error, make adapted models without any "
    "gain look better than their base; a fair paired comparison does not.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("banking77", "ag_news", "sst2", "clinc150"),
    minutes=60,
    seeds=(0, 1, 2, 3),
    smoke_seeds=(0, 1),
    deviations=(
        "A protocol test with known truth on a 135-million-parameter chat model instead of 7B-70B medical models: twelve "
        "adapted models are made so that none has learned a task.",
        "The deltas change all linear layers of the last blocks only (LoRA, rank 8); the card does not fix the targets. "
        "What enters those blocks is then the same for all models and is computed once.",
        "The same 8 formats (the grammar's default and 7 sampled) serve every model; the paper samples them per model.",
        "One draw of three worked examples for each task instead of ten, no system prompt and no chat template.",
        "Only constrained decoding is scored (the letter of highest log-probability), not free text.",
        "Prefix and item are made tokens apart, for all models alike.",
        "The classes of AG News and SST-2 are offered in one order, intents in random order. The order was fixed after a pilot "
        "of the control with random order, on validation items, stayed at chance.",
        "AG News items of the task come from the official test split; the adaptation texts are training articles of the "
        "business and science classes, at most 96 tokens each, 40 steps of 8 articles.",
        "Random deltas have the norm of a continued-pre-training delta's change in every weight.",
        "The positive control is a LoRA of rank 16 on all blocks, trained on 2,400 training items of SST-2 (six words or more) "
        "without shots, in the first format only. Three pilots with all formats in turn stayed at chance on validation items; the fourth, in one format, reached 85 %.",
    ),
)
