# SPDX-License-Identifier: Apache-2.0
"""Trials by Ray give what one process gives; what goes wrong in a worker is told; workers open the same base."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tunesmith as ts
from tunesmith.arena.compare import run_compare
from tunesmith.arena.executors import InProcess, Place, Ray, arena_at
from tunesmith.arena.trials import Arena, Trial, split
from tunesmith.core.base import Base
from tunesmith.core.errors import BaseMismatch, DataError, ResourceError, UsageError
from tunesmith.data import Dataset
from tunesmith.derive import Quantise, derive, save_derived
from tunesmith.train.config import TrainConfig

QUICK: dict[str, Any] = {"budget": 600, "epochs": 1, "precision": "fp32", "seeds": 2, "lrs": [3e-2, 1e-1]}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def folder(writer: Base, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with the tokenizer of the other tests, as files: what a worker can open."""
    from model_folders import llama

    place = llama(tmp_path_factory.mktemp("models") / "tiny", vocab_size=40)
    writer.tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all tests here, which is what `Ray` finds running; starting one takes seconds."""
    import os

    from tunesmith.arena.executors import _PRIVATE, STORE_BYTES

    before = dict(os.environ)
    os.environ.update(_PRIVATE)
    import ray

    ray.init(address="local", num_cpus=2, object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


def _make(folder: str, chats: Dataset) -> functools.partial[Arena]:
    config = TrainConfig(precision="fp32", warmup=0.1)
    return functools.partial(arena_at, Place.of(ts.load(folder)), split(chats, None, None), config, None, None)


def _trials() -> list[Trial]:
    method = ts.LoRA(rank=2)
    return [Trial("lora", method, lr, 0, 5) for lr in (1e-3, 1e-2)]


def _listeners() -> set[str]:
    """Local addresses, in the kernel's hexadecimal, that something listens on."""
    lines = [x for f in ("tcp", "tcp6") for x in Path(f"/proc/net/{f}").read_text().splitlines()[1:]]
    return {w[1] for w in (x.split() for x in lines) if w[3] == "0A"}


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    kept = ("label", "lr", "lr_trials", "steps", "target", "retention", "seeds", "scores", "trainable", "stored")
    rows = [{k: r[k] for k in kept} for r in found["rows"]]
    return sorted(rows, key=lambda r: r["label"])


def test_workers_need_ray(encoder: Base, topics: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError, match=r"tunesmith\[ray\]"):
        Ray(lambda: Arena(encoder, split(topics, None, None), TrainConfig()), 2)


def test_workers_need_a_base_with_a_name(encoder: Base, topics: Dataset) -> None:
    with pytest.raises(UsageError, match="by its name"):
        run_compare(encoder, topics, methods="head", workers=2, **QUICK)


def test_a_worker_opens_the_same_base_or_none(folder: str, tmp_path: Path) -> None:
    base = ts.load(folder, dtype="bfloat16")
    place = Place.of(base)
    assert place.open().fingerprint.digest == base.fingerprint.digest and place.dtype == "bfloat16"
    with pytest.raises(BaseMismatch, match="another base"):
        dataclasses.replace(place, fingerprint="0" * 64).open()
    small = derive(ts.load(folder), Quantise())
    with pytest.raises(UsageError, match="by its name"):
        Place.of(small)
    saved = save_derived(small, tmp_path / "small")
    assert Place.of(ts.load(saved)).open().fingerprint.digest == small.fingerprint.digest


@needs_ray
def test_a_cluster_of_its_own_listens_on_the_loopback_and_is_stopped(folder: str, chats: Dataset) -> None:
    import ray

    assert not ray.is_initialized(), "this test comes before those that share a cluster"
    before = _listeners()
    make = _make(folder, chats)
    spread = Ray(make, 2)
    try:
        new = {a.rsplit(":", 1)[0] for a in _listeners() - before}
        loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
        assert new and new <= loopback
        found = {t.lr: r["dev"] for t, r in spread.run(_trials())}
        assert found == {t.lr: r["dev"] for t, r in InProcess(make()).run(_trials())}
        assert spread.lanes(3) == 1.5 and InProcess(make()).lanes(3) == 1
    finally:
        spread.close()
    assert not ray.is_initialized()


@needs_ray
def test_comparing_by_ray_gives_the_rows_of_one_process(folder: str, chats: Dataset, cluster: None) -> None:
    here, there = (run_compare(folder, chats, methods="lora:rank=2,ia3", workers=n, **QUICK) for n in (1, 2))
    assert _rows(here) == _rows(there)
    assert [(c["name"], c["value"]) for c in here["controls"]] == [(c["name"], c["value"]) for c in there["controls"]]


@needs_ray
def test_what_goes_wrong_in_a_worker_is_told(folder: str, chats: Dataset, cluster: None) -> None:
    def broken() -> Arena:
        raise DataError("no rows", where="here", hint="give rows")

    with pytest.raises(DataError, match="no rows") as told:
        Ray(broken, 1)
    assert (told.value.where, told.value.hint) == ("here", "give rows")
    spread = Ray(_make(folder, chats), 1)
    try:
        spread.ray.kill(spread.actors[0])
        with pytest.raises(ResourceError, match="a worker died"):
            list(spread.run(_trials()))
    finally:
        spread.close()
