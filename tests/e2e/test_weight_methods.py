# SPDX-License-Identifier: Apache-2.0
"""Every weight method keeps the laws of undoing, merging, storing and training on the real bundled bases.

Each base is loaded once, and one delta of a method serves all checks on it. Only tensors of the touched layers are compared
after each check; all bytes of a base are compared once, when its tests are over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tunesmith as ts
from tunesmith.checks import Case
from tunesmith.core import method as methods
from tunesmith.core.delta import Delta
from tunesmith.core.trace import primary

pytestmark = pytest.mark.real

WEIGHTS = ("linear", "conv2d", "embedding")
TARGETS = {
    "smollm2-135m-instruct": {"linear": "model.layers.0.self_attn.*_proj,model.layers.1.mlp.*_proj"},
    "minilm-l6": {"linear": "encoder.layer.[01].*", "embedding": "embeddings.position_embeddings"},
    "efficientnet-lite0": {"conv2d": "_conv_stem,_blocks.[12].*_conv"},
}
POINTWISE = "_blocks.[12]._[ep]*_conv"  # no depthwise convolutions, and no 27 inputs of the stem
ONLY = {
    "trainable-tokens": {"smollm2-135m-instruct": "embed", "minilm-l6": "embeddings.word_embeddings"},
    "bitfit": {"minilm-l6": "encoder.layer.[01].*", "efficientnet-lite0": "_bn0,_blocks.[12].*_bn?"},  # SmolLM2 has no bias
    "dsee": {"smollm2-135m-instruct": "model.layers.[01].self_attn.k_proj", "minilm-l6": "encoder.layer.0.*.query",
             "efficientnet-lite0": TARGETS["efficientnet-lite0"]["conv2d"]},  # its decomposition takes seconds a layer
    "corda": {"smollm2-135m-instruct": "model.layers.[01].self_attn.*_proj", "minilm-l6": "encoder.layer.[01].attention.*",
              "efficientnet-lite0": POINTWISE},
}  # fmt: skip
CONVS = {"boft": POINTWISE, "bone": POINTWISE, "eva": POINTWISE, "hydra": POINTWISE}
OURS = [i for i in methods.methods() if i.carrier == "weight" and i.cls.__module__.startswith("tunesmith.deltas.")]


def targets_of(info: methods.MethodInfo, base: str) -> str:
    """What the method is tried on in that base, or nothing."""
    if info.name in ONLY:
        return ONLY[info.name].get(base, "")
    if base == "efficientnet-lite0" and info.name in CONVS:
        return CONVS[info.name]
    return ",".join(text for kind, text in TARGETS[base].items() if kind in info.kinds)


CASES = [(base, i.name) for base in TARGETS for i in OURS if targets_of(i, base)]


@dataclass(frozen=True)
class World:
    """A base with its outputs and digest of before."""

    base: ts.Base
    out: Tensor
    digest: str


@cache
def world(name: str) -> World:
    """The base, loaded once, with a short probe. Of SmolLM2's 30 blocks the first 4 are kept, to save the time of the rest."""
    base = ts.load(name, dtype="fp32", device="cpu")
    if base.family != "vision":
        ids: Any = base.probe()
        model: Any = base.model
        if base.family == "causal-lm":
            model.model.layers = model.model.layers[:4]
            model.config.num_hidden_layers = 4
        base = ts.Base(model, example={"input_ids": ids["input_ids"][:, :6]}, name=name, family=base.family)
    return World(base, base.probe_outputs(), base.digest())


def held(base: ts.Base, delta: Delta) -> dict[str, Tensor]:
    """Copies of the base's tensors at the layers a delta touches."""
    return {f"{p}.{n}": t.clone() for p in delta.parts[0].kind_of for n, t in base.modules[p].state_dict().items()}


def tensors_are(base: ts.Base, delta: Delta, before: dict[str, Tensor]) -> bool:
    now = held(base, delta)
    return now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())


@pytest.mark.parametrize(("where", "name"), CASES, ids=["-".join(c) for c in CASES])
def test_laws_of_a_weight_method(where: str, name: str, tmp_path: Path) -> None:
    info, first = methods.get(name), world(where)
    base = first.base
    options = {**methods.config(info.cls.toy()), "targets": targets_of(info, where)}
    if name == "trainable-tokens":
        options["tokens"] = sorted(set(base.probe()["input_ids"].flatten().tolist()))[:3]  # type: ignore[index, call-overload]
    method = info.cls(**options)
    case = Case(method, base)
    delta = case.fresh()
    before = held(base, delta)
    if info.identity_at_init:
        with base.using(delta):
            case.near(base.probe_outputs(), first.out, "fresh delta", 0.1)
    stir(delta)
    with base.using(delta):
        applied = base.probe_outputs()
    effect = float((applied - first.out).abs().max())
    assert effect > 0, "the delta has no effect, so nothing below proves anything"
    assert torch.equal(base.probe_outputs(), first.out) and tensors_are(base, delta, before)
    with base.using(delta.at(0)):
        assert torch.equal(base.probe_outputs(), first.out)
    merged = base.merged(delta).probe_outputs()
    case.near(merged, applied, "merged against applied", 2)  # rounding adds up over layers
    assert float((merged - applied).abs().max()) < 0.1 * effect  # else the base itself would pass
    delta.save(tmp_path / "d")
    loaded = Delta.load(tmp_path / "d", base)
    assert loaded.digest == delta.digest
    with base.using(loaded):
        assert torch.equal(base.probe_outputs(), applied)
    if "only_declared_trains" not in info.expected:
        trained(base, delta)
    assert tensors_are(base, delta, before)
    assert not any("forward" in base.modules[p].__dict__ for p in delta.parts[0].kind_of)


@pytest.mark.parametrize("where", TARGETS)
def test_all_bytes_of_the_base_are_as_before(where: str) -> None:
    """Runs last, after every method was put on, merged, trained and taken off."""
    first = world(where)
    assert first.base.digest() == first.digest
    assert torch.equal(first.base.probe_outputs(), first.out)


def test_every_weight_method_is_tried_somewhere() -> None:
    assert {i.name for i in OURS if set(i.kinds) & set(WEIGHTS)} == {name for _, name in CASES}


def stir(delta: Delta) -> None:
    """Move every trainable tensor a little away from its first values."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, t in delta.items():
            if t.requires_grad:
                t.add_(0.02 * torch.randn(t.shape, generator=g, dtype=t.dtype))


def trained(base: ts.Base, delta: Delta) -> None:
    """One step: every trainable tensor moves, no frozen one does, and no parameter of the base has a gradient."""
    old = {k: t.detach().clone() for k, t in delta.items()}
    inputs: Any = base.probe()
    with base.frozen(), base.using(delta):
        out = primary(base.model(**inputs) if isinstance(inputs, Mapping) else base.model(*inputs))
        assert out is not None
        out.square().sum().backward()
    torch.optim.SGD([t for _, t in delta.items() if t.requires_grad], lr=1.0).step()
    moved = {k for k, t in delta.items() if not torch.equal(t, old[k])}
    assert moved == {k for k, t in delta.items() if t.requires_grad} != set()
    assert all(p.grad is None for p in base.model.parameters())
