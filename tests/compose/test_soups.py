# SPDX-License-Identifier: Apache-2.0
"""Model soups: averages against state dicts and PEFT, greedy selection, learned weights, paths and batch norm."""

from __future__ import annotations

import copy
import math
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from given_changes import Given, random_changes
from torch import nn

from tunesmith.compose import soups
from tunesmith.compose.working import dense_delta
from tunesmith.core.algebra import LowRank
from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys


@pytest.fixture(scope="module")
def lm() -> Base:
    torch.set_num_threads(1)
    return toys()[0]


@pytest.fixture(scope="module")
def vision() -> Base:
    return toys()[2]


def dense(pairs: Any) -> dict[str, torch.Tensor]:
    return {p.key: u.dense() for p, u in pairs}


def test_a_soup_of_copies_is_the_model_and_order_does_not_matter(lm: Base) -> None:
    one = random_changes(lm, 1)
    copies = Given(lm, [one.sources[0]] * 5)
    for key, value in dense(soups.average(copies)).items():
        assert torch.equal(value, one.sources[0][key].dense())
    three = random_changes(lm, 3)
    first = dense(soups.average(three))
    for order in permutations(range(3)):
        for key, value in dense(soups.average(three, order)).items():
            torch.testing.assert_close(value, first[key], atol=1e-6, rtol=1e-6)


def test_the_uniform_soup_is_the_mean_of_state_dicts(lm: Base) -> None:
    changes = random_changes(lm, 4, kinds=("linear", "norm", "embedding"))
    states = []
    for i in range(4):
        model = lm.merged(dense_delta(lm, [(p, changes.at(p)[i]) for p in changes.places()])).model
        states.append(model.state_dict())
    soup = lm.merged(dense_delta(lm, soups.average(changes))).model.state_dict()
    assert soup.keys() == states[0].keys()
    for key, value in soup.items():
        torch.testing.assert_close(value, torch.stack([s[key] for s in states]).mean(0), atol=1e-6, rtol=1e-5)


def test_a_source_that_leaves_a_tensor_alone_counts_as_zero(lm: Base) -> None:
    key = "layers.0.gate.weight"
    tau = torch.randn(32, 16)
    for sources in ([{key: tau}, {}, {}], [{}, {key: tau}, {}], [{}, {}, {key: tau}]):
        found = dense(soups.average(Given(lm, sources)))
        torch.testing.assert_close(found[key], tau / 3)
    assert dense(soups.average(Given(lm, [{key: tau}, {}]), [1])) == {}
    with pytest.raises(UsageError, match="at least one"):
        list(soups.average(Given(lm, [{key: tau}]), []))


def test_the_mean_of_loras_is_pefts_concatenation_and_not_the_mean_of_factors() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False))
    start = copy.deepcopy(net)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "1"])
    model = peft.get_peft_model(net, config, adapter_name="a0")
    for name in ("a1", "a2"):
        model.add_adapter(name, config)
    names = ["a0", "a1", "a2"]
    layers = [model.base_model.model[i] for i in (0, 1)]
    for layer in layers:
        for name in names:
            nn.init.normal_(layer.lora_B[name].weight)
    sources = [
        {f"{i}.weight": LowRank(m.lora_B[n].weight.detach(), m.lora_A[n].weight.detach(), m.scaling[n]) for i, m in enumerate(layers)}
        for n in names
    ]  # fmt: skip
    base = Base(start, example=(torch.randn(2, 6),))
    found = dense(soups.average(Given(base, sources)))
    model.add_weighted_adapter(names, [1 / 3] * 3, "soup", combination_type="cat")
    for i, layer in enumerate(layers):
        torch.testing.assert_close(found[f"{i}.weight"], layer.get_delta_weight("soup"), atol=1e-6, rtol=1e-5)
        factors = sum(layer.lora_B[n].weight for n in names) @ sum(layer.lora_A[n].weight for n in names) * 2 / 9
        assert (found[f"{i}.weight"] - factors).abs().max() > 0.05


def test_greedy_never_scores_below_the_best_single_model() -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        models = torch.randn(6, 3, generator=g)
        target = torch.randn(3, generator=g)

        def score(m: torch.Tensor, target: torch.Tensor = target) -> float:
            return -float((m - target).square().sum())

        found = soups.greedy(6, lambda at, m=models: m[at].mean(0), score)
        assert found.score >= max(found.singles) and found.ingredients[0] == found.singles.index(max(found.singles))
        assert found.score == pytest.approx(score(models[found.ingredients].mean(0)))
        best = max(found.singles)
        for step in found.trail:  # kept scores never fall
            assert step["kept"] == (step["score"] >= best)
            best = step["score"] if step["kept"] else best
        assert best == found.score and len(found.trail) == 5
        assert found.ingredients[1:] == [s["source"] for s in found.trail if s["kept"]]


def test_equal_scores_stay_by_the_papers_rule_and_go_by_that_of_the_code() -> None:
    assert soups.greedy(3, list, lambda at: 0.5).ingredients == [0, 1, 2]
    assert soups.greedy(3, list, lambda at: 0.5, strict=True).ingredients == [0]
    known = soups.greedy(3, list, lambda at: float(len(at)), singles=[1.0, 3.0, 2.0], strict=True)
    assert known.ingredients == [1] and known.score == 3.0  # [1, 2] scores 2, [1, 0] too
    with pytest.raises(UsageError, match="source 1 is not finite"):
        soups.greedy(2, list, lambda at: math.nan if at == [1] else 0.0)
    with pytest.raises(UsageError, match="2 scores were given for 3"):
        soups.greedy(3, list, lambda at: 0.0, singles=[0.0, 1.0])


def examples(base: Base, rows: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return torch.randint(0, 37, (rows, 6), generator=g), torch.randint(0, 37, (rows,), generator=g)


def last(base: Base, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return base.model(input_ids=batch[0])["logits"][:, -1], batch[1]


def test_a_learned_soup_without_training_is_uniform(lm: Base) -> None:
    changes = random_changes(lm, 3)
    data = examples(lm)
    for rows in soups.ROWS:
        found = soups.learned(lm, changes, lambda: [data], last, rows=rows, epochs=0)
        assert all(row == pytest.approx([1 / 3] * 3) for row in found.weights.values()) and found.temperature == 1.0
        soup = dense(soups.mixed(changes, found.weights))
        for key, value in dense(soups.average(changes)).items():
            torch.testing.assert_close(soup[key], value, atol=1e-6, rtol=1e-5)
    assert set(found.weights) == {p.key for p in changes.places()}


def test_the_gradient_of_the_weights_is_that_of_autograd_through_the_mix(
    lm: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One Adam step shows its sign only, so the chain rule is compared with autograd through functional_call."""
    changes = random_changes(lm, 3, size=0.3)
    x, y = examples(lm)
    a = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(1.3, requires_grad=True)
    state = {k: t.detach() for k, t in lm.model.named_parameters()}
    w = a.softmax(-1).float()
    for p in changes.places():
        state[p.key] = state[p.key] + sum(w[i] * u.dense() for i, u in enumerate(changes.at(p)))
    logits = torch.func.functional_call(lm.model, state, kwargs={"input_ids": x})["logits"][:, -1]
    loss = F.cross_entropy(beta * logits, y)
    loss.backward()
    lr, seen = 1e-3, []
    plain = torch.optim.AdamW

    class Watched(plain):  # the optimiser sees the gradient
        def step(self, closure: Any = None) -> Any:
            seen.append([p.grad.clone() for g in self.param_groups for p in g["params"]])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    found = soups.learned(lm, changes, lambda: [(x, y)], last, lr=lr, epochs=1, temperature=1.3)
    torch.testing.assert_close(seen[0][0][0], a.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(seen[0][1], beta.grad, atol=1e-6, rtol=1e-4)
    assert found.losses[0] == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize("rows", soups.ROWS)
def test_learning_finds_the_model_that_fits_and_leaves_the_base_as_it_was(lm: Base, rows: str) -> None:
    changes = random_changes(lm, 3, size=0.4)
    x, _ = examples(lm)
    digest = lm.digest()
    second = dense_delta(lm, [(p, changes.at(p)[1]) for p in changes.places()])
    with torch.no_grad(), lm.using(second):
        y = lm.model(input_ids=x)["logits"][:, -1].argmax(-1)
    found = soups.learned(lm, changes, lambda: [(x, y)], last, rows=rows, lr=0.1, epochs=15)
    mean = [sum(r[i] for r in found.weights.values()) / len(found.weights) for i in range(3)]
    assert found.losses[-1] < found.losses[0] and found.temperature > 0
    assert rows == "tensor" or max(range(3), key=mean.__getitem__) == 1  # a small tensor may lean elsewhere
    assert all(sum(r) == pytest.approx(1) for r in found.weights.values())
    assert lm.digest() == digest and not any(p.grad is not None for p in lm.model.parameters())
    with pytest.raises(UsageError, match="held-out loss is not finite"):
        soups.learned(lm, changes, lambda: [(x, torch.full_like(y, -100))], last, epochs=1)
    with pytest.raises(UsageError, match="unknown rows"):
        soups.learned(lm, changes, lambda: [], last, rows="layer")


def test_a_path_shows_whether_two_models_share_a_basin(lm: Base) -> None:
    key = "layers.0.gate.weight"
    one, two = torch.randn(32, 16), torch.randn(32, 16)
    place = next(Given(lm, [{key: one}]).places())

    def pair(t: torch.Tensor) -> Any:
        return [(place, Given(lm, [{key: t}]).at(place)[0])]

    def near(found: Any) -> float:
        ((_, u),) = found
        return -min(float((u.dense() - t).square().mean()) for t in (one, two))

    bent = soups.path(pair(one), pair(two), near)
    assert bent.points == [0, 0.25, 0.5, 0.75, 1] and bent.apart
    gap = float((one - two).square().mean())
    assert bent.scores == pytest.approx([0, -gap / 16, -gap / 4, -gap / 16, 0], abs=1e-5)
    assert bent.barrier == pytest.approx(gap / 4, rel=1e-4)
    straight = soups.path(pair(one), pair(two), lambda f: float(f[0][1].dense().sum()))
    assert not straight.apart and straight.barrier == pytest.approx(0, abs=1e-3)
    half = soups.path(pair(one), [], lambda f: float(f[0][1].dense().norm()), points=3)
    assert half.scores == pytest.approx([float(one.norm()), float(one.norm()) / 2, 0], rel=1e-5)


def test_the_formula_holds_for_a_model_that_is_linear_in_its_weights() -> None:
    """With logits linear in alpha, softmax regression, soup and logit ensemble are one: the two terms cancel."""
    torch.manual_seed(0)
    x, f0, f1 = torch.randn(200, 5).double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    y = torch.randint(0, 4, (200,))

    def loss(a: float) -> float:
        return float(F.cross_entropy(x @ ((1 - a) * f0 + a * f1), y))

    h, a = 1e-3, 0.3
    curvature = (loss(a + h) - 2 * loss(a) + loss(a - h)) / h**2
    p = (x @ ((1 - a) * f0 + a * f1)).softmax(-1)
    assert soups.soup_minus_ensemble(a, curvature, p, x @ (f1 - f0)) == pytest.approx(0, abs=1e-5)
    assert soups.soup_minus_ensemble(a, 0.0, p, x @ (f1 - f0)) == pytest.approx(a * (1 - a) / 2 * curvature, abs=1e-5)


def test_batch_norm_statistics_are_measured_anew_and_not_averaged(vision: Base) -> None:
    changes = random_changes(vision, 2, kinds=("conv2d", "linear"), size=0.3)
    merged = vision.merged(dense_delta(vision, soups.average(changes)))
    g = torch.Generator().manual_seed(3)
    batches = [torch.randn(8, 3, 6, 6, generator=g) * 2 + 1 for _ in range(3)]
    before = vision.digest(), merged.digest()
    found = soups.batch_norm_statistics(merged, batches, lambda b, x: b.model(x))
    assert (vision.digest(), merged.digest()) == before and set(found) == {"bn1", "bn2"}
    peer = copy.deepcopy(merged.model).train()
    for m in (peer.bn1, peer.bn2):
        m.reset_running_stats()
        m.momentum = None  # the plain mean over batches
    with torch.no_grad():
        for x in batches:
            peer(x)
    for name in found:
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(found[name][key], getattr(getattr(peer, name), key), atol=1e-5, rtol=1e-5)
    fresh = soups.with_statistics(merged, found)
    torch.testing.assert_close(fresh.model(batches[0]), peer.eval()(batches[0]), atol=1e-5, rtol=1e-4)
    assert merged.digest() == before[1] and fresh.model.mix.weight is merged.model.mix.weight
    assert fresh.model.bn1.num_batches_tracked is merged.model.bn1.num_batches_tracked  # a count is not averaged
    with pytest.raises(UsageError, match="no batch norm with running"):
        soups.batch_norm_statistics(toys()[0], batches, lambda b, x: b.model(x))
    with pytest.raises(UsageError, match="mix: it is no batch norm"):
        soups.with_statistics(merged, {"mix": {}})
