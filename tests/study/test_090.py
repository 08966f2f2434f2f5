# SPDX-License-Identifier: Apache-2.0
"""Study 090 at toy size: the layers, the projected rules, refactorisation and reset, memory by hand, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "090-refactor-reset"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def package(study: Any) -> str:
    return study.run.__module__.rpartition(".")[0]


@pytest.fixture(scope="module")
def gpt(package: str) -> Any:
    return import_module(package + ".gpt")


@pytest.fixture(scope="module")
def training(package: str) -> Any:
    return import_module(package + ".training")


@pytest.fixture
def shape(gpt: Any) -> Any:
    return gpt.Shape(d=16, heads=2, depth=2, context=12, rank=4)


def test_a_smoke_run_gives_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    assert {arm: [r["seed"] for r in rows] for arm, rows in raw["arms"].items()} == {a: [0, 1] for a in study.arms}
    assert {len(t["trials"]) for t in raw["tuning"].values()} == {3}
    assert set(raw["memory"]) == set(study.arms)


def test_refactoring_changes_no_logit_and_balances(gpt: Any, training: Any, shape: Any) -> None:
    for kind in ("low-rank", "sltrain"):
        torch.manual_seed(1)
        model = gpt.GPT(kind, shape)
        with torch.no_grad():
            for layer in model.layers():
                layer.B.mul_(30)
        x = torch.randint(0, 256, (3, 12))
        before = model(x)
        training.refactor(model)
        torch.testing.assert_close(model(x), before, atol=1e-4, rtol=0)
        for layer in model.layers():
            left, right = layer.B.T @ layer.B, layer.A @ layer.A.T
            torch.testing.assert_close(left, right, atol=1e-4 * float(left.detach().max()), rtol=0)
            assert layer.A.numel() + layer.B.numel() == 4 * (layer.A.shape[1] + layer.B.shape[0])


def test_a_sparse_plus_layer_is_its_dense_matrix(gpt: Any, shape: Any) -> None:
    layer = gpt.SparsePlus(10, 6, 2, 0.25, 0.2)
    W = 0.25 * layer.B @ layer.A
    W = W + torch.zeros(60).index_put((layer.at,), layer.values).reshape(6, 10)
    x = torch.randn(4, 10)
    torch.testing.assert_close(layer(x), x @ W.T)
    assert layer.values.numel() == 12 == len(layer.at.unique())
    layer(x).square().sum().backward()
    assert layer.values.grad.abs().min() > 0


def rotated_adam(W: torch.Tensor, P: torch.Tensor, gradient: Any, steps: int, lr: float) -> torch.Tensor:
    """Adam on X with W = P X, by torch."""
    X = torch.nn.Parameter(P.T @ W)
    rule = torch.optim.Adam([X], lr=lr)
    for _ in range(steps):
        X.grad = P.T @ gradient(P @ X.detach())
        rule.step()
    return P @ X.detach()


@pytest.mark.parametrize("shape_", [(5, 9), (9, 5)])
def test_galore_of_full_rank_is_adam_in_a_rotated_basis(training: Any, shape_: tuple[int, int]) -> None:
    torch.manual_seed(2)
    start, goal, scales = torch.randn(shape_), torch.randn(shape_), torch.rand(shape_) + 0.5
    for fira in (False, True):
        W = torch.nn.Parameter(start.clone())
        rule = training.Projected([W], lr=0.02, rank=5, every=10**9, scale=1.0, fira=fira)
        for _ in range(20):
            W.grad = scales * (W.detach() - goal)
            rule.step()
        P = rule.state[W]["P"]
        turn = (lambda t: t.T) if shape_[0] > shape_[1] else (lambda t: t)
        want = rotated_adam(turn(start), P, lambda w, t=turn: t(scales * (t(w) - goal)), 20, 0.02)
        torch.testing.assert_close(turn(W.detach()), want, atol=1e-4, rtol=1e-4)


def test_galore_projected_anew_every_step_goes_about_as_adam(gpt: Any, training: Any, shape: Any) -> None:
    text, arm = gpt.toy(), training.Arm
    plan = training.Plan(3e-3, 40, 8, 10**9)
    _, plain = training.fit(arm("full"), plan, shape, text, 0)
    torch.manual_seed(0)
    model = gpt.GPT("full", shape)
    inner = [m.W for m in model.layers()]
    mine = {id(p) for p in inner}
    rules = [
        torch.optim.AdamW([p for p in model.parameters() if id(p) not in mine], lr=3e-3, weight_decay=0.0),
        training.Projected(inner, 3e-3, rank=16, every=1, scale=1.0),
    ]
    generator, losses = torch.Generator().manual_seed(1000), []
    for step in range(40):
        for rule in rules:
            for group in rule.param_groups:
                group["lr"] = 3e-3 * training.factor(plan, step, reset=False)
        loss = gpt.loss_on(model, text.batch(8, shape.context, generator))
        losses.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rule in rules:
            rule.step()
            rule.zero_grad()
    assert losses[0] == plain[0] and losses != plain
    assert losses[-1] == pytest.approx(plain[-1], rel=0.1) and plain[-1] < 0.8 * plain[0]


def test_fira_adds_what_the_projection_leaves_out(training: Any) -> None:
    torch.manual_seed(3)
    start, G = torch.randn(6, 8), torch.randn(6, 8)
    moved = {}
    for fira in (False, True):
        W = torch.nn.Parameter(start.clone())
        rule = training.Projected([W], lr=1.0, rank=2, every=5, scale=1.0, fira=fira)
        W.grad = G.clone()
        rule.step()
        moved[fira], P = start - W.detach(), rule.state[W]["P"]
    rest = G - P @ P.T @ G
    R = P.T @ G
    N = R / (R.abs() + 1e-8)  # Adam's first step
    torch.testing.assert_close(moved[False], P @ N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved[True] - moved[False], rest * (N.norm(dim=0) / R.norm(dim=0)), atol=1e-5, rtol=1e-5)
    # the rest may grow by 1 % a step at most
    W.grad = P @ R + 50 * rest
    before = W.detach().clone()
    rule.step()
    state = rule.state[W]
    assert state["rest"] == pytest.approx(1.01 * float((moved[True] - moved[False]).norm()), rel=1e-4)
    assert float((before - W.detach()).norm()) < 20


def test_a_reset_forgets_everything_and_the_rate_climbs_back(gpt: Any, training: Any, shape: Any) -> None:
    plan = training.Plan(1e-2, 12, 4, 5, recovery=2)
    seen: list[list[int]] = []

    class Spy(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            seen.append([int(s["step"]) for s in self.state.values()])
            return super().step(closure)

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.optim, "AdamW", Spy)
    training.fit(training.Arm("low-rank", reset=True), plan, shape, gpt.toy(), 0)
    patch.undo()
    assert [max(s, default=0) for s in seen] == [0, 1, 2, 3, 4] * 2 + [0, 1]
    plain = [training.factor(plan, i, reset=False) for i in range(12)]
    with_reset = [training.factor(plan, i, reset=True) for i in range(12)]
    ratio = [a / b for a, b in zip(with_reset, plain, strict=True)]
    assert ratio == pytest.approx([1] * 5 + [1 / 3, 2 / 3, 1, 1, 1, 1 / 3, 2 / 3])
    assert plain[0] == 1.0 and plain[-1] < 0.2


def test_memory_is_counted_as_by_hand(gpt: Any, training: Any, shape: Any) -> None:
    d, r, depth = 16, 4, 2
    rest = 256 * d * 2 + 12 * d + depth * 4 * d + 2 * d  # embeddings and head, places, norms
    inner = depth * (4 * d * d + 2 * 4 * d * d)
    thin = depth * r * (4 * 2 * d + 2 * 5 * d)
    assert training.memory(training.Arm("full"), shape) == 16 * (rest + inner)
    assert training.memory(training.Arm("low-rank", reset=True), shape) == 16 * (rest + thin)
    k = depth * (4 * round(0.03 * d * d) + 2 * round(0.03 * 4 * d * d))
    assert training.memory(training.Arm("sltrain"), shape) == 16 * (rest + thin + k) + 8 * k
    projected = depth * (4 * (2 * r * d + d * r) + 2 * (2 * r * 4 * d + d * r))
    assert training.memory(training.Arm("full", rule="galore"), shape) == 16 * rest + 8 * inner + 4 * projected


def test_held_out_pieces_do_not_overlap_and_the_text_is_split(gpt: Any, tmp_path: Path) -> None:
    for name, text in (
        ("train", "alpha beta gamma delta"),
        ("validation", "one two three"),
        ("test", "red green blue"),
    ):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{text}", "label": 0}}\n' * 2)
    text = gpt.news(tmp_path)
    assert bytes(text.dev.tolist()) == b"one two three\none two three"
    rows = text.held("test", 8, 100)
    assert rows.shape == (3, 9) and torch.equal(rows[0, 8:9], rows[1, :1])
    piece = text.batch(5, 8, torch.Generator().manual_seed(0))
    assert all(bytes(p.tolist()) in bytes(text.train.tolist()) for p in piece)


def _raw(study: Any, wobble: float = 0.002, memory: int = 2, **means: float) -> dict[str, Any]:
    level = dict.fromkeys(study.arms, 2.0) | {
        "full rank": 1.5, "low-rank": 1.8, "low-rank + both": 1.6, "galore": 1.7, "fira": 1.65
    } | {k.replace("_", " "): v for k, v in means.items()}  # fmt: skip
    return {
        "arms": {a: [{"seed": s, "metric": level[a] + wobble * s * (a == "low-rank + both")} for s in range(3)] for a in study.arms},
        "memory": dict.fromkeys(study.arms, 3) | {"low-rank + both": memory},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "reproduced"),
        ({"full_rank": 1.7}, "not reproduced"),  # an arm is better than full rank on every seed
        ({"full_rank": 1.601, "sltrain": 1.6}, "not reproduced"),
        ({"wobble": 0.2}, "inconclusive"),
        ({"low-rank": 1.5}, "not reproduced"),
        ({"galore": 1.59, "full_rank": 1.4}, "not reproduced"),
        ({"fira": 1.602}, "inconclusive"),
        ({"memory": 3}, "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, options: dict[str, Any], label: str) -> None:
    assert study.verdict(_raw(study, **options)).label == label
