# SPDX-License-Identifier: Apache-2.0
"""`tune`: data in, delta and receipt out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, bake
from tunesmith.core.effect import effect
from tunesmith.core.errors import Rejected, TrainingError, UsageError, nearest
from tunesmith.core.store import save
from tunesmith.data import Dataset, read
from tunesmith.evaluate.controls import random_delta, shuffled
from tunesmith.evaluate.gates import accepted, check, parse_require
from tunesmith.evaluate.receipt import Cost, Training
from tunesmith.evaluate.run import evaluate
from tunesmith.models.open import load, opened_as
from tunesmith.train.config import TrainConfig
from tunesmith.train.derived import derived_base, parted
from tunesmith.train.loop import Trained, fit
from tunesmith.train.prepare import Prepared, choose_methods, prepare
from tunesmith.train.processes import is_main
from tunesmith.train.runs import Run, new_folder, now, read_record, runs, unfinished, write_record
from tunesmith.train.sample import started
from tunesmith.train.tasks import LoaderTask, Task, inputs_of, moved

__all__ = ["Run", "resume", "runs", "tune"]

HELD_OUT = 0.1
# What run.json must hold for a run to be continued.
_RESUMED = (
    "model", "methods", "data", "config", "system", "metric", "receipt", "require", "controls", "panels", "tied",
    "on_error", "held_out",
)  # fmt: skip
CONTROLS = ("random", "shuffled")


def tune(
    base: Base | nn.Module | str,
    data: Any,
    *,
    method: Any = None,
    name: str | None = None,
    out: str | Path | None = None,
    validation: Any = None,
    test: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    system: str | None = None,
    metric: str | None = None,
    receipt: bool = True,
    require: str | None = None,
    controls: Sequence[str] = (),
    panels: Sequence[str] = ("retention", "safety"),
    score: Callable[[Base], float] | None = None,
    tied: str = "both",
    progress: bool = True,
    on_error: str = "raise",
    **settings: Any,
) -> Run:
    """Train a delta on `data` and prove what it changed.

    Args:
        base: a base, its name or folder, or any module.
        data: a path, list of rows, `Dataset` or `datasets.Dataset`; or, with `loss`, any iterable of batches.
        method: a method, its name with options (`"lora:rank=16"`), or a list of them; chosen by the base if None. A head
            is added where the data needs one. A recipe of a base that says what trains on it (`"lq-lora:rank=16"`, an
            instance of `ts.derive.LQ`) comes first: the derived base is kept in the run's folder.
        validation: data that picks the best state (every `evaluate_every` steps); test: data the receipt is measured on;
            without it a tenth of `data` is held out.
        loss: `loss(output, batch)`, the mean over rows; makes `data` an iterable of batches and needs no transformers.
            The model is called with the batch less its labels: a mapping's other keys, or the first of a tuple.
        require: gates such as "target>=0.8, retention<=1.05x"; the receipt says accept or reject.
        settings: fields of `TrainConfig` (`epochs`, `lr`, `batch_size`, `seed`, ...).
    Raises UsageError, DataError, TrainingError, ResourceError, Interrupted; see their messages. The base is left
    bit for bit as it was.
    """
    config = TrainConfig.build(settings)
    for wanted in controls:
        if wanted not in CONTROLS:
            raise UsageError(f"unknown control {wanted!r}", hint=nearest(wanted, CONTROLS))
    gates = parse_require(require) if require else []
    if loss is not None:
        unused = {"test": test, "system": system, "metric": metric, "require": require, "controls": controls}
        for key, value in unused.items():
            if value:
                hint = "a run with a loss of your own has no receipt; measure with score= or validation="
                raise UsageError("it cannot be used together with loss=", where=key, hint=hint)
        return _tune_loader(base, data, loss, method, name, out, validation, score, tied, progress, config)
    opened = load(base)
    dataset = _dataset(data, on_error)
    valid = None if validation is None else _dataset(validation, on_error, dataset.labels)
    tested = None if test is None else _dataset(test, on_error, dataset.labels)
    if receipt and tested is None:
        dataset, tested = dataset.split(HELD_OUT, seed=config.seed)
    prepared = prepare(opened, dataset, config, system=system)
    recipe, method = parted(method)
    label = recipe.info.name if recipe is not None else None
    chosen = [] if recipe is not None else choose_methods(opened, method, prepared)
    label = label or methods.info_of(chosen[0]).name
    folder = new_folder(name, out, f"{label}-{Path(dataset.report.path or 'data').stem}")
    if recipe is not None:
        opened, method = derived_base(opened, recipe, method, prepared, config, folder)
        chosen = choose_methods(opened, method, prepared)
    record = {
        "created": now(),
        "model": opened_as(opened) or opened.name,
        "task": opened.source.get("task"),
        "methods": [{"name": methods.info_of(m).name, "options": methods.config(m)} for m in chosen],
        "data": _described(dataset), "validation": _described(valid), "test": _described(tested),
        "held_out": test is None and receipt, "config": config.to_dict(), "system": system, "metric": metric,
        "receipt": receipt, "require": require, "controls": list(controls), "panels": list(panels), "tied": tied,
        "on_error": on_error, "score": score is not None, "finished": False,
    }  # fmt: skip
    _refuse_other(folder, record)
    write_record(folder, record)
    return _train(
        opened, chosen, prepared, dataset, valid, tested, config, folder, record, gates, progress, score=score,
        again=(folder / "checkpoint").exists(),
    )  # fmt: skip


def resume(folder: str | Path | None = None, *, progress: bool = True) -> Run:
    """Continue a run that was stopped (the newest unfinished one by default) to the losses it would have had.

    Raises UsageError when there is none, the data has changed, or the run was not given by names and paths.
    """
    where = Path(folder) if folder is not None else unfinished()
    record = read_record(where)
    if record.get("finished"):
        raise UsageError("this run is finished", where=str(where))
    missing = [k for k in _RESUMED if k not in record]
    if missing or not isinstance(record["data"], dict) or not isinstance(record["config"], dict):
        raise UsageError(f"run.json is damaged: it lacks {', '.join(missing) or 'data or config'}", where=str(where))
    if record.get("score"):
        hint = "call tune again as before; it continues from the checkpoint"
        raise UsageError("this run was given a score function, which cannot be stored", where=str(where), hint=hint)
    config = TrainConfig.build(record["config"])
    base = load(record["model"], task=record.get("task"))
    dataset = _reread(record["data"], record, where)
    tested, valid = (
        None
        if not record.get(k) or (k == "test" and record["held_out"])
        else _reread(record[k], record, where, dataset.labels)
        for k in ("test", "validation")
    )
    if record["held_out"]:
        dataset, tested = dataset.split(HELD_OUT, seed=config.seed)
    for key, now_there in (("data", dataset), ("test", tested), ("validation", valid)):
        if now_there is not None and now_there.digest != record[key]["digest"]:
            raise UsageError("the data has changed since the run began", where=str(record[key]["path"]))
    prepared = prepare(base, dataset, config, system=record["system"])
    chosen = [methods.build(m["name"], m["options"]) for m in record["methods"]]
    gates = parse_require(record["require"]) if record["require"] else []
    return _train(
        base, chosen, prepared, dataset, valid, tested, config, where, record, gates, progress, again=True
    )  # fmt: skip


def _train(
    base: Base, chosen: list[Any], prepared: Prepared, dataset: Dataset, valid: Dataset | None, tested: Dataset | None,
    config: TrainConfig, folder: Path, record: dict[str, Any], gates: list[Any], progress: bool, *, again: bool,
    score: Callable[[Base], float] | None = None,
) -> Run:  # fmt: skip
    """A run from its fresh delta to its receipt, from its newest checkpoint if it runs `again`."""
    system, tied = record["system"], record["tied"]
    delta = _fresh(base, chosen, prepared, dataset, config, folder.resolve().name, tied, folder, progress)
    before = base.digest()
    validating = None if valid is None else prepare(base, valid, config, system=system).task
    trained = fit(
        base, delta, prepared.task, config, validation=validating, out=folder, progress=progress, score=score,
        resume=again,
    )  # fmt: skip

    def on_shuffled() -> Delta:
        return _trained_on_shuffled(base, chosen, dataset, config, system, tied, progress)

    return _finish(
        base, delta, trained, config, folder, record, tested, gates, progress, before=before, controlled=on_shuffled
    )


def _dataset(data: Any, on_error: str, labels: list[str] | None = None) -> Dataset:
    return data if isinstance(data, Dataset) else read(data, on_error=on_error, labels=labels)  # type: ignore[arg-type]


def _described(dataset: Dataset | None) -> dict[str, Any] | None:
    if dataset is None:
        return None
    return {"path": dataset.report.path, "digest": dataset.digest, "rows": len(dataset), "kind": dataset.kind}


def _reread(
    entry: Mapping[str, Any], record: Mapping[str, Any], where: Path, labels: list[str] | None = None
) -> Dataset:
    path = entry.get("path") or ""
    if not path.startswith("shared:") and not Path(path).exists():
        hint = (
            "the data was given as objects; run tune again from Python"
            if path[:1] in ("", "<")
            else "put the file back"
        )
        raise UsageError(f"the data of this run is not at {path!r}", where=str(where), hint=hint)
    return read(path, on_error=record["on_error"], labels=labels)


def _refuse_other(folder: Path, record: Mapping[str, Any]) -> None:
    """An unfinished run may be continued by the same call; another call must not take its place. Raises UsageError."""
    if not (folder / "checkpoint").exists() or not (folder / "run.json").exists():
        return
    before, same = read_record(folder), json.loads(json.dumps(record))
    other = [k for k in (*_RESUMED, "validation", "test") if before.get(k) != same.get(k)]
    if other:
        hint = "continue it with tunesmith tune --resume, choose another name, or remove it"
        raise UsageError(f"an unfinished run with another {' and '.join(other)} is here", where=str(folder), hint=hint)


def _fresh(
    base: Base, chosen: list[Any], prepared: Prepared, dataset: Dataset, config: TrainConfig, name: str, tied: str,
    folder: Path | None = None, progress: bool = False,
) -> Delta:  # fmt: skip
    """The delta before its first step, with what must be known to use it later."""
    above = _lineage(base)
    delta = started(base, chosen, prepared.task, config, name, tied, folder, progress)
    delta.layout = dict(prepared.layout)
    delta.provenance.update(
        {
            "seeds": {"init": config.seed, "train": config.seed},
            "data": {"digest": dataset.digest, "rows": len(dataset), "source": Path(dataset.report.path or "").name},
            "training": config.to_dict(),
            "lineage": above,
        }
    )
    return delta


def _lineage(base: Base) -> list[dict[str, str]]:
    """The deltas in use while this one is trained: it is valid on that stack."""
    from tunesmith.core.apply import current

    app = current(base)
    return [{"name": v.delta.name, "digest": v.delta.digest} for v in app.stack] if app else []


def _finish(
    base: Base,
    delta: Delta,
    trained: Trained,
    config: TrainConfig,
    folder: Path,
    record: dict[str, Any],
    tested: Dataset | None,
    gates: list[Any],
    progress: bool,
    *,
    before: str,
    controlled: Callable[[], Delta] | None = None,
) -> Run:
    """Bake, measure the effect, save, evaluate, write the receipt."""
    bake(base, delta)
    delta.provenance["effect"] = effect(base, delta)
    run = Run(folder.resolve().name, base, delta, trained, config, folder)
    if not is_main():
        return run
    if record["receipt"] and tested is not None:
        run.receipt = evaluate(
            base, delta, tested, metric=record["metric"], system=record["system"],
            controls=_controls(run, record, controlled), panels=tuple(record["panels"]), seed=config.seed,
            progress=progress, batch_size=max(16, config.batch_size), max_length=config.max_length,
            training=Training(trained.steps, _thin(trained.losses), list(trained.validation)),
            cost=Cost(
                trained.seconds, trained.peak_memory_bytes, delta.trainable_parameters, delta.nbytes, trained.tokens,
                trained.tokens / max(1e-9, trained.seconds),
            ),
            next_commands=next_commands(base, delta, folder),
        )  # fmt: skip
        if run.receipt.undo.digest_after != before:
            raise TrainingError("the base is not as it was before training", where=base.name)
        if gates:
            results = check(gates, run.receipt)
            run.receipt = dataclasses.replace(run.receipt, gates=results, accepted=accepted(results))
        delta.provenance["metrics"] = _metrics(run.receipt)
    save(delta, folder / "delta", base=base)
    if run.receipt is not None:
        from tunesmith.evaluate.html import write_html

        run.receipt.write(folder / "receipt.json")
        write_html(run.receipt, folder / "receipt.html")
    summary = run.receipt.proof() if run.receipt is not None else f"{trained.steps} steps"
    write_record(folder, {**record, "finished": True, "steps": trained.steps, "summary": summary})
    return run


def _trained_on_shuffled(
    base: Base, chosen: list[Any], dataset: Dataset, config: TrainConfig, system: str | None, tied: str, progress: bool
) -> Delta:
    """The control that should not help: the same training on the same rows with their answers permuted."""
    wrong = shuffled(dataset, config.seed)
    prepared = prepare(base, wrong, config, system=system)
    delta = _fresh(base, chosen, prepared, wrong, config, "shuffled", tied)
    fit(base, delta, prepared.task, dataclasses.replace(config, evaluate_every=None, patience=None), progress=progress)
    bake(base, delta)
    return delta


def _controls(run: Run, record: Mapping[str, Any], controlled: Callable[[], Delta] | None) -> dict[str, Delta]:
    """The deltas of the controls that were asked for, by a readable name."""
    made: dict[str, Delta] = {}
    for name in record["controls"]:
        if name == "random":
            made["random direction, same norm"] = random_delta(run.base, run.delta, run.config.seed)
        elif name == "shuffled" and controlled is not None:
            made["trained on shuffled answers"] = controlled()
    return made


def require_accepted(run: Run) -> None:
    """Raise Rejected, naming the gates that failed, when a run's gates were not all met."""
    if run.receipt is not None and run.receipt.accepted is False:
        failed = [g for g in run.receipt.gates if not g.passed]
        raise Rejected(
            f"{len(failed)} of {len(run.receipt.gates)} gates were not met",
            hint="; ".join(f"{g.clause}: {g.reason}" for g in failed),
        )


def _thin(losses: list[float], most: int = 500) -> list[tuple[int, float]]:
    every = max(1, len(losses) // most)
    return [(i + 1, v) for i, v in enumerate(losses) if i % every == 0 or i == len(losses) - 1]


def _metrics(receipt: Any) -> dict[str, Any]:
    t = receipt.target
    return {
        "metric": t.metric, "n": t.n, "base": t.base.mean, "tuned": t.tuned.mean, "verdict": t.difference.verdict
    }  # fmt: skip


def next_commands(base: Base, delta: Delta, folder: Path) -> list[str]:
    """What can be done next with a finished run: only commands that work for this base and this delta."""
    place = folder / "delta"
    use = f"tunesmith chat {place} --compare" if base.family == "causal-lm" else f"tunesmith evaluate {place} DATA"
    merges = all(part.info.mergeable for part in delta.parts)
    more = f"tunesmith merge {place} --into {folder / 'merged'}" if merges else f"tunesmith show {place}"
    return [use, more, f"tunesmith verify {place}"]


def _tune_loader(
    base: Any, data: Iterable[Any], loss: Any, method: Any, name: str | None, out: Any, validation: Any, score: Any,
    tied: str, progress: bool, config: TrainConfig,
) -> Run:  # fmt: skip
    """Any module, any batches, the user's loss: no tokenizer, no receipt."""
    if isinstance(data, str | Path | Dataset):
        raise UsageError("with loss=, data must be an iterable of batches", hint="a DataLoader, or a list of (x, y)")
    folder = None if out is None else new_folder(None, out, "")
    if folder and (folder / "delta").exists():
        raise UsageError("a finished run is here already", where=str(folder), hint="choose another folder or remove it")
    task: Task = LoaderTask(data, loss, seed=config.seed, most=config.steps)
    opened = load(base)
    if opened.probe() is None:
        args, kwargs = inputs_of(task.batch([0], 0)["batch"])
        opened.with_example(moved(kwargs or args, opened.device))
    chosen = choose_methods(opened, method, Prepared(task, None))
    delta = started(opened, chosen, task, config, name or "delta", tied, folder, progress)
    delta.provenance.update({"seeds": {"init": config.seed, "train": config.seed}, "lineage": _lineage(opened)})
    validating = None if validation is None else LoaderTask(validation, loss, seed=config.seed)
    trained = fit(
        opened, delta, task, config, validation=validating, out=folder, score=score, progress=progress,
        resume=bool(folder and (folder / "checkpoint").exists()),
    )  # fmt: skip
    bake(opened, delta)
    with torch.no_grad():
        delta.provenance["effect"] = effect(opened, delta)
    if folder and is_main():
        save(delta, folder / "delta", base=opened)
    return Run(delta.name, opened, delta, trained, config, folder)
