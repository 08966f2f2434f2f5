# SPDX-License-Identifier: Apache-2.0
"""The hand-off: whose tokens are whose, what it costs, and that the delta is truly off until then."""

from __future__ import annotations

import math

import pytest
import torch
from serve_cases import moved, tiny_llama

from tunesmith.core.base import Base
from tunesmith.core.decoding import Decoder, Joint
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.reading import reader
from tunesmith.decode import forced, handoff
from tunesmith.deltas import LoRA, PromptTuning
from tunesmith.evaluate.generate import generate

PROMPTS = [[3, 4, 5, 6, 7], [10, 11], [12, 13, 14, 15, 16, 17]]


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_llama()


@pytest.fixture(scope="module")
def delta(base: Base) -> Delta:
    return moved(base, LoRA(rank=3), seed=5)


def write(base: Base | Decoder, prompts: list[list[int]] = PROMPTS, new: int = 10) -> dict[int, list[int]]:
    return dict(generate(base, prompts, max_new_tokens=new, stop_ids=[]))


def tuned(base: Base, delta: Delta, prompts: list[list[int]], new: int = 10) -> dict[int, list[int]]:
    with base.using(delta):
        return write(base, prompts, new)


@pytest.mark.parametrize("recompute", [True, False])
def test_k_0_is_the_tuned_model_and_k_inf_the_aligned_one(base: Base, delta: Delta, recompute: bool) -> None:
    assert write(handoff(base, delta, 0, recompute=recompute)) == tuned(base, delta, PROMPTS)
    assert write(handoff(base, delta, math.inf, recompute=recompute)) == write(base)
    assert write(base) != tuned(base, delta, PROMPTS)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_aligned_model_writes_k_tokens_and_the_tuned_one_continues_them(base: Base, delta: Delta, k: int) -> None:
    first = write(base, new=k)
    then = tuned(base, delta, [[*p, *first[i]] for i, p in enumerate(PROMPTS)], 10 - k)
    assert write(handoff(base, delta, k)) == {i: first[i] + then[i] for i in first}


def test_a_kept_cache_holds_what_was_read_without_the_delta(base: Base, delta: Delta) -> None:
    from transformers import DynamicCache

    k, prompt = 4, PROMPTS[0]
    cache, ids, got = DynamicCache(config=base.model.config), torch.tensor([prompt]), []
    for step in range(10):
        with torch.no_grad(), base.using(delta if step >= k else None):
            z = base.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
        got.append(int(z.argmax()))
        ids = torch.tensor([[got[-1]]])
    assert write(handoff(base, delta, k, recompute=False), [prompt])[0] == got


def test_it_costs_one_aligned_pass_for_each_of_k_tokens_and_none_after(base: Base, delta: Delta) -> None:
    seen: list[tuple[int, bool]] = []

    def note(module: object, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen.append((kwargs["input_ids"].shape[1], bool(base.active)))

    hook = base.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        write(handoff(base, delta, 3), PROMPTS[:1], new=6)
        assert seen == [(5, False), (1, False), (1, False), (8, True), (1, True), (1, True)]
        seen.clear()
        write(handoff(base, delta, 3, recompute=False), PROMPTS[:1], new=6)
        assert seen == [(5, False)] + 2 * [(1, False)] + 3 * [(1, True)]
    finally:
        hook.remove()


def test_until_then_the_delta_is_off_bit_for_bit(base: Base, delta: Delta) -> None:
    want = torch.log_softmax(reader(base).start(PROMPTS), -1)
    assert torch.equal(Joint(handoff(base, delta, 2)).start(PROMPTS), want)
    with base.using(delta):
        assert not torch.equal(torch.log_softmax(reader(base).start(PROMPTS), -1), want)


def test_another_aligned_model_and_given_tokens(base: Base, delta: Delta) -> None:
    aligned = moved(base, LoRA(rank=1), seed=8)
    first = tuned(base, aligned, PROMPTS, 3)
    then = tuned(base, delta, [[*p, *first[i]] for i, p in enumerate(PROMPTS)], 7)
    assert write(handoff(base, delta, 3, aligned=(base, aligned))) == {i: first[i] + then[i] for i in first}
    given = (9, 8, 7)
    then = tuned(base, delta, [[*p, *given] for p in PROMPTS], 7)
    assert write(forced(base, delta, given)) == {i: [*given, *a] for i, a in then.items()}


def test_what_is_refused(base: Base, delta: Delta) -> None:
    for k in (-1, 2.5, math.nan, True):
        with pytest.raises(UsageError, match="whole number"):
            handoff(base, delta, k)
    other = tiny_llama(seed=3)
    with pytest.raises(UsageError, match="another base"):
        handoff(base, delta, 3, aligned=other, recompute=False)
    with pytest.raises(UsageError, match="keeps no cache"):
        handoff(base, moved(base, PromptTuning(tokens=2)).at(0.5), 3, recompute=False)
    with pytest.raises(UsageError, match="token numbers from 0 to 66"):
        forced(base, delta, [99])
