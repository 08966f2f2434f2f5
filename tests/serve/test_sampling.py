# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens: the settings mean what they mean in transformers, and a row does not feel its neighbours."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as hf

from tunesmith.core.errors import UsageError
from tunesmith.serve.sampling import LIKELIEST, Row, Sampling, choose, choose_each, scores

V = 50


def logits(n: int = 1, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
        ({"repetition": 1.4}, [hf.RepetitionPenaltyLogitsProcessor(1.4)]),
        (
            {"repetition": 1.2, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
            [
                hf.RepetitionPenaltyLogitsProcessor(1.2), hf.TemperatureLogitsWarper(1.3), hf.TopKLogitsWarper(20),
                hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.02),
            ],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(4))
def test_settings_are_those_of_transformers(settings: dict[str, Any], theirs: list[Any], seed: int) -> None:
    z, seen = logits(seed=seed), [3, 7, 7, 11]
    want = z.clone()
    for process in theirs:
        want = process(torch.tensor([seen]), want)
    got = scores(z[0], Row(Sampling(**settings), prompt=seen[:2], answer=seen[2:]))
    assert torch.equal(torch.isfinite(got), torch.isfinite(want[0]))
    kept = torch.isfinite(got)
    assert torch.allclose(got[kept], want[0][kept], atol=1e-5)


def test_presence_and_frequency_count_the_answer_only() -> None:
    z = logits()[0]
    got = scores(z, Row(Sampling(presence=0.5, frequency=0.25), prompt=[1, 1], answer=[2, 2, 3]))
    assert got[1] == z[1]
    assert float(z[2] - got[2]) == pytest.approx(1.0, abs=1e-6)
    assert float(z[3] - got[3]) == pytest.approx(0.75, abs=1e-6)


def test_temperature_zero_takes_the_most_likely_and_reports_its_probability() -> None:
    z = logits(3)
    got = choose(z, [Row(Sampling(temperature=0, logprobs=3))] * 3)
    assert [c.token for c in got] == z.argmax(-1).tolist()
    for c, row in zip(got, torch.log_softmax(z, -1), strict=True):
        assert c.logprob == pytest.approx(float(row.max())) and len(c.others) == 3
        assert c.others[0] == (c.token, pytest.approx(c.logprob))
        assert list(c.others) == sorted(c.others, key=lambda o: -o[1])


def test_a_row_draws_the_same_in_any_batch_and_another_at_each_step() -> None:
    z = logits(4)
    rows = [Row(Sampling(seed=i), answer=[1] * i) for i in range(4)]
    together = [c.token for c in choose(z, rows)]
    alone = [choose(z[i : i + 1], [rows[i]])[0].token for i in range(4)]
    turned = [c.token for c in choose(z.flip(0), rows[::-1])][::-1]
    assert together == alone == turned
    flat = torch.zeros(1, V)
    assert len({choose(flat, [Row(Sampling(seed=5), answer=[1] * t)])[0].token for t in range(30)}) > 10


def test_tokens_come_as_often_as_their_probability_says() -> None:
    z = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    n = 4000
    counts = Counter(choose(z, [Row(Sampling(seed=i))])[0].token for i in range(n))
    chi = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate([0.5, 0.3, 0.15, 0.05]))
    assert chi < 16.3  # the 99.9 % point with three degrees of freedom


def test_only_what_is_allowed_comes() -> None:
    allowed = torch.zeros(V, dtype=torch.bool)
    allowed[[4, 9]] = True
    got = {choose(logits(seed=1), [Row(Sampling(seed=i), allowed=allowed)])[0].token for i in range(40)}
    assert got <= {4, 9}
    assert choose(logits(), [Row(Sampling(temperature=0, bias={8: 100.0}))])[0].token == 8


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"frequency": 3.0}, "frequency"),
        ({"bias": {1: 1000.0}}, "bias"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Sampling(**settings)


def test_what_cannot_be_drawn_from_is_said() -> None:
    with pytest.raises(UsageError, match="no token is allowed"):
        choose(logits(), [Row(Sampling(), allowed=torch.zeros(V, dtype=torch.bool))])
    with pytest.raises(UsageError, match="not finite"):
        choose(torch.full((1, V), float("nan")), [Row(Sampling())])
    with pytest.raises(UsageError, match="no token 50"):
        choose(logits(), [Row(Sampling(bias={50: 1.0}))])
    with pytest.raises(UsageError, match="2 rows"):
        choose(logits(), [Row(Sampling())] * 2)


def test_a_bad_row_is_told_and_the_others_draw() -> None:
    z = logits(3)
    z[1, 4] = math.nan
    none = torch.zeros(V, dtype=torch.bool)
    rows = [Row(Sampling(temperature=0)), Row(Sampling(temperature=0)), Row(Sampling(temperature=1.0), allowed=none)]
    got = choose_each(z, rows)
    assert got[0] == choose(z[:1], rows[:1])[0]
    assert "not finite" in str(got[1]) and "no token is allowed" in str(got[2])


def test_rows_of_all_settings_draw_together_what_they_draw_alone() -> None:
    z = logits(6, seed=3)
    rows = [
        Row(Sampling(temperature=0)), Row(Sampling(temperature=1.3, seed=1)), Row(Sampling(top_k=3, seed=2, logprobs=2)),
        Row(Sampling(top_p=0.5, seed=3), answer=[1]), Row(Sampling(min_p=0.2, seed=4, repetition=1.5), prompt=[5]),
        Row(Sampling(top_k=9, top_p=0.9, min_p=0.01, frequency=1.0, seed=5, logprobs=5), answer=[7, 7]),
    ]  # fmt: skip
    together = choose(z, rows)
    alone = [choose(z[i : i + 1], [r])[0] for i, r in enumerate(rows)]
    assert [c.token for c in together] == [c.token for c in alone]
    assert [len(c.others) for c in together] == [0, 0, 2, 0, 0, 5]


@pytest.mark.parametrize("spread", [0.001, 5.0])
def test_a_nucleus_larger_than_the_first_look_is_found_whole(spread: float) -> None:
    z = spread * torch.randn(2, 4 * LIKELIEST, generator=torch.Generator().manual_seed(1))
    rows = [Sampling(top_p=0.9), Sampling(top_p=0.05)]
    for i, s in enumerate(rows):
        want = hf.TopPLogitsWarper(s.top_p)(torch.empty(1, 0), z[i : i + 1])[0]
        kept, theirs = torch.isfinite(scores(z[i], Row(s))), torch.isfinite(want)
        assert int((kept != theirs).sum()) <= 1  # the last one hangs on the order of a sum
