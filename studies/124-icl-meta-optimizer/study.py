# SPDX-License-Identifier: Apache-2.0
"""Study 124: do demonstrations in the prompt move a model as training on them does?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

TRAINED, SHUFFLED, RANDOM, OTHER = "trained", "trained on shuffled labels", "random direction", "prompt of another task"
ARMS = (TRAINED, SHUFFLED, RANDOM, OTHER)
TASKS = ("sst2", "ag_news")
RATES = (1e-3, 1e-2, 1e-1)

RULE = """\
SimAOU is the mean over layers and 200 test queries of the cosine between what 16 demonstrations in the prompt change in the
normalised attention outputs at the last position and what a pass of SGD over keys and values on the same demonstrations changes in
them. Rec2FTP is the share of the queries mended by training that the prompt mends too; its chance value is the prompt's
accuracy on all queries that are wrong without either. Intervals are 95% Student t over 5 draws of demonstrations, by task.
The rate is the one with the best mean accuracy on validation queries over the draws, by task.
"reproduced" if on both tasks the lower bounds of SimAOU - SimAOU with labels shuffled in training and of SimAOU - SimAOU with a
random direction are above 0 and the mean of Rec2FTP - its chance value is above 0; "not reproduced" if on neither task the lower
bound of SimAOU - SimAOU with shuffled labels is above 0; "inconclusive" otherwise. A draw in which training mends no query has no
Rec2FTP.
"""


@dataclass(frozen=True)
class Sizes:
    """Demonstrations, validation and test queries, tokens of a text."""

    shown: int = 16
    val: int = 60
    test: int = 200
    length: int = 24


SMOKE = Sizes(4, 8, 8, 8)


def run(ctx: Context) -> Raw:
    """Rates on validation queries of every draw, then every draw on test queries; one cell for each."""
    from . import prompts

    sizes = SMOKE if ctx.smoke else Sizes()
    base = None
    if not ctx.smoke:
        from tunesmith.models.open import load

        base = load(prompts.MODEL, dtype="fp32", device="cpu")
    worlds = {name: prompts.prompted(ctx, base, name, sizes.val, sizes.test, sizes.length) for name in TASKS}
    total, done = len(TASKS) * len(ctx.seeds) * (len(RATES) + 1), 0

    def cell(key: dict[str, Any], fn: Any) -> Any:
        nonlocal done
        found = ctx.cell(key, fn)
        done += 1
        ctx.progress(done, total)
        ctx.log(f"{key}: {found if isinstance(found, float) else found['accuracy']}")
        return found

    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "draws": [], "tuning": {}, "zsl": {}}
    for name, world in worlds.items():
        trials = {
            lr: [cell({"task": name, "seed": s, "lr": lr}, lambda w=world, s=s, lr=lr: _rate(w, sizes, s, lr))
                 for s in ctx.seeds]
            for lr in RATES
        }  # fmt: skip
        lr = max(RATES, key=lambda r: (sum(trials[r]), -r))
        raw["tuning"][name] = {"lr": lr, "trials": {str(r): v for r, v in trials.items()}}
        plain = world.seen(world.test)
        raw["zsl"][name] = 100 * plain.accuracy
        other = worlds[next(t for t in TASKS if t != name)]
        for s in ctx.seeds:
            found = cell(
                {"task": name, "seed": s}, lambda w=world, o=other, p=plain, s=s, lr=lr: _draw(w, o, p, sizes, s, lr)
            )
            raw["draws"].append({"task": name, "seed": s, **found})
    for s in ctx.seeds:
        for arm in ARMS:
            found = [row["sim"][arm] for row in raw["draws"] if row["seed"] == s]
            raw["arms"][arm].append({"seed": s, "metric": sum(found) / len(found)})
    return raw


def _rate(world: Any, sizes: Sizes, seed: int, lr: float) -> float:
    """Validation accuracy after training on a draw; 0 where it diverges."""
    return world.seen(world.val, world.tuned(world.drawn(sizes.shown, seed), lr, seed)).accuracy


def _draw(world: Any, other: Any, plain: Any, sizes: Sizes, seed: int, lr: float) -> dict[str, Any]:
    """Similarities, layer by layer too, accuracies in percent, Rec2FTP and its chance value of one draw."""
    from tunesmith.inspect.icl import compare

    shown = world.drawn(sizes.shown, seed)
    prompt = world.seen(world.test, prefix=world.prefix(shown))
    foreign = world.seen(world.test, prefix=other.prefix(other.drawn(sizes.shown, seed)))
    trained = world.seen(world.test, world.tuned(shown, lr, seed))
    wrong = world.seen(world.test, world.tuned(world.shuffled(shown, seed), lr, seed))
    right = {"zsl": plain.right, "icl": prompt.right, "ft": trained.right}
    found = compare(plain.states, prompt.states, trained.states, right, controls={SHUFFLED: wrong.states}, seed=seed)
    swapped = compare(plain.states, foreign.states, trained.states)
    values = found.values
    sim = {TRAINED: values["sim"], SHUFFLED: values[SHUFFLED], RANDOM: values["random"], OTHER: swapped.values["sim"]}
    answers = {"prompt": prompt, "trained": trained, "shuffled": wrong, "prompt of another task": foreign}
    return {
        "sim": sim, "rec2ftp": values["rec2ftp"], "chance": values["icl_on_wrong"],
        "mended": sum(b and not a for a, b in zip(plain.right, trained.right, strict=True)),
        "accuracy": {name: 100 * seen.accuracy for name, seen in answers.items()},
        "layers": [{"sim": r["sim"], "shuffled": r[SHUFFLED], "moved by the prompt": r["moved_icl"],
                    "moved by training": r["moved_ft"]} for r in found.rows],
    }  # fmt: skip


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    statistics: dict[str, Any] = {}
    reasons: list[str] = []
    holds, differs = True, []
    for task in dict.fromkeys(row["task"] for row in raw["draws"]):
        rows = sorted((row for row in raw["draws"] if row["task"] == task), key=lambda row: row["seed"])
        for arm in ARMS[1:]:
            t = paired_t([row["sim"][TRAINED] - row["sim"][arm] for row in rows])
            statistics[f"{task}: SimAOU - {arm}"] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
            if arm != OTHER:
                holds = holds and t.low > 0
            if arm == SHUFFLED:
                differs.append(t.low > 0)
                reasons.append(f"{task}: SimAOU - shuffled labels {t.mean:+.3f} [{t.low:+.3f}, {t.high:+.3f}]")
        known = [row["rec2ftp"] - row["chance"] for row in rows if row["rec2ftp"] is not None]
        if known:
            t = paired_t(known)
            low, high = (t.low, t.high) if t.n > 1 else (None, None)
            statistics[f"{task}: Rec2FTP - chance"] = {"mean": t.mean, "low": low, "high": high, "n": t.n}
            reasons.append(f"{task}: Rec2FTP - chance {t.mean:+.3f} over {t.n} draws")
        else:
            reasons.append(f"{task}: training mends no query")
        holds = holds and bool(known) and mean(known) > 0
        statistics[f"{task}: SimAOU"] = mean(row["sim"][TRAINED] for row in rows)
        statistics[f"{task}: accuracy without either"] = raw["zsl"][task]
        for name in rows[0]["accuracy"]:
            statistics[f"{task}: accuracy, {name}"] = mean(row["accuracy"][name] for row in rows)
    label = "reproduced" if holds else "inconclusive" if any(differs) else "not reproduced"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=124,
    slug="icl-meta-optimizer",
    paper="Why Can GPT Learn In-Context? Language Models Implicitly Perform Gradient Descent as Meta-Optimizers, Findings of ACL "
    "2023, arXiv 2212.10559",
    claim="Demonstrations in the prompt change attention outputs and answers as training keys and values on them does.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("sst2", "ag_news"),
    minutes=12,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(0, 1),
    deviations=(
        "SimAM and the order of attention to demonstrations are not measured; no verdict depends on them.",
        "Texts are cut to 24 tokens and have at least 6 words, so that 16 demonstrations and 200 queries take seconds.",
        "Queries follow demonstrations whose keys and values are computed once; it is the same as one long prompt.",
        "Training supervises the label word's first token among all tokens, one demonstration a step.",
        "World news is called politics; words and template are those of five variants under which validation queries are answered best.",
        "The control with shuffled labels has the rate that is chosen for true labels.",
    ),
)
