# SPDX-License-Identifier: Apache-2.0
"""Prompt against training: the dual form, the measures and their baselines, momentum attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tunesmith as ts
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys
from tunesmith.inspect.icl import agreement, compare, icl, implicit_update, momentum_attention, rec2ftp, sim_am, sim_aou


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_demonstrations_are_a_change_of_weights_in_linear_attention() -> None:
    W_V, W_K, W_Q = (randn(5, 8, seed=s) for s in range(3))
    shown, own = randn(6, 8, seed=3), randn(4, 8, seed=4)
    q = W_Q @ own[-1]
    K, V = (torch.cat([shown, own]) @ W.T for W in (W_K, W_V))
    attention = V.T @ (K @ q)  # no softmax, no scale
    W_zsl = (own @ W_V.T).T @ (own @ W_K.T)
    torch.testing.assert_close((W_zsl + implicit_update(W_V, W_K, shown)) @ q, attention, atol=1e-6, rtol=0)


def test_rec2ftp() -> None:
    assert rec2ftp([0, 0, 0, 1], [1, 0, 1, 1], [1, 1, 0, 1]) == 0.5
    assert rec2ftp([0, 0], [0, 0], [1, 1]) == 0 and rec2ftp([0], [1], [1]) == 1
    assert rec2ftp([1, 1], [1, 1], [1, 1]) is None
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        found = rec2ftp(*(torch.randint(0, 2, (12,), generator=g).tolist() for _ in range(3)))
        assert found is None or 0 <= found <= 1
    with pytest.raises(UsageError):
        rec2ftp([0], [1, 0], [1])


def test_sim_aou_of_a_change_with_itself_is_one() -> None:
    zsl, icl_ = randn(7, 16, seed=1), randn(7, 16, seed=2)
    torch.testing.assert_close(sim_aou(zsl, icl_, icl_), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(sim_aou(zsl, icl_, 3 * icl_), torch.ones(7, dtype=torch.float64))  # normalised first
    assert float(sim_aou(zsl, zsl, icl_).abs().max()) < 1e-6
    a, b, c = (F.normalize(x, dim=-1) for x in (zsl, icl_, randn(7, 16, seed=5)))
    want = torch.stack([(b[i] - a[i]) @ (c[i] - a[i]) / (b[i] - a[i]).norm() / (c[i] - a[i]).norm() for i in range(7)])
    torch.testing.assert_close(sim_aou(zsl, icl_, randn(7, 16, seed=5)), want)
    with pytest.raises(UsageError):
        sim_aou(zsl, icl_, icl_[:3])


def test_the_random_baseline_is_centred_where_the_released_one_is_not() -> None:
    common = 5 * randn(1, 64, seed=9).abs()
    zsl = {"l": common + randn(400, 64, seed=1)}
    shown = {"l": zsl["l"] + 0.3 * randn(400, 64, seed=2) + 0.5}
    found = compare(zsl, shown, {"l": zsl["l"] + 0.1 * (shown["l"] - zsl["l"])})
    assert abs(found.values["random"]) < 0.03 and found.values["sim"] > 0.9
    change = F.normalize(shown["l"], dim=-1) - F.normalize(zsl["l"], dim=-1)
    uniform = torch.rand(400, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert abs(float(F.cosine_similarity(change, uniform).mean())) > 0.1
    assert found.rows[0]["moved_icl"] > 2 * found.rows[0]["moved_ft"]  # the magnitude is told beside the cosine


def test_no_momentum_is_plain_attention() -> None:
    q, K, V = (randn(2, 3, 6, 4, seed=s) for s in range(3))
    plain = F.scaled_dot_product_attention(q, K, V, is_causal=True)
    assert torch.equal(momentum_attention(q, K, V, 0.0), plain)
    more = momentum_attention(q, K, V, 0.3) - plain
    want = torch.stack(
        [sum((0.3 ** (t - i) * V[..., i, :] for i in range(t)), torch.zeros(2, 3, 4)) for t in range(6)], -2
    )
    torch.testing.assert_close(more, want.double())
    with pytest.raises(UsageError):
        momentum_attention(q, K, V, 1.0)


def test_attention_weights() -> None:
    a = torch.softmax(randn(50), 0)
    assert agreement(a, a, 5) == {"kendall": 1.0, "recall": 1.0}
    assert agreement(a, -a, 5) == {"kendall": -1.0, "recall": 0.0}
    assert float(sim_am(a, 2 * a)) == pytest.approx(1)
    with pytest.raises(UsageError):
        agreement(a, a, 51)
    with pytest.raises(UsageError):
        sim_am(a, a[:4])


def test_a_delta_against_a_prompt_on_a_model() -> None:
    base = toys()[0]
    delta = Delta.create(base, ts.Full(targets="k,v", bias=False))
    for i, (_, t) in enumerate(delta.items()):
        t.data.copy_(0.3 * randn(*t.shape, seed=i))
    other = Delta.create(base, ts.Full(targets="k,v", bias=False), name="other")
    ids = torch.randint(0, 37, (6, 5), generator=torch.Generator().manual_seed(0))
    shown = torch.cat([torch.randint(0, 37, (6, 9), generator=torch.Generator().manual_seed(1)), ids], 1)
    digest = (base.digest(), delta.digest)

    def run(b: Any, batch: dict[str, Any]) -> Any:
        return b.model(**batch)

    given = ([{"input_ids": ids}], [{"input_ids": shown}], run)
    right = {"zsl": [0, 0, 0, 0, 1, 1], "icl": [1, 0, 1, 0, 1, 1], "ft": [1, 1, 0, 0, 1, 1]}
    found = icl(base, delta, *given, controls={"itself": delta, "untrained": other}, right=right)
    assert len(found.rows) == 2 and all(-1 <= r["sim"] <= 1 for r in found.rows)
    assert found.values["itself"] == pytest.approx(found.values["sim"]) and found.values["untrained"] == 0
    assert found.values["rec2ftp"] == 0.5 and found.values["icl_on_wrong"] == 0.5
    assert (base.digest(), delta.digest) == digest
    with pytest.raises(UsageError, match="different layers"):
        compare({"a": randn(2, 3)}, {"b": randn(2, 3)}, {"a": randn(2, 3)})
