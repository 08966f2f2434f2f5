# SPDX-License-Identifier: Apache-2.0
"""Study 019 at toy size: the word model, SGD, grafts and their sizes, and the verdict rule."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "019-skill-grafting"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def words(module: Any) -> Any:
    return import_module(module.__name__.rpartition(".")[0] + ".words")


@pytest.fixture(scope="module")
def world(words: Any) -> Any:
    return words.made(SimpleNamespace(smoke=True), "sst2", words.TOY)


def test_a_smoke_run_gives_every_arm_task_and_seed(study: Any, module: Any, words: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    assert [(r["task"], r["seed"]) for r in raw["tasks"]] == [(t, s) for t in words.TASKS for s in (0, 1)]
    for row in raw["tasks"]:
        sizes = {arm: r["entries"] for arm, r in row["arms"].items() if arm != module.FULL}
        assert row["search"]["entries"] == sizes[module.GRAFT] <= int(0.01 * row["search"]["of"])
        assert len({n for arm, n in sizes.items() if arm != module.GRAFT}) == 1  # the others fill the budget
        assert len(row["search"]["curve"]) == words.TOY.steps + 1
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [0, 1]


def test_the_word_model_is_the_whole_model_at_the_last_position(words: Any, world: Any) -> None:
    text = min((t for t, _ in world.pool[0]), key=len)
    ids = world.encode(text)
    inputs = world.states([(text, 0)]).some([0])
    with torch.no_grad():
        want = world.full.model(input_ids=torch.tensor([ids])).logits[0, -1, [2, 3]]
        torch.testing.assert_close(world.base.model(**inputs)[0], want, atol=1e-5, rtol=1e-5)
        longer = {
            "inputs_embeds": torch.cat([inputs["inputs_embeds"], torch.ones(1, 2, 32)], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros(1, 2, dtype=torch.int64)], 1),
        }
        torch.testing.assert_close(world.base.model(**longer)[0], want, atol=1e-5, rtol=1e-5)


def test_rows_of_a_seed_are_balanced_and_apart(words: Any, world: Any) -> None:
    learn, dev = world.drawn(0)
    assert [learn.labels.count(c) for c in (0, 1)] == [6, 6] and [dev.labels.count(c) for c in (0, 1)] == [4, 4]
    other, _ = world.drawn(1)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(learn.states, other.states, strict=True))


def test_a_graft_of_all_entries_is_the_fine_tuned_model_and_of_none_the_base(words: Any, world: Any) -> None:
    digest = world.base.digest()
    learn, _ = world.drawn(0)
    delta, facts = world.fine_tuned(learn, 0, 0.5)
    assert 1 <= facts["passes"] <= 4 and world.base.digest() == digest
    everything = words.baselines(delta, world.base, 1.0, 0)
    whole = world.only(delta, everything["largest movement"], "whole")
    rows = world.rows["test"]
    with world.base.using(delta):
        want = world.probabilities(rows)[0]
    with world.base.using(whole):
        torch.testing.assert_close(world.probabilities(rows)[0], want, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(world.probabilities(rows)[0], want, atol=1e-4)
    norms = everything["norm gains"]
    assert set(norms) == {k for k in norms if "norm" in k} and len(norms) == 2 * 2 + 1


def test_one_step_of_sgd_is_the_gradient_times_the_rate(words: Any) -> None:
    import copy
    from dataclasses import replace

    sizes = replace(words.TOY, batch=100, epochs=1)
    world = words.made(SimpleNamespace(smoke=True), "sst2", sizes)
    learn, _ = world.drawn(0)
    delta, _ = world.fine_tuned(learn, 0, 0.3)
    model = copy.deepcopy(world.base.model)
    moving = {n: p.requires_grad_(True) for n, p in model.named_parameters()}
    inputs, y = world.batch(learn, range(len(learn)))
    loss = torch.nn.functional.cross_entropy(model(**inputs), y)
    grads = dict(zip(moving, torch.autograd.grad(loss, list(moving.values())), strict=True))
    found = {f"{path}.{name}": t for part in delta.parts for path, name, t in part.items()}
    assert found.keys() == grads.keys()
    for name, g in grads.items():
        torch.testing.assert_close(found[name].detach(), -0.3 * g, atol=1e-6, rtol=1e-4)


def test_the_rate_of_the_search_flips_about_as_many_entries_as_the_budget_has(words: Any, world: Any) -> None:
    from dataclasses import replace

    learn, dev = world.drawn(0)
    delta, _ = world.fine_tuned(learn, 0, 0.5)
    some = replace(world, sizes=replace(world.sizes, steps=8, flips=4.0))
    curve = some.grafted(delta, learn, dev, 0).curve
    total = sum(t.numel() for part in delta.parts for _, _, t in part.items())
    start, budget = int(0.005 * total), int(0.01 * total)
    found = [r["entries"] for r in curve]
    assert abs(found[0] - start) <= 1 and found[1] < start + 0.5 * (budget - start)
    assert max(found) > start + 0.5 * (budget - start)


def test_noise_exchanges_neighbours(words: Any) -> None:
    text = "abcdefghij" * 40
    found = words.noised(text, 0.15, random.Random(0))
    assert sorted(found) == sorted(text) and 0.05 < sum(a != b for a, b in zip(text, found, strict=True)) / 400 < 0.25
    assert words.noised(text, 0.0, random.Random(0)) == text


def _raw(module: Any, recovery: float, ece: float, d: float) -> dict[str, Any]:
    rows = []
    for task in ("sst2", "ag_news"):
        for seed in range(3):
            arms = {arm: {"test": 50.0, "ece": 20.0, "shifted": 50.0} for arm in module.ARMS}
            arms[module.FULL] = {"test": 80.0, "ece": 10.0, "shifted": 70.0}
            first = task == "sst2"
            arms[module.GRAFT] = {
                "test": 80 * recovery,
                "ece": ece if first else 10.0,
                "shifted": 70 + (d if first else 0),
            }
            rows.append({"task": task, "seed": seed, "arms": arms})
    return {"tasks": rows, "base": {t: {"test": 60.0, "ece": 15.0, "shifted": 50.0} for t in ("sst2", "ag_news")}}


@pytest.mark.parametrize(
    ("recovery", "ece", "d", "label"),
    [
        (0.97, 5.0, 1.0, "reproduced"),
        (0.97, 8.0, 1.0, "inconclusive"),
        (0.97, 5.0, -1.0, "inconclusive"),
        (0.9, 5.0, 1.0, "inconclusive"),
        (0.8, 5.0, 1.0, "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(
    study: Any, module: Any, recovery: float, ece: float, d: float, label: str
) -> None:
    found = study.verdict(_raw(module, recovery, ece, d))
    assert found.label == label
    assert found.statistics["sst2: share of the gain recovered"] == pytest.approx((80 * recovery - 60) / 20)
