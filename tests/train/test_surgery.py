# SPDX-License-Identifier: Apache-2.0
"""Tensors that change in mid-run: moments, groups, gradients, rates, checkpoints, and what several processes refuse."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.core.algebra import LowRank
from tunesmith.core.delta import Delta, Part
from tunesmith.core.errors import TrainingError, UsageError
from tunesmith.core.method import option, register
from tunesmith.deltas import LoRA, LoRARefactor
from tunesmith.train.config import TrainConfig, rate
from tunesmith.train.loop import _Loop, _optimiser
from tunesmith.train.surgery import Now

SITE = "layers.0.attention.q"
SEEN: list[dict[str, Any]] = []


@register("surgery-grower", carrier="weight")
class Grower:
    """Gains a component every `every` steps, in front of the others, and forgets one at step 7."""

    targets: str = option("q,o", "which layers")
    every: int = option(3, "steps between growths", low=1, high=100)

    def init(self, site, g):
        return {"A": 0.1 * torch.randn(2, site.shape[1], generator=g), "B": torch.zeros(site.shape[0], 2),
                "order": torch.arange(2)}  # fmt: skip

    def update(self, site, t):
        return LowRank(t["B"], t["A"], 2.0, site.shape)

    def books(self):
        return ("order",)

    def before_step(self, part: Part, now: Now) -> None:
        SEEN.append({"hook": "before", "step": now.step, "lr": now.learning_rate(SITE, "A"), "rate": now.rate})

    def after_step(self, part: Part, now: Now) -> None:
        SEEN.append({"hook": "after", "step": now.step, "optimiser": now.optimiser})
        for path in part.kind_of:
            A, B, order = (part.parameter(path, n) for n in ("A", "B", "order"))
            r = len(A)
            if now.step % self.every == 0:
                keep = torch.tensor([-1, *range(r)])
                new = 0.1 * torch.randn(1, A.shape[1])
                now.replace(path, "A", torch.cat([new, A]), keep=keep)
                now.replace(path, "B", torch.cat([torch.zeros(len(B), 1), B], 1), keep=keep, dim=1)
                now.replace(path, "order", torch.tensor([now.step, *order.tolist()]))
            if now.step == 7:
                keep = torch.arange(1, r)
                now.replace(path, "A", A[1:], keep=keep)
                now.replace(path, "B", B[:, 1:], keep=keep, dim=1)
                now.replace(path, "order", order[1:])


@pytest.fixture(autouse=True)
def _forget() -> None:
    SEEN.clear()


@pytest.fixture
def now(lm: Any) -> Now:
    """A moment after one AdamW step of a LoRA with gradients of 1, 2, 3, ... along the rank."""
    delta = Delta.create(lm(), LoRA(rank=3, targets="q"), seed=1)
    part = delta.parts[0]
    optimiser = _optimiser(delta, TrainConfig(lr=0.1))
    for _, name, p in part.items():
        ranks = torch.arange(1.0, 4.0)
        p.grad = torch.ones_like(p) * (ranks[:, None] if name == "A" else ranks)
    optimiser.step()
    return Now(part, 2, 10, 1.0, optimiser)


def in_groups(optimiser: torch.optim.Optimizer) -> list[int]:
    return [id(p) for g in optimiser.param_groups for p in g["params"]]


def test_survivors_keep_their_moments_and_newcomers_have_none(now: Now) -> None:
    for name, dim in (("A", 0), ("B", 1)):
        old = {k: v.clone() for k, v in now.state(SITE, name).items()}
        value = now.part.parameter(SITE, name).detach().clone()
        keep = torch.tensor([2, -1, 0, 1, -1])
        grown = torch.cat([value, torch.full_like(value, 7.0)], dim).index_select(dim, keep % 6)
        now.replace(SITE, name, grown, keep=keep, dim=dim)
        p, state = now.part.parameter(SITE, name), now.state(SITE, name)
        assert p.shape[dim] == 5 and torch.equal(p, grown) and p.requires_grad
        assert state["step"] == old["step"] == 1
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].shape == p.shape
            for at, before in enumerate(keep.tolist()):
                want = old[key].select(dim, before) if before >= 0 else torch.zeros_like(old[key].select(dim, 0))
                assert torch.equal(state[key].select(dim, at), want)
        assert old["exp_avg"].abs().min() > 0


def test_a_step_after_the_change_moves_survivors_as_if_nothing_had_happened(now: Now) -> None:
    part, optimiser = now.part, now.optimiser
    A = part.parameter(SITE, "A")
    alone = torch.nn.Parameter(A.detach().clone())
    twin = torch.optim.AdamW([alone], lr=0.1, weight_decay=0.0)
    twin.state[alone] = {k: v.clone() for k, v in now.state(SITE, "A").items()}
    now.replace(SITE, "A", torch.cat([torch.zeros(1, A.shape[1]), A]), keep=torch.tensor([-1, 0, 1, 2]))
    grad = torch.randn(4, A.shape[1])
    optimiser.zero_grad()
    part.parameter(SITE, "A").grad, alone.grad = grad, grad[1:].clone()
    optimiser.step()
    twin.step()
    torch.testing.assert_close(part.parameter(SITE, "A")[1:], alone.data, rtol=1e-6, atol=1e-7)


def test_every_tensor_is_in_the_optimiser_once_and_in_its_own_group(lm: Any) -> None:
    delta = Delta.create(lm(), LoRA(rank=2, targets="q,o", lr_ratio=4.0))
    optimiser = _optimiser(delta, TrainConfig(lr=0.1))
    part = delta.parts[0]
    moment = Now(part, 1, 10, 1.0, optimiser)
    for path in part.kind_of:
        for name, dim in (("A", 0), ("B", 1)):
            t = part.parameter(path, name)
            moment.replace(path, name, torch.cat([t, t], dim))
    assert sorted(in_groups(optimiser)) == sorted(id(t) for _, _, t in part.items())
    by_rate = {g["lr"]: {p.shape for p in g["params"]} for g in optimiser.param_groups}
    assert by_rate == {0.1: {(4, 16)}, 0.4: {(16, 4)}}
    assert moment.learning_rate(SITE, "A") == 0.1 and moment.learning_rate(SITE, "B") == 0.4


def test_without_keep_the_tensor_starts_anew(now: Now) -> None:
    now.replace(SITE, "A", torch.zeros(5, 16))
    assert now.state(SITE, "A") == {} and now.part.parameter(SITE, "A").grad is None
    now.reset(SITE, "B")
    assert now.state(SITE, "B") == {}
    now.reset(SITE, "B")  # nothing left to forget


def test_a_value_of_the_same_shape_stays_the_same_parameter(now: Now) -> None:
    changes: list[int] = []
    now.on_change = lambda: changes.append(1)
    A = now.part.parameter(SITE, "A")
    values, moments = A.detach().clone(), now.state(SITE, "A")["exp_avg"].clone()
    now.replace(SITE, "A", A.flip(0), keep=torch.tensor([2, 1, -1]))
    assert now.part.parameter(SITE, "A") is A and torch.equal(A, values.flip(0)) and not changes
    assert torch.equal(now.state(SITE, "A")["exp_avg"], torch.stack([moments[2], moments[1], moments[0] * 0]))
    square = torch.nn.Parameter(torch.arange(9.0).reshape(3, 3))
    now.part._parameters[now.part._index[SITE]["A"]] = square
    now.replace(SITE, "A", square.T)  # a view of the tensor it goes to
    assert torch.equal(square, torch.arange(9.0).reshape(3, 3).T)


def test_a_gradient_that_is_there_goes_along(now: Now) -> None:
    grad = now.part.parameter(SITE, "A").grad.clone()
    now.replace(SITE, "A", torch.zeros(2, 16), keep=torch.tensor([-1, 1]))
    assert torch.equal(now.part.parameter(SITE, "A").grad, torch.stack([torch.zeros(16), grad[1]]))


def test_the_new_tensor_has_the_old_ones_dtype_and_frozen_ones_stay_out(now: Now) -> None:
    now.part.put(SITE, "at", torch.arange(3), trainable=False)
    before, changes = in_groups(now.optimiser), []
    now.on_change = lambda: changes.append(1)
    now.replace(SITE, "at", torch.arange(5.0))
    found = now.part.parameter(SITE, "at")
    assert found.dtype == torch.int64 and not found.requires_grad and len(found) == 5
    assert in_groups(now.optimiser) == before and not changes
    now.replace(SITE, "A", torch.zeros(1, 16, dtype=torch.float64))
    assert now.part.parameter(SITE, "A").dtype == torch.float32 and changes == [1]
    assert in_groups(now.optimiser) != before


def test_an_emptied_tensor_can_grow_again(now: Now) -> None:
    now.replace(SITE, "A", torch.zeros(0, 16), keep=torch.empty(0, dtype=torch.int64))
    now.optimiser.step()
    now.replace(SITE, "A", torch.ones(2, 16), keep=torch.tensor([-1, -1]))
    assert now.state(SITE, "A")["exp_avg"].abs().sum() == 0
    now.part.parameter(SITE, "A").grad = torch.ones(2, 16)
    now.optimiser.step()
    assert (now.part.parameter(SITE, "A") < 1).all()


@pytest.mark.parametrize(
    ("value", "keep", "dim"),
    [
        (torch.zeros(4, 16), [0, 1, 2], 0),
        (torch.zeros(4, 15), [0, 1, 2, -1], 0),
        (torch.zeros(3, 16), [0, 1, 3], 0),
        (torch.zeros(3, 16), [0, 1, -2], 0),
        (torch.zeros(48), [0] * 48, 0),
        (torch.zeros(3, 16), [0, 1, 2], 2),
    ],
)
def test_a_map_that_does_not_fit_is_refused_and_changes_nothing(now: Now, value: Tensor, keep: Any, dim: int) -> None:
    before, state = now.part.parameter(SITE, "A").detach().clone(), dict(now.state(SITE, "A"))
    with pytest.raises(UsageError, match=SITE):
        now.replace(SITE, "A", value, keep=torch.tensor(keep), dim=dim)
    assert torch.equal(now.part.parameter(SITE, "A"), before) and now.state(SITE, "A") == state


def test_a_part_slows_itself_for_one_step_and_no_other(lm: Any, trained: Any) -> None:
    delta = Delta.create(lm(), LoRA(rank=1, targets="q"), LoRA(rank=1, targets="o"))
    optimiser = _optimiser(delta, TrainConfig(lr=0.1))
    Now(delta.parts[0], 1, 10, 1.0, optimiser).slow(0.25)
    other = Now(delta.parts[1], 1, 10, 1.0, optimiser)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.025)
    assert other.learning_rate("layers.0.attention.o", "A") == 0.1
    rates: dict[int, list[float]] = {}

    class Spy(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.setdefault(len(rates), [g["lr"] for g in self.param_groups])
            return super().step(closure)

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.optim, "AdamW", Spy)
    method = LoRARefactor(rank=2, every=3, recovery=1, balance=False)
    trained(method, LoRA(rank=1, targets="q"), steps=6, lr=0.1, schedule="constant", warmup=0.0)
    patch.undo()
    assert [r for r, _ in rates.values()] == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.1, 0.1])
    assert [r for _, r in rates.values()] == pytest.approx([0.1] * 6)


def test_growth_in_a_run(trained: Any) -> None:
    config = {"steps": 9, "schedule": "linear", "warmup": 0.2, "lr": 0.05}
    done, delta = trained(Grower(), **config)
    assert {len(delta.parts[0].parameter(p, "A")) for p in delta.parts[0].kind_of} == {4}  # + 3 and 6 and 9, - 7
    assert delta.parts[0].parameter(SITE, "order").tolist() == [9, 3, 0, 1]
    assert done.steps == 9 and done.losses[-1] < done.losses[0]
    last = SEEN[-1]["optimiser"]
    assert sorted(in_groups(last)) == sorted(id(t) for _, t in delta.items() if t.requires_grad)
    before = [s for s in SEEN if s["hook"] == "before"]
    settings = TrainConfig.build({"batch_size": 8, **config})
    assert [s["lr"] for s in before] == pytest.approx([0.05 * rate(settings, i, 9) for i in range(9)])
    assert [s["rate"] for s in before] == [rate(settings, i, 9) for i in range(9)]


class Crash(Exception):
    pass


def crash_at(step: int) -> Any:
    def on_step(at: int, loss: float) -> None:
        if at == step:
            raise Crash

    return on_step


@pytest.mark.parametrize("crash", [2, 4, 5, 7, 8, 10])
def test_a_run_killed_and_resumed_across_a_change_of_shape_is_the_run_that_never_was(
    trained: Any, tmp_path: Path, crash: int
) -> None:
    settings = {"steps": 11, "checkpoint_every": 1 if crash % 2 else 4, "lr": 0.05}
    whole, expected = trained(Grower(), **settings)
    with pytest.raises(Crash):
        trained(Grower(), **settings, out=tmp_path, on_step=crash_at(crash))
    done, delta = trained(Grower(), **settings, out=tmp_path, resume=True)
    assert done.resumed_at == {2: None, 4: None, 5: 4, 7: 6, 8: 4, 10: 8}[crash]
    assert done.losses == whole.losses
    assert delta.digest == expected.digest


def test_the_best_state_comes_back_in_the_shape_it_had(trained: Any, tmp_path: Path) -> None:
    def settings() -> dict[str, Any]:
        scores = iter([1.0, 9.0, 3.0, 4.0, 5.0])
        return {"steps": 10, "evaluate_every": 2, "score": lambda base: next(scores), "lr": 0.05}

    done, delta = trained(Grower(), **settings())
    assert done.best_step == 4
    assert delta.parts[0].parameter(SITE, "order").tolist() == [3, 0, 1]
    assert delta.parts[0].parameter(SITE, "A").shape[0] == 3 and delta.parts[0].parameter(SITE, "A").requires_grad
    with pytest.raises(Crash):
        trained(Grower(), **settings(), out=tmp_path, checkpoint_every=1, on_step=crash_at(8))
    late = iter([4.0, 5.0])
    _, again = trained(Grower(), **{**settings(), "score": lambda base: next(late)}, out=tmp_path, resume=True)
    assert again.digest == delta.digest


def test_a_changed_shape_is_for_methods_that_change_them(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        trained(LoRA(rank=2), steps=6, out=tmp_path, checkpoint_every=2, on_step=crash_at(5))
    with pytest.raises(TrainingError, match="has shape"):
        trained(LoRA(rank=3), steps=6, out=tmp_path, resume=True)


def test_several_processes_refuse_a_changed_shape() -> None:
    with pytest.raises(TrainingError, match="gradient exchange"):
        _Loop._reshaped(SimpleNamespace(world=2))  # type: ignore[arg-type]
    loop = SimpleNamespace(world=1, changed=0)
    loop._changed = lambda: setattr(loop, "changed", 1)
    _Loop._reshaped(loop)  # type: ignore[arg-type]
    assert loop.changed == 1


def test_no_hook_after_a_step_that_was_not_taken(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp16's loss scale the optimiser itself skips a step whose gradients overflow."""
    from accelerate.optimizer import AcceleratedOptimizer

    def skipped(self: Any) -> bool:
        return SEEN[-1]["step"] == 3

    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(skipped))
    _, delta = trained(Grower(), steps=5)
    assert [s["step"] for s in SEEN if s["hook"] == "before"] == [1, 2, 3, 4, 5]
    assert [s["step"] for s in SEEN if s["hook"] == "after"] == [1, 2, 4, 5]
    assert delta.parts[0].parameter(SITE, "order").tolist() == [0, 1]  # growth was due in that step


def test_no_hook_after_a_loss_that_is_not_finite(trained: Any, token_rows: Any) -> None:
    from tunesmith.objectives import SFT
    from tunesmith.train.tasks import RowTask

    class Broken(SFT):
        def loss(self, base: Any, batch: Any) -> Tensor:
            found = super().loss(base, batch)
            return found * float("nan") if len([s for s in SEEN if s["hook"] == "before"]) == 1 else found

    done, _ = trained(Grower(), steps=4, task=RowTask(token_rows(24), Broken()))
    assert [s["step"] for s in done.skipped] == [2]
    assert [s["step"] for s in SEEN if s["hook"] == "after"] == [1, 3, 4]
