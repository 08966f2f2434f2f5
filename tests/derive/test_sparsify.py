# SPDX-License-Identifier: Apache-2.0
"""SPDF's masks: exact zeros through training, densifying, counts, the split of a delta, and the paper's FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import ToyLM, toys
from tunesmith.derive import RandomMask, Schedule, densify, flops, mask_of, masks, sparsify, split, train_own
from tunesmith.derive.sparsify import Flops

SIX = ("attention.q", "attention.k", "attention.v", "attention.o")


def batches(i: int) -> Tensor:
    return torch.randint(0, 37, (4, 8), generator=torch.Generator().manual_seed(i))


def loss(model: nn.Module, ids: Any) -> Tensor:
    logits = model(ids)["logits"]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


PLAN = Schedule(12, 1e-2, weight_decay=0.1, clip=1.0, betas=(0.9, 0.999))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 0.9])
def test_the_kept_share_is_exact_and_the_mask_is_a_number(share: float) -> None:
    mask = RandomMask(share, seed=3)
    for path, shape in (("a", (17, 23)), ("b", (64, 64)), ("c", (1, 5))):
        m = mask.of(path, shape)
        assert m.dtype == torch.bool and tuple(m.shape) == shape
        assert abs(float(m.double().mean()) - (1 - share)) <= 1 / m.numel()
        assert torch.equal(m, RandomMask(share, seed=3).of(path, shape))
    if share:
        assert not torch.equal(mask.of("b", (64, 64)), mask.of("other", (64, 64)))
        assert not torch.equal(mask.of("b", (64, 64)), RandomMask(share, 4).of("b", (64, 64)))
    with pytest.raises(UsageError):
        RandomMask(1.0)


def test_six_kinds_of_matrix_are_masked_and_nothing_else(lm: Base) -> None:
    sparse = sparsify(lm, 0.75, seed=1)
    found = masks(sparse)
    assert {p.split(".", 2)[2] for p in found} == {*SIX, "gate", "up", "down"}  # a gated MLP has three
    for name, p in sparse.model.named_parameters():
        path, _, what = name.rpartition(".")
        if what == "weight" and path in found:
            kept = found[path]
            assert torch.equal(p[kept], lm.model.get_parameter(name)[kept]) and not p[~kept].any()
        else:
            assert p is lm.model.get_parameter(name)


def test_rescaling_keeps_the_spread() -> None:
    base = Base(nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 2)), example=(torch.randn(2, 200),))
    plain, scaled = (sparsify(base, 0.75, targets="0", rescale=r) for r in (False, True))
    torch.testing.assert_close(scaled.modules["0"].weight, 2 * plain.modules["0"].weight)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_masked_entries_stay_exactly_zero_through_adamw_decay_and_clipping(lm: Base, share: float) -> None:
    sparse = sparsify(lm, share)
    before = sparse.digest()
    trained = train_own(sparse, batches, loss, PLAN).base
    assert sparse.digest() == before, "the given base stays as it was"
    for path, m in masks(trained).items():
        W = trained.modules[path].weight
        assert torch.equal(W[~m], torch.zeros(int((~m).sum())))
        moved = (sparse.modules[path].weight != W)[m]
        assert float(moved.float().mean()) > 0.99
    assert mask_of(trained) == RandomMask(share, 0)
    assert [r["recipe"] for r in trained.source["derived"]] == ["sparsify", "train"]


def test_share_0_is_dense_training_bit_for_bit(lm: Base) -> None:
    none = train_own(sparsify(lm, 0.0), batches, loss, PLAN)
    dense = train_own(lm, batches, loss, PLAN)
    assert none.losses == dense.losses and none.base.digest() == dense.base.digest()


def test_training_is_that_of_masked_weights(lm: Base) -> None:
    """The same run with M * W in every forward pass, by hand."""
    sparse = sparsify(lm, 0.75)
    got = train_own(sparse, batches, loss, Schedule(4, 1e-2))
    model = ToyLM()
    model.load_state_dict(sparse.model.state_dict())
    found = masks(sparse)
    for path, m in found.items():
        layer = model.get_submodule(path)
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", _Masked(m))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    plan = Schedule(4, 1e-2)
    for i in range(4):
        value = loss(model, batches(i))
        assert float(value.detach()) == pytest.approx(got.losses[i], rel=1e-5)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = 1e-2 * plan.rate(i)
        optimiser.step()
        optimiser.zero_grad()


class _Masked(nn.Module):
    def __init__(self, m: Tensor) -> None:
        super().__init__()
        self.m = m

    def forward(self, W: Tensor) -> Tensor:
        return self.m * W


def test_densify_changes_no_logit_and_lets_zeros_train(lm: Base) -> None:
    sparse = train_own(sparsify(lm, 0.75), batches, loss, PLAN).base
    dense = densify(sparse)
    assert torch.equal(dense.probe_outputs(), sparse.probe_outputs()) and mask_of(dense) is None
    assert dense.source["derived"][-1]["recipe"] == "densify" and masks(dense) == {}
    path = "layers.0.gate"
    off = ~masks(sparse)[path]
    W = dense.model.get_parameter(f"{path}.weight")
    W.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(dense.model, batches(0)), [W])
    W.requires_grad_(False)
    assert float((gradient[off] != 0).float().mean()) > 0.99
    after = train_own(dense, batches, loss, Schedule(2, 1e-3)).base
    assert float((after.modules[path].weight[off] != 0).float().mean()) > 0.99
    kept = train_own(sparse, batches, loss, Schedule(2, 1e-3)).base
    assert not kept.modules[path].weight[off].any(), "sparse fine-tuning keeps the mask"
    with pytest.raises(UsageError, match="no mask"):
        densify(dense)


def test_every_delta_sees_ordinary_layers(lm: Base) -> None:
    sparse = sparsify(lm, 0.75)
    assert all(type(sparse.modules[p]) is type(lm.modules[p]) for p in masks(sparse))
    delta = ts.Delta.create(sparse, ts.LoRA(rank=2))
    with torch.no_grad():
        for _, t in delta.items():
            t.normal_()
    merged = sparse.merged(delta)
    off = ~masks(sparse)["layers.0.gate"]
    assert float((merged.modules["layers.0.gate"].weight[off] != 0).float().mean()) > 0.9, "a LoRA fills the zeros"


def test_a_delta_is_split_into_what_lies_on_the_mask_and_off_it(lm: Base) -> None:
    sparse = sparsify(lm, 0.75)
    dense = densify(sparse)
    delta = ts.Delta.create(dense, ts.Full(targets="layers.0.gate,layers.1.down,norms"))
    with torch.no_grad():
        for _, t in delta.items():
            t.normal_()
    found = split(sparse, delta)
    assert set(found) == {"layers.0.gate", "layers.1.down"}
    for path, energy in found.items():
        D, m = delta.parts[0].tensors(path)["weight"], masks(sparse)[path]
        assert energy.on == pytest.approx(float((D * m).detach().square().sum()), rel=1e-5)
        assert energy.off == pytest.approx(float((D * ~m).detach().square().sum()), rel=1e-5)
        assert energy.revived == pytest.approx(0.75, abs=0.1)
    half = split(dense, delta.at(0.5), of=masks(sparse))
    assert half["layers.0.gate"].off == pytest.approx(found["layers.0.gate"].off / 4, rel=1e-4)
    with pytest.raises(UsageError, match="no mask"):
        split(dense, delta)
    low = ts.Delta.create(sparse, ts.LoRA(rank=2, targets="layers.0.gate"))
    assert split(sparse, low)["layers.0.gate"].revived == 0.0, "a fresh LoRA changes nothing"


def test_flops_of_one_block_by_hand() -> None:
    """ToyLM: d 16, 4 query heads and 2 key-value heads of 4, MLP 32, vocabulary 37, two blocks."""
    base, T = toys()[0], 7
    q = o = 2 * 16 * 16
    k = v = 2 * 16 * 8
    mlp = 3 * 2 * 16 * 32
    scores = 2 * T * 4 * (4 + 4)  # q k^T and the weighted sum, for each of 4 heads
    block, head = q + k + v + o + mlp, 2 * 16 * 37
    assert flops(base, T) == Flops(0.0, 2 * block + head, 2 * scores)
    assert flops(sparsify(base, 0.75), T) == Flops(0.25 * 2 * block, head, 2 * scores)
    assert flops(base, T, share=0.5).total == 0.5 * 2 * block + head + 2 * scores
    assert flops(densify(sparsify(base, 0.75)), T) == flops(base, T)


@pytest.mark.parametrize(
    ("layers", "d", "want"), [(12, 768, {0.5: 0.737, 0.75: 0.601}), (24, 2048, {0.5: 0.601, 0.75: 0.401})]
)
def test_shares_of_dense_flops_are_the_paper_s(layers: int, d: int, want: dict[float, float]) -> None:
    """GPT-2 Small and GPT-3 XL at 2048 tokens, by the same formula as `flops`."""
    linear, scores, head = layers * 2 * 12 * d * d, layers * 2 * 2048 * 2 * d, 2 * 50257 * d
    for s, share in want.items():
        assert ((1 - s) * linear + scores + head) / (linear + scores + head) == pytest.approx(share, abs=5e-3)
