# SPDX-License-Identifier: Apache-2.0
"""Whole comparisons on tiny bases: fairness, controls, resuming, failures, and the files that are written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tunesmith as ts
from tunesmith.arena import measure
from tunesmith.arena.compare import run_compare
from tunesmith.arena.measure import Yardstick
from tunesmith.arena.report import load_comparison
from tunesmith.arena.trials import Arena, Trial, split
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import DataError, Interrupted, TrainingError, UsageError
from tunesmith.data import Dataset, read
from tunesmith.train.config import TrainConfig

QUICK: dict[str, Any] = {"budget": 600, "epochs": 2, "precision": "fp32", "seeds": 2, "lrs": [3e-2, 1e-1]}


@pytest.fixture(scope="module")
def done(encoder: Base, topics: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("compared")
    return run_compare(encoder, topics, methods="lora:rank=2,head,lora:targets=nowhere", out=out, **QUICK)


def test_a_comparison_learns_measures_and_recommends(done: dict[str, Any]) -> None:
    rows = {r["label"]: r for r in done["rows"]}
    assert set(rows) == {"lora:rank=2", "head"}
    assert [x["label"] for x in done["left_out"]] == ["lora:targets=nowhere"]
    for r in rows.values():
        assert len(r["target"]["values"]) == len(r["retention"]["values"]) == 2 and r["seeds"] == [0, 1]
        assert [t["lr"] for t in r["lr_trials"]] == [3e-2, 1e-1] and r["lr"] in (3e-2, 1e-1)
        assert r["target"]["values"] == pytest.approx([np.mean(s) for s in r["scores"]])
        assert r["seconds"] > 0 and r["peak_memory"] > 0 and r["stored"] > 0
    assert rows["head"]["target"]["mean"] > 0.5
    assert rows["head"]["retention"]["mean"] == pytest.approx(1.0, abs=1e-6), "a head leaves the base as it is"
    assert rows["lora:rank=2"]["retention"]["mean"] < 1
    assert rows["head"]["own_trainable"] == 0 and rows["head"]["trainable"] == 3 * 17
    assert rows["lora:rank=2"]["own_trainable"] == rows["lora:rank=2"]["trainable"] - 3 * 17
    assert rows["head"]["steps"] == rows["lora:rank=2"]["steps"], "both reach the cap"
    assert done["recommendation"]["method"] in rows and done["recommendation"]["reason"]
    assert done["data"]["train"] + done["data"]["dev"] + done["data"]["test"] == 90
    folder = Path(done["folder"])
    assert load_comparison(folder) == json.loads((folder / "compare.json").read_text())
    assert "Recommendation" in (folder / "table.md").read_text()


def test_controls_do_not_help(done: dict[str, Any]) -> None:
    told = done["recommendation"]["method"]
    by = {c["name"]: c for c in done["controls"]}
    assert set(by) == {
        "untrained base",
        "constant answer",
        f"{told} on shuffled answers",
        f"random delta of the size of {told}",
    }
    assert by["untrained base"]["verdict"] is None and "no output" in by["untrained base"]["reason"]
    best = max(r["target"]["mean"] for r in done["rows"])
    for name in ("constant answer", f"{told} on shuffled answers", f"random delta of the size of {told}"):
        assert by[name]["value"] < best - 0.1
    assert (
        by["constant answer"]["value"] == pytest.approx(1 / 3, abs=0.1) and by["constant answer"]["verdict"] == "beaten"
    )


def test_the_base_is_as_it_was_and_a_finished_comparison_is_not_run_again(
    encoder: Base, topics: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = encoder.digest()
    first = run_compare(encoder, topics, methods="head", **QUICK)
    assert encoder.digest() == digest
    assert Path(first["folder"]).name.startswith("compare-")

    def refuse(self: Arena, trial: Trial) -> dict[str, Any]:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(Arena, "run", refuse)
    again = run_compare(encoder, topics, methods="head", **QUICK)
    assert again["rows"] == first["rows"] and again["controls"] == first["controls"]
    with pytest.raises(AssertionError):
        run_compare(encoder, topics, methods="head", fresh=True, **QUICK)


def test_a_stopped_comparison_goes_on_and_gives_what_it_would_have_given(
    encoder: Base, topics: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "lora:rank=2,ssf"
    whole = run_compare(encoder, topics, methods=names, out=tmp_path / "whole", **QUICK)
    plain, count = Arena.run, {"n": 0}

    def stops(self: Arena, trial: Trial) -> dict[str, Any]:
        count["n"] += 1
        if count["n"] == 7:  # the first final: its delta is lost with the process and must be trained again
            raise Interrupted("stopped")
        return plain(self, trial)

    monkeypatch.setattr(Arena, "run", stops)
    with pytest.raises(Interrupted):
        run_compare(encoder, topics, methods=names, out=tmp_path / "cut", **QUICK)
    assert not (tmp_path / "cut" / "compare.json").exists()
    count["n"] = 100
    rest = run_compare(encoder, topics, methods=names, out=tmp_path / "cut", **QUICK)
    assert count["n"] < 100 + 7, "finished trials are not run again"
    for a, b in zip(whole["rows"], rest["rows"], strict=True):
        assert (a["label"], a["lr"], a["steps"], a["scores"]) == (b["label"], b["lr"], b["steps"], b["scores"])
        assert a["retention"]["values"] == pytest.approx(b["retention"]["values"])
    assert rest["controls"][-1]["value"] == whole["controls"][-1]["value"]


def test_other_settings_in_the_same_folder_are_refused(encoder: Base, topics: Dataset, tmp_path: Path) -> None:
    run_compare(encoder, topics, methods="head", out=tmp_path, **QUICK)
    with pytest.raises(UsageError, match="changed: budget"):
        run_compare(encoder, topics, methods="head", out=tmp_path, **{**QUICK, "budget": 700})


def test_a_method_that_fails_is_left_out_and_the_others_stay(
    encoder: Base, topics: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Arena._trained

    def trained(self: Arena, trial: Trial, *args: Any, **kw: Any) -> Any:
        if trial.label == "ssf" and trial.purpose == "tune":
            raise TrainingError("it fell over")
        return plain(self, trial, *args, **kw)

    monkeypatch.setattr(Arena, "_trained", trained)
    found = run_compare(encoder, topics, methods="ssf,head", **QUICK)
    assert [r["label"] for r in found["rows"]] == ["head"]
    assert found["left_out"] == [{"label": "ssf", "reason": "every learning rate failed: it fell over"}]
    with pytest.raises(TrainingError, match="every method failed"):
        run_compare(encoder, topics, methods="ssf", **QUICK)


def test_any_failure_of_a_method_is_a_reason_and_a_stop_is_a_stop(encoder: Base, topics: Dataset) -> None:
    arena = Arena(encoder, split(topics, None, None), TrainConfig(precision="fp32"))

    @dataclasses.dataclass(frozen=True)
    class Broken:
        error: type[BaseException]

        def __getattr__(self, name: str) -> Any:
            raise self.error("it broke")

    assert arena.run(Trial("x", Broken(RuntimeError), 1e-3, 0, 2)) == {"failed": "RuntimeError: it broke"}
    with pytest.raises(Interrupted):
        arena.run(Trial("x", Broken(Interrupted), 1e-3, 0, 2))


def test_a_rate_that_diverges_is_a_trial_that_cannot_win(encoder: Base, topics: Dataset) -> None:
    found = run_compare(encoder, topics, methods="lora:rank=2", **{**QUICK, "lrs": [1e5, 1e-1], "seeds": 1})
    trials = found["rows"][0]["lr_trials"]
    assert found["rows"][0]["lr"] == 1e-1 and [t["lr"] for t in trials] == [1e-1, 1e5]
    assert found["rows"][0]["target"]["high"] == float("inf"), "one seed tells nothing of the next"


def test_chats_are_compared_by_loss_and_perplexity(writer: Base, chats: Dataset) -> None:
    found = run_compare(writer, chats, methods="lora:rank=2,head", **{**QUICK, "lrs": [3e-2], "epochs": 3})
    assert found["target"] == {"metric": "loss", "higher_is_better": False}
    assert found["retention"]["measure"].startswith("perplexity")
    assert [x["label"] for x in found["left_out"]] == ["head"]
    row = found["rows"][0]
    base = next(c for c in found["controls"] if c["name"] == "untrained base")
    assert row["target"]["mean"] < base["value"] - 0.5 and base["verdict"] == "beaten"
    assert 0 < row["retention"]["mean"] != 1.0
    assert not any(c["name"] == "constant answer" for c in found["controls"])


def test_equal_parameters_trains_all_for_the_same_steps(encoder: Base, topics: Dataset) -> None:
    found = run_compare(encoder, topics, methods="lora:rank=2,dora", equal="parameters", **QUICK)
    sizes = {r["label"]: r["own_trainable"] for r in found["rows"]}
    assert found["matched"]["target"] == sizes["lora:rank=2"]
    assert abs(sizes["dora"] / sizes["lora:rank=2"] - 1) < 0.5
    assert len({r["steps"] for r in found["rows"]}) == 1


def test_rates_are_chosen_on_dev_and_test_rows_play_no_part(encoder: Base, topics: Dataset, tmp_path: Path) -> None:
    """With the labels of the test rows turned around, the same rates are chosen and the same deltas made."""
    whole, test = topics.split(0.3)
    turned = ts.read([{"text": r["text"], "label": topics.labels[(r["label"] + 1) % 3]} for r in test.rows])
    a = run_compare(encoder, whole, test=test, methods="head,ssf", out=tmp_path / "a", **QUICK)
    b = run_compare(encoder, whole, test=turned, methods="head,ssf", out=tmp_path / "b", **QUICK)

    def chosen(found: dict[str, Any]) -> dict[str, Any]:
        return {r["label"]: (r["lr"], r["lr_trials"], r["retention"]["values"]) for r in found["rows"]}

    assert chosen(a) == chosen(b)
    assert a["rows"][0]["target"]["mean"] > 0.5 > b["rows"][0]["target"]["mean"]


def test_splits_are_disjoint_thinned_and_say_what_overlaps(topics: Dataset) -> None:
    made = split(topics, None, None, dev_rows=5, test_rows=10)
    assert (len(made.dev), len(made.test)) == (5, 10) and made.source == topics.digest
    few = split(topics, None, None, shots=4)
    counts = [sum(r["label"] == k for r in few.train.rows) for k in range(3)]
    assert counts == [4, 4, 4] and len(few.dev) == 3
    texts = [{r["text"] for r in part.rows} for part in (made.train, made.test)]
    assert not texts[0] & texts[1] and made.notes == ()
    again = split(topics, topics.take(20), None)
    assert any("test rows are training rows too" in note for note in again.notes)
    with pytest.raises(UsageError, match="rows per class"):
        split(read([{"prompt": f"a{i}", "response": f"b{i}"} for i in range(9)]), None, None, shots=2)
    with pytest.raises(DataError, match="needed"):
        split(topics, None, None, shots=500)


def test_retention_is_measured_without_the_head(encoder: Base, topics: Dataset) -> None:
    parts = split(topics, None, None)
    yard = Yardstick(encoder, parts.dev, parts.test, TrainConfig(precision="fp32"))
    assert yard.retention() == pytest.approx(1)
    delta = Delta.create(encoder, ts.LoRA(rank=2), ts.Head(classes=3))
    for _, t in delta.items():
        t.data.normal_(std=0.5)
    alone = Delta("alone", [delta.parts[0]], provenance=delta.provenance)
    with encoder.using(delta):
        with_head = yard.retention()
        rows = yard.score("test").rows
    with encoder.using(alone):
        assert yard.retention() == pytest.approx(with_head) and with_head < 0.99
    assert len(rows) == len(parts.test)
    texts = [r["text"] for r in measure.probes("retention_text")][:3]
    ids = encoder.tokenizer(texts, truncation=True, max_length=128)["input_ids"]
    want = []
    for i in ids:
        with torch.no_grad():
            before = encoder.model(input_ids=torch.tensor([i])).mean(1)
            with encoder.using(alone):
                after = encoder.model(input_ids=torch.tensor([i])).mean(1)
        want.append(float(torch.nn.functional.cosine_similarity(before, after)))
    with encoder.using(alone):
        got = measure.cosine(yard._before, yard._vectors())[:3]
    assert got == pytest.approx(want, abs=1e-5)


def test_pictures_are_compared_by_drift_on_their_own_inputs() -> None:
    from tunesmith.core.toys import toys

    base = toys()[2]
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.integers(0, 60, size=(60, 6, 6, 3)) + 60 * y[:, None, None, None]
    rows = [{"array": a.astype(np.uint8), "label": f"c{k}"} for a, k in zip(x, y, strict=True)]
    found = run_compare(base, read(rows), methods="ssf:start=identity,head", **QUICK)
    assert found["retention"]["measure"].endswith("held-out inputs")
    assert {r["label"] for r in found["rows"]} == {"ssf:start=identity", "head"}


@pytest.mark.parametrize(
    ("wrong", "what"),
    [({"budget": "soon"}, "no length of time"), ({"equal": "steps"}, "unknown rule"), ({"seeds": 0}, "at least 1"),
     ({"lrs": [1e-3, 1e-3]}, "without repeats"), ({"methods": "lorra"}, "unknown method"),
     ({"lr_": 1}, "no training setting")],
)  # fmt: skip
def test_wrong_arguments_are_named(encoder: Base, topics: Dataset, wrong: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        run_compare(encoder, topics, **{"methods": "head", **QUICK, **wrong})


def test_a_metric_over_generated_answers_is_for_the_test_rows_only(writer: Base, chats: Dataset) -> None:
    found = run_compare(
        writer, chats, methods="lora:rank=2", metric="exact_match", **{**QUICK, "lrs": [3e-2], "seeds": 1, "epochs": 1}
    )
    assert found["target"] == {"metric": "exact_match", "higher_is_better": True}
    row = found["rows"][0]
    assert row["lr_trials"][0]["dev"] > 1, "rates are chosen by loss"
    assert set(row["scores"][0]) <= {0.0, 1.0} and found["controls"][0]["value"] == 0.0
