# SPDX-License-Identifier: Apache-2.0
"""SaRA against a loop written from the paper: masks, decay of the values themselves, the second phase, the penalty."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys
from tunesmith.deltas import SaRA
from tunesmith.deltas.weight.sara import nuclear_gradient
from tunesmith.train.surgery import Now

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """A convolution, a norm and linears; every tensor has small entries."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc, self.out = (
            nn.Conv2d(2, 5, 3),
            nn.GroupNorm(1, 5),
            nn.Linear(5, 7),
            nn.Linear(7, 4),
        )
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))))


@pytest.fixture
def base() -> Base:
    return Base(Net(), example=(torch.randn(2, 2, 5, 5),))


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 2, 5, 5, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(6)]


def loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def masks(base: Base, t: float) -> dict[str, Tensor]:
    return {n: (p.detach().abs() < t) for n, p in base.model.named_parameters()}


def stores(delta: Delta) -> dict[str, dict[str, Tensor]]:
    """The store of every parameter of the base, by its name."""
    out = {}
    for path in delta.parts[0].kind_of:
        t = delta.parts[0].tensors(path)
        for name, prefix in (("weight", ""), ("bias", "bias_")):
            found = {k.removeprefix(prefix): v for k, v in t.items() if k.startswith("bias_") == bool(prefix)}
            if found:
                out[f"{path}.{name}"] = found
    return out


def test_it_trains_the_entries_below_the_threshold_of_every_tensor(base: Base) -> None:
    delta = Delta.create(base, SaRA(threshold=0.1))
    want = {n: m for n, m in masks(base, 0.1).items() if m.any()}
    assert delta.trainable_parameters == sum(int(m.sum()) for m in want.values()) > 20
    got = stores(delta)
    assert set(got) == set(want) and {n.rsplit(".")[0] for n in got} >= {"conv", "fc", "out"}
    for n, m in want.items():
        assert torch.equal(got[n]["indices"], m.reshape(-1).nonzero().squeeze(1))
        assert torch.equal(
            got[n]["values"], dict(base.model.named_parameters())[n].detach().reshape(-1)[got[n]["indices"]]
        )
    only = Delta.create(base, SaRA(threshold=0.1, bias=False))
    assert only.trainable_parameters == sum(int(m.sum()) for n, m in want.items() if n.endswith("weight"))


def test_a_share_takes_the_smallest_entries_of_each_tensor(base: Base) -> None:
    for name, t in stores(Delta.create(base, SaRA(share=0.3))).items():
        p = dict(base.model.named_parameters())[name].detach().reshape(-1)
        assert len(t["indices"]) == round(0.3 * len(p))
        assert set(t["indices"].tolist()) == set(p.abs().argsort()[: len(t["indices"])].tolist())


def test_layers_without_small_weights_get_no_part(base: Base) -> None:
    with torch.no_grad():
        base.model.norm.weight.fill_(1), base.model.norm.bias.fill_(1)
    assert "norm" not in Delta.create(base, SaRA(threshold=0.1)).parts[0].kind_of
    with pytest.raises(UsageError, match="chose none"):
        Delta.create(base, SaRA(threshold=1e-12))


@pytest.mark.parametrize("which", range(4))
def test_the_first_forward_pass_is_the_bases_bit_for_bit(which: int) -> None:
    base = toys()[which]
    before = base.probe_outputs()
    delta = Delta.create(base, SaRA(share=0.4))
    assert any(name.startswith("bias") for _, name, _ in delta.parts[0].items())
    with base.using(delta):
        assert torch.equal(base.probe_outputs(), before)


def by_the_paper(
    base: Base, t: float, steps: int, lr: float, decay: float, switch: int
) -> tuple[dict[str, Tensor], Any]:
    """theta after `steps`: a vector p for each tensor, AdamW on it, frozen entries beyond t and a new AdamW after `switch`."""
    start = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    mask = {n: m for n, m in masks(base, t).items() if m.any()}
    grown: dict[str, Tensor] = {}
    theta = dict(start)
    p = {n: nn.Parameter(theta[n][m]) for n, m in mask.items()}
    optimiser = torch.optim.AdamW(p.values(), lr=lr, weight_decay=decay)
    for step, batch in zip(range(1, steps + 1), batches(), strict=False):
        full = {n: theta[n].masked_scatter(mask[n], p[n]) if n in p else theta[n] for n in theta}
        loss(torch.func.functional_call(base.model, full, (batch[0],)), batch).backward()
        optimiser.step()
        optimiser.zero_grad()
        if step == switch:
            theta = {n: theta[n].masked_scatter(mask[n], p[n].detach()) if n in p else theta[n] for n in theta}
            grown = {n: mask[n] & (theta[n].abs() >= t) for n in mask}
            mask = {n: mask[n] & (theta[n].abs() < t) for n in mask}
            p = {n: nn.Parameter(theta[n][m]) for n, m in mask.items()}
            optimiser = torch.optim.AdamW(p.values(), lr=lr, weight_decay=decay)
    return {n: theta[n].masked_scatter(mask[n], p[n].detach()) if n in p else theta[n] for n in theta}, (mask, grown)


@pytest.mark.parametrize("progressive", [0.5, 1.0])
def test_it_follows_the_papers_trajectory(base: Base, progressive: float) -> None:
    settings = {"lr": 0.01, "weight_decay": 0.3}
    run = ts.tune(
        base, batches(), method=SaRA(threshold=0.1, progressive=progressive, implicit=False), loss=loss, steps=6, batch_size=1,
        schedule="constant", warmup=0.0, clip=1e9, precision="fp32", progress=False, **settings,
    )  # fmt: skip
    want, (mask, grown) = by_the_paper(base, 0.1, 6, 0.01, 0.3, 3 if progressive < 1 else 99)
    merged = dict(base.merged(run.delta).model.named_parameters())
    first = masks(base, 0.1)
    for name, p in base.model.named_parameters():
        torch.testing.assert_close(merged[name], want[name], atol=1e-6, rtol=0)
        assert torch.equal(merged[name][~first[name]], p.detach()[~first[name]]), "entries outside M stay"
        assert (merged[name] != p)[first[name]].all()
    got = stores(run.delta)
    assert sum(int(m.sum()) for m in mask.values()) == run.delta.trainable_parameters
    if progressive < 1:
        assert sum(int(m.sum()) for m in grown.values()) > 1
    for name, t in got.items():
        inside = first[name].reshape(-1).nonzero().squeeze(1).tolist()
        assert set(t["indices"].tolist()) | set(t["settled_indices"].tolist()) == set(inside)
        if name in grown:
            assert t["settled_indices"].tolist() == grown[name].reshape(-1).nonzero().squeeze(1).tolist()


def test_the_gradient_is_that_of_the_tensors_at_their_places(base: Base) -> None:
    delta = Delta.create(base, SaRA(threshold=0.15))
    x, y = batches()[0]
    with base.frozen(), base.using(delta):
        F.cross_entropy(base.model(x), y).backward()
    twin = copy.deepcopy(base.model)
    for p in twin.parameters():
        p.requires_grad_(True)
    F.cross_entropy(twin(x), y).backward()
    dense = {n: p.grad.reshape(-1) for n, p in twin.named_parameters()}
    for name, t in stores(delta).items():
        torch.testing.assert_close(t["values"].grad, dense[name][t["indices"]], atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in base.model.parameters())


def test_saved_after_the_second_phase_it_gives_the_same_outputs(base: Base, tmp_path: Path) -> None:
    run = ts.tune(
        base, batches(), method=SaRA(threshold=0.1), loss=loss, steps=6, lr=0.02, precision="fp32", progress=False
    )
    x = torch.randn(3, 2, 5, 5)
    run.delta.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d", base)
    with torch.no_grad():
        with base.using(run.delta):
            want = base.model(x)
        with base.using(again):
            assert torch.equal(base.model(x), want)
        assert not torch.equal(base.model(x), want)


def test_the_nuclear_gradient_is_u_vt() -> None:
    W = torch.randn(9, 6, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(nuclear_gradient(W), U @ Vh)
    w = W.clone().requires_grad_()
    torch.linalg.matrix_norm(w, "nuc").backward()
    torch.testing.assert_close(nuclear_gradient(W), w.grad)
    low = torch.outer(torch.randn(9), torch.randn(6))
    torch.testing.assert_close(nuclear_gradient(low), low / low.norm(), atol=1e-5, rtol=0)
    assert not nuclear_gradient(torch.zeros(4, 3)).any()


def test_the_penalty_reaches_the_values_of_one_large_enough_matrix() -> None:
    model = nn.Sequential(nn.Linear(70, 80), nn.Tanh(), nn.Linear(80, 30), nn.Tanh(), nn.Linear(30, 66))
    base = Base(model, example=(torch.randn(2, 70),))
    method = SaRA(share=0.2, nuclear=0.5)
    part = Delta.create(base, method).parts[0]
    chosen = set()
    for step in range(1, 6):
        for _, _, p in part.items():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        now: Any = SimpleNamespace(step=step, sites=base.sites, scale=4.0)
        with torch.no_grad():
            method.before_step(part, now)
        moved = [path for path in part.kind_of if part.tensors(path)["values"].grad.any()]
        assert moved == ["0"], "only the first layer has both sides above 64"
        chosen.update(moved)
        t = part.tensors("0")
        W = torch.zeros(80 * 70).index_put((t["indices"],), t["values"].detach()).reshape(80, 70).requires_grad_()
        torch.linalg.matrix_norm(W, "nuc").backward()
        torch.testing.assert_close(t["values"].grad, 4 * 0.5 * W.grad.reshape(-1)[t["indices"]], atol=1e-5, rtol=0)
    method = SaRA(share=0.2, nuclear=0.5, smallest=20)
    picked = set()
    for step in range(1, 30):
        for _, _, p in part.items():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        with torch.no_grad():
            method.before_step(part, SimpleNamespace(step=step, sites=base.sites, scale=1.0))
        moved = [path for path in part.kind_of if part.tensors(path)["values"].grad.any()]
        assert len(moved) == 1
        picked.update(moved)
    assert picked == {"0", "2", "4"}


def test_the_penalty_lowers_the_nuclear_norm() -> None:
    base = Base(nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4)), example=(torch.randn(2, 20),))
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 20, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(4)]

    def norm(nuclear: float) -> float:
        method = SaRA(share=0.5, nuclear=nuclear, smallest=10, targets="0", progressive=1.0, implicit=False)
        run = ts.tune(base, data, method=method, loss=loss, steps=40, lr=5e-3, precision="fp32", progress=False)
        t = run.delta.parts[0].tensors("0")
        W = torch.zeros(400).index_put((t["indices"],), t["values"].detach()).reshape(20, 20)
        return float(torch.linalg.matrix_norm(W, "nuc"))

    assert norm(0.1) < 0.8 * norm(0.0)


def test_moments_start_anew_at_the_second_phase(base: Base) -> None:
    method = SaRA(threshold=0.1)
    delta = Delta.create(base, method)
    part = delta.parts[0]
    values = [p for _, _, p in part.items() if p.requires_grad]
    optimiser = torch.optim.AdamW(values, lr=0.05)
    for p in values:
        p.grad = torch.randn_like(p)
    optimiser.step()
    now = Now(part, 5, 10, 1.0, optimiser, sites=base.sites)
    assert now.state("fc", "values")
    method.after_step(part, Now(part, 4, 10, 1.0, optimiser, sites=base.sites))
    assert now.state("fc", "values"), "not before its time"
    method.after_step(part, now)
    assert not any(now.state(p, n) for p in part.kind_of for n in part.tensors(p) if n.endswith("values"))
    inside = {id(p) for g in optimiser.param_groups for p in g["params"]}
    assert {id(p) for _, _, p in part.items() if p.requires_grad} == inside


def test_the_learning_rate_follows_the_threshold() -> None:
    assert SaRA(threshold=2e-3).recipe()["lr"] == pytest.approx(5e-4, rel=0.01)
    assert SaRA(threshold=1e-4).recipe()["lr"] == pytest.approx(9.656e-4, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Argument self.mask_type")
def test_on_linear_layers_it_equals_pefts_shira_on_the_smallest_entries(llama: nn.Module, ids: Tensor) -> None:
    site = "model.layers.0.mlp.down_proj"
    m, n = 16, 24
    base = Base(llama)
    delta = Delta.create(base, SaRA(share=2 * (m + n) / (m * n), bias=False, targets=site))
    t = delta.parts[0].tensors(site)
    assert len(t["values"]) == 2 * (m + n), "as many as PEFT's rank 2 has"
    config = peft.ShiraConfig(r=2, mask_type="own", target_modules=[site])

    def smallest(layer: nn.Module, r: int, **_: Any) -> Tensor:
        W = layer.weight
        at = W.abs().reshape(-1).argsort()[: r * (m + n)]
        return torch.zeros_like(W).reshape(-1).index_fill(0, at, 1.0).reshape(W.shape)

    config.mask_fn = smallest
    want = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    move = torch.randn(len(t["values"])) * 0.3
    with torch.no_grad():
        t["values"].add_(move)
        next(p for k, p in want.named_parameters() if "shira_weight" in k).copy_(move)
        with base.using(delta):
            out = llama(input_ids=ids)[0]
        torch.testing.assert_close(out, want(input_ids=ids)[0], atol=1e-5, rtol=0)
        assert (out - llama(input_ids=ids)[0]).abs().max() > 1e-3
