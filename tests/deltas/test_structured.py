# SPDX-License-Identifier: Apache-2.0
"""LoHa, LoKr, VeRA and FourierFT against PEFT on copied tensors; FLoRA against its definition; P-tuning against its net."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, bake
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys
from tunesmith.deltas import FLoRA, FourierFT, LoHa, LoKr, LoRA, PTuning, VeRA
from tunesmith.deltas.weight.lokr import split

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.b = nn.Conv2d(6, 8, 1)
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = nn.Linear(12, 6, bias=False)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3))
        return self.out(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def base() -> Base:
    torch.manual_seed(0)
    return Base(Net().eval(), example=(torch.randn(3, 4, 8, 8),))


def jiggled(delta: Delta) -> Delta:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, t in delta.items():
            if t.requires_grad:
                t.add_(0.3 * torch.randn(t.shape, generator=g))
    return delta


# Our tensor name at a site -> PEFT's attribute.
NAMES = {
    "loha": {"B_1": "hada_w1_a", "A_1": "hada_w1_b", "B_2": "hada_w2_a", "A_2": "hada_w2_b", "T_1": "hada_t1", "T_2": "hada_t2"},
    "lokr": {"C": "lokr_w1", "C_1": "lokr_w1_a", "C_2": "lokr_w1_b", "D": "lokr_w2", "D_1": "lokr_w2_a", "D_2": "lokr_w2_b", "T": "lokr_t2"},
    "vera": {"b": "vera_lambda_b", "d": "vera_lambda_d"},
    "fourierft": {"c": "fourierft_spectrum"},
}  # fmt: skip


def parity(ours: Any, config: Any, targets: list[str], turned: tuple[str, ...] = ()) -> float:
    """The largest gap of outputs between our delta and PEFT with the tensors copied."""
    b = base()
    delta = jiggled(Delta.create(b, ours))
    model = peft.get_peft_model(copy.deepcopy(b.model), config)
    part, names = delta.parts[0], NAMES[ours.info.name]
    seen = 0
    with torch.no_grad():
        for path in targets:
            layer = model.base_model.model.get_submodule(path)
            for name, value in part.tensors(path).items():
                if name in names:
                    target = getattr(layer, names[name])["default"]
                    target.copy_(
                        (value.T if name in turned and "T_1" in part.tensors(path) else value).reshape(target.shape)
                    )
                    seen += 1
            if ours.info.name == "vera":
                layer.vera_A["default"], layer.vera_B["default"] = part.tensors(path)["A"], part.tensors(path)["B"]
            if ours.info.name == "fourierft":
                width = layer.in_features
                at = part.tensors(path)["at"]
                layer.indices["default"] = torch.stack([at // width, at % width])
        assert seen == sum(n in names for p, n, _ in part.items() if p)
        want = model.eval()(*b.probe())
        with b.using(delta):
            got = b.probe_outputs()
        assert not torch.allclose(got, b.probe_outputs())
    return float((got - want).abs().max())


def test_loha_is_pefts() -> None:
    config = peft.LoHaConfig(r=2, alpha=6, target_modules=["a", "fc1", "fc2"])
    assert parity(LoHa(rank=2, alpha=6.0, targets="a,fc1,fc2"), config, ["a", "fc1", "fc2"]) < 1e-5


def test_loha_in_tucker_form_is_pefts() -> None:
    config = peft.LoHaConfig(r=2, alpha=6, target_modules=["a", "b", "fc1"], use_effective_conv2d=True)
    ours = LoHa(rank=2, alpha=6.0, targets="a,b,fc1", tucker=True)
    assert parity(ours, config, ["a", "b", "fc1"], turned=("B_1", "B_2")) < 1e-5


@pytest.mark.parametrize(("rank", "both"), [(1, False), (1, True), (8, False)])
def test_lokr_is_pefts(rank: int, both: bool) -> None:
    config = peft.LoKrConfig(r=rank, alpha=3, target_modules=["a", "fc1", "fc2"], decompose_both=both)
    ours = LoKr(rank=rank, alpha=3.0, targets="a,fc1,fc2", both=both)
    assert parity(ours, config, ["a", "fc1", "fc2"]) < 1e-5


@pytest.mark.parametrize(("n", "factor"), [(256, -1), (128, -1), (127, -1), (128, 4), (36, 5), (12, 5), (7, 2)])
def test_sides_are_split_as_peft_does(n: int, factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    assert split(n, factor) == tuple(factorization(n, factor))


def test_vera_is_pefts() -> None:
    config = peft.VeraConfig(r=5, target_modules=["fc1", "fc2"], d_initial=0.3)
    assert parity(VeRA(rank=5, d_initial=0.3, targets="fc1,fc2"), config, ["fc1", "fc2"]) < 1e-5


def test_veras_pair_is_shared_frozen_and_large_enough() -> None:
    delta = Delta.create(base(), VeRA(rank=4, targets="fc1,fc2"))
    part = delta.parts[0]
    assert part.tensors("fc1")["A"] is part.tensors("fc2")["A"]
    assert part.parameter("", "A").shape == (4, 12)
    assert part.parameter("", "B").shape == (12, 4)
    assert delta.trainable_parameters == (12 + 4) + (6 + 4)


def test_fourierft_is_pefts() -> None:
    config = peft.FourierFTConfig(n_frequency=9, scaling=20.0, target_modules=["fc1", "fc2"])
    assert parity(FourierFT(n=9, scale=20.0, targets="fc1,fc2"), config, ["fc1", "fc2"]) < 1e-5


def test_fourierft_refuses_more_entries_than_a_layer_has() -> None:
    with pytest.raises(UsageError, match="fewer than n"):
        Delta.create(base(), FourierFT(n=1000, targets="fc1"))


@pytest.mark.parametrize("path", ["a", "b", "fc1"])
def test_flora_is_its_definition(path: str) -> None:
    b = base()
    delta = jiggled(Delta.create(b, FLoRA(rank=3, scale=0.7, targets=path)))
    part, site = delta.parts[0], b.sites[path]
    t = part.tensors(path)
    want = 0.7 * t["G"]
    for axis in range(len(site.shape)):
        want = torch.movedim(torch.tensordot(t[f"U_{axis + 1}"], want, dims=([1], [axis])), 0, axis)
    got = part.method.update(site, t).dense()
    assert got.shape == site.shape
    assert torch.allclose(got, want, atol=1e-5)
    ranks = [min(d, 3) for d in site.shape]
    assert delta.trainable_parameters == math.prod(ranks) + sum(d * r for d, r in zip(site.shape, ranks, strict=True))


def test_flora_at_full_ranks_holds_any_change() -> None:
    b = base()
    site = b.sites["a"]
    change = torch.randn(site.shape, generator=torch.Generator().manual_seed(3))
    delta = Delta.create(b, FLoRA(rank=6, targets="a"))
    core, t = change, delta.parts[0].tensors("a")
    with torch.no_grad():
        for axis in range(4):  # the higher-order SVD
            unfolded = torch.movedim(change, axis, 0).flatten(1)
            U = torch.linalg.svd(unfolded, full_matrices=False).U
            t[f"U_{axis + 1}"].copy_(U)
            core = torch.movedim(torch.tensordot(U.T, core, dims=([1], [axis])), 0, axis)
        t["G"].copy_(core)
    assert torch.allclose(delta.parts[0].method.update(site, t).dense(), change, atol=1e-5)


def test_flora_with_the_identity_as_core_is_lora() -> None:
    b = base()
    tucker = jiggled(Delta.create(b, FLoRA(rank=4, targets="fc1")))
    lora = Delta.create(b, LoRA(rank=4, alpha=4.0, targets="fc1"))
    t, u = tucker.parts[0].tensors("fc1"), lora.parts[0].tensors("fc1")
    with torch.no_grad():
        t["G"].copy_(torch.eye(4))
        u["B"].copy_(t["U_1"])
        u["A"].copy_(t["U_2"].T)
    with b.using(tucker):
        one = b.probe_outputs()
    with b.using(lora):
        two = b.probe_outputs()
    assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2),
        nn.Conv2d(4, 6, (3, 2), padding="same", bias=False),
        nn.Conv2d(4, 8, 3, groups=2, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, groups=4),
    ],
)  # fmt: skip
def test_flora_merges_exactly_on_every_convolution(conv: nn.Module) -> None:
    size = (2, 4, 9) if isinstance(conv, nn.Conv1d) else (2, 4, 9, 9)
    b = Base(nn.Sequential(conv, nn.ReLU()).eval(), example=(torch.randn(size),))
    delta = jiggled(Delta.create(b, FLoRA(rank=2, targets="all-weights")))
    assert delta.parts[0].parameter("0", "U_2").shape[0] == conv.weight.shape[1]  # in / groups
    with b.using(delta):
        applied = b.probe_outputs()
    assert torch.allclose(b.merged(delta).probe_outputs(), applied, atol=1e-5)


def test_p_tuning_bakes_to_prompt_tuning_and_its_net_is_pefts() -> None:
    from peft.tuners.p_tuning import PromptEncoder

    toy = next(b for b in toys() if _takes(b))
    delta = jiggled(Delta.create(toy, PTuning(tokens=3, hidden=7)))
    t = delta.parts[0].tensors("")
    d = t["Z"].shape[1]
    encoder = PromptEncoder(
        peft.PromptEncoderConfig(num_virtual_tokens=3, token_dim=d, num_transformer_submodules=1, encoder_hidden_size=7)
    )
    with torch.no_grad():
        encoder.embedding.weight.copy_(t["Z"])
        for i in (1, 2, 3):
            linear = encoder.mlp_head[2 * (i - 1)]
            linear.weight.copy_(t[f"W_{i}"])
            linear.bias.copy_(t[f"b_{i}"])
        want = encoder(torch.arange(3))
    with toy.using(delta):
        before = toy.probe_outputs()
    bake(toy, delta)
    assert delta.parts[0].info.name == "prompt-tuning"
    assert torch.allclose(delta.parts[0].tensors("")["P"], want, atol=1e-6)
    with toy.using(delta):
        assert torch.allclose(toy.probe_outputs(), before, atol=1e-6)


def _takes(b: Base) -> bool:
    try:
        Delta.create(b, PTuning(tokens=2))
    except UsageError:
        return False
    return True
