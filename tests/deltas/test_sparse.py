# SPDX-License-Identifier: Apache-2.0
"""The sparse store and its selectors, LIFT and SHiRA: PEFT, AdamW on everything, moments, supports and counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, Part
from tunesmith.core.errors import UsageError
from tunesmith.core.sample import Sample
from tunesmith.core.sites import Site
from tunesmith.core.toys import toys
from tunesmith.deltas import LIFT, Full, SHiRA, SparseDelta
from tunesmith.deltas.weight import selectors, sparse
from tunesmith.deltas.weight.selectors import SELECTORS, Look
from tunesmith.objectives import SFT
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.surgery import Now
from tunesmith.train.tasks import RowTask

peft = pytest.importorskip("peft")


ALL = "everything"


def net(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = (10, 12, 6)) -> Base:
    a, b, c = sizes
    model = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c)).to(dtype)
    return Base(model, example=(torch.randn(2, a, dtype=dtype),))


def batches(n: int = 8, width: int = 10) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(16, width, generator=g), torch.randint(6, (16,), generator=g)) for _ in range(n)]


def loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output.float(), batch[1])


def tuned(base: Base, method: Any, steps: int = 8, **settings: Any) -> Delta:
    settings = {"lr": 1e-2, "precision": "fp32", "schedule": "constant", "warmup": 0.0, **settings}
    run = ts.tune(base, batches(), method=method, loss=loss, steps=steps, progress=False, **settings)
    return run.delta


def dense(base: Base, delta: Delta, path: str) -> Tensor:
    part = delta.parts[0]
    with torch.no_grad():
        return part.method.update(base.sites[path], part.tensors(path)).dense()


# -- drawing and ranking


def test_the_top_entries_are_those_of_a_sort_and_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[3.0, 1.0, 3.0], [2.0, 3.0, -1.0]])
    assert sparse.top(scores, 2).tolist() == [0, 2] and sparse.top(scores, 4).tolist() == [0, 2, 3, 4]
    many = torch.randn(40, 30)
    assert set(sparse.top(many, 77).tolist()) == set(many.reshape(-1).argsort(descending=True)[:77].tolist())


@pytest.mark.parametrize(("k", "scores"), [(0, [1.0]), (2, [1.0]), (1, [float("nan"), 1.0])])
def test_what_cannot_be_ranked_is_an_error(k: int, scores: list[float]) -> None:
    with pytest.raises(UsageError):
        sparse.top(torch.tensor(scores), k)


@pytest.mark.parametrize(("n", "k"), [(20, 20), (20, 15), (20, 3), (2**40, 1000), (5, 0)])
def test_drawn_places_are_distinct_rising_and_in_range(n: int, k: int) -> None:
    got = sparse.draw(n, k, torch.Generator().manual_seed(1))
    assert got.dtype == torch.int64 and len(got) == k == len(set(got.tolist()))
    assert got.tolist() == sorted(got.tolist()) and all(0 <= i < n for i in got.tolist())
    assert torch.equal(got, sparse.draw(n, k, torch.Generator().manual_seed(1)))
    if n > 2**31:
        assert int(got.max()) > 2**38, "places beyond 32 bits are drawn too"


@pytest.mark.parametrize("k", [3, 12])  # both ways of drawing
def test_every_entry_is_drawn_as_often_as_any_other(k: int) -> None:
    g = torch.Generator().manual_seed(0)
    seen = torch.zeros(16)
    for _ in range(4000):
        seen[sparse.draw(16, k, g)] += 1
    share = seen / 4000
    assert (share - k / 16).abs().max() < 5 * math.sqrt(k / 16 * (1 - k / 16) / 4000)


def test_more_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(UsageError, match="cannot choose 7 of 6"):
        sparse.drawn(Site("m", "linear", (2, 3), nn.Linear(3, 2)), 7, torch.Generator())


def test_survivors_say_where_each_entry_was() -> None:
    old, new = torch.tensor([2, 5, 9]), torch.tensor([1, 5, 9, 11])
    assert sparse.survivors(old, new).tolist() == [-1, 1, 2, -1]
    assert sparse.survivors(old[:0], new).tolist() == [-1] * 4
    big = 2**40 + torch.tensor([0, 7])
    assert sparse.survivors(big, torch.tensor([2**40 + 7])).tolist() == [1]


def test_counts_are_those_of_a_lora_at_most_all() -> None:
    site = Site("m", "conv2d", (6, 4, 3, 3), nn.Conv2d(4, 6, 3))
    assert sparse.lora_equivalent(site, 2) == 2 * (6 + 36) and sparse.lora_equivalent(site, 10**9) == 6 * 36


# -- selectors


def test_rank_reduction_is_that_of_the_svd() -> None:
    W = torch.randn(9, 14)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    want = sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(4))
    torch.testing.assert_close(selectors.rank_reduced(W, 4), want, atol=1e-5, rtol=0)
    assert selectors.rank_reduced(W, 9) is W
    low = torch.randn(40, 3) @ torch.randn(3, 30) + 0.01 * torch.randn(40, 30)
    fast = selectors.rank_reduced(low, 3, exact=False, seed=1)
    torch.testing.assert_close(fast, selectors.rank_reduced(low, 3), atol=1e-3, rtol=0)
    assert torch.equal(fast, selectors.rank_reduced(low, 3, exact=False, seed=1))


def test_scores_by_their_definitions() -> None:
    W, G = torch.randn(8, 12), torch.randn(8, 12)
    look = Look(W, filter_rank=3, G=G)
    order = {name: s.score(look).reshape(-1).argsort(descending=True, stable=True) for name, s in SELECTORS.items()}
    flat, grad = W.reshape(-1), G.reshape(-1)
    for name, score in {
        "magnitude": flat.abs(), "smallest": -flat.abs(), "gradient": grad.abs(), "movement": -flat * grad,
        "principal": selectors.rank_reduced(W, 3).abs().reshape(-1),
    }.items():  # fmt: skip
        assert torch.equal(order[name], score.argsort(descending=True, stable=True)), name
    blocks = selectors.chosen("block", look, 32)
    cells = {(int(i) // 12 // 4, int(i) % 12 // 4) for i in blocks}
    means = F.avg_pool2d(selectors.rank_reduced(W, 3).abs()[None], 4)[0]
    best = means.reshape(-1).topk(2).indices.tolist()
    assert cells == {(i // 3, i % 3) for i in best}


@pytest.mark.parametrize("select", [name for name, s in SELECTORS.items() if s.gradient])
def test_scores_from_data_follow_the_gradients(select: str) -> None:
    base = net()
    sample = Sample(batches, lambda b, batch: b.model(batch[0]), lambda b, batch: loss(b.model(batch[0]), batch))
    delta = Delta.create(base, SparseDelta(select=select, rank=1, targets=ALL), sample=sample)
    for path in ("0", "2"):
        W = base.sites[path].module.weight
        found: list[Tensor] = []
        for batch in batches():
            with torch.enable_grad():
                w = W.detach().clone().requires_grad_()
                out = torch.func.functional_call(base.model, {f"{path}.weight": w}, (batch[0],))
                found.append(torch.autograd.grad(F.cross_entropy(out, batch[1]), w)[0])
        want = torch.zeros_like(W)
        for g in found:
            want = {"gradient": want + g, "movement": want + g, "fisher": want + g.square(),
                    "momentum": 0.9 * want + 0.1 * g}[select]  # fmt: skip
        score = -W * want if select == "movement" else want.abs()
        got = set(delta.parts[0].tensors(path)["indices"].tolist())
        assert got == set(score.reshape(-1).topk(len(got)).indices.tolist())


def test_a_refresh_of_a_score_from_data_is_refused() -> None:
    with pytest.raises(UsageError, match="seen at the start only"):
        Delta.create(net(), SparseDelta(select="fisher", refresh=3))
    with pytest.raises(UsageError, match="learns its start from data"):
        Delta.create(net(), SparseDelta(select="fisher"))


def test_how_many_entries_train() -> None:
    base = net()

    def k(**options: Any) -> list[int]:
        part = Delta.create(base, SparseDelta(select="magnitude", targets=ALL, **options)).parts[0]
        return [len(part.tensors(p)["values"]) for p in ("0", "2")]

    assert k(rank=2) == [44, 36] and k(rank=100) == [120, 72]
    assert k(share=0.1) == [12, 7] and k(share=1e-9) == [1, 1]
    assert k(count=5) == [5, 5] and k(count_pattern={"0": 3}, rank=1) == [3, 18]
    assert k(rank=1, rank_pattern={"2": 2}) == [22, 36]
    for bad in ({"count_pattern": {"7": 3}}, {"count_pattern": {"0": 0}}, {"rank_pattern": {"0": 0}}):
        with pytest.raises(UsageError):
            k(**bad)


# -- LIFT


@pytest.mark.parametrize("rank", [1, 3])
def test_lift_chooses_k_entries_a_matrix_and_by_size_where_r_is_full(rank: int) -> None:
    base = net()
    part = Delta.create(base, LIFT(rank=rank, filter_rank=6, targets=ALL)).parts[0]
    for path, (m, n) in {"0": (12, 10), "2": (6, 12)}.items():
        W = base.sites[path].module.weight.detach()
        got = part.tensors(path)["indices"]
        assert len(got) == rank * (m + n)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        Wr = (U[:, :6] * S[:6]) @ Vh[:6]
        assert set(got.tolist()) == set(Wr.abs().reshape(-1).topk(len(got)).indices.tolist())
    plain = set(base.sites["2"].module.weight.abs().reshape(-1).topk(rank * 18).indices.tolist())
    assert set(part.tensors("2")["indices"].tolist()) == plain  # r = min(6, 12)


@pytest.mark.parametrize(
    "method",
    [
        LIFT(rank=99, refresh=3, targets=ALL),
        SparseDelta(rank=99, select="random", targets=ALL),
        SHiRA(rank=99, targets=ALL),
    ],
)
def test_with_every_entry_it_is_adamw_on_the_weights(method: Any) -> None:
    base = net()
    got = tuned(base, method, weight_decay=0.1)
    want = tuned(base, Full(targets=ALL, bias=False), weight_decay=0.1)
    for path in ("0", "2"):
        D = want.parts[0].tensors(path)["weight"].detach()
        assert D.abs().max() > 1e-2
        torch.testing.assert_close(dense(base, got, path), D, atol=1e-6, rtol=0)


def moment(base: Base, delta: Delta, step: int = 4) -> tuple[Part, Now]:
    """After three AdamW steps with gradients of their own at every entry."""
    part = delta.parts[0]
    values = [p for _, _, p in part.items() if p.requires_grad]
    optimiser = torch.optim.AdamW(values, lr=0.1)
    for _ in range(3):
        for p in values:
            p.grad = torch.randn_like(p)
        optimiser.step()
    return part, Now(part, step, 100, 1.0, optimiser, sites=base.sites)


def test_a_refresh_carries_moments_of_survivors_exactly_and_newcomers_start_from_none() -> None:
    base = net()
    method = LIFT(rank=2, filter_rank=3, refresh=4, targets=ALL)
    part, now = moment(base, Delta.create(base, method))
    before = {p: {n: t.detach().clone() for n, t in part.tensors(p).items()} for p in part.kind_of}
    states = {p: {n: t.clone() for n, t in now.state(p, "values").items()} for p in part.kind_of}
    current = {p: base.sites[p].module.weight + dense(base, Delta("x", [part]), p) for p in part.kind_of}
    method.after_step(part, now)
    for path, old in before.items():
        t, state = part.tensors(path), now.state(path, "values")
        wanted = selectors.rank_reduced(current[path].detach(), 3).abs().reshape(-1).topk(len(old["indices"])).indices
        assert set(t["indices"].tolist()) == set(wanted.tolist())
        was = {int(i): n for n, i in enumerate(old["indices"])}
        new = [n for n, i in enumerate(t["indices"].tolist()) if i not in was]
        stayed = [(n, was[i]) for n, i in enumerate(t["indices"].tolist()) if i in was]
        assert new and stayed, "the mask must move for this to show anything"
        for name in ("exp_avg", "exp_avg_sq"):
            assert all(state[name][n] == states[path][name][m] != 0 for n, m in stayed)
            assert all(state[name][n] == 0 for n in new)
        assert state["step"] == states[path]["step"] == 3
        assert all(t["values"][n] == old["values"][m] for n, m in stayed) and all(t["values"][n] == 0 for n in new)
        left = {int(i): float(v) for i, v in zip(old["indices"], old["values"], strict=True)}
        left = {i: v for i, v in left.items() if i not in set(t["indices"].tolist())}
        assert dict(zip(t["settled_indices"].tolist(), t["settled_values"].tolist(), strict=True)) == left
        groups = [p for g in now.optimiser.param_groups for p in g["params"]]
        assert any(p is part.parameter(path, "values") for p in groups) and len(groups) == 2


def test_an_entry_that_comes_back_goes_on_from_what_it_learnt() -> None:
    base = net()
    part, now = moment(base, Delta.create(base, SparseDelta(select="magnitude", count=4)))
    t = {n: v.detach().clone() for n, v in part.tensors("0").items()}
    others = torch.tensor([i for i in range(120) if i not in t["indices"].tolist()][:4])
    whole = dense(base, Delta("x", [part]), "0")
    sparse.reselect(part, now, "0", others)
    assert torch.equal(part.tensors("0")["settled_indices"], t["indices"])
    assert torch.equal(dense(base, Delta("x", [part]), "0"), whole)
    mixed = torch.cat([others[:2], t["indices"][1:3]]).sort().values
    sparse.reselect(part, now, "0", mixed)
    assert torch.equal(dense(base, Delta("x", [part]), "0"), whole)
    now_t = part.tensors("0")
    assert torch.equal(now_t["settled_indices"], t["indices"][[0, 3]])
    for i, v in zip(t["indices"][1:3].tolist(), t["values"][1:3].tolist(), strict=True):
        assert now_t["values"][now_t["indices"] == i].tolist() == [v]
    assert not now.state("0", "values")["exp_avg"].any(), "moments do not come back"


@pytest.mark.parametrize(
    "method",
    [
        LIFT(rank=1, filter_rank=2, refresh=3, targets=ALL),
        SparseDelta(rank=1, select="random", refresh=2, targets=ALL),
        SHiRA(rank=1, targets=ALL),
    ],
)
def test_only_entries_of_the_masks_ever_move(method: Any) -> None:
    base = net()
    union: dict[str, set[int]] = {"0": set(), "2": set()}
    seen: list[Part] = []
    plain = type(method).after_step if hasattr(type(method), "after_step") else None

    def watched(self: Any, part: Part, now: Any) -> None:
        for path in union:
            union[path] |= set(part.tensors(path)["indices"].tolist())
        seen.append(part)
        if plain:
            plain(self, part, now)

    type(method).after_step = watched
    try:
        delta = tuned(base, method, steps=10, weight_decay=0.3)
    finally:
        if plain:
            type(method).after_step = plain
        else:
            del type(method).after_step
    assert len(seen) == 10
    before = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    merged = dict(base.merged(delta).model.named_parameters())
    for path in union:
        moved = (merged[f"{path}.weight"] != before[f"{path}.weight"]).reshape(-1).nonzero().squeeze(1)
        assert set(moved.tolist()) <= union[path] and len(moved) > 0.9 * len(union[path])
        assert torch.equal(merged[f"{path}.bias"], before[f"{path}.bias"])
    refreshed = getattr(method, "refresh", 0)
    assert (len(union["0"]) > len(delta.parts[0].tensors("0")["indices"])) == bool(refreshed)


def test_a_run_with_refreshes_resumes_with_the_same_losses(tmp_path: Any) -> None:
    rows = [{"input_ids": [3 + (i * j) % 30 for j in range(1, 9)], "labels": list(range(8))} for i in range(1, 17)]
    task, config = RowTask(rows, SFT()), TrainConfig(steps=10, batch_size=4, lr=1e-2, checkpoint_every=5)

    def run(out: Any, stop: int = 0, resume: bool = False) -> tuple[list[float], Delta]:
        base = toys()[0]
        delta = Delta.create(base, LIFT(rank=1, filter_rank=2, refresh=3))

        def halt(step: int, value: float) -> None:
            if step == stop:
                raise RuntimeError("killed")

        done = fit(base, delta, task, config, out=out, resume=resume, progress=False, on_step=halt)
        return done.losses, delta

    losses, whole = run(tmp_path / "a")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "b", stop=7)
    again, resumed = run(tmp_path / "b", resume=True)
    assert again == losses and resumed.digest == whole.digest
    assert any(len(t) for _, name, t in whole.parts[0].items() if name == "settled_values")


def test_optimiser_state_is_that_of_the_entries_alone() -> None:
    base = net(sizes=(40, 50, 6))
    delta = Delta.create(base, LIFT(rank=1, filter_rank=4, targets=ALL))
    trained = [p for _, p in delta.items() if p.requires_grad]
    k = 1 * (50 + 40) + 1 * (6 + 50)
    assert sum(p.numel() for p in trained) == k == delta.trainable_parameters and all(p.dim() == 1 for p in trained)
    optimiser = torch.optim.AdamW(trained)
    with base.frozen(), base.using(delta):
        base.model(torch.randn(4, 40)).square().sum().backward()
    optimiser.step()
    assert sum(v.numel() for s in optimiser.state.values() for v in s.values() if v.dim()) == 2 * k
    assert all(p.grad is None for p in base.model.parameters())


def test_values_of_a_bf16_base_stay_fp32_and_small_changes_count() -> None:
    base = net(torch.bfloat16)
    delta = Delta.create(base, SparseDelta(select="magnitude", count=20))
    t = delta.parts[0].tensors("0")
    assert t["values"].dtype == torch.float32
    x = torch.randn(64, 10, dtype=torch.bfloat16)
    with torch.no_grad():
        W = base.sites["0"].module.weight
        t["values"].fill_(2.0**-13)
        at = t["indices"]
        assert torch.equal((W.reshape(-1)[at].float() + 2.0**-13).bfloat16(), W.reshape(-1)[at]), (
            "lost if added in bf16"
        )
        change = delta.parts[0].method.update(base.sites["0"], t).apply(x, base.sites["0"])
    want = x.double() @ dense(base, delta, "0").double().T
    torch.testing.assert_close(change.double(), want, atol=2e-5, rtol=2e-2)


# -- PEFT's SHiRA


def shira_of(model: nn.Module, delta: Delta, r: int) -> nn.Module:
    """PEFT's SHiRA with a mask function that gives the delta's own masks, and its values."""
    part = delta.parts[0]
    by_layer = {id(dict(model.named_modules())[p]): p for p in part.kind_of}
    config = peft.ShiraConfig(r=r, mask_type="own", target_modules=sorted(part.kind_of))

    def mask(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        W, t = base_layer.weight, part.tensors(by_layer[id(base_layer)])
        return torch.zeros_like(W).reshape(-1).index_fill(0, t["indices"], 1.0).reshape(W.shape)

    config.mask_fn = mask
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, module in made.named_modules():
            if hasattr(module, "shira_weight"):
                module.shira_weight["default"].copy_(part.tensors(name.removeprefix("base_model.model."))["values"])
    return made.eval()


@pytest.mark.filterwarnings("ignore:Argument self.mask_type")
@pytest.mark.parametrize("method", [LIFT(rank=3, filter_rank=5, targets="q,v,down"), SHiRA(rank=3, targets="q,v,down")])
def test_equals_peft_shira_with_the_same_mask(
    method: Any, llama: nn.Module, ids: Tensor, moved: Callable[..., Delta], undone: Callable[..., Tensor]
) -> None:
    base = Base(llama)
    delta = moved(base, method)
    out = undone(base, delta, input_ids=ids)
    peft_model = shira_of(copy.deepcopy(llama), delta, 3)
    assert sum(p.numel() for p in peft_model.parameters() if p.requires_grad) == delta.trainable_parameters
    with torch.no_grad():
        torch.testing.assert_close(out, peft_model(input_ids=ids)[0], atol=1e-5, rtol=0)
        assert (out - llama(input_ids=ids)[0]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Argument self.mask_type")
def test_gradients_equal_pefts(llama: nn.Module, ids: Tensor, moved: Callable[..., Delta]) -> None:
    base = Base(llama)
    delta = moved(base, SHiRA(rank=2, targets="q,down"))
    with base.frozen(), base.using(delta):
        llama(input_ids=ids)[0].square().mean().backward()
    want = shira_of(copy.deepcopy(llama), delta, 2)
    want(input_ids=ids)[0].square().mean().backward()
    for name, module in want.named_modules():
        if hasattr(module, "shira_weight"):
            got = delta.parts[0].tensors(name.removeprefix("base_model.model."))["values"].grad
            torch.testing.assert_close(got, module.shira_weight["default"].grad, atol=1e-6, rtol=1e-4)


def test_shira_draws_as_many_as_pefts_random_mask(llama: nn.Module) -> None:
    model = peft.get_peft_model(copy.deepcopy(llama), peft.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    want = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert Delta.create(Base(llama), SHiRA(rank=2, targets="q_proj,down_proj")).trainable_parameters == want
