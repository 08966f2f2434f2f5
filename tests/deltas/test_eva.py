# SPDX-License-Identifier: Apache-2.0
"""EVA against PEFT's, against the exact decomposition of stacked inputs, and the ranks it shares out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, bake
from tunesmith.core.errors import UsageError
from tunesmith.core.sample import Sample, inputs
from tunesmith.deltas import EVA, LoRA
from tunesmith.deltas.weight.explained import Components, same_inputs, shared_out

peft = pytest.importorskip("peft")

TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@pytest.fixture
def llama(llama: Any) -> Any:
    """The tiny model with inputs whose variance falls off, as those of real models does: directions are well defined."""
    with torch.no_grad():
        for layer in llama.model.layers:
            for m in (layer.input_layernorm, layer.post_attention_layernorm):
                m.weight.copy_(3 * 0.6 ** torch.arange(16))
            for m in (layer.self_attn.v_proj, layer.mlp.up_proj):
                fall = 3 * 0.6 ** torch.arange(m.out_features)
                m.weight.mul_(fall[:, None])
                m.bias.mul_(fall)
    return llama


def token_batches(n: int, pad: int = 0, seed: int = 3) -> list[dict[str, Tensor]]:
    """Batches of 6 rows of 9 to 14 tokens, with padding, and labels from the fourth token on."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        lengths = torch.randint(9, 15, (6, 1), generator=g)
        ids = F.pad(torch.randint(3, 50, (6, 14), generator=g), (0, pad))
        mask = (torch.arange(14 + pad) < lengths).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(14 + pad) < 3), -100)
        out.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return out


def sample_of(batches: list[dict[str, Tensor]]) -> Sample:
    def run(b: Base, batch: dict[str, Tensor]) -> Any:
        return b.model(**{k: v for k, v in batch.items() if k != "labels"})

    def keep(batch: dict[str, Tensor], supervised: bool = False) -> Tensor:
        return batch["labels"] != -100 if supervised else batch["attention_mask"].bool()

    return Sample(lambda: batches, run, lambda b, x: run(b, x).logits.sum(), keep)


def rows_sample(batches: list[Tensor]) -> Sample:
    return Sample(lambda: batches, lambda b, x: b.model(x), lambda b, x: b.model(x).sum())


def rows(n: int, d: int = 12, seed: int = 0, mean: float = 0.0) -> Tensor:
    """Rows whose components fall off by a half each, in a random basis."""
    g = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 2.0 ** -torch.arange(d)
    return x @ basis + mean


def angles(A: Tensor, B: Tensor) -> float:
    """The largest principal angle between the row spaces, in radians."""
    Q, P = (torch.linalg.qr(M.double().T).Q for M in (A, B))
    return float((Q - P @ (P.T @ Q)).norm(2).clamp(0, 1).asin())


def ranks(delta: Delta) -> dict[str, int]:
    return {p: len(delta.parts[0].tensors(p)["A"]) for p in delta.parts[0].kind_of}


# The incremental decomposition


def test_components_are_those_of_all_rows_at_once() -> None:
    """With every component kept nothing is cut off, so mean, scatter and components are exact."""
    X = rows(70, mean=3.0)
    c = Components(12, 0.99)
    for part in X.split([20, 30, 20]):
        c.take(part)
    centred = X - X.mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(c.S, S, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(c.mean.float(), X.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(float(c.scatter), float(centred.square().sum()), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(c.ratio.float(), S**2 / centred.square().sum(), atol=1e-5, rtol=1e-4)
    assert c.Vh is not None and angles(c.Vh[:5], Vh[:5]) < 1e-3
    assert float(c.ratio.sum()) == pytest.approx(1, abs=1e-5)


def test_the_mean_is_taken_off() -> None:
    """As in the released code: the first direction is not the mean of the inputs."""
    X = rows(60, mean=50.0)
    c = Components(2, 0.99)
    c.take(X)
    mean = F.normalize(X.mean(0), dim=0)
    assert c.Vh is not None
    assert float((c.Vh[0] @ mean).abs()) < 0.9 < float((torch.linalg.svd(X).Vh[0] @ mean).abs())


def test_few_rows_wait_for_more() -> None:
    X = rows(30)
    c, want = Components(8, 0.99), Components(8, 0.99)
    c.take(X[:5])
    assert c.Vh is None
    c.take(X[5:10])
    want.take(X[:10])
    assert c.Vh is not None and torch.equal(c.Vh, want.Vh)
    short = Components(8, 0.99)
    short.take(X[:3], last=True)
    assert short.Vh is not None and len(short.Vh) == 3


def test_convergence_is_the_cosine_with_the_component_before() -> None:
    X = rows(4000)
    c = Components(3, 0.99)
    c.take(X[:20])
    assert not c.converged.any()
    c.take(X[20:40])
    before = c.Vh
    c.take(X[40:80])
    assert before is not None and c.Vh is not None
    assert c.converged.tolist() == [bool(v >= 0.99) for v in F.cosine_similarity(before, c.Vh).abs()]
    for part in X[80:].split(500):
        c.take(part)
    assert c.converged.all()
    strict = Components(3, 1.0)
    strict.take(X[:20])
    strict.take(X[20:40])
    assert not strict.converged.all()


def test_components_go_to_the_largest_shares_of_variance() -> None:
    ratio = {"a": torch.tensor([0.5, 0.3, 0.1]), "b": torch.tensor([0.9, 0.05, 0.01]), "c": torch.tensor([0.04, 0.03])}
    assert shared_out(ratio, {"a": 3, "b": 3, "c": 2}, 4) == {"a": 3, "b": 1, "c": 0}
    assert shared_out(ratio, {"a": 1, "b": 3, "c": 2}, 4) == {"a": 1, "b": 2, "c": 1}
    same = {"a": torch.tensor([0.5, 0.3]), "b": torch.tensor([0.5, 0.3])}
    assert shared_out(same, {"a": 2, "b": 2}, 3) == {"a": 2, "b": 1}, "the earlier layer wins a tie"


def test_layers_with_one_input_share_a_decomposition(llama: Any) -> None:
    base = Base(llama)
    sites = base.sites.select(TARGETS, ("linear",))
    leader = same_inputs(base, sites, sample_of(token_batches(1)), supervised=True)
    short = {p.split(".", 2)[2]: q.split(".", 2)[2] for p, q in leader.items() if ".0." in p}
    attention, mlp = "0.self_attn.", "0.mlp."
    assert short == {
        **{f"{attention}{n}_proj": f"{attention}q_proj" for n in "qkv"}, f"{attention}o_proj": f"{attention}o_proj",
        **{f"{mlp}{n}_proj": f"{mlp}gate_proj" for n in ("gate", "up")}, f"{mlp}down_proj": f"{mlp}down_proj",
    }  # fmt: skip


# The method


def test_directions_are_orthonormal_and_span_those_of_the_stacked_inputs(llama: Any) -> None:
    base = Base(llama)
    sample = sample_of(token_batches(4))
    method = EVA(rank=2, alpha=4.0, rho=4.0, targets=TARGETS, limit=4, tau=1.0)
    delta = Delta.create(base, method, sample=sample)
    sites = base.sites.select(TARGETS, ("linear",))
    stacked: dict[str, list[Tensor]] = {s.path: [] for s in sites}
    for found in inputs(base, sites, sample, supervised=True):
        for path, X in found.items():
            stacked[path].append(X)
    assert len(ranks(delta)) > 10
    for path, k in ranks(delta).items():
        t = delta.parts[0].tensors(path)
        torch.testing.assert_close(t["A"] @ t["A"].T, torch.eye(k), atol=1e-5, rtol=0)
        assert not t["B"].any() and t["B"].shape == (base.sites[path].shape[0], k)
        X = torch.cat(stacked[path])
        exact = torch.linalg.svd(X - X.mean(0), full_matrices=False).Vh
        assert angles(t["A"].detach()[:1], exact[:1]) < 1e-2


def test_the_span_is_exact_where_the_spectrum_falls() -> None:
    """Principal angles to the exact decomposition of all inputs below 1e-2."""
    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 4))
    base = Base(model, example=(rows(4),))
    batches = [rows(64, seed=i, mean=0.5) for i in range(6)]
    method = EVA(rank=4, alpha=4.0, rho=2.0, targets="0", tau=1.0, limit=6)
    A = Delta.create(base, method, sample=rows_sample(batches)).parts[0].tensors("0")["A"].detach()
    X = torch.cat(batches)
    assert len(A) == 4 and angles(A, torch.linalg.svd(X - X.mean(0), full_matrices=False).Vh[:4]) < 1e-2


def test_ranks_add_up_and_the_scale_stays(llama: Any, ids: Tensor, undone: Any) -> None:
    base = Base(llama)
    sample = sample_of(token_batches(4))
    method = EVA(rank=3, alpha=6.0, targets=TARGETS)
    delta = Delta.create(base, method, sample=sample)
    got = ranks(delta)
    assert sum(got.values()) == 3 * 14 and max(got.values()) <= 6 and len(set(got.values())) > 1
    for path in got:
        t = delta.parts[0].tensors(path)
        assert method.update(base.sites[path], t).scale == 2.0
        loose = EVA(rank=3, alpha=6.0, targets=TARGETS, adjust=False)
        assert loose.update(base.sites[path], t).scale == pytest.approx(6.0 / got[path])
    assert torch.equal(undone(base, delta, input_ids=ids), llama(input_ids=ids)[0])
    even = Delta.create(base, EVA(rank=3, alpha=6.0, rho=1.0, targets=TARGETS), sample=sample)
    assert set(ranks(even).values()) == {3} and len(ranks(even)) == 14
    sizes = {p: base.sites[p].shape for p in got}
    assert delta.trainable_parameters == sum(r * sum(sizes[p]) for p, r in got.items())


def test_a_layer_without_rank_is_in_no_manifest(tmp_path: Path) -> None:
    """One layer's variance lies in one direction, the other's in all: the first gets one component, the third none."""
    base, sample, method = uneven()
    delta = Delta.create(base, method, sample=sample)
    got = ranks(delta)
    assert sum(got.values()) == 6 and "flat" not in got and got["steep"] >= 1
    delta.save(tmp_path / "d")
    loaded = Delta.load(tmp_path / "d", base)
    assert loaded.digest == delta.digest and ranks(loaded) == got


class Uneven(nn.Module):
    """Three layers on inputs of very unequal spectra."""

    def __init__(self) -> None:
        super().__init__()
        self.steep, self.middle, self.flat = nn.Linear(12, 5), nn.Linear(12, 6), nn.Linear(400, 7)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.sin(1000 * torch.arange(1, 401) * x[:, :1])
        return torch.cat([self.steep(x), self.middle(x.abs() ** 0.5), self.flat(flat)], 1)


def uneven() -> tuple[Base, Sample, EVA]:
    torch.manual_seed(0)
    base = Base(Uneven(), example=(rows(4),))
    return (
        base,
        rows_sample([rows(40, seed=i) for i in range(3)]),
        EVA(rank=2, alpha=3.0, rho=3.0, targets="all-linear"),
    )


def test_it_is_stored_as_lora_with_ranks_and_the_same_scale(tmp_path: Path) -> None:
    base, sample, method = uneven()
    delta = Delta.create(base, method, sample=sample)
    got, x = ranks(delta), rows(5, seed=9)
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(torch.randn_like(t) * 0.1)
        with base.using(delta):
            live = base.model(x)
        bake(base, delta)
        made = delta.parts[0].method
        assert isinstance(made, LoRA) and ranks(delta) == got
        assert set(made.targets.split(",")) == set(got)
        for path, r in got.items():
            update = made.update(base.sites[path], delta.parts[0].tensors(path))
            assert update.scale == pytest.approx(1.5) and update.rank == r
        with base.using(delta):
            torch.testing.assert_close(base.model(x), live, atol=1e-6, rtol=1e-6)
    plain = Delta.create(base, EVA(rank=2, alpha=3.0, rho=1.0), sample=sample)
    bake(base, plain)
    assert plain.parts[0].method == LoRA(rank=2, alpha=3.0)


def test_whitening_divides_by_the_root_of_the_singular_values() -> None:
    base = Base(nn.Sequential(nn.Linear(12, 9)), example=(rows(4),))
    sample = rows_sample([rows(50, seed=i) for i in range(3)])
    plain, white = (
        Delta.create(base, EVA(rank=3, rho=1.0, whiten=w, targets="0", limit=3, tau=1.0), sample=sample)
        for w in (False, True)
    )
    A, W = (d.parts[0].tensors("0")["A"].detach() for d in (plain, white))
    X = torch.cat([rows(50, seed=i) for i in range(3)])
    S = torch.linalg.svdvals(X - X.mean(0))[:3]
    torch.testing.assert_close(W, A / S.sqrt()[:, None], atol=1e-3, rtol=1e-2)


def test_the_amount_of_padding_and_the_order_of_batches_change_little(llama: Any) -> None:
    base = Base(llama)
    method = EVA(rank=2, alpha=4.0, targets="q_proj,o_proj,down_proj")
    batches = token_batches(6)
    plain = Delta.create(base, method, sample=sample_of(batches))
    padded = Delta.create(base, method, sample=sample_of(token_batches(6, pad=0)))
    wide = [{k: F.pad(v, (0, 9), value=-100 if k == "labels" else 0) for k, v in b.items()} for b in batches]
    wider = Delta.create(base, method, sample=sample_of(wide))
    turned = Delta.create(base, method, sample=sample_of(batches[::-1]))
    assert padded.digest == plain.digest
    assert ranks(wider) == ranks(plain)
    for path in ranks(plain):
        A = plain.parts[0].tensors(path)["A"].detach()
        torch.testing.assert_close(wider.parts[0].tensors(path)["A"].detach(), A, atol=1e-3, rtol=1e-3)
        first = turned.parts[0].tensors(path)["A"].detach()[:1]
        assert float((first @ A.T).norm()) > 0.98, "tau is 0.99 for each component"
    assert sum(abs(ranks(turned).get(p, 0) - r) for p, r in ranks(plain).items()) <= 2


def test_every_batch_counts_until_all_have_converged_or_the_limit() -> None:
    base = Base(nn.Sequential(nn.Linear(12, 9)), example=(rows(4),))
    ran: list[int] = []

    def run(b: Base, x: Tensor) -> Any:
        ran.append(len(x))
        return b.model(x)

    batches = [rows(30, seed=i) for i in range(3)]
    sample = Sample(lambda: batches, run, lambda b, x: b.model(x).sum())
    Delta.create(base, EVA(rank=2, rho=1.0, targets="0", tau=1.0, limit=7), sample=sample)
    assert len(ran) == 1 + 7, "one look at which layers share inputs, then round and round up to the limit"
    ran.clear()
    Delta.create(base, EVA(rank=1, rho=1.0, targets="0", tau=0.5), sample=sample)
    assert len(ran) == 1 + 2, "two batches are the least that can show convergence"


def test_too_few_rows_give_fewer_components() -> None:
    base = Base(nn.Sequential(nn.Linear(12, 9)), example=(rows(4),))
    delta = Delta.create(base, EVA(rank=6, targets="0", limit=2), sample=rows_sample([rows(3)]))
    assert ranks(delta) == {"0": 6}  # the three rows came twice
    delta = Delta.create(base, EVA(rank=6, targets="0", limit=1), sample=rows_sample([rows(3)]))
    assert ranks(delta) == {"0": 3}


def test_convolutions_start_from_their_patches() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8).cumsum(2).cumsum(3)  # neighbours are alike, as in pictures
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2))
    base = Base(model, example=(x,))
    delta = Delta.create(base, EVA(rank=2, rho=1.0, targets="0"), sample=rows_sample([x]))
    A = delta.parts[0].tensors("0")["A"].detach()
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 27)
    exact = torch.linalg.svd(patches - patches.mean(0), full_matrices=False).Vh
    assert angles(A[:1], exact[:1]) < 1e-2
    with torch.no_grad():
        delta.parts[0].parameter("0", "B").normal_()
        with base.using(delta):
            out = model(x)
        torch.testing.assert_close(base.merged(delta).model(x), out, atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="grouped"):
        Delta.create(base, EVA(rank=2, targets="convs"), sample=rows_sample([x]))


def test_embeddings_are_refused(llama: Any) -> None:
    with pytest.raises(UsageError, match="embed"):
        Delta.create(Base(llama), EVA(rank=2, targets="embeddings"), sample=sample_of(token_batches(1)))
    with pytest.raises(UsageError, match="needs|given none"):
        Delta.create(Base(llama), EVA(rank=2))


# Against PEFT


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_equals_peft(llama: Any, ids: Tensor, rho: float) -> None:
    """The same ranks, scales and directions up to sign, on batches with padding and unlabelled positions.

    PEFT compares components with their sign, so one whose sign its rule turns keeps a layer open for longer than it needs
    to be; with these batches none does.
    """
    base, batches = Base(llama), token_batches(5, seed=5)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=TARGETS.split(","), init_lora_weights="eva", lora_dropout=0.0,
        eva_config=peft.EvaConfig(rho=rho, tau=0.9),
    )  # fmt: skip
    want = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    peft.initialize_lora_eva_weights(want, batches, show_progress_bar=False)
    method = EVA(rank=2, alpha=6.0, rho=rho, tau=0.9, targets=TARGETS)
    delta = Delta.create(base, method, sample=sample_of(batches))
    theirs = {
        n.removeprefix("base_model.model."): m for n, m in want.named_modules() if hasattr(m, "lora_A") and m.lora_A
    }
    same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}

    def group(path: str) -> str:
        stem, _, last = path.rpartition(".")
        return f"{stem}.{same.get(last, last)}"

    def by_group(found: dict[str, int]) -> dict[str, list[int]]:
        out: dict[str, list[int]] = {}
        for path, r in sorted(found.items()):
            out.setdefault(group(path), []).append(r)
        return {g: sorted(r) for g, r in out.items()}

    mine = ranks(delta)
    assert by_group(mine) == by_group({p: m.r["default"] for p, m in theirs.items()})
    for path, layer in theirs.items():
        if path not in mine:
            continue  # which layer of equal inputs gets the odd component is open
        assert layer.scaling["default"] == pytest.approx(3.0)
        A, B = layer.lora_A["default"].weight.detach(), delta.parts[0].tensors(path)["A"].detach()
        k = min(len(A), len(B))
        assert ((A[:k] * B[:k]).sum(1).abs() > 0.999).all(), path
    if rho == 1.0:
        assert set(mine) == set(theirs)
        with torch.no_grad():
            for path, layer in theirs.items():
                t = delta.parts[0].tensors(path)
                t["B"].normal_()
                layer.lora_A["default"].weight.copy_(t["A"])
                layer.lora_B["default"].weight.copy_(t["B"])
            with base.using(delta):
                torch.testing.assert_close(llama(input_ids=ids)[0], want(input_ids=ids)[0], atol=1e-5, rtol=1e-5)
