# SPDX-License-Identifier: Apache-2.0
"""DSEE: robust decomposition, support, PEFT's LoRA without entries, pruning by a delta's scores, heads."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys
from tunesmith.deltas import DSEE, LoRA
from tunesmith.deltas.weight.bits import count, unpack
from tunesmith.deltas.weight.prune import mask_delta, prune, prune_heads, prune_neurons
from tunesmith.deltas.weight.robust import alternate, grebsmo, outliers, spikes

peft = pytest.importorskip("peft")


def spiked(rows: int, columns: int, rank: int, k: int, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A low-rank matrix of entries about size / 5 with k spikes, and the sorted flat places of the spikes."""
    g = torch.Generator().manual_seed(0)
    W = 0.2 * size * torch.randn(rows, rank, generator=g) @ torch.randn(rank, columns, generator=g) / math.sqrt(rank)
    at = torch.randperm(rows * columns, generator=g)[:k].sort().values
    W.view(-1)[at] += torch.where(torch.rand(k, generator=g) < 0.5, -size, size)
    return W, at


@pytest.mark.parametrize(("shape", "rank", "k"), [((48, 48), 5, 10), ((64, 48), 10, 12), ((96, 96), 20, 16)])
def test_spikes_are_found(shape: tuple[int, int], rank: int, k: int) -> None:
    W, at = spiked(*shape, rank=rank, k=k)
    split = grebsmo(W, threshold=0.4, least=k)
    assert torch.equal(split.S.abs().flatten().topk(k).indices.sort().values, at)
    assert split.rank == rank and (W - split.U @ split.V - split.S).abs().max() <= 0.4
    torch.testing.assert_close(split.U.T @ split.U, torch.eye(split.rank), atol=1e-5, rtol=0)


def test_more_rounds_at_the_right_rank_give_the_parts_themselves() -> None:
    W, at = spiked(96, 96, rank=20, k=16)
    start = grebsmo(W, threshold=0.4, least=16)
    split = alternate(W, start.V, spikes(0.4), rounds=60, S=start.S)
    assert torch.equal(split.S.flatten().nonzero().squeeze(1), at)
    assert split.errors[-1] < 1e-3 * float(W.norm())
    torch.testing.assert_close(split.S.flatten()[at].abs(), torch.ones(16), atol=5e-3, rtol=0)


def test_rounds_never_make_it_worse() -> None:
    """||W - U V - S||^2 + threshold^2 ||S||_0 falls; so does the residual where the spikes stay the same."""
    W, _ = spiked(40, 30, rank=4, k=10)
    V, S, last = torch.randn(4, 30), None, math.inf
    for _ in range(12):
        found = alternate(W, V, spikes(0.2), rounds=1, S=S)
        V, S = found.V, found.S
        value = found.errors[0] ** 2 + 0.2**2 * int(torch.count_nonzero(S))
        assert value <= last * (1 + 1e-5)
        last = value
    errors = alternate(W, torch.randn(4, 30), spikes(0.2), rounds=12).errors
    assert all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(errors)), errors


def test_any_simple_part_can_take_turns_with_the_low_rank_one() -> None:
    """A grid of 16 levels for S: the loop of LQ-LoRA, whose error may not grow either."""
    W = torch.randn(20, 16)
    found = alternate(W, torch.randn(3, 16), lambda R: (R / 0.3).round().clamp(-8, 7) * 0.3, rounds=8)
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(found.errors))
    torch.testing.assert_close(found.S / 0.3, (found.S / 0.3).round())


def test_growth_stops_before_the_spikes_are_explained_away() -> None:
    W, _ = spiked(48, 48, rank=5, k=10)
    assert int(torch.count_nonzero(grebsmo(W, threshold=0.4, least=10).S)) >= 10
    assert int(torch.count_nonzero(grebsmo(W, threshold=0.4, least=0).S)) < 10
    assert grebsmo(W, growth=1, step=4).rank == 4
    assert grebsmo(torch.randn(30, 30), threshold=10.0, growth=100).rank == round(30 * 500 / 768)
    assert torch.equal(grebsmo(W, least=6).S, grebsmo(W, least=6).S)


def one(W: torch.Tensor) -> Base:
    layer = nn.Linear(W.shape[1], W.shape[0])
    with torch.no_grad():
        layer.weight.copy_(W)
    return Base(nn.Sequential(layer), example=(torch.randn(3, W.shape[1]),))


@pytest.mark.parametrize("support", ["robust", "size", "random"])
def test_the_support_has_n_places_and_the_start_is_the_identity(support: str) -> None:
    W, at = spiked(48, 64, rank=5, k=6)
    base, x = one(W), torch.randn(3, 64)
    method = DSEE(rank=2, entries=6, support=support, threshold=0.4, targets="everything")
    delta = Delta.create(base, method)
    t = delta.parts[0].tensors("0")
    assert len(set(t["indices"].tolist())) == 6 and t["indices"].tolist() == sorted(t["indices"].tolist())
    if support == "robust":
        assert torch.equal(t["indices"], at)
    if support == "size":
        assert torch.equal(t["indices"], W.abs().flatten().topk(6).indices.sort().values)
    with torch.no_grad(), base.using(delta):
        out = base.model(x)
    assert torch.equal(out, base.model(x))
    assert delta.trainable_parameters == 2 * (48 + 64) + 6
    assert Delta.create(base, method).digest == delta.digest


def test_ties_go_to_the_lower_index() -> None:
    base = one(torch.ones(4, 4))
    t = Delta.create(base, DSEE(rank=1, entries=5, support="size", targets="everything")).parts[0].tensors("0")
    assert t["indices"].tolist() == [0, 1, 2, 3, 4]


def test_the_count_on_bert_base_is_the_papers() -> None:
    layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(768, 768) for n in ("query", "value")}) for _ in range(12))
    total = Delta.create(Base(layers), DSEE(support="random", targets="query,value")).trainable_parameters
    assert total == 590_208


def test_the_change_is_that_of_its_separate_branches(bert, ids, moved, undone) -> None:
    base = Base(bert)
    method = DSEE(rank=3, alpha=6.0, entries=5, support="size")
    delta = moved(base, method)
    twins = []
    for keep in ("low-rank", "sparse"):
        twin = Delta.create(base, method)
        with torch.no_grad():
            for path in delta.parts[0].kind_of:
                for name in ("A", "B") if keep == "low-rank" else ("values",):
                    twin.parts[0].tensors(path)[name].copy_(delta.parts[0].tensors(path)[name])
        twins.append(twin)
    out = undone(base, delta, input_ids=ids)
    with torch.no_grad(), base.using(*twins):
        torch.testing.assert_close(bert(input_ids=ids)[0], out, atol=1e-5, rtol=0)


def test_without_entries_it_is_pefts_lora(bert, ids, moved, undone) -> None:
    base = Base(bert)
    delta = moved(base, DSEE(rank=3, alpha=7.0, entries=0, targets="query,value"))
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["query", "value"])
    want = peft.get_peft_model(copy.deepcopy(bert), config).eval()
    with torch.no_grad():
        for path, module in want.named_modules():
            if hasattr(module, "lora_A"):
                t = delta.parts[0].tensors(path.removeprefix("base_model.model."))
                module.lora_A["default"].weight.copy_(t["A"])
                module.lora_B["default"].weight.copy_(t["B"])
        want_out = want(input_ids=ids)[0]
    out = undone(base, delta, input_ids=ids)
    torch.testing.assert_close(out, want_out, atol=1e-5, rtol=0)
    assert (out - bert(input_ids=ids)[0]).abs().max() > 1e-3
    assert delta.trainable_parameters == sum(p.numel() for p in want.parameters() if p.requires_grad)


def test_more_entries_than_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="12 weights, not 16"):
        Delta.create(one(torch.randn(3, 4)), DSEE(rank=1, targets="everything"))


@pytest.mark.parametrize("score", ["update", "tuned", "low-rank", "weight", "random"])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.55, 1.0])
def test_a_mask_has_its_ratio_over_all_and_keeps_the_largest_scores(bert, moved, score: str, ratio: float) -> None:
    base = Base(bert)
    delta = moved(base, DSEE(rank=2, alpha=6.0, entries=4, support="size"))
    digest = base.digest()
    mask = prune(base, delta, score, ratio)
    assert base.digest() == digest
    paths = list(delta.parts[0].kind_of)
    total = sum(math.prod(base.sites[p].shape) for p in paths)
    kept = sum(count(mask.parts[0].tensors(p)["bits"]) for p in paths)
    assert total - kept == round(ratio * total)
    assert not any(t.requires_grad for _, t in mask.items())
    found, M = [], []
    for p in paths:
        t, W = delta.parts[0].tensors(p), base.sites[p].params()["weight"]
        low, sparse = 3.0 * (t["B"] @ t["A"]), torch.zeros(W.numel())
        sparse[t["indices"]] = 3.0 * t["values"]
        dW = low + sparse.view_as(W)
        by = {"update": dW, "tuned": W + dW, "low-rank": W + low, "weight": W}
        found.append(by.get(score, W).detach().abs().flatten())
        M.append(unpack(mask.parts[0].tensors(p)["bits"], W.shape).flatten())
    scores, M = torch.cat(found), torch.cat(M)
    if score != "random" and 0 < ratio < 1:
        assert scores[~M].max() <= scores[M].min()


def test_mask_then_change_is_m_w_plus_d_w_and_ratio_zero_is_the_delta_alone(bert, ids, moved) -> None:
    base = Base(bert)
    delta = moved(base, DSEE(rank=2, entries=4, support="size"))
    mask = prune(base, delta, "update", 0.4)
    both = Delta("pruned", [*mask.parts, *delta.parts])
    want = copy.deepcopy(bert)
    with torch.no_grad():
        for p in delta.parts[0].kind_of:
            W = want.get_submodule(p).weight
            M = unpack(mask.parts[0].tensors(p)["bits"], W.shape)
            W.copy_(M * W + delta.parts[0].method.update(base.sites[p], delta.parts[0].tensors(p)).dense())
        pruned = want(input_ids=ids)[0]
        with base.using(mask, delta):
            torch.testing.assert_close(bert(input_ids=ids)[0], pruned, atol=1e-5, rtol=0)
        with base.using(both):
            torch.testing.assert_close(bert(input_ids=ids)[0], pruned, atol=1e-5, rtol=0)
        torch.testing.assert_close(base.merged(both).model(input_ids=ids)[0], pruned, atol=1e-5, rtol=0)
        with base.using(delta):
            alone = bert(input_ids=ids)[0]
        assert (alone - pruned).abs().max() > 1e-3
        with base.using(prune(base, delta, "update", 0.0), delta):
            torch.testing.assert_close(bert(input_ids=ids)[0], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_head_pruning_is_zeroing_the_heads_slice(name, request, ids, moved) -> None:
    model = request.getfixturevalue(name)
    base = Base(model)
    delta = moved(base, DSEE(rank=2, entries=3, support="size"))
    mask = prune_heads(base, delta, 1)
    o = [p for p in mask.parts[0].kind_of]
    assert len(o) == 2
    gone = {}
    for p in o:
        M = unpack(mask.parts[0].tensors(p)["bits"], base.sites[p].shape)
        heads = M.reshape(len(M), 4, -1)
        dead = [h for h in range(4) if not bool(heads[:, h].any())]
        assert len(dead) == 1 and int((~M).sum()) == M.numel() // 4
        gone[p] = dead[0]
    handles = []
    for p, h in gone.items():

        def hook(_m: nn.Module, args: tuple[torch.Tensor], h: int = h) -> tuple[torch.Tensor]:
            x = args[0].clone()
            x[..., h * 4 : (h + 1) * 4] = 0
            return (x,)

        handles.append(model.get_submodule(p).register_forward_pre_hook(hook))
    with torch.no_grad(), base.using(delta):
        want = model(input_ids=ids)[0]
    for handle in handles:
        handle.remove()
    with torch.no_grad(), base.using(mask, delta):
        torch.testing.assert_close(model(input_ids=ids)[0], want, atol=1e-5, rtol=0)


def test_the_head_with_the_smallest_change_goes(bert, moved) -> None:
    base = Base(bert)
    delta = moved(base, LoRA(rank=2, targets="q,v"))
    with torch.no_grad():
        for path in delta.parts[0].kind_of:
            delta.parts[0].tensors(path)["B"][8:12] = 0  # rows of head 2
    mask = prune_heads(base, delta, 1)
    for p in mask.parts[0].kind_of:
        M = unpack(mask.parts[0].tensors(p)["bits"], base.sites[p].shape)
        assert not bool(M[:, 8:12].any()) and bool(M[:, :8].all()) and bool(M[:, 12:].all())


def test_neurons_with_the_smallest_columns_go(bert) -> None:
    base = Base(bert)
    mask = prune_neurons(base, None, 0.25)
    assert len(mask.parts[0].kind_of) == 2
    for p in mask.parts[0].kind_of:
        W = base.sites[p].params()["weight"].detach()
        M = unpack(mask.parts[0].tensors(p)["bits"], W.shape)
        off = (~M).all(0)
        assert int(off.sum()) == 6 and bool((M.all(0) | off).all())
        size = W.abs().sum(0)
        assert size[off].max() <= size[~off].min()


def test_a_pruned_delta_survives_its_file(tmp_path, bert, moved) -> None:
    base = Base(bert)
    delta = moved(base, DSEE(rank=2, entries=4, support="size"))
    both = Delta("pruned", [*prune(base, delta).parts, *delta.parts], provenance=delta.provenance)
    both.save(tmp_path / "both")
    assert Delta.load(tmp_path / "both", base).digest == both.digest


def test_what_cannot_be_pruned_is_named(bert, moved) -> None:
    base = Base(bert)
    delta = moved(base, LoRA(rank=2, targets="q,v"))
    for wrong, text in (
        (lambda: prune(base, delta, "wieght"), "weight"),
        (lambda: prune(base, delta, "update", 1.5), "0..1"),
        (lambda: prune(base, delta, "update", targets="k"), "adds to this layer"),
        (lambda: prune(base, None, "weight"), "which layers"),
        (lambda: prune_heads(base, delta, 4), "4 of 4"),
        (lambda: prune_heads(base, moved(base, LoRA(rank=2, targets="o")), 1), "fill"),
        (lambda: prune_heads(toys()[2], delta, 1), "no attention"),
        (lambda: mask_delta(base, {"encoder.layer.0.output.dense": torch.ones(3, 3)}), "does not fit"),
    ):
        with pytest.raises(UsageError, match=text):
            wrong()


def test_places_are_kept_until_the_weight_changes() -> None:
    W, at = spiked(48, 64, rank=5, k=6)
    base = one(W)
    site = base.sites["0"]
    assert torch.equal(outliers(site, 6, threshold=0.4), at)
    assert len(outliers(site, 4, threshold=0.4)) == 4, "another count is another answer"
    found = outliers(site, 6, threshold=0.4)
    found.zero_()
    assert torch.equal(outliers(site, 6, threshold=0.4), at), "what is kept was handed out"
    with torch.no_grad():
        site.module.weight.copy_(W.flip(0))
    assert not torch.equal(outliers(site, 6, threshold=0.4), at)
