# SPDX-License-Identifier: Apache-2.0
"""Methods that first make a new base, in one call: what is kept, what trains, resuming, and using the result later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith as ts
from tunesmith.core.delta import Delta
from tunesmith.core.errors import Interrupted, UsageError
from tunesmith.derive import FactoredLinear, QuantLinear, loftq, lq_lora
from tunesmith.train.derived import parse_method, parted
from tunesmith.train.plan import plan

CHAT = [{"prompt": p, "response": r} for p, r in [("red", "one"), ("green", "two two"), ("blue", "three")] * 5]
ASKED: dict[str, Any] = {
    "receipt": False, "progress": False, "steps": 4, "batch_size": 4, "lr": 1e-2, "precision": "fp32",
    "checkpoint_every": 2,
}  # fmt: skip
LQ = "lq-lora:rank=2,bits=4,block=[16],budget=0"
RECIPES = [LQ, "loftq:rank=2,block=16", "pela:ratio=1.2,steps=3,smallest=4", "quantise:block=[16]"]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "runs"))


@pytest.mark.parametrize("text", RECIPES, ids=lambda t: t.partition(":")[0])
def test_one_call_makes_the_base_trains_on_it_and_opens_again(causal_folder: Path, tmp_path: Path, text: str) -> None:
    run = ts.tune(str(causal_folder), CHAT, name="a", method=text, **ASKED)
    place = tmp_path / "runs/a"
    base = ts.load(place / "base")
    kind = FactoredLinear if text.startswith("pela") else QuantLinear
    assert sum(isinstance(m, kind) for m in base.model.modules()) > 3
    assert base.source["derived"][0]["recipe"] == text.partition(":")[0]
    assert json.loads((place / "run.json").read_text())["model"] == str(place / "base")
    assert run.delta.parts[0].info.name == ("full" if text.startswith("pela") else "lora")
    again = Delta.load(place / "delta", base)
    ids = {"input_ids": torch.arange(3, 11)[None]}
    with torch.no_grad(), run.base.using(run.delta), base.using(again):
        assert torch.equal(run.base.model(**ids).logits, base.model(**ids).logits)
    losses = run.trained.losses
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("text", "by_hand"), [(LQ, lq_lora), (RECIPES[1], loftq)], ids=["lq-lora", "loftq"])
def test_training_starts_at_the_error_of_packing(causal_folder: Path, tmp_path: Path, text: str, by_hand: Any) -> None:
    run = ts.tune(str(causal_folder), CHAT, name="a", method=text, **{**ASKED, "steps": 1, "lr": 1e-5})
    base = ts.load(tmp_path / "runs/a/base")
    got = run.delta
    options = {"bits": (4,), "block": (16,), "budget": 0.0} if by_hand is lq_lora else {"block": 16}
    packed, want = by_hand(ts.load(str(causal_folder)), 2, **options)
    assert packed.fingerprint.digest == base.fingerprint.digest
    for (key, a), (_, b) in zip(got.items(), want.items(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=key)
    assert any(t.abs().max() > 1e-3 for k, t in got.items() if k.endswith("/B")), "it is no fresh LoRA"


def test_a_run_that_was_stopped_goes_on_to_the_same_delta(
    causal_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.train import tune as module

    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in CHAT))
    whole = ts.tune(str(causal_folder), str(data), name="whole", method=LQ, **ASKED)
    plain = module.fit

    def fit(*args: Any, **kw: Any) -> Any:
        def stop(step: int, loss: float) -> None:
            if step == 3:
                raise KeyboardInterrupt

        return plain(*args, **kw, on_step=stop)

    with monkeypatch.context() as m, pytest.raises((Interrupted, KeyboardInterrupt)):
        m.setattr(module, "fit", fit)
        ts.tune(str(causal_folder), str(data), name="cut", method=LQ, **ASKED)
    run = ts.resume(tmp_path / "runs/cut", progress=False)
    assert run.trained.losses[-1] == whole.trained.losses[-1]
    for (_, a), (_, b) in zip(run.delta.items(), whole.delta.items(), strict=True):
        assert torch.equal(a, b)


def test_another_run_on_the_kept_base_begins_where_the_first_did(causal_folder: Path, tmp_path: Path) -> None:
    first = ts.tune(str(causal_folder), CHAT, name="a", method=LQ, **ASKED)
    again = ts.tune(str(tmp_path / "runs/a/base"), CHAT, name="b", **ASKED)
    assert again.trained.losses == first.trained.losses
    other = ts.tune(str(tmp_path / "runs/a/base"), CHAT, name="c", method="lora:rank=3", **ASKED)
    assert other.trained.losses != first.trained.losses


def test_data_goes_into_it_where_it_is_asked_for(causal_folder: Path, tmp_path: Path) -> None:
    found = {}
    for name, text in (("plain", LQ), ("fisher", LQ + ",fisher=true")):
        ts.tune(str(causal_folder), CHAT, name=name, method=text, **{**ASKED, "steps": 1})
        found[name] = ts.load(tmp_path / f"runs/{name}/base").source["derived"][0]
    assert found["plain"]["digest"] != found["fisher"]["digest"]
    assert found["fisher"]["not_repeatable"] == "data went into it" and found["plain"]["not_repeatable"] is None


def test_what_cannot_be_named_is_told(causal_folder: Path) -> None:
    with pytest.raises(UsageError, match="unknown method 'lq-lorra'.*\n.*lq-lora"):
        parse_method("lq-lorra")
    with pytest.raises(UsageError, match="does not say what trains"):
        parse_method("sparsify:share=0.5")
    with pytest.raises(UsageError, match="before any method"):
        parted(["lora", LQ])
    with pytest.raises(UsageError, match="brings its own start"):
        ts.tune(str(causal_folder), CHAT, name="x", method=[LQ, "dora"], **ASKED)
    with pytest.raises(UsageError, match="known once it is made"):
        plan(str(causal_folder), CHAT, method=LQ)
    assert parted("lora") == (None, "lora") and parted(None) == (None, None)
