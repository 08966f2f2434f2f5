# SPDX-License-Identifier: Apache-2.0
"""Pivotal tuning: the trial leaves W alone, its gradient is W * dL/dW_eff, and only the chosen entries and rows change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys
from tunesmith.deltas import PivotalTuning, TrainableTokens
from tunesmith.deltas.weight.ppt import MaskProbe
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.sample import sample_of, started
from tunesmith.train.tasks import LoaderTask


def base_and_task(seed: int = 0) -> tuple[Base, LoaderTask]:
    base = toys()[0]
    ids = torch.randint(0, 37, (24, 7), generator=torch.Generator().manual_seed(seed))
    ids[:, 2] = 36  # the identifier of the concept
    data = [{"input_ids": ids[i : i + 4], "labels": ids[i : i + 4].flip(1)} for i in range(0, 24, 4)]

    def loss(out: Any, batch: Any) -> Tensor:
        return F.cross_entropy(out["logits"].flatten(0, 1), batch["labels"].flatten())

    return base, LoaderTask(data, loss, seed=seed)


CONFIG = TrainConfig(steps=20, lr=1e-3, precision="fp32", seed=0, weight_decay=0.2)


def test_the_trial_leaves_the_weights_and_chooses_the_largest_moves() -> None:
    base, task = base_and_task()
    before = base.digest()
    method = PivotalTuning(density=0.05, trial=0.5)
    delta = started(base, [method], task, CONFIG, "d", "both")
    assert base.digest() == before
    sites = base.sites.select("attention", ("linear",))
    total = sum(s.module.weight.numel() for s in sites)
    assert delta.trainable_parameters == round(0.05 * total)
    probe = sample_of(task, CONFIG).trained(base, [MaskProbe("attention", 100.0)], 0.5).parts[0]
    moves = {s.path: (probe.parameter(s.path, "D").detach() - 1).abs() for s in sites}
    least = torch.cat([m.flatten() for m in moves.values()]).topk(delta.trainable_parameters).values[-1]
    for path in delta.parts[0].kind_of:
        got = delta.parts[0].tensors(path)["indices"]
        assert (moves[path].flatten()[got] >= least).all()
    assert len(delta.parts[0].kind_of) > 1, "the share is over all layers together"


def test_score_change_weighs_by_the_weight() -> None:
    base, task = base_and_task()
    by = {s: started(base, [PivotalTuning(entries=40, score=s)], task, CONFIG, "d", "both") for s in ("mask", "change")}

    def mean(delta: Delta) -> float:
        part = delta.parts[0]
        at = [base.modules[p].weight.flatten()[part.tensors(p)["indices"]].abs() for p in part.kind_of]  # type: ignore[union-attr]
        return float(torch.cat(at).detach().mean())

    assert mean(by["change"]) > 1.5 * mean(by["mask"])


def test_gradient_of_the_mask() -> None:
    """dL/dD = W * dL/dW_eff."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4), torch.randn(7, 5)
    base = Base(nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)), example=(x,))
    delta = Delta.create(base, MaskProbe("0", 1.0))
    D = delta.parts[0].parameter("0", "D")
    assert torch.equal(D, torch.ones(4, 5))
    with torch.no_grad():
        D.mul_(torch.rand(4, 5) + 0.5)
    with base.frozen(), base.using(delta):
        base.model(x).square().sum().backward()
    effective = (D.detach() * layer.weight.detach()).requires_grad_()
    base.model[1:](F.linear(x, effective, layer.bias)).square().sum().backward()  # type: ignore[index]
    torch.testing.assert_close(D.grad, layer.weight.detach() * effective.grad)  # type: ignore[operator]
    assert layer.weight.grad is None or not layer.weight.grad.any()


def test_a_still_mask_does_not_count_decay_as_movement() -> None:
    """Weight decay must not move D: entries that no gradient reaches keep D at 1."""
    base, task = base_and_task()
    with torch.no_grad():
        base.model.layers[0].attention.o.weight[0, :] = 0.0  # type: ignore[union-attr,operator,index]
    config = TrainConfig(**{**CONFIG.to_dict(), "betas": (0.9, 0.999), "weight_decay": 0.5})
    part = sample_of(task, config).trained(base, [MaskProbe("o", 100.0)], 0.3).parts[0]
    D = part.parameter("layers.0.attention.o", "D")
    assert torch.equal(D[0], torch.ones(16)) and (D[1:] != 1).float().mean() > 0.9


def test_only_the_chosen_entries_and_the_token_rows_change() -> None:
    base, task = base_and_task()
    before = base.digest()
    methods = [PivotalTuning(density=0.1), TrainableTokens(tokens=[36])]
    delta = started(base, methods, task, CONFIG, "d", "both")
    assert not any(t.any() for k, t in delta.items() if k.endswith(("values", "/d"))), "both start anew after the trial"
    fit(base, delta, task, CONFIG, progress=False)
    assert base.digest() == before
    merged = dict(base.merged(delta).model.named_parameters())
    part = delta.part("ppt")
    for name, w in base.model.named_parameters():
        moved = (merged[name] != w).flatten().nonzero().flatten().tolist()
        path = name.removesuffix(".weight")
        if path in part.kind_of:
            assert set(moved) <= set(part.tensors(path)["indices"].tolist()) and moved
        elif name == "embed.weight":
            assert {i // 16 for i in moved} == {36}
        else:
            assert not moved, name


def test_identifiers_shape_the_choice() -> None:
    """The rows train in the trial too, so other places are chosen than without them."""
    base, task = base_and_task()
    alone = started(base, [PivotalTuning(entries=60, trial=1.0)], task, CONFIG, "d", "both")
    config = TrainConfig(**{**CONFIG.to_dict(), "betas": (0.9, 0.999), "lr": 0.05})
    method = PivotalTuning(entries=60, trial=1.0, lr_ratio=0.02)
    with_rows = started(base, [method, TrainableTokens(tokens=[36])], task, config, "d", "both")
    chosen = [
        {(p, i) for p in d.part("ppt").kind_of for i in d.part("ppt").tensors(p)["indices"].tolist()}
        for d in (alone, with_rows)
    ]
    assert chosen[0] != chosen[1]


def test_prompts_without_the_identifier_are_the_base() -> None:
    base, task = base_and_task()
    delta = Delta.create(base, TrainableTokens(tokens=[36]))
    fit(base, delta, task, CONFIG, progress=False)
    ids = torch.randint(0, 36, (4, 7))
    with torch.no_grad():
        plain = base.model(input_ids=ids)["logits"]
        with base.using(delta):
            assert torch.equal(base.model(input_ids=ids)["logits"], plain)
            ids[0, 0] = 36
            assert not torch.equal(base.model(input_ids=ids)["logits"], plain)


def test_two_concepts_in_one_bundle_add_up() -> None:
    """Deltas learnt apart, put in one stack: the sum, whose places overlap (not the joint training of the paper)."""
    made = []
    for seed in (0, 1):
        base, task = base_and_task(seed)
        delta = started(base, [PivotalTuning(density=0.1)], task, CONFIG, f"c{seed}", "both")
        fit(base, delta, task, CONFIG, progress=False)
        made.append(delta)
    base = base_and_task()[0]
    both = dict(base.merged(*made).model.named_parameters())
    one, two = (dict(base.merged(d).model.named_parameters()) for d in made)
    for name, w in base.model.named_parameters():
        torch.testing.assert_close(both[name], one[name] + two[name] - w, atol=1e-6, rtol=0)


def test_errors() -> None:
    base, task = base_and_task()
    with pytest.raises(UsageError, match="only"):
        started(base, [PivotalTuning(entries=10**6)], task, CONFIG, "d", "both")
    with pytest.raises(UsageError, match="not a choice"):
        PivotalTuning(score="random")
