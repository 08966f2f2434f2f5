# SPDX-License-Identifier: Apache-2.0
"""SoRA and AdaLoRA: their operators and schedules, PEFT's tensors, and what is left of them after pruning."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, bake
from tunesmith.core.errors import DeltaError, UsageError
from tunesmith.core.toys import toys
from tunesmith.deltas import AdaLoRA, Head, LoRA, SoRA
from tunesmith.deltas.weight.gated import ranks
from tunesmith.deltas.weight.sora import released_threshold, soft_threshold
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import _optimiser
from tunesmith.train.surgery import Now

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """Two layers whose paths end alike, a convolution and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.fc = nn.Linear(6, 5)
        self.block = nn.ModuleDict({"fc": nn.Linear(24, 6)})
        self.out = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.embed(ids)[:, None])).mean(2).flatten(1)
        return self.out(torch.tanh(self.fc(torch.tanh(self.block["fc"](x)))))


@pytest.fixture
def net() -> Base:
    return Base(Net().eval(), example=(torch.randint(0, 11, (4, 7)),), name="net")


TARGETS = "embed,conv,fc,out"


def loss_of(base: Base) -> Tensor:
    out = base.model(*base.probe())
    return (out * torch.arange(out.numel()).reshape(out.shape).sin()).sum() + out.square().sum()


# Thresholding


def test_the_proximal_operator_is_the_closed_form_and_the_minimiser() -> None:
    g, xi = torch.randn(1000), 0.3
    got = soft_threshold(g, xi)
    want = torch.where(g > xi, g - xi, torch.where(g < -xi, g + xi, torch.zeros(())))
    assert torch.equal(got, want)
    assert (got[g.abs() <= xi] == 0).all() and (got == 0).sum() > 100  # exactly, not nearly
    grid = torch.linspace(-4, 4, 8001)[:, None]
    least = grid[(0.5 * (grid - g) ** 2 + xi * grid.abs()).argmin(0), 0]
    assert (got - least).abs().max() < 1e-3
    assert torch.equal(soft_threshold(g, 0.0), g)


def test_the_published_operator_has_twice_the_dead_zone() -> None:
    g, xi = torch.randn(1000), 0.3
    by_hand = g.clone()
    by_hand[by_hand > xi] -= xi
    by_hand[by_hand < -xi] += xi
    by_hand[by_hand.abs() < xi] = 0.0
    assert torch.equal(released_threshold(g, xi), by_hand)
    between = (g.abs() > 1.01 * xi) & (g.abs() < 1.99 * xi)
    assert between.any() and (by_hand[between] == 0).all() and (soft_threshold(g, xi)[between] != 0).all()


# SoRA


def test_sora_with_gates_of_one_is_pefts_lora(net) -> None:
    delta = Delta.create(net, SoRA(rank=3, alpha=6.0, xi=0.0, eta=0.0, targets=TARGETS))
    part = delta.parts[0]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(part.kind_of))
    model = peft.get_peft_model(copy.deepcopy(net.model), config).train(False)
    pairs: list[tuple[Tensor, Tensor, bool]] = []
    with torch.no_grad():
        for path, kind in part.kind_of.items():
            t, layer = part.tensors(path), model.base_model.model.get_submodule(path)
            t["B"].normal_(std=0.3)
            t["g"].fill_(1.0)
            t["g"].requires_grad_(False)
            if kind == "embedding":  # PEFT stores an embedding's factors turned
                pairs += [(t["B"], layer.lora_embedding_A["default"], True)]
                pairs += [(t["A"], layer.lora_embedding_B["default"], True)]
            else:
                pairs += [(t[n], getattr(layer, f"lora_{n}")["default"].weight, False) for n in ("A", "B")]
        for mine, its, turned in pairs:
            its.copy_((mine.T if turned else mine).reshape(its.shape))
    with net.frozen(), net.using(delta):
        got = net.model(*net.probe())
        loss_of(net).backward()
    want = model(*net.probe())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    ((want * torch.arange(want.numel()).reshape(want.shape).sin()).sum() + want.square().sum()).backward()
    for mine, its, turned in pairs:
        assert its.grad.abs().sum() > 0
        torch.testing.assert_close(
            mine.grad, (its.grad.T if turned else its.grad).reshape_as(mine), atol=1e-5, rtol=1e-4
        )
    with torch.no_grad():
        part.method.after_step(part, SimpleNamespace(rate=1.0))
    assert all(torch.equal(part.parameter(path, "g"), torch.ones(3)) for path in part.kind_of)
    total = sum(part.method.penalty(net.sites.of(p, k), part.tensors(p)) for p, k in part.kind_of.items())
    assert float(total) == 0.0


def test_sora_starts_as_published_and_counts(net) -> None:
    delta = Delta.create(net, SoRA(rank=40, targets="fc,conv"))
    t = delta.parts[0].tensors("fc")
    assert not t["B"].any() and t["A"].abs().max() <= 6**-0.5 and 0.6 < float(t["g"].detach().std()) < 1.4
    sizes = {"conv": 4 + 9, "block.fc": 24 + 6, "fc": 6 + 5}
    assert delta.trainable_parameters == sum(40 * (n + 1) for n in sizes.values())


def test_the_penalty_is_eta_times_the_mean_gate(net) -> None:
    method = SoRA(rank=3, eta=10.0, rank_pattern={"out": 5}, targets=TARGETS)
    part = Delta.create(net, method).parts[0]
    total = sum(method.penalty(net.sites.of(p, k), part.tensors(p)) for p, k in part.kind_of.items())
    gates = torch.cat([part.parameter(p, "g") for p in part.kind_of])
    assert len(gates) == 4 * 3 + 5
    torch.testing.assert_close(total, 10 * gates.abs().mean())


def test_a_closed_gate_gets_a_gradient_and_can_open_again(net) -> None:
    method = SoRA(rank=3, xi=0.05, eta=0.0, targets="fc")
    delta = Delta.create(net, method)
    part = delta.parts[0]
    g, A, B = (part.parameter("fc", n) for n in ("g", "A", "B"))
    with torch.no_grad():
        B.normal_()
        g.copy_(torch.tensor([1.0, 0.0, 0.0]))
        B[:, 2] = 0.0
    with net.frozen(), net.using(delta):
        loss_of(net).backward()
    h: list[Tensor] = []
    hook = net.model.fc.register_forward_pre_hook(lambda m, args: h.append(args[0].detach()))
    with net.using(delta), torch.no_grad():
        net.model(*net.probe())
    hook.remove()
    change = (16 / 3) * (B * g) @ A
    whole = torch.zeros(5, 6, requires_grad=True)  # the gradient of the whole change, another way
    y = nn.functional.linear(h[0], net.model.fc.weight + change.detach() + whole, net.model.fc.bias)
    out = net.model.out(torch.tanh(y))
    ((out * torch.arange(out.numel()).reshape(out.shape).sin()).sum() + out.square().sum()).backward()
    want = (16 / 3) * torch.einsum("or,on,rn->r", B, whole.grad, A)
    torch.testing.assert_close(g.grad, want, atol=1e-4, rtol=1e-4)
    assert g.grad[1].abs() > 1e-3 and g.grad[2] == 0  # no gradient where B is zero too
    with torch.no_grad():
        g.add_(g.grad, alpha=-0.2 / float(g.grad[1].abs()))
        method.after_step(part, SimpleNamespace(rate=1.0))
    assert float(g.detach()[1].abs()) == pytest.approx(0.15, abs=1e-6) and g[2] == 0


def test_the_threshold_can_follow_the_schedule(net) -> None:
    part = Delta.create(net, SoRA(rank=3, xi=0.2, xi_schedule="rate", targets="fc")).parts[0]
    with torch.no_grad():
        part.parameter("fc", "g").fill_(1.0)
        part.method.after_step(part, SimpleNamespace(rate=0.5))
    torch.testing.assert_close(part.parameter("fc", "g").detach(), torch.full((3,), 0.9))


def test_gates_have_no_weight_decay_and_a_rate_of_their_own(net) -> None:
    delta = Delta.create(net, SoRA(rank=3, gate_lr=0.5, targets="fc"))
    groups = _optimiser(delta, TrainConfig(lr=0.1, weight_decay=0.1)).param_groups
    assert sorted((g["lr"], g["weight_decay"], len(g["params"])) for g in groups) == [(0.05, 0.0, 2), (0.1, 0.1, 4)]


# Pruning


def closed(delta: Delta, gate: str, at: dict[str, list[int]]) -> Delta:
    """Every tensor moved, the gates of some components at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, t in delta.items():
            if t.requires_grad:
                t.add_(0.4 * torch.randn(t.shape, generator=generator))
        for path, which in at.items():
            delta.parts[0].parameter(path, gate)[which] = 0.0
    return delta


@pytest.mark.parametrize(
    ("method", "gate"),
    [
        (SoRA(rank=4, targets=TARGETS, alpha_pattern={"out": 3.0}), "g"),
        (AdaLoRA(initial=4, rank=2, targets=TARGETS), "E"),
    ],
)
def test_what_is_pruned_has_no_effect_and_is_dropped(net, method, gate, tmp_path) -> None:
    delta = closed(Delta.create(net, method), gate, {"fc": [0, 2], "block.fc": [1, 2, 3], "conv": [0, 1, 2, 3]})
    with net.using(delta):
        before = net.probe_outputs()
    assert not torch.allclose(before, net.probe_outputs())
    kept = {"embed": 4, "conv": 0, "fc": 2, "block.fc": 1, "out": 4}
    assert ranks(delta.parts[0], gate) == kept
    bake(net, delta)
    part = delta.parts[0]
    assert isinstance(part.method, LoRA) and part.name == method.info.name
    assert {p: len(part.parameter(p, "A")) for p in part.kind_of} == {p: r for p, r in kept.items() if r}
    sizes = {"embed": 11 + 6, "fc": 6 + 5, "block.fc": 24 + 6, "out": 5 + 3}
    assert delta.trainable_parameters == sum(kept[p] * n for p, n in sizes.items())
    with net.using(delta):
        torch.testing.assert_close(net.probe_outputs(), before, atol=1e-6, rtol=0)
    torch.testing.assert_close(net.merged(delta).probe_outputs(), before, atol=1e-5, rtol=0)
    delta.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d", net)
    assert again.digest == delta.digest
    with net.using(again):
        torch.testing.assert_close(net.probe_outputs(), before, atol=1e-6, rtol=0)
    fresh = Delta.create(net, part.method)  # the options describe these very tensors
    assert {k: t.shape for k, t in fresh.parts[0].named_parameters()} == {
        k: t.shape for k, t in part.named_parameters()
    }


@pytest.mark.parametrize("at", range(4), ids=lambda i: toys()[i].name)
@pytest.mark.parametrize(
    ("method", "gate"),
    [(SoRA(rank=3, targets="all-weights"), "g"), (AdaLoRA(rank=2, initial=3, targets="all-weights"), "E")],
)
def test_pruning_on_every_toy(at, method, gate) -> None:
    base = toys()[at]
    delta = Delta.create(base, method)
    paths = list(delta.parts[0].kind_of)
    delta = closed(delta, gate, {paths[0]: [1], paths[-1]: [0, 1, 2]})
    with base.using(delta):
        before = base.probe_outputs()
    bake(base, delta)
    assert list(delta.parts[0].kind_of) == paths[:-1]
    with base.using(delta):
        torch.testing.assert_close(base.probe_outputs(), before, atol=1e-6, rtol=1e-6)


def test_equal_ranks_need_no_patterns(net) -> None:
    delta = Delta.create(net, SoRA(rank=3, alpha=6.0, targets="fc,out"))
    bake(net, delta)
    assert delta.parts[0].method == LoRA(rank=3, alpha=6.0, targets="fc,out")


def test_where_nothing_is_left_there_is_no_delta_but_other_parts_stay(net) -> None:
    delta = closed(Delta.create(net, SoRA(rank=2, targets="fc")), "g", {"fc": [0, 1], "block.fc": [0, 1]})
    with pytest.raises(DeltaError, match="nothing is left"):
        bake(net, delta)
    both = Delta.create(net, SoRA(rank=2, targets="out"), LoRA(rank=1, targets="fc"))
    with torch.no_grad():
        both.parts[0].parameter("out", "g").zero_()
    bake(net, both)
    assert [p.name for p in both.parts] == ["lora"]


def rows(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 11, (8, 7), generator=g) for _ in range(n)]
    return [(x, (x[:, 0] > 5).long()) for x in ids]


def crossed(out: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(out, batch[1])


def test_a_sora_run_ends_as_a_plain_lora_of_learned_ranks(net, tmp_path) -> None:
    method = SoRA(rank=6, xi=0.02, eta=1.0, targets=TARGETS)
    run = ts.tune(net, rows(), loss=crossed, method=method, epochs=6, lr=0.02, progress=False, out=tmp_path / "run")
    part = run.delta.parts[0]
    left = [len(part.parameter(p, "A")) for p in part.kind_of]
    assert isinstance(part.method, LoRA) and 0 < sum(left) < 5 * 6
    assert run.trained.losses[-1] < run.trained.losses[0]
    assert Delta.load(tmp_path / "run" / "delta", net).digest == run.delta.digest


# AdaLoRA


def pefts_adalora(base: Base, method: AdaLoRA, delta: Delta, total: int = 20) -> Any:
    """PEFT's model on a copy of the base with the delta's tensors."""
    paths = list(delta.parts[0].kind_of)
    config = peft.AdaLoraConfig(
        init_r=method.initial, target_r=method.rank, lora_alpha=method.alpha, deltaT=method.every, total_step=total,
        tinit=round(method.tinit * total), tfinal=round(method.tfinal * total), beta1=method.beta1,
        beta2=method.beta2, orth_reg_weight=method.orthogonal, target_modules=paths, lora_dropout=0.0,
    )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(base.model), config)
    with torch.no_grad():
        for path in paths:
            for name, its in pefts_tensors(model, path).items():
                its.copy_(delta.parts[0].parameter(path, name).reshape(its.shape))
    return model


def pefts_tensors(model: Any, path: str) -> dict[str, Tensor]:
    layer = model.base_model.model.get_submodule(path)
    return {name: getattr(layer, f"lora_{name}")["default"] for name in ("A", "E", "B")}


def test_adalora_is_pefts_on_copied_tensors(net) -> None:
    method = AdaLoRA(initial=3, rank=2, alpha=5.0, targets="conv,fc,out")
    delta = closed(Delta.create(net, method), "E", {"fc": [1]})
    model = pefts_adalora(net, method, delta).eval()
    with torch.no_grad(), net.using(delta):
        got = net.model(*net.probe())
        torch.testing.assert_close(got, model(*net.probe()), atol=1e-5, rtol=0)
    assert (got - net.probe_outputs()).abs().max() > 1e-2
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == delta.trainable_parameters


def test_adalora_scores_prunes_and_trains_as_peft(net) -> None:
    total, method = 20, AdaLoRA(initial=4, rank=1, tinit=0.1, tfinal=0.3, every=3, targets="conv,fc,out")
    delta = closed(Delta.create(net, method), "E", {})
    model = pefts_adalora(net, method, delta, total)
    part, paths = delta.parts[0], list(delta.parts[0].kind_of)
    mine = torch.optim.AdamW([t for _, t in delta.items() if t.requires_grad], lr=0.02)
    its = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    counts = []
    for step in range(1, total + 1):
        for p in (*mine.param_groups[0]["params"], *its.param_groups[0]["params"]):
            p.grad = None
        with net.frozen(), net.using(delta):
            loss_of(net).backward()
        out = model(*net.probe())
        ((out * torch.arange(out.numel()).reshape(out.shape).sin()).sum() + out.square().sum()).backward()
        mine.step()
        its.step()
        with torch.no_grad():
            method.after_step(part, Now(part, step, total, 1.0, mine))
        model.base_model.update_and_allocate(step)
        counts.append(sum(ranks(part, "E").values()))
        for path in paths:
            for name, value in pefts_tensors(model, path).items():
                torch.testing.assert_close(
                    part.parameter(path, name), value.reshape_as(part.parameter(path, name)), atol=2e-5, rtol=1e-4
                )
    assert counts[:2] == [16, 16] and counts[-1] == 4 and counts[13:] == [4] * 7
    # components come back between two allocations and go again, so the counts do not simply fall
    assert len(set(counts)) > 2


def test_the_budget_falls_as_pefts(net) -> None:
    from peft.tuners.adalora.layer import RankAllocator

    for tinit, tfinal, every in ((0.0, 0.0, 1), (0.1, 0.5, 10), (0.25, 0.2, 7)):
        method = AdaLoRA(initial=7, rank=3, tinit=tinit, tfinal=tfinal, every=every)
        start, end = round(tinit * 100), 100 - round(tfinal * 100)
        its = SimpleNamespace(init_bgt=35, target_bgt=15,
                              peft_config=SimpleNamespace(tinit=start, tfinal=100 - end, deltaT=every, total_step=100))  # fmt: skip
        for step in range(start + 1, end + 1):
            assert method.budget(5, step, start, end) == RankAllocator.budget_schedule(its, step)[0]


def test_the_regulariser_is_pefts_mean_over_factors(llama, ids) -> None:
    base = Base(llama)
    method = AdaLoRA(initial=3, rank=2, targets="q,down", orthogonal=0.7)
    delta = closed(Delta.create(base, method), "E", {})
    model = pefts_adalora(base, method, delta)
    labels = ids.clone()
    with base.using(delta), torch.no_grad():
        plain = base.model(input_ids=ids, labels=labels).loss
    total = sum(
        method.penalty(base.sites.of(p, k), delta.parts[0].tensors(p)) for p, k in delta.parts[0].kind_of.items()
    )
    torch.testing.assert_close(model.base_model(input_ids=ids, labels=labels).loss - plain, total, atol=1e-4, rtol=1e-4)


def test_an_adalora_run_meets_its_budget_and_resumes(net, tmp_path) -> None:
    method = AdaLoRA(initial=5, rank=2, every=2, targets=TARGETS)
    asked = {"loss": crossed, "method": method, "lr": 0.02, "steps": 20, "checkpoint_every": 3, "progress": False}
    whole = ts.tune(net, rows(), **asked)
    part = whole.delta.parts[0]
    assert sum(len(part.parameter(p, "A")) for p in part.kind_of) == 5 * 2
    for stop in (5, 13):
        out = tmp_path / str(stop)
        patch = pytest.MonkeyPatch()
        from tunesmith.train import tune as module

        plain = module.fit

        def fit(*args: Any, plain: Any = plain, stop: int = stop, **kwargs: Any) -> Any:
            def crash(step: int, loss: float) -> None:
                if step == stop:
                    raise KeyError("stop")

            return plain(*args, **kwargs, on_step=crash)

        patch.setattr(module, "fit", fit)
        with pytest.raises(KeyError):
            ts.tune(net, rows(), out=out, **asked)
        patch.undo()
        run = ts.tune(net, rows(), out=out, **asked)
        assert run.trained.resumed_at and run.trained.losses == whole.trained.losses
        assert run.delta.digest == whole.delta.digest


def test_a_head_beside_it_is_left_alone(bert, ids) -> None:
    base = Base(bert, example={"input_ids": ids})
    delta = closed(Delta.create(base, AdaLoRA.toy(), Head(classes=3)), "E", {})
    bake(base, delta)
    assert [type(p.method) for p in delta.parts] == [LoRA, Head]


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (AdaLoRA(rank=5, initial=4), "above the 4 of the start"),
        (AdaLoRA(tinit=0.6, tfinal=0.4), "no time for pruning"),
        (SoRA(rank_pattern={"nowhere": 3}), "matches none"),
    ],
)
def test_options_that_do_not_fit_are_errors(net, method, text) -> None:
    with pytest.raises(UsageError, match=text):
        Delta.create(net, method)
