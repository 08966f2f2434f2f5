# SPDX-License-Identifier: Apache-2.0
"""Study 051 at toy size: the text and its labels, the GPT, budgets, the budget curve, and the verdict rule."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.core.delta import Delta
from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "051-apet"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def code(study: Any) -> Any:
    return sys.modules[study.run.__module__]


@pytest.fixture(scope="module")
def world(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".world")


@pytest.fixture(scope="module")
def base(world: Any) -> Any:
    from dataclasses import replace

    return world.pretrained("small", replace(world.FULL, pretrain=2, pretrain_batch=4))


def test_a_smoke_run_has_every_family_and_seed(study: Any, code: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    assert {arm: len(rows) for arm, rows in raw["arms"].items()} == dict.fromkeys(study.arms, 2)
    for scale, tasks in raw["tasks"].items():
        for found in tasks.values():
            for family, by_seed in found["accuracy"].items():
                assert [len(r) for r in by_seed] == [2 if family.startswith("arbitrary") else 1] * 2
        tuning = raw["tuning"][scale]
        assert {len(t["trials"]) for t in tuning.values()} == {2}
        assert raw["trained"][scale]["arbitrary 1 %"] == raw["sizes"][scale] // 100
        assert raw["trained"][scale]["full"] == raw["sizes"][scale]
        assert raw["trained"][scale]["raw 16"] == 16


def test_labels_are_what_the_hidden_text_says(world: Any) -> None:
    found = world.text(300, 20, np.random.default_rng(0))
    words, states = found["words"], found["states"]
    plain = words < world.FIRST_MARKER
    assert (words[plain] // world.WORDS == states[plain]).all()
    majority, parity = world.labels(found, "majority"), world.labels(found, "parity")
    for i in range(300):
        counts = [(states[i] == s).sum() for s in range(world.STATES)]
        assert counts[majority[i]] == max(counts)
        marks = [w - world.FIRST_MARKER for w in words[i] if world.FIRST_MARKER <= w < world.FIRST_ECHO]
        assert len(marks) == 2 and parity[i] == (marks[0] != marks[1])
        (at,) = np.flatnonzero(words[i] >= world.FIRST_ECHO)
        assert words[i, at] == world.FIRST_ECHO + parity[i] and words[i, at - 1] == world.FIRST_MARKER + marks[1]
    quiet = world.text(50, 20, np.random.default_rng(0), echo=False)["words"]
    assert (quiet < world.FIRST_ECHO).all()


def test_topics_have_their_own_transitions(world: Any) -> None:
    found = world.text(4000, 20, np.random.default_rng(1))
    counts = np.zeros((world.TOPICS, world.STATES, world.STATES))
    a, b = found["states"][:, :-1], found["states"][:, 1:]
    np.add.at(counts, (np.repeat(found["topic"], 19), a.ravel(), b.ravel()), 1)
    counts /= counts.sum(-1, keepdims=True)
    gaps = [np.abs(counts[i] - counts[j]).max() for i in range(world.TOPICS) for j in range(i)]
    assert min(gaps) > 0.1


def test_splits_are_fixed_but_for_the_training_rows(world: Any) -> None:
    assert torch.equal(world.rows("topic", "test", 20, 8, 0).ids, world.rows("topic", "test", 20, 8, 1).ids)
    assert not torch.equal(world.rows("topic", "train", 20, 8, 0).ids, world.rows("topic", "train", 20, 8, 1).ids)
    assert not torch.equal(world.rows("topic", "dev", 20, 8).ids, world.rows("topic", "test", 20, 8).ids)


def test_the_gpt_is_causal_and_knows_distances_alone(world: Any) -> None:
    torch.manual_seed(0)
    model = world.GPT(2, 16).eval()
    ids = torch.randint(world.VOCABULARY, (2, 9))
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 3) % world.VOCABULARY
    with torch.no_grad():
        a, b = model(ids)["logits"], model(other)["logits"]
        torch.testing.assert_close(a[:, :5], b[:, :5])
        assert (a[:, 5:] - b[:, 5:]).abs().max() > 1e-3
        x = torch.randn(1, 1, 6, 8)
        y = torch.randn(1, 1, 6, 8)
        f = torch.rand(4)
        near = (world.turned(x, torch.arange(6)[:, None] * f) @ world.turned(y, torch.arange(6)[:, None] * f).mT)[0, 0]
        at = torch.arange(6)[:, None] + 11
        far = (world.turned(x, at * f) @ world.turned(y, at * f).mT)[0, 0]
        torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "bitfit", "prompt", "adapter"])
def test_designed_methods_have_about_the_budget(code: Any, base: Any, kind: str) -> None:
    small = Delta.create(base, *code.methods(base, kind, 0))
    assert 130 <= small.trainable_parameters <= 400  # 1 % is 266; an adapter has no smaller rank
    large = Delta.create(base, *code.designed(base, kind, 3000)).trainable_parameters
    assert large > 2500 or kind in ("bitfit", "prompt")


def test_arbitrary_sets_differ_and_have_one_size(code: Any, base: Any) -> None:
    total = sum(p.numel() for p in base.model.parameters())
    made = [Delta.create(base, *code.methods(base, "arbitrary 1 %", k)) for k in range(4)]
    assert {d.trainable_parameters for d in made} == {total // 100}
    assert len({str([(p.info.name, sorted(p.kind_of)) for p in d.parts]) for d in made}) == 4
    assert Delta.create(base, *code.methods(base, "raw 64", 0)).trainable_parameters == 64


def test_the_budget_curve(code: Any) -> None:
    curve = {16: 0.5, 64: 0.62, 256: 0.8, 1024: 0.9}
    assert code.budget_curve(curve, 0.9, 0.5, 1000, 9999) == (64, 1024)
    assert code.budget_curve(curve, 1.0, 0.5, 1000, 9999) == (64, 9999)
    assert code.budget_curve(curve, 0.9, 0.9, 1000, 9999) == (9999, 1024)


def _raw(
    spread: tuple[float, ...] = (0.1, 0.06, 0.03), needed: tuple[int, ...] = (4096, 4096, 4096), full: float = 0.9
) -> dict[str, Any]:
    """Three scales, two tasks, two seeds; `needed` is the first size that reaches full fine-tuning."""
    tasks: dict[str, Any] = {}
    for scale, sd, n in zip(("small", "middle", "large"), spread, needed, strict=True):
        sets = [0.6 + sd * (k - 3.5) / 2.45 * full for k in range(8)]
        accuracy = {"full": [[full]] * 2, "arbitrary 1 %": [sets] * 2, "arbitrary 2,048": [sets] * 2}
        for size in (16, 64, 256, 1024, 4096, 16384):
            accuracy[f"raw {size}"] = [[full if size >= n else 0.3]] * 2
        tasks[scale] = {t: {"commonest": 0.25, "accuracy": accuracy} for t in ("majority", "topic")}
    arms = {arm: [{"seed": s, "metric": 50.0} for s in range(2)] for arm in ("arbitrary", "full")}
    sizes = {"small": 20_000, "middle": 100_000, "large": 600_000}
    return {"arms": arms, "sizes": sizes, "tasks": tasks, "test_rows": 1000}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (_raw(), "reproduced"),
        (_raw(spread=(0.1, 0.06, 0.055)), "inconclusive"),
        (_raw(spread=(0.1, 0.02, 0.03)), "inconclusive"),
        (_raw(needed=(16, 1024, 99_999_999)), "not reproduced"),
        (_raw(full=0.26), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label
