# SPDX-License-Identifier: Apache-2.0
"""Settings: what is refused, the closed forms of the schedules, seeds, learning-rate groups, and which state is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import ResourceError, UsageError
from tunesmith.deltas import BitFit, Full, LoRA
from tunesmith.objectives import SFT
from tunesmith.train.config import TrainConfig, rate
from tunesmith.train.loop import _optimiser, fit
from tunesmith.train.tasks import RowTask


@pytest.mark.parametrize(
    ("key", "nearest"), [("epoch", "'epochs'"), ("learning_rate", "lr"), ("batchsize", "'batch_size'")]
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"no training setting {key!r}") as caught:
        TrainConfig.build({key: 1})
    if nearest != "lr":
        assert nearest in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0), ("epochs", float("nan")), ("epochs", float("inf")), ("epochs", "3"), ("steps", 0), ("steps", 2.5),
        ("batch_size", -1), ("batch_size", True), ("micro_batch", 0), ("lr", -1e-3), ("lr", float("nan")),
        ("lr", float("inf")), ("warmup", 1.1), ("warmup", float("nan")), ("decay", -0.1), ("clip", 0.0), ("clip", None),
        ("weight_decay", -1.0), ("betas", (0.9,)), ("betas", (0.9, 1.0)), ("betas", 0.9), ("betas", [0.9, "x"]),
        ("schedule", "cosin"), ("precision", "fp8"), ("overflow", "eror"), ("packing", 1), ("seed", "a"), ("patience", 0),
        ("checkpoint_every", 0), ("nonfinite_limit", 0), ("tracker", 3),
    ],
)  # fmt: skip
def test_a_value_out_of_range_or_of_another_type_names_its_field(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=key):
        TrainConfig.build({key: value})


def test_a_config_survives_json_and_its_digest_means_its_losses() -> None:
    config = TrainConfig(steps=5, lr=1, betas=(0.8, 0.9))
    again = TrainConfig.build(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.digest == config.digest
    assert TrainConfig(checkpoint_every=3).digest == TrainConfig().digest
    assert TrainConfig(seed=1).digest != TrainConfig().digest


def test_schedules_have_their_closed_forms() -> None:
    total, warm = 100, 10
    for step in range(total):
        ramp = (step + 1) / warm
        done = (step - warm) / (total - warm)
        for name, value in {
            "constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2,
            "wsd": 1.0 if step < 10 + 90 * 0.75 else (1 - done) / 0.25,
        }.items():  # fmt: skip
            got = rate(TrainConfig(schedule=name, warmup=0.1, decay=0.25), step, total)
            assert got == pytest.approx(ramp if step < warm else value, rel=1e-9), (name, step)


def test_schedules_without_warmup_or_with_nothing_else() -> None:
    assert rate(TrainConfig(warmup=0.0), 0, 10) == 1.0
    assert [rate(TrainConfig(warmup=1.0), s, 4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert all(
        0 < rate(TrainConfig(schedule=s, warmup=0.05), i, 3) <= 1 for s in ("cosine", "linear", "wsd") for i in range(3)
    )


def test_the_optimiser_follows_the_schedule(trained: Any) -> None:
    """The first step of Adam is as long as its rate."""
    _, slow = trained(LoRA(rank=1), steps=1, lr=1e-4, warmup=0.0)
    _, fast = trained(LoRA(rank=1), steps=1, lr=2e-4, warmup=0.0)
    b = [k for k, _ in slow.items() if k.endswith("/B")]
    a, c = dict(slow.items()), dict(fast.items())
    assert all(c[k].abs().max().item() == pytest.approx(2 * a[k].abs().max().item(), rel=1e-3) for k in b)


def test_the_same_seed_gives_the_same_delta_and_another_seed_another(trained: Any) -> None:
    (one, d1), (two, d2), (other, d3) = (trained(LoRA(rank=2), seed=s) for s in (4, 4, 5))
    assert one.losses == two.losses and d1.digest == d2.digest
    assert one.losses != other.losses and d1.digest != d3.digest


def test_lora_plus_and_methods_have_their_own_rates(lm: Any) -> None:
    base = lm()
    delta = Delta.create(base, LoRA(rank=1, lr_ratio=8.0), BitFit())
    groups: dict[float, set[int]] = {}
    for g in _optimiser(delta, TrainConfig(lr=1e-3)).param_groups:
        groups.setdefault(g["peak"], set()).update(id(p) for p in g["params"])
    assert sorted(groups) == pytest.approx([1e-3, 8e-3])
    factors = {id(t) for path, name, t in delta.part("lora").items() if name == "B"}
    assert groups[max(groups)] == factors
    assert sum(map(len, groups.values())) == len(list(delta.items()))


def test_the_state_with_the_lowest_validation_loss_is_kept(trained: Any, token_rows: Any, tmp_path: Path) -> None:
    """A rate that overshoots makes later states worse; the delta must be that of the recorded minimum."""
    seen: dict[int, str] = {}
    held: dict[str, Delta] = {}

    def score(base: Base) -> float:
        from tunesmith.core.apply import current

        delta = current(base).stack[0].delta
        held["delta"] = delta
        seen[len(seen) + 1] = delta.digest
        return [0.2, 0.9, 0.9, 0.1, float("nan"), 0.3][len(seen) - 1]

    done, delta = trained(LoRA(rank=2), steps=6, evaluate_every=1, score=score, out=tmp_path)
    assert done.best_step == 2 and delta.digest == seen[2] and len(set(seen.values())) == 6
    assert [-v for _, v in done.validation][:4] == [0.2, 0.9, 0.9, 0.1]
    values = [
        json.loads(l)["validation"] for l in (tmp_path / "log.jsonl").read_text().splitlines() if "validation" in l
    ]
    assert values[:2] == [-0.2, -0.9] and values[4] is None


def test_validation_loss_picks_its_minimum_and_the_kept_delta_has_it(trained: Any, lm: Any) -> None:
    from tunesmith.train.loop import mean_loss

    same = [[{"input_ids": [token] * 6, "labels": [token] * 6} for _ in range(8)] for token in (3, 5)]
    base, held = lm(), RowTask(same[1], SFT())  # the better it learns to say 3, the less it says 5
    done, delta = trained(LoRA(rank=2), base=base, rows=same[0], steps=12, lr=0.1, evaluate_every=2, validation=held)
    steps, losses = zip(*done.validation, strict=True)
    assert steps == (2, 4, 6, 8, 10, 12)
    assert done.best_step == steps[losses.index(min(losses))] != 12
    with base.using(delta), base.evaluating():
        assert mean_loss(base, held, TrainConfig()) == pytest.approx(min(losses), rel=1e-6)


def test_a_first_validation_that_is_nan_does_not_win(trained: Any) -> None:
    values = iter([float("nan"), 1.0, 2.0])
    done, _ = trained(LoRA(rank=1), steps=3, evaluate_every=1, score=lambda base: next(values))
    assert done.best_step == 3


def test_patience_stops_early(trained: Any) -> None:
    values = iter([3.0, 2.0, 2.5, 1.0, 9.0])
    done, _ = trained(LoRA(rank=1), steps=10, evaluate_every=2, patience=2, score=lambda base: next(values))
    assert done.stopped_early and done.steps == 6 and done.best_step == 2


def test_validation_is_scored_once_per_epoch_unless_told(trained: Any, token_rows: Any) -> None:
    done, _ = trained(LoRA(rank=1), steps=7, rows=token_rows(24), validation=RowTask(token_rows(4), SFT()))
    assert [s for s, _ in done.validation] == [3, 6, 7]


@pytest.mark.parametrize("setting", [{"patience": 2}, {"evaluate_every": 2}])
def test_what_needs_validation_says_so_before_training(trained: Any, setting: dict[str, int]) -> None:
    def never(step: int, loss: float) -> None:
        raise AssertionError("trained before it complained")

    with pytest.raises(UsageError, match="needs validation data or a score"):
        trained(LoRA(rank=1), on_step=never, **setting)


def test_trackers_are_checked_and_write(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'tensorboard'"):
        trained(LoRA(rank=1), tracker="tensorbord")
    from accelerate import tracking

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ResourceError, match="not installed"):
        trained(LoRA(rank=1), tracker="tensorboard", out=tmp_path)


def test_without_progress_nothing_is_printed(trained: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained(LoRA(rank=1), out=tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    trained(LoRA(rank=1), out=tmp_path / "b", progress=True)
    printed = capfd.readouterr()
    assert printed.out == "" and "step 4/4" in printed.err and "tokens/s" in printed.err


def test_nothing_to_train_on_is_refused(lm: Any) -> None:
    base = lm()
    with pytest.raises(UsageError, match="nothing to train on"):
        fit(base, Delta.create(base, LoRA(rank=1)), RowTask([], SFT()), TrainConfig(), progress=False)


def test_every_method_names_a_learning_rate_of_its_own() -> None:
    from tunesmith.core.method import methods
    from tunesmith.train.loop import default_lr

    rates = {m.name: default_lr(m.cls()) for m in methods() if m.cls.__module__.startswith("tunesmith.deltas")}
    assert all(hasattr(m.cls, "recipe") for m in methods() if m.name in rates)
    assert rates["full"] < rates["lora"] < rates["ia3"] < rates["prompt-tuning"]


def test_what_trains_can_be_held_in_bf16(trained: Any, tmp_path: Path) -> None:
    """Losses stay near those in fp32, moments are bf16 too, a resumed run goes on bit for bit, and the delta keeps the format."""
    wide, _ = trained(Full(), steps=6, precision="fp32", state="fp32")
    half, delta = trained(Full(), steps=6, precision="fp32", state="bf16", out=tmp_path / "a", checkpoint_every=2)
    assert half.losses != wide.losses and half.losses == pytest.approx(wide.losses, rel=0.03)
    assert {t.dtype for _, t in delta.items() if t.requires_grad} == {torch.bfloat16}
    newest = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        trained(Full(), steps=6, state="bf16", out=newest, checkpoint_every=2, on_step=stop_after(4))
    again, resumed = trained(Full(), steps=6, state="bf16", out=newest, checkpoint_every=2, resume=True)
    assert again.losses == half.losses
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(delta.items(), resumed.items(), strict=True))


def stop_after(steps: int) -> Any:
    def on_step(step: int, loss: float) -> None:
        if step == steps:
            raise KeyboardInterrupt

    return on_step
