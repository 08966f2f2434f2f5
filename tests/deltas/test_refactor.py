# SPDX-License-Identifier: Apache-2.0
"""Balanced factors with the same product, on any low-rank part, and the LoRA that is balanced in mid-run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, bake
from tunesmith.core.errors import UsageError
from tunesmith.deltas import AdaLoRA, BitFit, DoRA, LoRA, LoRARefactor, SoRA
from tunesmith.deltas.weight.refactor import balanced, refactor, reset_momentum
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import _optimiser, fit
from tunesmith.train.surgery import Now
from tunesmith.train.tasks import LoaderTask

# (out, r, n): usual, tall, wide, rank above one side, rank above both.
SHAPES = [(40, 8, 30), (100, 4, 5), (6, 4, 90), (5, 8, 40), (5, 9, 6), (7, 1, 9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_stays_and_the_factors_are_balanced(shape) -> None:
    out, r, n = shape
    B, A = 30 * torch.randn(out, r), 0.01 * torch.randn(r, n)
    new_B, new_A = balanced(B, A)
    assert new_B.shape == B.shape and new_A.shape == A.shape
    P = B.double() @ A.double()
    assert float((new_B.double() @ new_A.double() - P).norm() / P.norm()) < 1e-5
    left, right = new_B.T @ new_B, new_A @ new_A.T
    S = torch.linalg.svdvals(P)[: min(shape)].float()
    full = min(out, n) >= r
    if full:
        torch.testing.assert_close(left, right, atol=float(S[0]) * 1e-4, rtol=0)
        torch.testing.assert_close(left, torch.diag(S), atol=float(S[0]) * 1e-4, rtol=0)
    for i in range(r):  # no component is dead on both sides
        assert new_A[i].any() or new_B[:, i].any()


def test_a_product_of_lower_rank_keeps_a_way_to_grow() -> None:
    B, A = torch.randn(20, 2) @ torch.randn(2, 6), torch.randn(6, 15)
    new_B, new_A = balanced(B, A, torch.Generator().manual_seed(0))
    torch.testing.assert_close(new_B @ new_A, B @ A, atol=1e-4, rtol=1e-4)
    assert not new_B[:, 2:].any() and new_A[2:].abs().sum(1).min() > 0
    assert float(new_A[2:].norm()) < 0.01 * float(new_A[:2].norm())
    G = torch.randn(20, 15)
    assert (G @ new_A.T).abs().sum(0).min() > 0  # the gradient of every column of B
    again = balanced(B, A, torch.Generator().manual_seed(0))
    assert torch.equal(again[1], new_A)


def test_nothing_to_balance_stays_as_it_is() -> None:
    B, A = torch.zeros(4, 2), torch.randn(2, 5)
    new_B, new_A = balanced(B, A)
    assert torch.equal(new_B, B) and torch.equal(new_A, A)


def test_half_precision_goes_through_fp32() -> None:
    B, A = torch.randn(12, 3).bfloat16(), torch.randn(3, 9).bfloat16()
    new_B, new_A = balanced(B, A)
    assert new_B.dtype == new_A.dtype == torch.bfloat16
    P = B.float() @ A.float()
    assert float((new_B.float() @ new_A.float() - P).norm() / P.norm()) < 0.02


@pytest.mark.parametrize("method", [LoRA(rank=3), LoRA(rank=3, rslora=True), DoRA(rank=3), LoRARefactor(rank=3)])
def test_a_part_is_balanced_without_a_change_of_the_model(llama, ids, moved, undone, method) -> None:
    base = Base(llama)
    delta = moved(base, method, size=0.3)
    before = undone(base, delta, input_ids=ids)
    merged = {k: v.clone() for k, v in base.merged(delta).model.state_dict().items()}
    old = {k: t.clone() for k, t in delta.items()}
    refactor(delta.parts[0])
    assert all(not torch.equal(t, old[k]) for k, t in delta.items() if k.endswith(("/A", "/B")))
    torch.testing.assert_close(undone(base, delta, input_ids=ids), before, atol=1e-4, rtol=0)
    for k, v in base.merged(delta).model.state_dict().items():
        torch.testing.assert_close(v, merged[k], atol=1e-5, rtol=0)
    for path in delta.parts[0].kind_of:
        t = delta.parts[0].tensors(path)
        torch.testing.assert_close(t["B"].T @ t["B"], t["A"] @ t["A"].T, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("method", "text"),
    [(SoRA(), "gate"), (AdaLoRA(), "gate"), (BitFit(), "no factors B and A"), (ts.IA3(), "no factors")],
)
def test_what_has_no_pair_of_factors_is_refused(llama, ids, method, text) -> None:
    with pytest.raises(UsageError, match=text):
        refactor(Delta.create(Base(llama, example={"input_ids": ids}), method).parts[0])


def test_a_gated_delta_can_be_balanced_once_it_is_baked(llama, moved) -> None:
    base = Base(llama)
    delta = moved(base, SoRA(rank=3))
    bake(base, delta)
    refactor(delta.parts[0])
    t = delta.parts[0].tensors("model.layers.0.self_attn.q_proj")
    torch.testing.assert_close(t["B"].T @ t["B"], t["A"] @ t["A"].T, atol=1e-4, rtol=0)


def test_reset_leaves_no_moment_and_no_count(llama, ids) -> None:
    base = Base(llama)
    delta = Delta.create(base, LoRA(rank=2, targets="q"), LoRA(rank=2, targets="v"))
    optimiser = _optimiser(delta, TrainConfig(lr=0.1))
    for _, t in delta.items():
        t.grad = torch.ones_like(t)
    optimiser.step()
    now = Now(delta.parts[0], 2, 10, 1.0, optimiser)
    reset_momentum(delta.parts[0], now)
    assert all(now.state(p, n) == {} for p, n, _ in delta.parts[0].items())
    other = Now(delta.parts[1], 2, 10, 1.0, optimiser)
    assert all(other.state(p, n)["exp_avg"].all() for p, n, _ in delta.parts[1].items())
    optimiser.step()
    assert all(int(now.state(p, n)["step"]) == 1 for p, n, _ in delta.parts[0].items())
    assert delta.trainable_parameters == 2 * (2 * (16 + 16) + 2 * (16 + 8))


# The preset


def net() -> Base:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    return Base(model, example=(torch.randn(4, 6),))


def run(method: Any, steps: int = 20, **kw: Any) -> tuple[Any, Delta]:
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(8, 6, generator=g) for _ in range(steps)]
    data = [(v, (v[:, 0] > 0).long()) for v in x]

    def loss(out: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(out, batch[1])

    settings = {k: kw.pop(k) for k in ("checkpoint_every",) if k in kw}
    config = TrainConfig.build({"steps": steps, "lr": 0.05, "precision": "fp32", **settings})
    base = net()
    delta = Delta.create(base, method)
    return fit(base, delta, LoaderTask(data, loss, seed=0, most=steps), config, progress=False, **kw), delta


TARGETS = "everything"


def test_a_run_is_balanced_and_reset_at_its_steps() -> None:
    seen: dict[int, tuple[float, int]] = {}

    class Spy(LoRARefactor):
        def before_step(self, part: Any, now: Any) -> None:
            super().before_step(part, now)
            t = part.tensors("0")
            gap = (t["B"].T @ t["B"] - t["A"] @ t["A"].T).abs().max() / (t["A"] @ t["A"].T).abs().max()
            seen[now.step] = (float(gap), int(now.state("0", "A").get("step", 0)))

    run(Spy(rank=2, every=5, targets=TARGETS))
    counts = [count for _, count in seen.values()]
    assert counts == [0, 1, 2, 3, 4] * 4
    assert all(seen[step][0] < 1e-4 for step in (6, 11, 16)) and seen[5][0] > 0.1


def test_without_reset_and_balance_it_is_lora() -> None:
    plain, expected = run(LoRA(rank=2, targets=TARGETS))
    same, delta = run(LoRARefactor(rank=2, every=5, balance=False, reset=False, targets=TARGETS))
    assert same.losses == plain.losses
    balanced_, _ = run(LoRARefactor(rank=2, every=5, reset=False, targets=TARGETS))
    assert balanced_.losses[:5] == plain.losses[:5]
    assert balanced_.losses[5] == pytest.approx(plain.losses[5], abs=1e-5)  # the function itself did not jump
    assert balanced_.losses[7] != pytest.approx(plain.losses[7], abs=1e-5)
    bake(net(), delta)
    assert delta.parts[0].method == LoRA(rank=2, targets=TARGETS)
    for mine, its in zip(delta.items(), expected.items(), strict=True):
        assert torch.equal(mine[1], its[1])


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    method = LoRARefactor(rank=2, every=4, recovery=3, targets=TARGETS)
    whole, expected = run(method)

    def crash(step: int, loss: float) -> None:
        if step == 10:
            raise KeyError("stop")

    with pytest.raises(KeyError):
        run(method, checkpoint_every=3, out=tmp_path, on_step=crash)
    done, delta = run(method, checkpoint_every=3, out=tmp_path, resume=True)
    assert done.resumed_at == 9 and done.losses == whole.losses and delta.digest == expected.digest
