# SPDX-License-Identifier: Apache-2.0
"""Name a method, its size and a learning rate for a task, with the evidence they rest on and how much that is worth.

Evidence, best first: comparisons of the user's own on the same data and base; comparisons on the same base, or on the
same kind of data and family of base (also those committed in a checkout's `docs`); learning rates that committed
studies chose for a method. Without any of it the library's defaults are named, and called that.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.arena.budget import FACTOR
from tunesmith.arena.report import load_comparison
from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.errors import ResourceError, TunesmithError
from tunesmith.core.memory import available_memory
from tunesmith.data import Dataset
from tunesmith.models.skeleton import skeleton
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import default_lr
from tunesmith.train.plan import Plan
from tunesmith.train.plan import plan as planned
from tunesmith.train.prepare import choose_methods, prepare
from tunesmith.train.runs import root

LEVELS = ("none", "thin", "some", "strong")
SMALL, LARGE = 300, 20_000  # training rows below and above which the default rank is halved and doubled
_PASSES = {0: 10.0, 1000: 5.0, 10_000: 3.0}  # rows from which so many passes over the data are suggested


@dataclass(frozen=True)
class Evidence:
    """One thing that a recommendation rests on: its kind, where it lies, how near it is to the task, what it says."""

    kind: str
    where: str
    level: str
    says: str


@dataclass
class Advice:
    """What to run. `strength` is "strong", "some", "thin" or "none"; `doubts` say what would make it better founded."""

    method: str
    options: dict[str, Any]
    lr: float
    epochs: float
    strength: str
    settings: dict[str, Any] = field(default_factory=dict)
    evidence: list[Evidence] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> str:
        """The method as the command line takes it."""
        options = ",".join(f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in self.options.items())
        return self.method + (f":{options}" if options else "")


def comparisons(places: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The comparisons under some folders, newest first. Files that cannot be read are left out."""
    found = []
    for place in places:
        for file in sorted(place.glob("**/compare.json")) if place.is_dir() else []:
            try:
                found.append((file, load_comparison(file)))
            except TunesmithError:
                continue
    return sorted(found, key=lambda pair: str(pair[1]["created"]), reverse=True)


def study_rates(studies: Path | None, method: str) -> list[tuple[Path, list[float], str]]:
    """(result file, chosen learning rates, verdict) of each committed study that has arms of a method.

    An arm belongs to a method when its name is the method's or begins with it. Empty where there are no studies: an
    installed package has none.
    """
    out = []
    for file in (
        sorted(studies.glob("[0-9][0-9][0-9]-*/result.json")) if studies is not None and studies.is_dir() else []
    ):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            raw = result["raw"]
            arms = [a for a in result["arms"] if _is(a, method)]
            rates = [r for a in arms for r in [*_rates((raw.get("tuning") or {}).get(a)), *_rates(raw["arms"].get(a))]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if rates:
            out.append((file, rates, str(result.get("verdict"))))
    return out


def _is(arm: str, method: str) -> bool:
    plain = str(arm).lower().replace("_", "-")
    return plain == method or plain.startswith((method + " ", method + ":", method + ",", method + "("))


def _rates(value: Any) -> list[float]:
    """Learning rates in what a study kept of an arm: {"lr": x}, by seed, or rows with one. Trials are not choices."""
    if isinstance(value, Mapping):
        if isinstance(value.get("lr"), int | float):
            return [float(value["lr"])]
        return [x for v in value.values() for x in _rates(v)]
    if isinstance(value, list):
        return [x for v in value if isinstance(v, Mapping) and isinstance(v.get("lr"), int | float) for x in _rates(v)]
    return []


def recommended(
    model: str | Base,
    data: Dataset,
    *,
    memory: int | None = None,
    seconds: float | None = None,
    registry: Path | None = None,
    studies: Path | None = None,
    docs: Path | None = None,
    system: str | None = None,
    **settings: Any,
) -> Advice:
    """What to run on `data` with `model`, without loading its weights.

    Args:
        memory: bytes that may be used (default: what is free now); seconds: time that training may take.
        registry: the folder of the user's runs and comparisons; docs: committed comparisons; studies: their results.
    Raises ResourceError when nothing fits into the memory, else what the base or the data cause.
    """
    base = model if isinstance(model, Base) else skeleton(model)
    config = TrainConfig.build({"overflow": "truncate", **settings})
    ready = prepare(base, data, config, system=system)
    facts = {
        "name": base.source.get("name", base.name), "family": base.family, "kind": data.kind, "digest": data.digest,
        "rows": len(data),
    }  # fmt: skip
    known = comparisons([registry or root(), *([docs] if docs is not None else [])])
    advice = _from_comparisons(facts, known) or _from_defaults(base, ready, facts, studies)
    _fit(advice, base, data, memory, seconds, system, {"overflow": "truncate", **settings})
    return advice


# Which method


def _from_comparisons(facts: Mapping[str, Any], known: Sequence[tuple[Path, dict[str, Any]]]) -> Advice | None:
    """From comparisons: one on this data and base decides; else the method that most near ones recommend."""
    ranked = [(level, file, c) for file, c in known if (level := _nearness(facts, c)) != "none"]
    if not ranked:
        return None
    strongest = max((level for level, _, _ in ranked), key=LEVELS.index)
    near = [(file, c) for level, file, c in ranked if level == strongest]
    if strongest == "strong":
        near = near[:1]  # the newest on this very task
    votes: dict[str, list[dict[str, Any]]] = {}
    for _, c in near:
        votes.setdefault(c["recommendation"]["method"], []).append(c)
    label = max(votes, key=lambda m: len(votes[m]))
    rows = [next(r for r in c["rows"] if r["label"] == label) for c in votes[label]]
    name = rows[0]["method"]
    options = _changed(name, rows[0]["options"])
    advice = Advice(
        name, options, _middle([r["lr"] for r in rows]), _epochs(votes[label][0], rows[0]), strongest,
        {"batch_size": votes[label][0]["config"]["batch_size"]},
    )  # fmt: skip
    advice.evidence = [Evidence("comparison", str(f), strongest, _said(c)) for f, c in near]
    if not rows or not all(c["recommendation"]["convincing"] for c in votes[label]):
        advice.doubts.append("in a comparison behind this the method was not shown to beat every control")
    if strongest != "strong":
        what = "another set of data on this base" if strongest == "some" else "another base of this family"
        advice.doubts.append(f"the comparisons behind this are on {what}; one on this data would settle it")
    elif any(len(c["recommendation"]["not_shown_worse"]) > 1 for c in votes[label]):
        advice.doubts.append("other methods were in a tie with it; more test rows or seeds would tell them apart")
    return advice


def _nearness(facts: Mapping[str, Any], c: Mapping[str, Any]) -> str:
    same_base = c["base"]["name"] == facts["name"]
    same_data = c["data"].get("source") == facts["digest"]
    same_kind = c["data"]["kind"] == facts["kind"]
    if same_base and same_data:
        return "strong"
    if same_base and same_kind:
        return "some"
    return "thin" if same_kind and c["base"]["family"] == facts["family"] else "none"


def _said(c: Mapping[str, Any]) -> str:
    top = c["recommendation"]
    return f"{c['base']['name']} on {c['data']['name']}, {len(c['rows'])} methods: {top['reason']}"


def _epochs(c: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """The passes over the data that the method had in the comparison."""
    return max(0.1, round(row["steps"] * c["config"]["batch_size"] / max(1, c["data"]["train"]), 1))


def _from_defaults(base: Base, ready: Any, facts: Mapping[str, Any], studies: Path | None) -> Advice:
    """What `tune` takes by itself, the rank set by the number of rows, the rate by studies that tuned the method."""
    method = choose_methods(base, None, ready)[0]
    name = methods.info_of(method).name
    options = _changed(name, methods.config(method))
    rank = next((r["default"] for r in methods.schema(type(method)) if r["name"] == "rank"), None)
    if rank is not None and facts["rows"] < SMALL:
        options["rank"] = max(1, rank // 2)
    elif rank is not None and facts["rows"] > LARGE:
        options["rank"] = 2 * rank
    passes = next(v for k, v in sorted(_PASSES.items(), reverse=True) if facts["rows"] >= k)
    advice = Advice(name, options, default_lr(method), passes, "none")
    advice.doubts.append(
        f"no comparison is near this task: {name} and its size are the library's defaults, not a finding"
    )
    found = study_rates(studies, name)
    if found:
        advice.lr = _middle([x for _, rates, _ in found for x in rates])
        advice.strength = "thin"
        advice.evidence = [
            Evidence("study", file.parent.name, "thin", f"{verdict}; it chose {_listed(rates)} for {name}")
            for file, rates, verdict in found
        ]
        advice.doubts.append("the learning rate is the middle of those that studies on other tasks chose")
    elif studies is None or not studies.is_dir():
        advice.doubts.append("no committed studies are installed here; a checkout has them")
    return advice


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{x:g}" for x in sorted(set(rates)))


def _changed(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    default = {row["name"]: row["default"] for row in methods.schema(methods.get(name).cls)}
    skip = ("classes", "task") if name == "head" else ()
    return {k: v for k, v in options.items() if k not in skip and default.get(k) != v}


def _middle(rates: Sequence[float]) -> float:
    """The median on a log scale, to three digits."""
    return float(f"{math.exp(statistics.median(math.log(r) for r in rates)):.3g}")


# Does it fit


def _fit(
    advice: Advice, base: Base, data: Dataset, memory: int | None, seconds: float | None, system: str | None,
    settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Lower what needs memory until the plan fits, and the passes until the time does; says what was done."""
    room = memory if memory is not None else available_memory()
    made: Plan | None = None
    for step in ({}, {"micro_batch": 1}, {"micro_batch": 1, "gradient_checkpointing": True}):
        if "gradient_checkpointing" in step and not _can_recompute(base):
            continue
        made = _planned(advice, base, data, system, {**settings, **step})
        if made is None:
            advice.doubts.append("its memory and time cannot be planned: the method learns its start from the data")
            return
        if room is None or made.peak <= room:
            advice.settings.update(step)
            break
    else:
        assert made is not None and room is not None
        what = f"{advice.method} needs about {made.peak / 1e9:.1f} GB even one row at a time"
        raise ResourceError(
            f"{what}, {room / 1e9:.1f} GB may be used",
            where=base.name,
            hint="a smaller base, shorter rows (--max-length), or more memory",
        )
    if advice.settings.get("micro_batch"):
        advice.doubts.append("memory is short: rows are computed one at a time, which is slower")
    if seconds is not None and made.minutes is not None and made.minutes * 60 > seconds:
        share = seconds / (made.minutes * 60)
        advice.epochs = max(0.01, float(f"{advice.epochs * share:.2g}"))
        note = f"the time allows {advice.epochs:g} passes over the data"
        if share < 1 / FACTOR:
            note += "; so short a run may want a larger learning rate"
        advice.doubts.append(note)
        made = _planned(advice, base, data, system, settings) or made
    advice.plan = {
        "steps": made.steps, "trainable": made.trainable, "peak": made.peak, "minutes": made.minutes, "memory": room
    }  # fmt: skip


def _planned(advice: Advice, base: Base, data: Dataset, system: str | None, settings: Mapping[str, Any]) -> Plan | None:
    """The plan of the advice; None for a method that cannot be made without data or weights."""
    method = [] if advice.method == "head" else methods.build(advice.method, advice.options)
    if hasattr(method, "observe"):
        return None
    try:
        return planned(base, data, method=method, system=system,
                       **{**settings, **advice.settings, "epochs": advice.epochs})  # fmt: skip
    except (RuntimeError, NotImplementedError):  # a start that needs the values of the weights
        return None


def _can_recompute(base: Base) -> bool:
    return any(hasattr(base.model, f"{stem}_checkpointing_enable") for stem in ("activation", "gradient"))
