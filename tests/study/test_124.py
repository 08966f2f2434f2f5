# SPDX-License-Identifier: Apache-2.0
"""Study 124 at toy size: demonstrations before a query, training on them, its controls, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "124-icl-meta-optimizer"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def module(study: Any) -> Any:
    return import_module(study.run.__module__)


@pytest.fixture(scope="module")
def prompts(module: Any) -> Any:
    return import_module(module.__name__.rpartition(".")[0] + ".prompts")


@pytest.fixture(scope="module")
def world(prompts: Any) -> Any:
    return prompts.prompted(SimpleNamespace(smoke=True), None, "ag_news", 8, 8, 8)


def test_a_smoke_run_gives_every_arm_draw_and_task(study: Any, module: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    assert [(r["task"], r["seed"]) for r in raw["draws"]] == [(t, s) for t in module.TASKS for s in (0, 1)]
    for arm in study.arms:
        assert [r["seed"] for r in raw["arms"][arm]] == [0, 1] and all(abs(r["metric"]) <= 1 for r in raw["arms"][arm])
    for task, found in raw["tuning"].items():
        assert task in module.TASKS and set(found["trials"]) == {str(r) for r in module.RATES}
        best = max(sum(v) for v in found["trials"].values())
        assert sum(found["trials"][str(found["lr"])]) == best
    assert all(row["rec2ftp"] is None or 0 <= row["rec2ftp"] <= 1 for row in raw["draws"])


def test_demonstrations_kept_aside_are_one_long_prompt(prompts: Any, world: Any) -> None:
    shown = world.drawn(4, 0)
    ids = world.pool[-1][0]
    whole = [t for some, y in shown for t in (*some, world.words[y], *world.gap)] + ids
    with torch.no_grad(), world.base.evaluating():
        want = world.last(torch.tensor([whole]))
        prefix = world.prefix(shown)
        for _ in range(2):  # what is kept is not used up
            found = world.last(torch.tensor([ids, ids]), prefix)
            torch.testing.assert_close(found, want.expand(2, -1), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(world.last(torch.tensor([ids])), want, atol=1e-3)


def test_demonstrations_are_balanced_and_shuffling_keeps_the_texts(world: Any) -> None:
    shown = world.drawn(8, 3)
    assert sorted(y for _, y in shown) == [0, 0, 1, 1, 2, 2, 3, 3] and shown != world.drawn(8, 4)
    other = world.shuffled(shown, 0)
    assert [ids for ids, _ in other] == [ids for ids, _ in shown]
    assert sorted(y for _, y in other) == sorted(y for _, y in shown) and other != shown


def test_queries_keep_their_labels(prompts: Any) -> None:
    rows = [([5] * n, n % 3) for n in (3, 2, 3, 4, 2, 3)]
    found = prompts.Queries.of(rows, most=2)
    assert [tuple(b.shape) for b in found.batches] == [(2, 2), (2, 3), (1, 3), (1, 4)]
    assert found.y.tolist() == [b.shape[1] % 3 for b in found.batches for _ in range(len(b))]


def test_training_is_a_pass_of_sgd_over_keys_and_values(world: Any) -> None:
    """Two steps by hand on copies of the weights."""
    import copy

    import torch.nn.functional as F

    shown, lr = world.drawn(4, 1)[:2], 0.5
    digest = world.base.digest()
    delta = world.tuned(shown, lr, 0)
    assert world.base.digest() == digest
    model = copy.deepcopy(world.base.model)
    moving = {n: p.requires_grad_(True) for n, p in model.named_parameters() if ".k_proj." in n or ".v_proj." in n}
    for ids, y in shown:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        loss = F.cross_entropy(logits[None], torch.tensor([world.words[y]]))
        for p, g in zip(moving.values(), torch.autograd.grad(loss, list(moving.values())), strict=True):
            p.data.sub_(lr * g)
    found = {f"{path}.{name}": t for part in delta.parts for path, name, t in part.items()}
    start = dict(world.base.model.named_parameters())
    assert found.keys() == moving.keys() and len(found) == 8
    for name, p in moving.items():
        torch.testing.assert_close(start[name] + found[name], p.detach(), atol=1e-6, rtol=1e-5)


def _raw(module: Any, gap: float, recall: float, chance: float = 0.5, wobble: float = 0.01) -> dict[str, Any]:
    rows = []
    for task in module.TASKS:
        for s in range(5):
            sim = {
                module.TRAINED: 0.3 + gap + wobble * (s - 2),
                module.SHUFFLED: 0.3,
                module.RANDOM: 0.0,
                module.OTHER: 0.2,
            }
            rows.append({"task": task, "seed": s, "sim": sim, "rec2ftp": recall, "chance": chance,
                         "accuracy": {"prompt": 60.0}})  # fmt: skip
    return {"draws": rows, "zsl": dict.fromkeys(module.TASKS, 50.0)}


def test_the_verdict_follows_the_rule(study: Any, module: Any) -> None:
    assert study.verdict(_raw(module, 0.1, 0.8)).label == "reproduced"
    assert study.verdict(_raw(module, 0.1, 0.4)).label == "inconclusive"  # no more mended than by chance
    assert study.verdict(_raw(module, 0.001, 0.8)).label == "not reproduced"
    assert study.verdict(_raw(module, -0.2, 0.8)).label == "not reproduced"
    one = _raw(module, 0.1, 0.8)
    for row in one["draws"][5:]:
        row["sim"][module.TRAINED] = 0.3
    assert study.verdict(one).label == "inconclusive"  # one task only
    none = _raw(module, 0.1, 0.8)
    for row in none["draws"]:
        row["rec2ftp"] = None
    assert study.verdict(none).label == "inconclusive"
