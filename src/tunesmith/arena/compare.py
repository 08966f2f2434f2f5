# SPDX-License-Identifier: Apache-2.0
"""Compare methods on one set of data under one budget: resumable trials, one table, one picture, a recommendation."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.arena import judge
from tunesmith.arena.budget import Plan, Timing, check_equal, next_rate, parse_seconds, plan
from tunesmith.arena.candidates import Candidate, LeftOut, gather
from tunesmith.arena.executors import Executor, InProcess, Place, Ray, arena_at
from tunesmith.arena.pareto import front
from tunesmith.arena.report import FORMAT, write
from tunesmith.arena.trials import TIMED_STEPS, Arena, Splits, Trial, failed, split
from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.errors import TrainingError, UsageError
from tunesmith.data import Dataset, read
from tunesmith.evaluate.stats import paired_t
from tunesmith.models.open import load
from tunesmith.study.cells import Cells, canonical
from tunesmith.study.run import environment
from tunesmith.train.config import TrainConfig
from tunesmith.train.runs import now, root

Say = Callable[[str], None]


@dataclass
class _Job:
    """One comparison under way."""

    arena: Arena
    candidates: list[Candidate]
    left: list[LeftOut]
    cells: Cells
    executor: Executor
    say: Say
    matched: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    plan: Plan | None = None

    def results(self, trials: Sequence[Trial], stage: str) -> list[tuple[Trial, dict[str, Any]]]:
        """Trials with their results, those that are on disk from there, the others run and written down one by one."""
        todo = [t for t in trials if not self.cells.has(t.key)]
        found = {canonical(t.key): self.cells.get(t.key, dict) for t in trials if self.cells.has(t.key)}
        began = time.perf_counter()
        for n, (trial, result) in enumerate(self.executor.run(todo), 1):
            ended = time.perf_counter()
            found[canonical(trial.key)] = self.cells.get(trial.key, lambda result=result: result, took=ended - began)
            self.say(f"{stage} {len(trials) - len(todo) + n}/{len(trials)}: {_told(trial, result)}")
            began = time.perf_counter()
        return [(t, found[canonical(t.key)]) for t in trials]


def _told(trial: Trial, found: Mapping[str, Any]) -> str:
    head = f"{trial.label}, lr {trial.lr:g}, seed {trial.seed}"
    if failed(found):
        return f"{head}: {found['failed']}"
    shown = [f"{k} {found[k]:.4g}" for k in ("step", "dev", "test", "retention") if isinstance(found.get(k), float)]
    return f"{head}, {trial.steps} steps: {', '.join(shown)}"


def run_compare(
    base: Base | str,
    data: Any,
    *,
    methods: str | Sequence[Any] = "all",
    budget: str | float = "10m",
    equal: str = "time",
    test: Any = None,
    dev: Any = None,
    shots: int | None = None,
    seeds: int = 3,
    lrs: int | Sequence[float] = 3,
    parameters: int | None = None,
    dev_rows: int = 200,
    test_rows: int = 500,
    system: str | None = None,
    metric: str | None = None,
    out: str | Path | None = None,
    workers: int = 1,
    fresh: bool = False,
    on_error: str = "raise",
    say: Say = lambda text: None,
    **settings: Any,
) -> dict[str, Any]:
    """Compare `methods` on `data` and write `compare.json`, `table.md` and `picture.svg`; returns what the JSON holds.

    Args:
        methods: "all", a comma-separated text, or a list of names and methods; "head" is the new output layer alone.
        budget: wall-clock time of all trials, such as "10m".
        equal: what every method gets the same of: "time" (seconds of training), "parameters" or "memory" (its size
            option is set to match, and all take the same steps).
        test, dev: data to report on and to choose learning rates on; cut from `data` where not given, see `split`.
        shots: use so many training rows of each class.
        lrs: how many learning rates each method tries around its own, or the rates themselves, the same for all.
        parameters: what "parameters" matches to; default the first method's count.
        out: the folder; default one in the registry named by a digest of data, base and settings, so that the same
            command goes on where it stopped, and shows the result at once when it is finished. `fresh` starts over.
        workers: above 1, trials run on so many Ray workers.
        settings: fields of `TrainConfig`; `epochs` (default 10) caps the passes over the data.
    Raises UsageError for a budget that is too small (naming one that would do), and what data and base cause.
    """
    check_equal(equal)
    allowed = parse_seconds(budget)
    explicit = None if isinstance(lrs, int) else [float(x) for x in lrs]
    _check_counts(seeds, lrs if isinstance(lrs, int) else len(lrs), explicit, workers)
    config = TrainConfig.build({"epochs": 10.0, "warmup": 0.1, "overflow": "skip", "max_length": 512, **settings})
    splits = _splits(data, test, dev, shots, dev_rows, test_rows, on_error)
    if splits.train.kind not in ("chat", "text") and "overflow" not in settings:
        config = TrainConfig.build({**config.to_dict(), "overflow": "truncate"})
    here = load(base)
    arena = Arena(here, splits, config, system=system, metric=metric)
    candidates, left, matched = gather(
        here, methods, has_head=arena.has_head, equal=equal, parameters=parameters
    )  # fmt: skip
    bound = {
        "data": splits.digest, "base": here.fingerprint.digest, "config": config.digest, "system": system,
        "metric": metric,
        "methods": [[c.label, c.options] for c in candidates], "budget": allowed, "equal": equal, "seeds": seeds,
        "lrs": explicit or lrs, "workers": workers,
    }  # fmt: skip
    folder = Path(out) if out is not None else root() / _name(splits, bound)
    path = folder / "trials.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
        (folder / "compare.json").unlink(missing_ok=True)
    cells = Cells(path, bound)
    executor: Executor = InProcess(arena)
    if workers > 1:
        executor = Ray(functools.partial(arena_at, Place.of(here), splits, config, system, metric), workers)
    job = _Job(arena, candidates, left, cells, executor, say, matched, list(splits.notes))
    try:
        result = _run(job, allowed, equal, seeds, explicit, lrs if isinstance(lrs, int) else len(lrs), config)
    finally:
        executor.close()
    result = {**result, "command_settings": bound, "minutes": round(cells.seconds / 60, 2)}
    write(result, folder)
    return {**result, "folder": str(folder)}


def _check_counts(seeds: int, rates: int, explicit: Sequence[float] | None, workers: int) -> None:
    for name, value in (("seeds", seeds), ("lrs", rates), ("workers", workers)):
        if value < 1:
            raise UsageError(f"must be at least 1, got {value}", where=name)
    if explicit is not None and (len(set(explicit)) != len(explicit) or not all(0 < x < 1e6 for x in explicit)):
        raise UsageError(f"must be rates above 0 without repeats, got {explicit}", where="lrs")


def _splits(data: Any, test: Any, dev: Any, shots: int | None, dev_rows: int, test_rows: int, on_error: str) -> Splits:
    def opened(source: Any, labels: list[str] | None) -> Dataset | None:
        if source is None or isinstance(source, Dataset):
            return source
        return read(source, on_error=on_error, labels=labels)  # type: ignore[arg-type]

    whole = opened(data, None)
    assert whole is not None
    rest = [opened(source, whole.labels) for source in (test, dev)]
    return split(whole, rest[0], rest[1], shots=shots, dev_rows=dev_rows, test_rows=test_rows)


def _name(splits: Splits, bound: Mapping[str, Any]) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(splits.train.report.path or "data").name.split(".")[0]).strip("-.")
    digest = hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()
    return f"compare-{stem or 'data'}-{digest[:8]}"


# The stages


def _run(
    job: _Job, allowed: float, equal: str, seeds: int, explicit: list[float] | None, rates: int, config: TrainConfig
) -> dict[str, Any]:
    yard = job.arena.yard
    job.say(f"{len(job.candidates)} methods, {len(job.left)} left out; {len(job.arena.splits.train)} training rows, "
            f"{len(yard.dev)} dev, {len(yard.test)} test")  # fmt: skip
    untrained = job.cells.get({"control": "base"}, lambda: _base(job.arena))
    timings, control = _timed(job, explicit)
    most = job.arena.steps_of(config.epochs)
    # The plan is kept: a resumed run must not make another from what is left of the time.
    lanes = job.executor.lanes(len(timings))
    made = job.cells.get(
        {"plan": sorted(timings)},
        lambda: plan(
            timings,
            allowed - job.cells.seconds,
            equal=equal,
            rates=rates,
            seeds=seeds,
            most=most,
            control=control,
            spent=job.cells.seconds,
            lanes=lanes,
        ).to_dict(),
    )
    job.plan = Plan(**made)
    job.notes += job.plan.notes
    if min(job.plan.steps.values()) == most:
        job.notes.append(f"every method reached the cap of {config.epochs:g} passes over the data ({most} steps)")
    chosen = _tuned(job, explicit)
    finals = _finals(job, chosen, allowed)
    return _judged(job, chosen, finals, untrained, equal, config, allowed)


def _base(arena: Arena) -> dict[str, Any]:
    """The untrained base and the constant answer, and what retention is measured against."""
    yard = arena.yard
    why = yard.answers()
    found = None if why else yard.score("test")
    fixed = yard.constant()
    return {
        "base": {"reason": why} if found is None else {"test": found.value, "rows": found.rows},
        "constant": None if fixed is None else {"test": fixed.value, "rows": fixed.rows},
        "retention": yard.retention(),
    }


def _timed(job: _Job, explicit: list[float] | None) -> tuple[dict[str, Timing], float]:
    """Seconds of every method, and of the controls' looks. A method that fails is left out with its reason."""
    trials = [
        Trial(c.label, c.method, min(explicit) if explicit else c.recipe_lr, 0, TIMED_STEPS, "time")
        for c in job.candidates
    ]
    looks = job.cells.get({"warm": "final look / dev look"}, lambda: job.executor.warm(trials))
    timings: dict[str, Timing] = {}
    for trial, found in job.results(trials, "timing"):
        if failed(found):
            job.left.append(LeftOut(trial.label, found["failed"]))
        else:
            timings[trial.label] = Timing(found["start"], found["step"], found["dev"], looks * found["dev"])
    job.candidates = [c for c in job.candidates if c.label in timings]
    if not timings:
        raise TrainingError("no method could be trained on this data", hint="; ".join(x.reason for x in job.left))
    return timings, 2 * max(t.test for t in timings.values())


def _tuned(job: _Job, explicit: list[float] | None) -> dict[str, dict[str, Any]]:
    """For each method the rate with the best dev score on the first seed; one that always fails is left out.

    All methods have the same number of trials, in rounds, so that each can go where its last ones pointed.
    """
    assert job.plan is not None
    higher = job.arena.yard.for_dev.higher_is_better
    tried: dict[str, dict[float, dict[str, Any]]] = {c.label: {} for c in job.candidates}
    for n in range(job.plan.rates):
        trials = []
        for c in job.candidates:
            scores = {lr: r.get("dev") for lr, r in tried[c.label].items()}
            lr = explicit[n] if explicit else next_rate(scores, c.recipe_lr, higher_is_better=higher)
            trials.append(Trial(c.label, c.method, lr, 0, job.plan.steps[c.label]))
        for trial, result in job.results(trials, f"learning rates, round {n + 1} of {job.plan.rates}:"):
            tried[trial.label][trial.lr] = result
    sign = 1 if higher else -1
    chosen: dict[str, dict[str, Any]] = {}
    for c in job.candidates:
        mine = sorted(tried[c.label].items())
        good = [(lr, r) for lr, r in mine if not failed(r)]
        if not good:
            job.left.append(LeftOut(c.label, f"every learning rate failed: {mine[0][1]['failed']}"))
            continue
        lr, best = max(good, key=lambda pair: (sign * pair[1]["dev"], -pair[0]))
        listed = [{"lr": lr_, "dev": r.get("dev"), "failed": r.get("failed")} for lr_, r in mine]
        at_end = len(mine) > 1 and lr in (mine[0][0], mine[-1][0])
        chosen[c.label] = {"lr": lr, "trials": listed, "facts": best, "at_the_edge": at_end}
    job.candidates = [c for c in job.candidates if c.label in chosen]
    if not chosen:
        raise TrainingError("every method failed at every learning rate", hint="give smaller rates with --lrs")
    return chosen


def _finals(job: _Job, chosen: Mapping[str, dict[str, Any]], allowed: float) -> dict[str, list[dict[str, Any]]]:
    """Test scores seed by seed, all methods before the next seed, so that a stop for time is the same for all."""
    assert job.plan is not None
    out: dict[str, list[dict[str, Any]]] = {m: [] for m in chosen}
    for seed in range(job.plan.seeds):
        before = job.cells.seconds
        trials = [
            Trial(c.label, c.method, chosen[c.label]["lr"], seed, job.plan.steps[c.label], "final")
            for c in job.candidates
        ]
        for trial, found in job.results(trials, f"seed {seed},"):
            if failed(found):
                job.notes.append(f"{trial.label} failed on seed {seed}: {found['failed']}")
            else:
                out[trial.label].append({"seed": seed, **({} if seed else chosen[trial.label]["facts"]), **found})
        spent = job.cells.seconds
        if 1 < seed + 1 < job.plan.seeds and spent + (spent - before) > 1.1 * allowed:
            job.notes.append(
                f"stopped after {seed + 1} of {job.plan.seeds} seeds: the machine was slower than when timed"
            )
            break
    for c in list(job.candidates):
        if not out[c.label]:
            job.left.append(LeftOut(c.label, "it failed on every seed at its best learning rate"))
            del out[c.label]
    job.candidates = [c for c in job.candidates if c.label in out]
    if not out:
        raise TrainingError("every method failed on every seed")
    return out


def _judged(
    job: _Job, chosen: Mapping[str, Any], finals: Mapping[str, list[dict[str, Any]]], untrained: Mapping[str, Any],
    equal: str, config: TrainConfig, allowed: float,
) -> dict[str, Any]:  # fmt: skip
    yard, plan_ = job.arena.yard, job.plan
    assert plan_ is not None
    rule = yard.for_test
    sign = 1 if rule.higher_is_better else -1
    rows = [_row(c, chosen[c.label], finals[c.label], plan_) for c in job.candidates]
    scores = {m: [f["rows"] for f in found] for m, found in finals.items()}
    best = max(rows, key=lambda r: sign * r["target"]["mean"])["label"]
    versus = judge.against_best(scores, best, higher_is_better=rule.higher_is_better)
    on_front = front([(sign * r["target"]["mean"], r["retention"]["mean"]) for r in rows])
    for row, flag in zip(rows, on_front, strict=True):
        row["pareto"] = flag
        row["versus"] = vars(versus[row["label"]]) if row["label"] in versus else None
    rows.sort(key=lambda r: -sign * r["target"]["mean"])
    times = [r["seconds"] for r in rows]
    if equal == "time" and max(times) > 1.3 * min(times):
        job.notes.append(f"one training took from {min(times):.1f} to {max(times):.1f} s: timings were not exact")
    draft = judge.recommend(rows, [], rule.name, higher_is_better=rule.higher_is_better)
    controls = _controls(job, draft["method"], chosen, scores[draft["method"]], untrained)
    told = judge.recommend(rows, controls, rule.name, higher_is_better=rule.higher_is_better)
    train = job.arena.splits.train
    return {
        "format": FORMAT, "created": now(),
        "data": {
            "name": Path(train.report.path or "data").name, "kind": train.kind,
            "source": job.arena.splits.source, "digest": job.arena.splits.digest, "train": len(train),
            "dev": len(yard.dev), "test": len(yard.test),
            "classes": len(train.labels or []) or None,
        },
        "base": {
            "name": job.arena.base.source.get("name", job.arena.base.name), "family": job.arena.base.family,
            "fingerprint": job.arena.base.fingerprint.digest,
            "parameters": sum(p.numel() for p in job.arena.base.model.parameters()),
        },
        "target": {"metric": rule.name, "higher_is_better": rule.higher_is_better},
        "retention": {"measure": yard.retention_name},
        "equal": equal, "matched": job.matched, "budget_seconds": allowed, "plan": plan_.to_dict(),
        "config": {**config.to_dict(), "lr": None, "seed": None, "steps": None},
        "rows": rows, "controls": controls, "left_out": [vars(x) for x in job.left], "recommendation": told,
        "notes": job.notes, "environment": environment(),
    }  # fmt: skip


def _row(c: Candidate, choice: Mapping[str, Any], found: Sequence[Mapping[str, Any]], plan_: Plan) -> dict[str, Any]:
    with_facts = [f for f in found if "seconds" in f] or [choice["facts"]]
    return {
        "label": c.label, "method": "head" if c.method is None else methods.info_of(c.method).name,
        "options": {} if c.method is None else methods.config(c.method), "size": c.note,
        "lr": choice["lr"], "lr_trials": choice["trials"], "lr_at_the_edge": choice["at_the_edge"],
        "steps": plan_.steps[c.label], "target": _spread([f["test"] for f in found]),
        "retention": _spread([f["retention"] for f in found]), "seeds": [f["seed"] for f in found],
        "scores": [f["rows"] for f in found],
        "trainable": with_facts[0]["trainable"], "own_trainable": with_facts[0]["own_trainable"],
        "stored": with_facts[0]["stored"], "seconds": sum(f["seconds"] for f in with_facts) / len(with_facts),
        "peak_memory": max(f["peak_memory"] for f in with_facts),
    }  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with the t interval; unbounded (null) for one seed."""
    t = paired_t(values)
    return {"mean": t.mean, "low": t.low, "high": t.high, "values": list(values)}


def _controls(
    job: _Job, winner: str, chosen: Mapping[str, Any], scores: Sequence[Sequence[float]], untrained: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What should not help, each against the recommended method on the same rows."""
    assert job.plan is not None
    rule = job.arena.yard.for_test
    c = next(c for c in job.candidates if c.label == winner)
    trials = [
        Trial(winner, c.method, chosen[winner]["lr"], 0, job.plan.steps[winner], purpose)
        for purpose in ("shuffled", "random")
    ]
    if job.arena.splits.train.kind == "text":
        trials = trials[1:]  # plain text has no answers to shuffle
    found = job.results(trials, "controls")
    names = {"shuffled": f"{winner} on shuffled answers", "random": f"random delta of the size of {winner}"}
    named: list[tuple[str, Mapping[str, Any] | None]] = [
        ("untrained base", untrained["base"]), ("constant answer", untrained["constant"]),
        *((names[t.purpose], value) for t, value in found),
    ]  # fmt: skip
    out = []
    for name, value in named:
        if value is None:
            continue
        reason = value.get("reason") or value.get("failed")
        if reason:
            out.append({"name": name, "value": None, "reason": reason, "verdict": None})
            continue
        paired = judge.between([value["rows"]], scores, higher_is_better=rule.higher_is_better)
        verdict = "beaten" if paired.verdict == "win" and paired.p < judge.LEVEL else "not beaten"
        out.append(
            {
                "name": name, "value": value["test"], "retention": value.get("retention"), "p": paired.p,
                "difference": paired.difference, "low": paired.low, "high": paired.high, "verdict": verdict,
            }
        )  # fmt: skip
    return out
