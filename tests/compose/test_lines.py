# SPDX-License-Identifier: Apache-2.0
"""LiNeS: scaling by depth, alone and on a merge (card 096)."""

from __future__ import annotations

import pytest
import torch
from compose_cases import dense, gap, moved
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.compose import Lines, merge, scale
from tunesmith.compose.collect import depths
from tunesmith.compose.lines import scale_at
from tunesmith.core.base import Base
from tunesmith.core.combine import Place
from tunesmith.core.toys import ToyLM, toys

LM = toys()[0]


def test_identity_and_the_two_ends() -> None:
    """alpha 1 is no change; alpha 0 leaves block 0 and embeddings as the base's and the last block as tuned."""
    delta = moved(LM, "full")
    assert gap(dense(LM, scale(LM, delta, depth="linear")), dense(LM, delta)) == 0
    merged = LM.merged(scale(LM, delta, depth="linear", start=0.0, end=1.0)).model.state_dict()
    tuned, base = LM.merged(delta).model.state_dict(), LM.model.state_dict()
    for k, v in merged.items():
        want = tuned[k] if k.startswith("layers.1.") else base[k]
        assert torch.equal(v, want), k


def test_scales_rise_and_a_single_block_gets_the_last() -> None:
    at = [scale_at(Place("x", "weight", (2, 2), "linear", i, 6), 0.1, 0.9) for i in range(6)]
    assert at == sorted(at) and len(set(at)) == 6 and at[0] == 0.1 and at[-1] == 1.0
    assert scale_at(Place("x", "weight", (2, 2), "linear", 0, 1), 0.1, 0.9) == 1.0
    assert scale_at(Place("x", "weight", (2, 2)), 0.1, 0.9) == 0.1


def test_a_scaled_lora_is_the_scaled_dense_change() -> None:
    delta = moved(LM, "lora", {"rank": 2})
    made = scale(LM, delta, 2.0, depth="linear", start=0.25, end=0.75)
    assert [p.info.name for p in made.parts] == ["lora"] and made.parts[0].method.rank == 2
    rows = dense(LM, delta)
    for key, (got,) in dense(LM, made).items():
        s = 2 * (0.25 if key.startswith("layers.0.") else 0.75)
        assert torch.allclose(got, s * rows[key][0], atol=1e-6)
    with pytest.raises(ts.TunesmithError, match="linear"):
        scale(LM, delta, depth="linea")
    with pytest.raises(ts.TunesmithError, match="by depth"):
        scale(LM, delta, start=0.1)


def test_open_alpha_is_one_over_the_number_of_sources_for_a_sum() -> None:
    deltas = [moved(LM, "full", {}, s) for s in range(3)]
    rows, made = dense(LM, *deltas), dense(LM, merge(LM, deltas, "lines"))
    for key, found in rows.items():
        s = 1.0 if key.startswith("layers.1.") else 1 / 3  # beta left open: 1 - alpha
        assert torch.allclose(made[key][0], s * sum(found), atol=1e-6), key


def test_open_alpha_on_ties_is_the_ratio_of_norms() -> None:
    deltas = [moved(LM, "full", {}, s) for s in range(2)]
    rows, inner = dense(LM, *deltas), dense(LM, merge(LM, deltas, "ties:density=0.3"))
    plain = sum(float(sum(t).abs().sum()) for t in rows.values())
    alpha = plain / sum(float(t[0].abs().sum()) for t in inner.values()) / 2
    made = dense(LM, merge(LM, deltas, Lines(of="ties:density=0.3", beta=0.5)))
    for key, (t,) in inner.items():
        s = alpha + 0.5 * key.startswith("layers.1.")
        assert torch.allclose(made[key][0], s * t, rtol=1e-4, atol=1e-6), key


class TwoStacks(nn.Module):
    """An encoder and a decoder, whose blocks have numbers in the names of their parts too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.encoder = nn.ModuleList(nn.ModuleDict({"experts": nn.Sequential(nn.Linear(4, 4))}) for _ in range(3))
        self.decoder = nn.ModuleList(nn.ModuleDict({"experts": nn.Sequential(nn.Linear(4, 4))}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in (*self.encoder, *self.decoder):
            x = x + block["experts"](x)  # type: ignore[index]
        return x


def test_stacks_are_counted_apart_and_numbers_inside_a_block_are_not_depth() -> None:
    base = Base(TwoStacks(), example=(torch.randn(2, 4),))
    found = depths(base)
    assert found["first"] == (None, 1)
    assert [found[f"encoder.{i}.experts.0"] for i in range(3)] == [(0, 3), (1, 3), (2, 3)]
    assert [found[f"decoder.{i}.experts.0"] for i in range(2)] == [(0, 2), (1, 2)]


def test_tied_embeddings_are_outside_the_blocks_once() -> None:
    base = Base(ToyLM(tied=True), example={"input_ids": torch.arange(6)[None]})
    delta = moved(base, "full")
    made = scale(base, delta, depth="linear", start=0.0, end=1.0)
    assert not {"embed", "head"} & set(made.parts[0].paths)
