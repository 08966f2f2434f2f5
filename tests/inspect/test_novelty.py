# SPDX-License-Identifier: Apache-2.0
"""Card 035: contrastive generative exploration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys
from tunesmith.inspect import Novelty, contrast, explore
from tunesmith.inspect.novelty import _Reference, clusters


def logits(seed: int, n: int = 50) -> torch.Tensor:
    return 2 * torch.randn(3, n, generator=torch.Generator().manual_seed(seed))


def test_without_reference_and_cut_it_is_the_changed_model() -> None:
    a, b = logits(1), logits(2)
    torch.testing.assert_close(contrast(a, b, gamma=0, alpha=0).softmax(-1), a.double().softmax(-1))


def test_equal_models_are_uniform_over_the_plausible_tokens() -> None:
    a = logits(1)
    p = a.softmax(-1)
    plausible = p >= 0.1 * p.max(-1, keepdim=True).values
    s = contrast(a, a)
    assert torch.equal(s.isfinite(), plausible) and float(s[plausible].abs().max()) == 0
    torch.testing.assert_close(s.softmax(-1), plausible.double() / plausible.sum(-1, keepdim=True))


def test_the_contrast_is_the_log_ratio() -> None:
    a, b = logits(1), logits(2)
    s = contrast(a, b, gamma=0.7, alpha=0.01)
    ratio = a.double().log_softmax(-1) - 0.7 * b.double().log_softmax(-1)
    torch.testing.assert_close(s[s.isfinite()], ratio[s.isfinite()])


def test_every_token_is_plausible_and_the_base_is_restored(lm: Base, noisy: Callable[..., Delta]) -> None:
    delta = noisy(lm, size=1.0)
    for iterative in (False, True):
        before = lm.digest(), delta.digest, [p.requires_grad for p in lm.model.parameters()]
        how = Novelty(n=6, length=7, start=1, iterative=iterative, lr=1e-2)
        texts = explore(lm, delta, how)
        assert (lm.digest(), delta.digest, [p.requires_grad for p in lm.model.parameters()]) == before
        assert not lm.active and len(texts) == 6
        for t in texts:
            ids = torch.tensor([[1, *t.ids]])
            with torch.no_grad(), lm.using(delta):
                p = lm(ids)["logits"].softmax(-1)[0]
            with torch.no_grad():
                q = lm(ids)["logits"].softmax(-1)[0]
            at = range(len(t.ids))
            assert all(float(p[i, t.ids[i]]) >= 0.1 * float(p[i].max()) - 1e-7 for i in at)
            novelty = sum(float((p[i, t.ids[i]] / q[i, t.ids[i]]).log()) for i in at) / len(t.ids)
            assert t.novelty == pytest.approx(novelty, abs=1e-4)


def test_a_step_of_the_reference_lowers_the_loss_of_the_text(lm: Base) -> None:
    reference = _Reference(lm, Novelty(iterative=True, lr=1e-2))
    ids = torch.tensor([[1, 5, 9, 2, 30]])

    def loss() -> float:
        with torch.no_grad(), lm.using(reference.delta):
            return float(F.cross_entropy(lm(ids)["logits"][0, :-1], ids[0, 1:]))

    before = loss()
    with torch.no_grad():
        assert before == pytest.approx(float(F.cross_entropy(lm(ids)["logits"][0, :-1], ids[0, 1:])))
    reference.learn(ids)
    assert loss() < before


def test_it_says_what_a_delta_was_trained_to_say(lm: Base) -> None:
    delta = Delta.create(lm, ts.LoRA(rank=8, targets="all-linear,head"))
    text = torch.tensor([[1, 20, 21, 22, 23, 24, 25]])
    optimiser = torch.optim.Adam([t for t in delta.parameters() if t.requires_grad], lr=2e-2)
    for _ in range(100):
        with lm.frozen(), lm.using(delta):
            F.cross_entropy(lm(text)["logits"][0, :-1], text[0, 1:]).backward()
        optimiser.step()
        optimiser.zero_grad()
    found = Novelty(n=8, length=6, start=1).measure(lm, delta)
    assert sum(r["ids"] == [20, 21, 22, 23, 24, 25] for r in found.rows) >= 6
    assert found.values["mean_novelty"] > 1 and found.rows[0]["text"].startswith("20 21")


def test_same_seed_same_texts(lm: Base, noisy: Callable[..., Delta]) -> None:
    delta = noisy(lm)
    a, b, c = (explore(lm, delta, Novelty(n=4, length=5, start=1, seed=s)) for s in (3, 3, 4))
    assert a == b != c


def test_clusters_separate_texts_without_common_tokens() -> None:
    texts = [(1, 2, 3, i % 3 + 1) for i in range(6)] + [(11, 12, 13, i % 3 + 11) for i in range(6)]
    groups, why = clusters(texts)
    assert not {g for g in groups[:6]} & {g for g in groups[6:]} and "silhouette" in why
    assert clusters([(1, 2)] * 5)[0] == [0] * 5 and clusters([(), (1,)])[1].startswith("one group")


def test_models_that_generate_no_text_are_refused(lm: Base, noisy: Callable[..., Delta]) -> None:
    with pytest.raises(UsageError, match="no start token"):
        Novelty().measure(lm, noisy(lm))
    vision = toys()[2]
    with pytest.raises(UsageError, match="causal language model"):
        Novelty(start=0).measure(vision, Delta.create(vision, ts.LoRA()))
