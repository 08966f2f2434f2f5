# SPDX-License-Identifier: Apache-2.0
"""Combined log-probabilities: what cancels, what stays, and the tokens that come of it; card checks of emulated fine-tuning."""

from __future__ import annotations

import math

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from serve_cases import moved, tiny_llama
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.decoding import Decoder, Joint, Member, vocabulary
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.decode import combine, contrastive
from tunesmith.decode.combine import combined
from tunesmith.deltas import LoRA
from tunesmith.evaluate.generate import generate, stream

PROMPTS = [[3, 4, 5, 6, 7], [10, 11], [12, 13, 14, 15, 16, 17], [18]]


@pytest.fixture(scope="module")
def large() -> Base:
    return tiny_llama(seed=1, hidden_size=48)


@pytest.fixture(scope="module")
def small() -> Base:
    return tiny_llama(seed=2)


@pytest.fixture(scope="module")
def delta(small: Base) -> Delta:
    return moved(small, LoRA(rank=2), seed=3)


@torch.no_grad()
def logp(base: Base, ids: list[int], delta: Delta | None = None) -> Tensor:
    with base.using(delta):
        return torch.log_softmax(base.model(input_ids=torch.tensor([ids])).logits[0, -1], -1)


def write(
    base: Base | Decoder, prompts: list[list[int]] = PROMPTS, new: int = 8, **more: object
) -> dict[int, list[int]]:
    return dict(generate(base, prompts, max_new_tokens=new, stop_ids=[], batch_size=3, **more))


def test_tokens_are_those_of_the_sum_written_out(large: Base, small: Base, delta: Delta) -> None:
    got = write(combine(large, [(0.7, (small, delta), small)]))
    for i, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(8):
            s = logp(large, ids) + 0.7 * (logp(small, ids, delta) - logp(small, ids))
            ids.append(int(s.argmax()))
        assert got[i] == ids[len(prompt) :]
        assert (
            list(stream(combine(large, [(0.7, (small, delta), small)]), prompt, max_new_tokens=8, stop_ids=[]))
            == got[i]
        )
    assert got != write(large)


def test_weight_0_is_the_large_base_and_a_delta_of_itself_is_the_tuned_model(
    large: Base, small: Base, delta: Delta
) -> None:
    nothing = combine(large, [(0.0, (small, delta), small)])
    assert nothing.members == (Member(large),) and write(nothing) == write(large)
    whole = combine(small, [(1.0, delta)])
    assert whole.needs(0) == (1,), "log p_N cancels, so N is not read"
    got = write(whole)
    with small.using(delta):
        assert got == write(small)
    z = {0: torch.randn(2, 67), 1: torch.randn(2, 67)}
    torch.testing.assert_close(whole.step(z, 0, 2), torch.log_softmax(z[1], -1))
    half = combine(small, [(0.5, delta)])
    torch.testing.assert_close(
        half.step(z, 0, 2), torch.log_softmax(0.5 * torch.log_softmax(z[0], -1) + 0.5 * torch.log_softmax(z[1], -1), -1)
    )


def test_members_may_be_shown_prompts_of_their_own(small: Base) -> None:
    same = Member(small, (moved(small, LoRA(rank=1), size=0.0).at(1.0),))  # the same model under another name
    other = [[40 + i, 41, 42] for i in range(len(PROMPTS))]
    d = combine(small, [(1.0, same, small)])
    assert write(d, others={1: other}) == write(small, other)
    off = combine(small, [(0.0, same, small)])
    assert write(off) == write(small)
    with pytest.raises(UsageError, match="2 prompts of member 1 for 4 rows"):
        write(d, others={1: other[:2]})


def test_two_terms(large: Base, small: Base, delta: Delta) -> None:
    second = moved(small, LoRA(rank=2), seed=9)
    both = combine(large, [(1.0, (small, delta), small), (0.0, (small, second), small)])
    one = combine(large, [(1.0, (small, delta), small)])
    assert write(both) == write(one) and len(both.members) == len(one.members) == 3
    mixed = combine(large, [(0.6, (small, delta), small), (0.4, (small, second), small)])
    assert len(mixed.members) == 4 and mixed.coefficients[2] == -1.0, "the reference is read once"


def test_probabilities_sum_to_one_and_constants_do_not_count(large: Base, small: Base, delta: Delta) -> None:
    g = torch.Generator().manual_seed(0)
    for top_p, plausible in ((1.0, 0.0), (0.9, 0.0), (1.0, 0.1), (0.8, 0.05)):
        d = combine(large, [(1.0, (small, delta), small)], top_p=top_p, plausible=plausible)
        z = {i: 3 * torch.randn(5, 67, generator=g) for i in range(3)}
        p = d.step(z, 0, 5)
        torch.testing.assert_close(p.exp().sum(-1), torch.ones(5))
        shifted = d.step({i: t + 10.0 * i - 4 for i, t in z.items()}, 0, 5)
        torch.testing.assert_close(p, shifted, atol=1e-4, rtol=0)


def test_a_bounded_adjustment_leaves_the_rest_of_the_distribution_alone() -> None:
    base = torch.tensor([0.5, 0.3, 0.12, 0.05, 0.03]).log()
    s = base + torch.tensor([-4.0, 1.0, 0.5, 9.0, 9.0])
    p = combined(s, base, top_p=0.9).exp()
    torch.testing.assert_close(p[3:], base.exp()[3:])
    torch.testing.assert_close(p[:3].sum(), torch.tensor(0.92))
    torch.testing.assert_close(p[:3], 0.92 * torch.softmax(s[:3], -1))
    q = combined(s, base, plausible=0.2).exp()
    assert q[3] == q[4] == 0 and q.argmax() == 1
    torch.testing.assert_close(q[:3], torch.softmax(s[:3], -1))
    torch.testing.assert_close(combined(s, base, top_p=1.0), torch.log_softmax(s, -1))


def test_contrastive_decoding_is_experts_less_amateurs(large: Base, small: Base) -> None:
    got = write(contrastive(large, small, weight=0.5, plausible=0.1), PROMPTS[:1])[0]
    ids = list(PROMPTS[0])
    for _ in range(8):
        e, a = logp(large, ids), logp(small, ids)
        s = torch.where(e >= e.max() + math.log(0.1), e - 0.5 * a, -torch.inf)
        ids.append(int(s.argmax()))
    assert got == ids[5:]


def test_vocabularies_must_mean_the_same() -> None:
    a, b, padded = tiny_llama(vocab_size=300), tiny_llama(seed=1, vocab_size=300), tiny_llama(seed=2, vocab_size=304)
    for base in (a, b, padded):
        base.tokenizer = byte_tokenizer()
    d = combine(a, [(1.0, b, padded)])
    assert d.size == 300 and vocabulary(d.members) == 300
    assert len(write(d, [[5, 6]], new=3)[0]) == 3, "rows of padding are left out"
    b.tokenizer.add_tokens(["zzz"])
    with pytest.raises(UsageError, match="'zzz' is None in"):
        combine(a, [(1.0, b, padded)])
    b.tokenizer = a.tokenizer = padded.tokenizer = None
    with pytest.raises(UsageError, match="no tokenizer to compare"):
        combine(a, [(1.0, b, padded)])


def test_what_is_refused(large: Base, small: Base, delta: Delta) -> None:
    for terms, match in (
        ([(float("nan"), small)], "finite number"), ([(1.0,)], "a term is"), ([(1.0, 3)], "int is no model"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=match):
            combine(large, terms)
    with pytest.raises(UsageError, match="must lie in 0 .. 1"):
        combine(large, [(1.0, small)], top_p=0.0)
    with pytest.raises(UsageError, match="a token id is outside"):
        write(combine(large, [(1.0, small)]), [[70]])


def test_rows_that_are_done_leave_every_cache(large: Base, small: Base, delta: Delta) -> None:
    d = combine(large, [(1.0, (small, delta), small)])
    alone = {i: next(iter(write(d, [p], new=12).values())) for i, p in enumerate(PROMPTS)}
    stop = alone[0][2]
    cut = {i: a[: a.index(stop)] if stop in a else a for i, a in alone.items()}
    assert dict(generate(d, PROMPTS, max_new_tokens=12, stop_ids=[stop])) == cut
    joint = Joint(d)
    first = joint.start(PROMPTS)
    joint.keep([2, 0])
    torch.testing.assert_close(joint.more([5, 6])[1], Joint(d).start([[*PROMPTS[0], 6]])[0], atol=1e-3, rtol=1e-4)
    assert first.shape == (4, 67)
