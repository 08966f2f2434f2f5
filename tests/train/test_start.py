# SPDX-License-Identifier: Apache-2.0
"""Methods that learn their start from data: in every kind of run, through a stop, and through a kill while they look."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core import store
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import Interrupted, UsageError
from tunesmith.data import encode, pack, read
from tunesmith.deltas import EVA, LTSFT, CorDA, SparseDelta
from tunesmith.models.open import load
from tunesmith.objectives import SFT
from tunesmith.train import sample as starting
from tunesmith.train import tune as module
from tunesmith.train.config import TrainConfig
from tunesmith.train.sample import sample_of, started
from tunesmith.train.tasks import LoaderTask, PackedTask, RowTask

# What they look at: inputs, second moments, gradients of the loss, and a trial run.
METHODS = [
    EVA(rank=2, alpha=4.0, limit=4),
    CorDA(rank=2, alpha=2.0),
    SparseDelta(rank=2, select="fisher"),
    LTSFT(entries=300, trial=0.5),
]
BY_NAME = [pytest.param(m, id=m.info.name) for m in METHODS]
CHAT = [{"prompt": p, "response": r} for p, r in [("red", "one"), ("green", "two two"), ("blue", "three")] * 5]
CLASSES = [{"text": t, "label": y} for t, y in [("good film", "yes"), ("very bad film was bad", "no")] * 8]
ASKED: dict[str, Any] = {
    "receipt": False, "progress": False, "steps": 5, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 2,
    "precision": "fp32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "runs"))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def watched(monkeypatch: pytest.MonkeyPatch, cls: type, fail_at: int = 0) -> list[int]:
    """Counts the looks of a method at its data; the one with number `fail_at` is killed in the middle of a batch."""
    looks: list[int] = []
    plain = cls.observe  # type: ignore[attr-defined]

    def observe(self: Any, base: Base, sites: Any, sample: Any) -> Any:
        looks.append(len(looks) + 1)
        if looks[-1] == fail_at:
            next(iter(sample.batches()))
            raise KeyboardInterrupt
        return plain(self, base, sites, sample)

    monkeypatch.setattr(cls, "observe", observe)
    return looks


@pytest.mark.parametrize("method", BY_NAME)
def test_classification_has_the_head_beside_it(encoder_folder: Path, tmp_path: Path, method: Any) -> None:
    run = ts.tune(str(encoder_folder), CLASSES, name="a", method=method, **ASKED)
    assert [p.name for p in run.delta.parts][1:] == ["head"]
    assert run.trained.steps == 5 and run.base.active == []
    again = Delta.load(tmp_path / "runs/a/delta", run.base)
    assert again.digest == run.delta.digest
    start = Delta.load(tmp_path / "runs/a/start", run.base)
    assert [p.info.name for p in start.parts] == [method.info.name, "head"] and start.digest != run.delta.digest
    twin = ts.tune(str(encoder_folder), CLASSES, name="b", method=method, **ASKED)
    assert twin.delta.digest == run.delta.digest and twin.trained.losses == run.trained.losses


@pytest.mark.parametrize("method", BY_NAME)
def test_sft(causal_folder: Path, tmp_path: Path, method: Any) -> None:
    base = load(str(causal_folder), dtype="fp32", device="cpu")
    before = base.digest()
    run = ts.tune(base, CHAT, name="a", method=method, **ASKED)
    assert run.trained.losses[-1] < run.trained.losses[0] and base.digest() == before
    start = Delta.load(tmp_path / "runs/a/start", run.base)
    probe = run.base.probe_outputs()
    with run.base.using(start):
        torch.testing.assert_close(run.base.probe_outputs(), probe, atol=1e-6, rtol=0)
    with run.base.using(Delta.load(tmp_path / "runs/a/delta", run.base)):
        assert (run.base.probe_outputs() - probe).abs().max() > 1e-4


@pytest.mark.parametrize("method", [EVA(rank=2, targets="0,2"), SparseDelta(rank=1, select="fisher", targets="0,2")])
def test_any_module_with_a_loss_of_ones_own(tmp_path: Path, method: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    y = torch.arange(24) % 3
    x = torch.randn(24, 6) + y[:, None]
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]

    def loss(out: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(out, batch[1])

    run = ts.tune(net, batches, method=method, loss=loss, epochs=5, lr=0.05, progress=False, out=tmp_path / "run")
    assert run.trained.losses[-1] < run.trained.losses[0] and (tmp_path / "run/start/delta.json").exists()
    with pytest.raises(UsageError, match=r"'facts.jsonl' cannot be read here"):
        ts.tune(net, batches, method=CorDA(rank=2, targets="0", context="facts.jsonl"), loss=loss, progress=False)


@pytest.mark.parametrize("method", [BY_NAME[0], BY_NAME[3]])
def test_a_stopped_run_goes_on_from_the_start_it_had(
    causal_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    data = jsonl(tmp_path / "data.jsonl", CHAT)
    whole = ts.tune(str(causal_folder), data, name="whole", method=method, **ASKED)
    looks = watched(monkeypatch, type(method))
    plain = module.fit

    def fit(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs, on_step=lambda step, loss: os.kill(os.getpid(), 2) if step == 3 else None)

    with monkeypatch.context() as m:
        m.setattr(module, "fit", fit)
        with pytest.raises(Interrupted):
            ts.tune(str(causal_folder), data, name="stopped", method=method, **ASKED)
    assert looks == [1]
    run = ts.resume(tmp_path / "runs/stopped", progress=False)
    assert looks == [1], "what was learnt from data is kept beside the checkpoint"
    assert run.trained.resumed_at == 3 and run.trained.losses == whole.trained.losses
    assert run.delta.digest == whole.delta.digest


@pytest.mark.parametrize("method", [BY_NAME[1], BY_NAME[2]])
def test_killed_while_it_looks_a_run_begins_anew_to_the_same_delta(
    causal_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    data = jsonl(tmp_path / "data.jsonl", CHAT)
    whole = ts.tune(str(causal_folder), data, name="whole", method=method, **ASKED)
    looks = watched(monkeypatch, type(method), fail_at=1)
    with pytest.raises(KeyboardInterrupt):
        ts.tune(str(causal_folder), data, name="killed", method=method, **ASKED)
    folder = tmp_path / "runs/killed"
    assert not (folder / "start/delta.json").exists()

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:  # and once more while what it saw is being written
        m.setattr(store, "_compare", cut)
        with pytest.raises(KeyboardInterrupt):
            ts.resume(folder, progress=False)
    assert not (folder / "start/delta.json").exists()
    run = ts.resume(folder, progress=False)
    assert looks == [1, 2, 3] and run.delta.digest == whole.delta.digest
    assert run.trained.losses == whole.trained.losses


def test_a_method_that_needs_no_data_keeps_no_start(causal_folder: Path, tmp_path: Path) -> None:
    ts.tune(str(causal_folder), CHAT, name="a", method="pissa:rank=2", **ASKED)
    assert (tmp_path / "runs/a/delta").exists() and not (tmp_path / "runs/a/start").exists()


def test_a_context_is_read_from_a_file(causal_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CorDA measures on other data than it trains on."""
    facts = jsonl(tmp_path / "facts.jsonl", [{"text": "the number one is good"}, {"text": "blue is the colour"}])
    tasks: list[int] = []
    plain = starting.sample_of

    def counted(task: Any, *args: Any, **kw: Any) -> Any:
        tasks.append(len(task))
        return plain(task, *args, **kw)

    monkeypatch.setattr(starting, "sample_of", counted)
    own = ts.tune(str(causal_folder), CHAT, name="own", method=CorDA(rank=2, mode="knowledge"), **ASKED)
    assert tasks == [15]
    method = CorDA(rank=2, mode="knowledge", context=str(facts))
    run = ts.tune(str(causal_folder), CHAT, name="facts", method=method, **ASKED)
    assert tasks == [15, 15, 2]
    path = next(iter(run.delta.parts[0].kind_of))
    starts = [Delta.load(tmp_path / f"runs/{r.name}/start").parts[0].tensors(path)["B0"] for r in (own, run)]
    assert not torch.allclose(starts[0], starts[1])
    assert "context" not in own.delta.provenance
    want = {str(facts): {"digest": read(facts).digest, "rows": 2}}
    assert run.delta.provenance["context"] == want == store.peek(tmp_path / "runs/facts/delta")["provenance"]["context"]
    with pytest.raises(ts.TunesmithError, match="nowhere"):
        ts.tune(str(causal_folder), CHAT, method=CorDA(rank=2, context=str(tmp_path / "nowhere.jsonl")), **ASKED)


def test_started_gives_a_plain_delta_where_nothing_is_learnt(lm: Any, token_rows: Any) -> None:
    base, task = lm(), RowTask(token_rows(8), SFT())
    config = TrainConfig(seed=4)
    got = started(base, [ts.LoRA(rank=2)], task, config, "a", "both")
    assert got.digest == Delta.create(base, ts.LoRA(rank=2), seed=4).digest


def test_a_sample_is_the_first_batches_of_the_run(lm: Any, token_rows: Any) -> None:
    base, task = lm(), RowTask(token_rows(24), SFT())
    config = TrainConfig(batch_size=5, seed=2)
    sample = sample_of(task, config, batches=3)
    got = [b["input_ids"] for b in sample.batches()]
    want = [task.batch(i, 0)["input_ids"] for i in task.plan(5, 2, 0)[:3]]
    assert len(got) == 3 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert [b["input_ids"].shape for b in sample.batches()] == [t.shape for t in got], "anew at each call"
    batch = next(iter(sample.batches()))
    assert torch.equal(sample.loss(base, batch), task.objective.loss(base, batch))
    assert torch.equal(
        sample.run(base, batch)["logits"], base.model(batch["input_ids"], batch["attention_mask"])["logits"]
    )


def test_what_counts_is_neither_padding_nor_unlabelled(lm: Any, token_rows: Any) -> None:
    sample = sample_of(RowTask(token_rows(6), SFT()), TrainConfig(batch_size=6))
    batch = next(iter(sample.batches()))
    every, some = sample.keep(batch), sample.keep(batch, supervised=True)
    assert every is not None and some is not None
    assert torch.equal(every, batch["attention_mask"].bool()) and not every.all()
    assert torch.equal(some, batch["labels"] != -100) and int(some.sum()) == int(every.sum()) - 2 * 6
    loader = sample_of(LoaderTask([(torch.randn(2, 3), None)], lambda out, b: out.sum()), TrainConfig())
    assert loader.keep(next(iter(loader.batches()))) is None and loader.read is None


def test_padding_of_packed_rows_does_not_count(causal_folder: Path) -> None:
    base = load(str(causal_folder), dtype="fp32", device="cpu")
    rows = encode(read(CHAT[:5]), base.tokenizer, max_length=40).rows
    packed = pack(rows, 25)
    task = PackedTask(packed, SFT())
    sample = sample_of(task, TrainConfig(batch_size=len(packed)))
    batch = next(iter(sample.batches()))
    keep = sample.keep(batch)
    assert keep is not None and len(packed) > 1
    lengths = sorted(p.length for p in packed)
    assert sorted(keep.sum(1).tolist()) == lengths and lengths[0] < lengths[-1]
    assert (keep.int().diff(dim=1) <= 0).all(), "padding is at the end"
    some = sample.keep(batch, supervised=True)
    assert some is not None and not (some & ~keep).any()
