# SPDX-License-Identifier: Apache-2.0
"""IncreLoRA: its score against dense autograd, its growth by formula, and runs that change shape and resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, bake
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys
from tunesmith.deltas import IncreLoRA, LoRA
from tunesmith.deltas.weight.whole_gradient import taken
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import _optimiser, fit
from tunesmith.train.surgery import Now
from tunesmith.train.tasks import LoaderTask


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.split = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.along = nn.Conv1d(4, 5, 2)
        self.fc = nn.Linear(5, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.split(torch.tanh(self.conv(self.embed(ids)[:, None])))).mean(3)
        return self.out(torch.tanh(self.fc(torch.tanh(self.along(x)).mean(2))))


EVERYTHING = "embed,conv,split,along,fc,out"


@pytest.fixture
def net() -> Base:
    torch.set_num_threads(1)
    return Base(Net().train(), example=(torch.randint(0, 11, (4, 7)),), name="net")


def loss_of(out: Tensor) -> Tensor:
    return (out * torch.arange(out.numel()).reshape(out.shape).sin()).sum() + out.square().sum()


def stirred(delta: Delta) -> Delta:
    with torch.no_grad():
        for _, t in delta.items():
            if t.requires_grad:
                t.add_(0.3 * torch.randn_like(t))
    return delta


def moment(delta: Delta, step: int = 1, total: int = 100, **kw: Any) -> Now:
    return Now(delta.parts[0], step, total, 1.0, _optimiser(delta, TrainConfig(lr=0.01)), **kw)


def active(delta: Delta) -> list[int]:
    return [len(delta.parts[0].parameter(p, "E")) for p in delta.parts[0].kind_of]


# The start and the reserve


def test_a_fresh_delta_is_the_identity_and_its_reserve_is_bounded_in_training(net) -> None:
    method = IncreLoRA(rank=4, targets=EVERYTHING)
    delta = Delta.create(net, method)
    part = delta.parts[0]
    with torch.no_grad():
        plain = net.model(*net.probe())
        with net.using(delta):
            assert torch.equal(net.model(*net.probe()), plain)
    with net.using(delta):
        assert not torch.equal(net.model(*net.probe()), plain)  # training: the reserve takes part
        assert torch.allclose(net.model(*net.probe()), plain, atol=1e-5)
        net.model.eval()
        assert torch.equal(net.model(*net.probe()), plain)
    net.model.train()
    for path, kind in part.kind_of.items():
        site, t = net.sites.of(path, kind), part.tensors(path)
        assert t["A"].shape == (1 + 2, math.prod(site.shape[1:])) and t["B"].shape == (site.shape[0], 3)
        dW = method.update(site, t).dense()
        bound = 32 * 1e-5 * (t["B"][:, 1:].abs() @ t["A"][1:].abs())
        assert dW.any() and (dW.abs().flatten(1) <= bound * (1 + 1e-5)).all()


def test_the_reserve_trains_before_it_is_used_unless_told_otherwise(net) -> None:
    for advance in (True, False):
        torch.manual_seed(0)
        delta = Delta.create(net, IncreLoRA(rank=2, targets="fc", advance=advance, orthogonal=0.0))
        with torch.no_grad():
            delta.parts[0].parameter("fc", "E").fill_(0.5)
        with net.frozen(), net.using(delta):
            loss_of(net.model(*net.probe())).backward()
        A, B, E = (delta.parts[0].parameter("fc", n) for n in ("A", "B", "E"))
        assert bool(A.grad[1].any()) is advance and bool(B.grad[:, 1].any()) is advance
        assert A.grad[0].any() and E.grad.any() and E.shape == (1,)


# The score


def test_the_score_is_that_of_the_dense_change(net) -> None:
    method = IncreLoRA(rank=2, targets=EVERYTHING)
    delta = stirred(Delta.create(net, method))
    part = delta.parts[0]
    changes = {p: method.update(net.sites.of(p, k), part.tensors(p)).dense().detach() for p, k in part.kind_of.items()}
    with net.frozen(), net.using(delta):
        loss_of(net.model(*net.probe())).backward()
    now = moment(delta)
    with torch.no_grad():
        method.before_step(part, now)
    twin = Net()
    twin.load_state_dict(net.model.state_dict())
    with torch.no_grad():
        for path, change in changes.items():
            twin.get_submodule(path).weight.add_(change)
    loss_of(twin(*net.probe())).backward()
    assert {k for k in part.kind_of.values()} == {"embedding", "conv2d", "conv1d", "linear"}
    for path, change in changes.items():
        want = (change * twin.get_submodule(path).weight.grad).abs().sum() / math.sqrt(change.numel())
        smooth = float(part.parameter(path, "sensitivity"))
        assert smooth == pytest.approx(0.15 * float(want), rel=1e-4) and smooth > 0
        assert float(part.parameter(path, "uncertainty")) == pytest.approx(0.15 * (float(want) - smooth), rel=1e-4)
        assert taken(part.parameter(path, "E")) is None  # freed
    with torch.no_grad():  # smoothed again, with no gradient at all: a layer without one scores 0
        before = {p: float(part.parameter(p, "sensitivity")) for p in part.kind_of}
        method.before_step(part, now)
        for path in part.kind_of:
            assert float(part.parameter(path, "sensitivity")) == pytest.approx(0.85 * before[path], rel=1e-5)


def test_a_gradient_that_is_zero_or_not_finite(net) -> None:
    method = IncreLoRA(rank=2, targets="fc")
    delta = stirred(Delta.create(net, method))
    for factor, want in ((0.0, 0.0), (float("nan"), 0.0)):
        with net.frozen(), net.using(delta):
            (factor * loss_of(net.model(*net.probe()))).backward()
        with torch.no_grad():
            method.before_step(delta.parts[0], moment(delta))
        assert float(delta.parts[0].parameter("fc", "sensitivity")) == want


def test_a_change_that_is_rewritten_is_watched_too(net) -> None:
    """Beside a method that forms the weight, the low-rank change is made dense; its gradient is the same."""
    found = []
    for methods in (
        (IncreLoRA(rank=2, targets="fc"),),
        (IncreLoRA(rank=2, targets="fc"), ts.DoRA(targets="fc", rank=1)),
    ):
        torch.manual_seed(3)
        delta = Delta.create(net, *methods)
        with torch.no_grad():
            delta.parts[0].parameter("fc", "E").fill_(0.5)
            if len(methods) > 1:  # row lengths of the changed weight, so that DoRA changes nothing
                t, W = delta.parts[0].tensors("fc"), net.model.fc.weight
                gates = torch.tensor([0.5, 1e-5])
                delta.parts[1].parameter("fc", "m").copy_((W + 32 / (1 + 1e-5) * (t["B"] * gates) @ t["A"]).norm(dim=1))
        with net.frozen(), net.using(delta):
            loss_of(net.model(*net.probe())).backward()
        found.append(taken(delta.parts[0].parameter("fc", "E")))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


def test_tied_weights_give_one_gradient_for_both_places() -> None:
    base = toys()[1]
    base.model.train()
    delta = stirred(Delta.create(base, IncreLoRA(rank=2, targets="embed")))
    assert delta.parts[0].alias == {"head": "embed"}
    merged = base.merged(delta).model.train()
    weight = merged.embed.weight.requires_grad_(True)
    assert merged.head.weight is weight
    loss_of(merged(**base.probe())["logits"]).backward()
    with base.frozen(), base.using(delta):
        loss_of(base.model(**base.probe())["logits"]).backward()
    # the merged weight lacks the reserve, which is about 1e-5 of the change
    torch.testing.assert_close(taken(delta.parts[0].parameter("embed", "E")), weight.grad, atol=1e-2, rtol=1e-3)


def test_micro_batches_add_up_to_the_gradient_of_the_batch(net) -> None:
    torch.manual_seed(2)
    delta = stirred(Delta.create(net, IncreLoRA(rank=2, targets="fc,conv")))
    ids = torch.randint(0, 11, (8, 7))
    gradients = []
    for parts in ([ids], [ids[:3], ids[3:]]):
        for some in parts:
            with net.frozen(), net.using(delta):
                net.model(some).sin().sum().backward()
        gradients.append({p: taken(delta.parts[0].parameter(p, "E")) for p in ("fc", "conv")})
    for path in ("fc", "conv"):
        torch.testing.assert_close(gradients[0][path], gradients[1][path], atol=1e-6, rtol=1e-5)


# Growth


@pytest.mark.parametrize(
    ("options", "sites"),
    [({"rank": 2, "top": 3}, 6), ({"rank": 3, "initial": 1, "top": 4, "add": 2}, 5), ({"rank": 6, "top": 2}, 4)],
)
def test_growth_keeps_to_its_budget_and_its_rounds(net, options, sites) -> None:
    targets = ",".join(EVERYTHING.split(",")[:sites])
    method = IncreLoRA(targets=targets, every=5, warmup=5, choice="random", **options)
    delta = Delta.create(net, method)
    target, start = method.rank * sites, method.initial * sites
    plan = method.growth(sites, 1000)
    assert plan.rounds == math.ceil((target - start) / (method.top * plan.add))
    now = moment(delta, total=1000)
    totals, grew = [], []
    for step in range(1, plan.last + 20):
        now.step = step
        with torch.no_grad():
            method.after_step(delta.parts[0], now)
        totals.append(sum(active(delta)))
        if len(totals) > 1 and totals[-1] != totals[-2]:
            grew.append(step)
        held = sorted(id(p) for g in now.optimiser.param_groups for p in g["params"])
        assert held == sorted(id(t) for _, t in delta.items() if t.requires_grad)
    assert grew == [10 + 5 * i for i in range(plan.rounds)] and max(totals) == totals[-1] == target
    for path in delta.parts[0].kind_of:  # no reserve is left
        A, B, E = (delta.parts[0].parameter(path, n) for n in ("A", "B", "E"))
        assert len(A) == len(E) == B.shape[1]


def test_the_most_important_layers_grow(net) -> None:
    method = IncreLoRA(rank=2, top=2, every=5, targets=EVERYTHING)
    delta = Delta.create(net, method)
    part = delta.parts[0]
    importance = {"embed": (1.0, 1.0), "conv": (9.0, 0.0), "split": (2.0, 3.0), "along": (0.0, 9.0), "fc": (3.0, 1.0)}
    with torch.no_grad():
        for path, (smooth, spread) in importance.items():
            part.parameter(path, "sensitivity").fill_(smooth)
            part.parameter(path, "uncertainty").fill_(spread)
        method.after_step(part, moment(delta, step=10))
    assert dict(zip(part.kind_of, active(delta), strict=True)) == {
        "embed": 1, "conv": 1, "split": 2, "along": 1, "fc": 2, "out": 1
    }  # fmt: skip


@pytest.mark.parametrize("continuous", [False, True])
def test_growth_changes_the_output_by_the_scale_alone(net, continuous) -> None:
    method = IncreLoRA(rank=4, top=1, every=5, targets="fc", continuous=continuous)
    delta = stirred(Delta.create(net, method))
    part = delta.parts[0]
    site = net.sites["fc"]
    net.model.eval()
    before = method.update(site, part.tensors("fc")).dense().detach()
    A, B = (part.parameter("fc", n).detach().clone() for n in ("A", "B"))
    now = moment(delta, step=10)
    with torch.no_grad():
        method.after_step(part, now)
    t = part.tensors("fc")
    assert active(delta) == [3] and t["E"][1:].tolist() == pytest.approx([1e-5] * 2)
    assert torch.equal(t["A"][:3], A) and torch.equal(t["B"][:, :3], B) and len(t["A"]) == 5
    shrink = 1.0 if continuous else (1 + 1e-5) / (3 + 1e-5)
    torch.testing.assert_close(method.update(site, t).dense(), before * shrink, atol=2e-4, rtol=1e-4)


def test_moments_of_survivors_stay_and_rates_follow(net) -> None:
    method = IncreLoRA(rank=2, top=1, every=2, targets="fc,out")
    delta = stirred(Delta.create(net, method))
    part, now = delta.parts[0], moment(delta)
    with net.frozen(), net.using(delta):
        loss_of(net.model(*net.probe())).backward()
    now.optimiser.step()
    kept = now.state("fc", "A")["exp_avg"].clone()
    with torch.no_grad():
        part.parameter("fc", "sensitivity").fill_(1.0)
        part.parameter("fc", "uncertainty").fill_(1.0)
        now.step = 4
        method.after_step(part, now)
    assert active(delta) == [2, 1]
    state = now.state("fc", "A")
    assert torch.equal(state["exp_avg"][:2], kept) and not state["exp_avg"][2:].any() and kept.any()
    assert now.state("fc", "E") == {}
    for group in now.optimiser.param_groups:
        group["lr"] = 0.123
    assert all(now.learning_rate("fc", n) == 0.123 for n in ("A", "B", "E"))


def test_the_schedule_of_any_run_ends_in_time(net) -> None:
    for sites in (1, 6, 36, 210):
        for total in (30, 60, 500, 7000):
            for method in (IncreLoRA(), IncreLoRA(rank=8, top=1), IncreLoRA(rank=3, add=5)):
                plan = method.growth(sites, total)
                assert plan.first >= 2 and plan.last <= total // 2 + 1, (sites, total, method, plan)
                assert plan.rounds * plan.layers * plan.add >= (method.rank - method.initial) * sites
                assert plan.layers <= sites or plan.layers == method.top
                assert [s for s in range(1, total) if plan.due(s)][: plan.rounds][-1] == plan.last
    published = IncreLoRA(every=100, warmup=100).growth(72, 6680)
    assert (published.first, published.rounds, published.last, published.layers) == (200, 24, 2500, 3)
    with pytest.raises(UsageError, match="growth would end at step 60, the run has 50"):
        run(net, IncreLoRA(every=20, top=3, targets=EVERYTHING), steps=50)
    for steps in (1, 2, 3):  # too few to grow in time, but nothing was asked for
        run(net, IncreLoRA(targets=EVERYTHING), steps=steps)
    with pytest.raises(UsageError, match="below the 3 of the start"):
        Delta.create(net, IncreLoRA(rank=2, initial=3))


# Whole runs


def batches(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 11, (8, 7), generator=g) for _ in range(n)]
    return [(x, (x[:, 0] > 5).long()) for x in ids]


def crossed(out: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(out, batch[1])


def run(base: Base, method: IncreLoRA, steps: int = 30, **kw: Any) -> tuple[Any, Delta]:
    settings = {k: kw.pop(k) for k in ("checkpoint_every", "micro_batch") if k in kw}
    config = TrainConfig.build({"steps": steps, "lr": 0.02, "precision": "fp32", **settings})
    delta = Delta.create(base, method)
    task = LoaderTask(batches(), crossed, seed=0, most=steps)
    return fit(base, delta, task, config, progress=False, **kw), delta


class Crash(Exception):
    pass


@pytest.mark.parametrize("choice", ["importance", "random"])
def test_a_run_that_grows_resumes_bit_for_bit(net, choice, tmp_path: Path) -> None:
    method = IncreLoRA(rank=2, top=2, every=4, targets=EVERYTHING, choice=choice)
    whole, expected = run(net, method)
    assert sum(active(expected)) == 12 and max(active(expected)) > 2
    assert whole.losses[-1] < whole.losses[0]
    for stop in (9, 17) if choice == "importance" else (9,):

        def crash(step: int, loss: float, stop: int = stop) -> None:
            if step == stop:
                raise Crash

        out = tmp_path / str(stop)
        with pytest.raises(Crash):
            run(net, method, checkpoint_every=3, out=out, on_step=crash)
        done, delta = run(net, method, checkpoint_every=3, out=out, resume=True)
        assert done.resumed_at and done.losses == whole.losses and delta.digest == expected.digest


def test_what_is_stored_is_a_lora_with_the_ranks_that_grew(net, tmp_path: Path) -> None:
    _, delta = run(net, IncreLoRA(rank=2, top=1, every=2, targets=EVERYTHING))
    left = dict(zip(delta.parts[0].kind_of, active(delta), strict=True))
    net.model.eval()
    with net.using(delta):
        before = net.probe_outputs()
    bake(net, delta)
    part = delta.parts[0]
    assert isinstance(part.method, LoRA) and {p: len(part.parameter(p, "A")) for p in part.kind_of} == left
    assert sum(left.values()) == 12 and len(set(left.values())) > 1
    with net.using(delta):
        torch.testing.assert_close(net.probe_outputs(), before, atol=1e-6, rtol=0)
    delta.save(tmp_path / "d")
    with net.using(Delta.load(tmp_path / "d", net)):
        torch.testing.assert_close(net.probe_outputs(), before, atol=1e-6, rtol=0)


def test_an_unfinished_growth_is_saved_and_loaded(net, tmp_path: Path) -> None:
    method = IncreLoRA(rank=2, top=1, every=2, targets="fc,out,conv,along")
    delta = Delta.create(net, method)
    now = moment(delta)
    with torch.no_grad():
        for now.step in range(1, 7):
            method.after_step(delta.parts[0], now)
    assert sum(active(delta)) == 6
    for path, k in zip(delta.parts[0].kind_of, active(delta), strict=True):
        assert len(delta.parts[0].parameter(path, "A")) == k + 1
    delta.save(tmp_path / "d")
    assert Delta.load(tmp_path / "d", net).digest == delta.digest
