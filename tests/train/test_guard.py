# SPDX-License-Identifier: Apache-2.0
"""What must move moves, what must not does not, and a value that is not finite is found, skipped and counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import TrainingError, UsageError
from tunesmith.deltas import BitFit, LoRA, SoRA
from tunesmith.train.config import TrainConfig
from tunesmith.train.guard import checksum
from tunesmith.train.loop import fit
from tunesmith.train.tasks import LoaderTask


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.aside, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) + 0.0 * self.aside(x).detach())


def batches(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 4, generator=g), torch.randn(3, 2, generator=g)) for _ in range(n)]


def mse(y: Tensor, batch: Any) -> Tensor:
    return nn.functional.mse_loss(y, batch[1])


def go(net: nn.Module, data: Any, *methods: Any, loss: Any = mse, **settings: Any) -> tuple[Any, Delta, Base]:
    base = Base(net, example=(torch.zeros(1, 4),))
    delta = Delta.create(base, *methods)
    extra = {k: settings.pop(k) for k in ("out", "resume") if k in settings}
    config = TrainConfig(**{"steps": 4, "lr": 1e-2, "precision": "fp32", **settings})
    return fit(base, delta, LoaderTask(data, loss), config, progress=False, **extra), delta, base


@pytest.mark.parametrize("size", [1e-7, 1.0])
def test_a_base_parameter_that_moves_is_caught(size: float) -> None:
    class Leaky(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.first.weight.data[0, 0] += size
            return super().forward(x)

    with pytest.raises(TrainingError, match=r"first\.weight: 1 frozen tensors of the base moved"):
        go(Leaky(), batches(), LoRA(rank=1, targets="last"))


def test_a_base_buffer_that_moves_late_is_caught() -> None:
    class Counting(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += self.training
            if type(self).calls == 4:
                self.count += 1
            return super().forward(x)

    with pytest.raises(TrainingError, match="count: 1 frozen tensors of the base moved"):
        go(Counting(), batches(), LoRA(rank=1, targets="last"))


def test_a_tensor_that_the_loss_does_not_reach_is_named() -> None:
    with pytest.raises(TrainingError, match=r"lora/aside/[AB].*1?.*did not move") as caught:
        go(Net(), batches(), LoRA(rank=1, targets="first,aside"))
    assert "first" not in str(caught.value)


def test_a_site_that_an_earlier_training_pruned_for_good_may_stay_still() -> None:
    base = Base(Net(), example=(torch.zeros(1, 4),))
    delta = Delta.create(base, SoRA(rank=2, alpha=4.0, xi=0.02, targets="first,last"))
    config = TrainConfig(steps=4, lr=1e-2, precision="fp32")
    fit(base, delta, LoaderTask(batches(), mse), config, progress=False)
    pruned = delta.part("sora").parameter("first", "g")
    with torch.no_grad():
        pruned.zero_()
    fit(base, delta, LoaderTask(batches(), mse), config, progress=False)
    assert not pruned.any()


def test_a_loss_that_no_trainable_tensor_reaches_is_refused() -> None:
    with pytest.raises(TrainingError, match="does not depend on anything that trains"):
        go(Net(), batches(), LoRA(rank=1, targets="first"), loss=lambda y, b: mse(y, b).detach())
    with pytest.raises(TrainingError, match="does not depend"):
        go(Net(), batches(), LoRA(rank=1, targets="aside"))


def test_a_learning_rate_of_zero_passes_and_moves_nothing() -> None:
    done, delta, base = go(Net(), batches(), LoRA(rank=1, targets="first"), lr=0.0)
    fresh = Delta.create(base, LoRA(rank=1, targets="first"))
    assert delta.digest == fresh.digest and done.steps == 4


def test_a_frozen_tensor_of_the_delta_that_moves_is_caught() -> None:
    base = Base(Net(), example=(torch.zeros(1, 4),))
    delta = Delta.create(base, LoRA(rank=1, targets="first"), BitFit(targets="last"))
    frozen = delta.part("bitfit").tensors("last")["bias" if "bias" in delta.part("bitfit").tensors("last") else "b"]
    frozen.requires_grad_(False)

    def loss(y: Tensor, batch: Any) -> Tensor:
        frozen.data.add_(1e-3)
        return mse(y, batch)

    with pytest.raises(TrainingError, match=r"bitfit/last/.*frozen tensors of the delta moved"):
        fit(base, delta, LoaderTask(batches(), loss), TrainConfig(steps=3, precision="fp32"), progress=False)


def test_a_delta_without_trainable_tensors_is_refused() -> None:
    base = Base(Net(), example=(torch.zeros(1, 4),))
    delta = Delta.create(base, LoRA(rank=1, targets="first"))
    for _, t in delta.items():
        t.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        fit(base, delta, LoaderTask(batches(), mse), TrainConfig(steps=3, precision="fp32"), progress=False)


def test_the_base_is_as_it_was_after_training_and_after_a_failure(lm: Any, trained: Any) -> None:
    base = lm()
    base.model.train()
    next(base.model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in base.model.parameters()], [m.training for m in base.model.modules()]
    digest = base.digest()
    trained(LoRA(rank=1), base=base)
    with pytest.raises(ZeroDivisionError):
        trained(LoRA(rank=1), base=base, on_step=lambda step, loss: 1 / 0)
    assert base.digest() == digest
    assert flags == ([p.requires_grad for p in base.model.parameters()], [m.training for m in base.model.modules()])
    assert not any("forward" in m.__dict__ for m in base.model.modules()) and base.active == []


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
def test_a_checksum_sees_the_smallest_change(dtype: torch.dtype) -> None:
    t = torch.ones(5, 7).to(dtype)
    before = checksum(t)
    assert checksum(t.clone()) == before
    t.view(torch.uint8)[2, 3] ^= 1
    assert checksum(t) != before


def test_a_poisoned_batch_is_skipped_counted_and_named(tmp_path: Path) -> None:
    data = batches(6)
    data[3] = (torch.full((3, 4), float("nan")), data[3][1])
    done, delta, _ = go(Net(), data, LoRA(rank=1, targets="first,last"), steps=6, out=tmp_path)
    (event,) = done.skipped
    assert event["rows"] == [3] and event["step"] == 4 and event["layer"] == "layer first"
    assert math.isnan(done.losses[3]) and all(math.isfinite(v) for i, v in enumerate(done.losses) if i != 3)
    assert all(torch.isfinite(t).all() for _, t in delta.items())

    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))

    log = [strict(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"nonfinite": event} in log and sum(r.get("step") == 4 and r["loss"] is None for r in log) == 1


def test_the_row_of_a_batch_is_named(trained: Any, token_rows: Any, lm: Any) -> None:
    """Token 36 has an embedding that is not finite; one row of eight holds it."""
    rows = [{k: [min(v, 35) for v in r[k]] for k in r} for r in token_rows(8)]
    rows[5]["input_ids"][1] = 36
    base = lm()
    base.model.embed.weight.data[36] = float("inf")
    with pytest.raises(TrainingError, match=r"3 steps in a row were not finite") as caught:
        trained(LoRA(rank=1), base=base, rows=rows, steps=9)
    assert "rows [5]" in str(caught.value) and "layer embed" in str(caught.value)


def test_a_layer_with_a_weight_that_is_not_finite_is_located(trained: Any, lm: Any) -> None:
    base = lm()
    base.model.layers[1].gate.weight.data[3, 3] = float("nan")
    with pytest.raises(TrainingError, match="layer layers.1.gate"):
        trained(LoRA(rank=1), base=base)


def test_training_stops_after_k_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    data = batches(6)
    for i in (3, 4, 5):
        data[i] = (torch.full((3, 4), 1e38), data[i][1])
    good, expected, _ = go(
        Net(), data[:3], LoRA(rank=1, targets="first,last"), steps=3, schedule="constant", warmup=0.0
    )
    base = Base(Net(), example=(torch.zeros(1, 4),))
    delta = Delta.create(base, LoRA(rank=1, targets="first,last"))
    config = TrainConfig(steps=6, lr=1e-2, precision="fp32", schedule="constant", warmup=0.0, nonfinite_limit=2)
    huge = lambda y, b: (y * b[0][:, :2]).square().mean()  # noqa: E731
    with pytest.raises(TrainingError, match="2 steps in a row were not finite"):
        fit(
            base,
            delta,
            LoaderTask(data, lambda y, b: huge(y, b) if b[0].max() > 1e30 else mse(y, b)),
            config,
            out=tmp_path,
            progress=False,
        )
    assert delta.digest == expected.digest
    from tunesmith.train import checkpoint

    path = checkpoint.newest(tmp_path / "checkpoint")
    assert path is not None
    tensors, state = checkpoint.read(path)
    assert state["trained"]["losses"][:3] == good.losses and len(state["trained"]["skipped"]) == 2
    for key, t in expected.items():
        assert torch.equal(tensors[f"delta/{key}"], t)


def test_a_good_step_resets_the_count() -> None:
    data = batches(8)
    for i in (1, 2, 4, 5):
        data[i] = (torch.full((3, 4), float("nan")), data[i][1])
    done, _, _ = go(Net(), data, LoRA(rank=1, targets="first,last"), steps=8)
    assert [e["rows"] for e in done.skipped] == [[1], [2], [4], [5]]
