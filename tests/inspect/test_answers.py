# SPDX-License-Identifier: Apache-2.0
"""Probes that read answers: the depth profile (card 010), the prior (card 075) and the lens behind both."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.sample import Sample
from tunesmith.core.toys import toys
from tunesmith.inspect import DepthKL, Lens, Prior, items_of, prior_of, read_layers
from tunesmith.inspect.answers import nth_answer_token
from tunesmith.inspect.prior import Item, ablated, correlation, interval, said, suggested


class Bigram(nn.Module):
    """Logits of the next token from the last one alone: a table and a bias."""

    def __init__(self, vocab: int = 11) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, vocab), nn.Linear(vocab, vocab)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embed(input_ids))}


def bigram() -> Base:
    torch.manual_seed(0)
    return Base(Bigram(), example={"input_ids": torch.arange(6)[None]}, family="causal-lm")


IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
ANSWERS = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0]]).bool()


def test_answer_tokens_are_counted_from_the_start_of_each_answer() -> None:
    keep = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 1]]).bool()
    assert nth_answer_token(keep).tolist() == [[-1, 0, 1, -1, 0, 1, 2], [0, -1, -1, -1, -1, -1, 0]]


def test_the_divergence_of_a_known_logit_shift(rows: Callable[..., Sample]) -> None:
    base, c = bigram(), 1.5
    delta = Delta.create(base, ts.BitFit(targets="head"))
    delta.parts[0].parameter("head", "bias").data[3] += c
    found = DepthKL(positions=4, first=2).measure(base, delta, rows(IDS, ANSWERS))
    wanted: list[list[float]] = [[], [], [], []]
    with torch.no_grad():
        p = base(IDS)["logits"].double().softmax(-1)
    for row, start, n in ((0, 2, 4), (1, 3, 2)):
        for t in range(n):
            p3 = float(p[row, start + t - 1, 3])  # the token before predicts
            q3 = p3 * math.exp(c) / (1 + p3 * (math.exp(c) - 1))
            wanted[t].append(c * q3 - math.log(1 + p3 * (math.exp(c) - 1)))
    assert [r["kl"] for r in found.rows] == pytest.approx([sum(w) / len(w) for w in wanted], rel=1e-5)
    assert [r["answers"] for r in found.rows] == [2, 2, 1, 1] and [r["t"] for r in found.rows] == [1, 2, 3, 4]
    kl = [r["kl"] for r in found.rows]
    assert found.values["first_share"] == pytest.approx(sum(kl[:2]) / sum(kl))
    loss = -math.log(float(p[0, 1, 3])), -math.log(float(p[1, 2, 3]))
    assert found.rows[0]["base_loss"] == pytest.approx(sum(loss) / 2, rel=1e-5)


def test_only_the_position_that_changed_diverges(rows: Callable[..., Sample]) -> None:
    base = bigram()
    delta = Delta.create(base, ts.Full(targets="embed"))
    delta.parts[0].parameter("embed", "weight").data[4] += torch.randn(11)  # what follows token 4
    found = DepthKL().measure(base, delta, rows(IDS[:1], ANSWERS[:1]))
    kl = {r["t"]: r["kl"] for r in found.rows}  # answer 3 4 5 6: token 5, the third, comes after 4
    assert kl[3] > 1e-3 and kl[1] == kl[2] == kl[4] == 0
    nothing = Delta.create(base, ts.LoRA(rank=1, targets="head"))
    assert DepthKL().measure(base, nothing, rows(IDS, ANSWERS)).values["first_share"] is None


def test_by_layer_the_last_one_is_the_whole_divergence(
    lm: Base, noisy: Callable[..., Delta], rows: Callable[..., Sample]
) -> None:
    delta, sample = noisy(lm, targets="layers.1.down"), rows(IDS, ANSWERS)
    before = lm.digest(), delta.digest
    found = DepthKL(layers=True).measure(lm, delta, sample)
    total = sum(r["kl"] * r["answers"] for r in found.rows) / sum(r["answers"] for r in found.rows)
    first, last = (r["kl"] for r in found.facts["by_layer"])
    assert first == 0 and last == pytest.approx(total, rel=1e-4)
    assert (lm.digest(), delta.digest) == before


def test_depth_needs_answers_and_logits(lm: Base, noisy: Callable[..., Delta], rows: Callable[..., Sample]) -> None:
    with pytest.raises(UsageError, match="needs data"):
        DepthKL().measure(lm, noisy(lm))
    with pytest.raises(UsageError, match="no row"):
        DepthKL().measure(lm, noisy(lm), rows(IDS, torch.zeros_like(ANSWERS)))
    vision = toys()[2]
    batch = vision.probe()
    plain = Sample(lambda: [batch], lambda b, x: b.model(*x), lambda b, x: torch.zeros(()))
    with pytest.raises(UsageError, match="prompts and answers"):
        DepthKL().measure(vision, Delta.create(vision, ts.LoRA()), plain)


def test_the_lens_at_the_last_layer_is_the_model(lm: Base, noisy: Callable[..., Delta]) -> None:
    lens = Lens(lm)
    assert (lens.norm, lens.head, lens.blocks) == ("norm", "head", ["layers.0", "layers.1"])
    ids = lm.probe()["input_ids"]
    plain, _ = lens.states(lambda: lm(ids))
    with lm.using(noisy(lm, targets="everything")), torch.no_grad():
        states, logits = lens.states(lambda: lm(ids))
        torch.testing.assert_close(lens.read(states[-1]), logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits, lm(ids)["logits"])
        assert not torch.allclose(states[0], plain[0])


def test_a_model_whose_logits_are_no_plain_read_out_is_refused(lm: Base) -> None:
    class Capped(type(lm.model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": 0.5 * super().forward(input_ids)["logits"]}

    capped = Base(Capped(), example={"input_ids": IDS})
    with pytest.raises(UsageError, match="cannot be read this way"):
        Lens(capped).states(lambda: capped(IDS))
    with pytest.raises(UsageError, match="lens needs repeated blocks"):
        Lens(toys()[2])


def test_the_prior_is_of_the_answer_alone(rows: Callable[..., Sample]) -> None:
    base = bigram()
    other = torch.tensor([[9, 8, 3, 4, 5, 6], [1, 1, 1, 3, 2, 1]])
    a, b = (items_of(base, rows(ids, ANSWERS)) for ids in (IDS, other))
    assert [x.answer for x in a] == [(3, 4, 5, 6), (3, 2)] == [x.answer for x in b]
    assert a[0].at == (2, 3, 4, 5) and a[1].ids == (6, 5, 4, 3, 2)
    found = prior_of(base, [x.answer for x in a], [7, 8])
    assert torch.equal(found, prior_of(base, [x.answer for x in b], [7, 8]))
    with torch.no_grad():
        logp = base(torch.tensor([[7, 8, 3, 2]]))["logits"].double().log_softmax(-1)[0]
    assert float(found[1]) == pytest.approx(float(logp[1, 3] + logp[2, 2]) / 2, rel=1e-5)
    with pytest.raises(UsageError, match="at least one token"):
        prior_of(base, [[1]], [])


def test_padding_does_not_change_what_is_said(lm: Base, rows: Callable[..., Sample]) -> None:
    padded = torch.full((2, 9), -1)
    padded[0, :6], padded[1, :6] = IDS[0], IDS[1]
    left = torch.full((2, 8), -1)
    left[:, 2:] = IDS
    wide = torch.zeros(2, 9).bool()
    wide[:, :6] = ANSWERS
    shifted = torch.zeros(2, 8).bool()
    shifted[:, 2:] = ANSWERS
    plain = items_of(lm, rows(IDS, ANSWERS))
    assert items_of(lm, rows(padded, wide)) == plain == items_of(lm, rows(left, shifted))
    alone = [said(lm, [x])[0] for x in plain]
    assert said(lm, plain) == alone


def test_correlation_is_pearsons_and_permuted_labels_destroy_it() -> None:
    from scipy import stats

    g = torch.Generator().manual_seed(0)
    prior = torch.randn(400, generator=g).double()
    correct = (prior + 0.5 * torch.randn(400, generator=g)) > 0
    r = correlation(correct, prior)
    exact = stats.pearsonr(correct.double().numpy(), prior.numpy())
    assert r == pytest.approx(exact.statistic) and r > 0.5
    low, high = exact.confidence_interval()
    assert interval(r, 400) == pytest.approx((low, high), abs=1e-6)
    shuffled = correlation(correct[torch.randperm(400, generator=g)], prior)
    low, high = interval(shuffled, 400)
    assert abs(shuffled) < 0.15 and low < 0 < high
    assert correlation(torch.ones(5), prior[:5]) is None and interval(None, 5) is None


def test_layers_where_the_prior_takes_over_are_suggested() -> None:
    c, a = [0.1, 0.1, 0.6, 0.7, 0.6], [0.1, 0.5, 0.3, 0.3, 0.4]
    rows_ = [{"layer": i, "base_c": x, "base_a": y} for i, (x, y) in enumerate(zip(c, a, strict=True))]
    assert suggested(rows_, 4) == [2, 3] and suggested(rows_, 1) == [2]
    assert suggested([{"layer": 0, "base_c": None, "base_a": 0.0}] * 2, 4) == []


def test_the_whole_probe_on_a_model_that_speaks_the_prior(lm: Base, rows: Callable[..., Sample]) -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 37, (40, 5), generator=g)
    answers = torch.zeros(40, 5).bool()
    answers[:, 4] = True
    with torch.no_grad():  # half of the items carry the answer the model gives
        ids[:20, 4] = lm(ids[:20])["logits"][:, 3].argmax(-1)
    delta = Delta.create(lm, ts.LoRA(rank=2))
    before = lm.digest(), delta.digest
    found = Prior(neutral_ids=[1, 2], ablate=True).measure(lm, delta, rows(ids, answers))
    assert found.values["base_accuracy"] == found.values["delta_accuracy"] >= 0.5
    assert found.values["base_rho"] == found.values["delta_rho"] is not None
    assert found.values["base_rho"] == pytest.approx(
        correlation(torch.tensor([i < 20 for i in range(40)]), prior_of(lm, ids[:, 4:].tolist(), [1, 2])), abs=0.1
    )
    last, items = found.rows[-1], items_of(lm, rows(ids, answers))
    assert last["base_a"] == found.values["base_accuracy"]  # the last layer is the model
    seen = read_layers(lm, items).logp[-1]
    with torch.no_grad():
        logp = lm(ids)["logits"][:, 3].log_softmax(-1).gather(-1, ids[:, 4:])[:, 0]
    torch.testing.assert_close(seen, logp.double(), atol=1e-5, rtol=1e-5)
    assert all(0 <= r["low_prior_accuracy_without"] <= 1 for r in found.rows)
    strata = found.facts["base_strata"]
    assert sum(s["items"] for s in strata) == 40 and [s["prior"] for s in strata] == sorted(s["prior"] for s in strata)
    assert (lm.digest(), delta.digest) == before


def test_ablation_replaces_the_outputs_of_one_block(lm: Base) -> None:
    items = [Item((1, 2, 3, 4), (3,), (4,)), Item((5, 6, 7, 8), (3,), (8,))]
    digest, outputs = lm.digest(), lm.probe_outputs()
    found = ablated(lm, items)
    assert len(found) == 2 and lm.digest() == digest and torch.equal(lm.probe_outputs(), outputs)
    with torch.no_grad():  # by hand for the first block: mean of both sublayers at the answer's position
        ids = torch.tensor([x.ids for x in items])
        kept: dict[str, Tensor] = {}
        names = ("layers.0.attention.o", "layers.0.down")
        hooks = [lm.modules[n].register_forward_hook(lambda _m, _a, out, n=n: kept.__setitem__(n, out)) for n in names]
        lm(ids)
        for h in hooks:
            h.remove()
        state = lm.modules["embed"](ids) + sum(kept[n][:, 2].mean(0) for n in names)
        logits = lm.modules["head"](lm.modules["norm"](lm.modules["layers.1"](state, None)))
        right = (logits[:, 2].argmax(-1) == ids[:, 3]).double().mean()
    assert found[0] == pytest.approx(float(right))


def test_bad_input_to_the_prior(lm: Base, noisy: Callable[..., Delta], rows: Callable[..., Sample]) -> None:
    sample = rows(IDS, ANSWERS)
    for options, match in (({}, "no tokenizer"), ({"neutral_ids": ["a"]}, "must be token ids")):
        with pytest.raises(UsageError, match=match):
            Prior(**options).measure(lm, noisy(lm), sample)
    with pytest.raises(UsageError, match="needs data"):
        Prior(neutral_ids=[1]).measure(lm, noisy(lm))
    with pytest.raises(UsageError, match="no row of the data has an answer"):
        Prior(neutral_ids=[1]).measure(lm, noisy(lm), rows(IDS, torch.zeros_like(ANSWERS)))
