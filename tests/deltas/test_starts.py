# SPDX-License-Identifier: Apache-2.0
"""Methods that start from a piece of the weight (PiSSA, OLoRA, CorDA), against PEFT and against closed forms."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.sample import Sample
from tunesmith.core.spectrum import flat
from tunesmith.deltas import CorDA, LoRA, OLoRA, PiSSA
from tunesmith.deltas.weight.corda import oriented
from tunesmith.deltas.weight.lowrank import begun, relative

peft = pytest.importorskip("peft")

RELATIVES: list[Any] = [PiSSA, OLoRA, CorDA]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def mlp() -> Base:
    torch.manual_seed(0)
    return Base(MLP(), example=(torch.randn(4, 12),))


def inputs(n: int = 6, tokens: int = 30) -> list[Tensor]:
    """Examples [tokens, 12] of unequal size whose features differ much in scale and are correlated."""
    g = torch.Generator().manual_seed(8)
    mix = torch.randn(12, 12, generator=g) * torch.linspace(2, 0.1, 12)
    return [float(i + 1) * torch.randn(tokens, 12, generator=g) @ mix for i in range(n)]


def sample_of(batches: list[Tensor]) -> Sample:
    return Sample(lambda: batches, lambda b, x: b.model(x), lambda b, x: b.model(x).square().sum())


def made(base: Base, method: Any, sample: Sample | None = None) -> Delta:
    return Delta.create(base, method, sample=sample or sample_of(inputs()))


def moved(delta: Delta, size: float = 0.1) -> Delta:
    with torch.no_grad():
        for _, t in delta.items():
            if t.requires_grad:
                t.add_(torch.randn_like(t) * size)
    return delta


def start_of(delta: Delta, path: str) -> tuple[Tensor, Tensor]:
    t = delta.parts[0].tensors(path)
    return t["B0"].detach(), t["A0"].detach()


# What all three share


@pytest.mark.parametrize("cls", RELATIVES)
def test_a_fresh_delta_is_the_identity_bit_for_bit_and_trains_as_many_numbers_as_lora(cls: Any) -> None:
    base, x = mlp(), torch.randn(5, 12)
    delta = made(base, cls(rank=3, alpha=6.0, targets="a,b"))
    with torch.no_grad():
        plain = base.model(x)
        with base.using(delta):
            assert torch.equal(base.model(x), plain)
        with base.using(moved(delta)):
            assert (base.model(x) - plain).abs().max() > 1e-2
    assert delta.trainable_parameters == Delta.create(base, LoRA(rank=3, targets="a,b")).trainable_parameters
    assert delta.nbytes == 2 * 4 * delta.trainable_parameters, "the frozen start doubles what is stored"
    for path in ("a", "b"):
        B0, A0 = start_of(delta, path)
        assert float((B0 @ A0).norm()) > 1e-3


@pytest.mark.parametrize(
    ("cls", "rslora"), [(PiSSA, False), (PiSSA, True), (OLoRA, False), (OLoRA, True), (CorDA, False)]
)
def test_it_is_the_residual_form_of_the_paper(cls: Any, rslora: bool) -> None:
    """W + s (B A - B0 A0) = W_res + s B A with W_res = W - s B0 A0, and W_res + s B0 A0 = W."""
    base, x = mlp(), torch.randn(5, 12)
    options = {"rslora": True} if rslora else {}
    s = 6 / 3**0.5 if rslora else 2.0
    delta = moved(made(base, cls(rank=3, alpha=6.0, targets="a,b", **options)))
    paper = copy.deepcopy(base.model)
    with torch.no_grad():
        for path in ("a", "b"):
            W, (B0, A0), t = getattr(paper, path).weight, start_of(delta, path), delta.parts[0].tensors(path)
            residual = W - s * B0 @ A0
            torch.testing.assert_close(residual + s * B0 @ A0, W, atol=1e-6, rtol=1e-4)
            W.copy_(residual + s * t["B"] @ t["A"])
        with base.using(delta):
            live = base.model(x)
        torch.testing.assert_close(live, paper(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(base.merged(delta).model(x), paper(x), atol=1e-5, rtol=1e-4)
    # the rank-2r form [B, -B0] [A; A0]
    t = delta.parts[0].tensors("a")
    want = s * torch.cat([t["B"], -t["B0"]], 1) @ torch.cat([t["A"], t["A0"]])
    update = delta.parts[0].method.update(base.sites["a"], t)
    assert update.rank == 6
    torch.testing.assert_close(update.dense(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cls", RELATIVES)
def test_gradients_are_those_of_the_residual_form(cls: Any) -> None:
    base, x = mlp(), torch.randn(5, 12)
    delta = moved(made(base, cls(rank=3, alpha=6.0, targets="a")))
    part = delta.parts[0]
    with base.using(delta):
        base.model(x).square().sum().backward()
    got = [part.parameter("a", n).grad for n in "AB"]
    assert all(part.parameter("a", n).grad is None for n in ("A0", "B0"))
    A, B = (part.parameter("a", n).detach().clone().requires_grad_(True) for n in "AB")
    layer = base.modules["a"]
    W = layer.weight.detach() - 2 * (part.parameter("a", "B0") @ part.parameter("a", "A0")).detach()
    h = torch.tanh(nn.functional.linear(x, W + 2 * B @ A, layer.bias))
    base.model.b(h).square().sum().backward()
    for mine, want in zip(got, (A.grad, B.grad), strict=True):
        torch.testing.assert_close(mine, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cls", RELATIVES)
def test_two_deltas_of_one_base_add_up(cls: Any) -> None:
    base, x = mlp(), torch.randn(5, 12)
    one, two = (moved(made(base, cls(rank=2, alpha=2.0, targets="b"))) for _ in range(2))
    one.name, two.name = "one", "two"
    site = base.sites["b"]
    with torch.no_grad():
        both = copy.deepcopy(base.model)
        for d in (one, two):
            both.b.weight += d.parts[0].method.update(site, d.parts[0].tensors("b")).dense()
        with base.using(one, two):
            torch.testing.assert_close(base.model(x), both(x), atol=1e-5, rtol=1e-5)


def test_small_moves_survive_half_precision() -> None:
    """With [B, -B0] [A; A0] in bf16 a move below half of a factor's last digit would vanish."""
    base = mlp()
    site, W = base.sites["a"], flat(base.sites["a"])
    t = made(base, PiSSA(rank=3, alpha=3.0, targets="a")).parts[0].tensors("a")
    t = {k: v.detach().clone() for k, v in t.items()}
    t["A"] += 1e-4 * torch.randn_like(t["A"])
    x = torch.randn(50, 12)
    want = x @ (t["B0"] @ (t["A"] - t["A0"])).T
    got = relative(t, 1.0, site.shape).apply(x.bfloat16(), site).float()
    assert float((got - want).norm() / want.norm()) < 0.02
    naive = (x.bfloat16() @ t["A"].T.bfloat16() - x.bfloat16() @ t["A0"].T.bfloat16()) @ t["B0"].T.bfloat16()
    assert float((naive.float() - want).norm() / want.norm()) > 0.1
    assert float(W.norm()) > 0


@pytest.mark.parametrize("cls", RELATIVES)
def test_a_rank_above_the_weights_components_is_refused(cls: Any) -> None:
    with pytest.raises(UsageError, match=r"rank 8 is above the 7 components"):
        made(mlp(), cls(rank=8, targets="a,b"))
    delta = made(mlp(), cls(rank=8, targets="a,b", rank_pattern={"b": 7}, alpha_pattern={"b": 3.5}))
    assert len(delta.parts[0].tensors("b")["A"]) == 7
    with pytest.raises(UsageError, match="matches none"):
        made(mlp(), cls(targets="a", rank=2, rank_pattern={"c": 2}))


@pytest.mark.parametrize("cls", RELATIVES)
def test_saved_and_loaded_it_keeps_its_start(cls: Any, tmp_path: Path) -> None:
    base = mlp()
    delta = moved(made(base, cls(rank=2, alpha=2.0, targets="a,b")))
    delta.save(tmp_path / "d")
    loaded = Delta.load(tmp_path / "d", base)
    assert loaded.digest == delta.digest
    assert [n for n, t in loaded.items() if not t.requires_grad] == [n for n, t in delta.items() if n[-1] == "0"]


@pytest.mark.parametrize("cls", RELATIVES)
def test_convolutions_start_from_their_flattened_kernel(cls: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9, 9)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 2, dilation=2))
    base = Base(model, example=(x,))
    delta = made(base, cls(rank=3, alpha=3.0, targets="convs"), sample_of([x]))
    B0, A0 = start_of(delta, "0")
    assert tuple(B0.shape) == (6, 3) and tuple(A0.shape) == (3, 36)
    with torch.no_grad():
        plain = model(x)
        with base.using(delta):
            assert torch.equal(model(x), plain)
        with base.using(moved(delta)):
            out = model(x)
        torch.testing.assert_close(base.merged(delta).model(x), out, atol=1e-4, rtol=1e-4)
        assert (out - plain).abs().max() > 1e-2
    if cls is PiSSA:
        W = flat(base.sites["0"])
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        torch.testing.assert_close(B0 @ A0, (U[:, :3] * S[:3]) @ Vh[:3], atol=1e-5, rtol=0)


# Against PEFT


def same_up_to_sign(B: Tensor, A: Tensor, want_B: Tensor, want_A: Tensor, atol: float = 1e-4) -> None:
    """Columns of B and rows of A agree, each pair up to one sign."""
    sign = torch.sign((B * want_B).sum(0))
    assert set(sign.tolist()) <= {1.0, -1.0}
    torch.testing.assert_close(B * sign, want_B, atol=atol, rtol=1e-3)
    torch.testing.assert_close(A * sign[:, None], want_A, atol=atol, rtol=1e-3)


def into_peft(delta: Delta, model: Any) -> None:
    """Copy the trained factors into a PEFT model that has made its own start."""
    with torch.no_grad():
        for path in delta.parts[0].kind_of:
            layer, t = model.base_model.model.get_submodule(path), delta.parts[0].tensors(path)
            layer.lora_A["default"].weight.copy_(t["A"])
            layer.lora_B["default"].weight.copy_(t["B"])


def factors_of(model: Any, path: str) -> tuple[Tensor, Tensor]:
    layer = model.base_model.model.get_submodule(path)
    return layer.lora_B["default"].weight.detach().clone(), layer.lora_A["default"].weight.detach().clone()


@pytest.mark.parametrize(
    ("method", "init"),
    [
        (PiSSA(rank=3, alpha=6.0, targets="a,b"), "pissa"),
        (PiSSA(rank=3, alpha=6.0, targets="a,b", rslora=True), "pissa"),
        (PiSSA(rank=3, alpha=6.0, targets="a,b", rounds=8), "pissa_niter_16"),
        (OLoRA(rank=3, alpha=6.0, targets="a,b"), "olora"),
    ],
    ids=["pissa", "pissa-rslora", "pissa-quick", "olora"],
)
def test_equals_peft(method: Any, init: str) -> None:
    base, x = mlp(), torch.randn(5, 12)
    with torch.no_grad():  # singular values far apart, so that the quick decomposition of both is exact
        for path in ("a", "b"):
            W = base.modules[path].weight
            U, _, Vh = torch.linalg.svd(W, full_matrices=False)
            W.copy_((U * 2.0 ** -torch.arange(len(Vh))) @ Vh)
    rslora = getattr(method, "rslora", False)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["a", "b"], init_lora_weights=init, use_rslora=rslora, lora_dropout=0.0
    )
    want = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    delta = made(base, method)
    for path in ("a", "b"):
        same_up_to_sign(*start_of(delta, path), *factors_of(want, path))
    into_peft(moved(delta), want)
    with torch.no_grad(), base.using(delta):
        torch.testing.assert_close(base.model(x), want(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mode", "theirs"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_corda_equals_peft(mode: str, theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT leaves the scale of C as it is, which moves size between B and A and leaves B A."""
    if importlib.util.find_spec("attr") is None:  # PEFT takes a decorator from a package it does not require
        monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base, x = mlp(), torch.randn(5, 12)
    data = [i.abs() for i in inputs()]  # PEFT divides by the largest signed value
    model = copy.deepcopy(base.model)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["a"], init_lora_weights="corda", lora_dropout=0.0,
        corda_config=CordaConfig(corda_method=theirs),
    )  # fmt: skip
    preprocess_corda(model, config, run_model=lambda: [model(i) for i in data])
    want = peft.get_peft_model(model, config).eval()
    batches = [torch.stack(data[:4]), torch.stack(data[4:])]  # several examples at a time give the same
    delta = made(base, CorDA(rank=3, alpha=6.0, mode=mode, targets="a"), sample_of(batches))
    (B, A), (want_B, want_A) = start_of(delta, "a"), factors_of(want, "a")
    C = sum((i / i.max()).T @ (i / i.max()) for i in data) / len(data)
    size = float(C.diagonal().mean())  # type: ignore[union-attr]
    same_up_to_sign(B * size**0.5, A / size**0.5, want_B, want_A, atol=1e-3)
    torch.testing.assert_close(B @ A, want_B @ want_A, atol=1e-4, rtol=1e-3)
    delta = moved(delta)
    into_peft(delta, want)
    with torch.no_grad(), base.using(delta):
        torch.testing.assert_close(base.model(x), want(x), atol=1e-4, rtol=1e-4)


# Closed forms


def test_pissa_takes_the_largest_or_the_smallest_components() -> None:
    base = mlp()
    W = flat(base.sites["a"])
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for start, some in (("largest", slice(0, 3)), ("smallest", slice(9, 12))):
        delta = made(base, PiSSA(rank=3, alpha=6.0, targets="a", start=start))
        B0, A0 = start_of(delta, "a")
        torch.testing.assert_close(2 * B0 @ A0, (U[:, some] * S[some]) @ Vh[some], atol=1e-5, rtol=0)
        torch.testing.assert_close(B0.norm(dim=0), A0.norm(dim=1), msg="B and A share the size of a component")
    with pytest.raises(UsageError, match="largest components only"):
        made(base, PiSSA(rank=3, targets="a", start="smallest", rounds=2))


def test_pissa_and_olora_on_an_embedding() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 30, (2, 5))
    base = Base(nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 4)), example=(ids,))
    for cls in (PiSSA, OLoRA):
        delta = made(base, cls(rank=3, alpha=3.0, targets="embeddings"))
        with torch.no_grad():
            plain = base.model(ids)
            with base.using(delta):
                assert torch.equal(base.model(ids), plain)
            with base.using(moved(delta)):
                out = base.model(ids)
            assert (out - plain).abs().max() > 1e-2
            torch.testing.assert_close(base.merged(delta).model(ids), out, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError):
        made(base, CorDA(rank=3, targets="embeddings"), sample_of([ids]))


def covariance(n: int = 12) -> Tensor:
    X = torch.cat(inputs())
    return X.T @ X / len(X)


def test_corda_all_components_give_the_weight_back() -> None:
    """U S Z = W, for every component, and Z is not orthonormal."""
    for W in (torch.randn(20, 12), torch.randn(5, 12)):
        found = oriented(W, covariance())
        torch.testing.assert_close(found.matrix(), W, atol=1e-4, rtol=1e-4)
        k = min(W.shape)
        assert (found.Vh @ found.Vh.T - torch.eye(k)).abs().max() > 1e-2


def test_corda_without_context_is_pissa_or_the_minor_components() -> None:
    W = torch.randn(9, 12)
    plain = torch.linalg.svd(W, full_matrices=False)
    for C in (torch.eye(12), 7 * torch.eye(12), torch.zeros(12, 12)):
        found = oriented(W, C)
        for some in (slice(0, 4), slice(5, 9)):
            piece = (found.U[:, some] * found.S[some]) @ found.Vh[some]
            torch.testing.assert_close(piece, (plain.U[:, some] * plain.S[some]) @ plain.Vh[some], atol=1e-4, rtol=0)
    found = oriented(W, torch.eye(12))
    torch.testing.assert_close(found.S, plain.S * 1.01, atol=1e-4, rtol=0, msg="C = I, damped")


def test_corda_does_not_depend_on_the_scale_of_the_inputs() -> None:
    W, C = torch.randn(9, 12), covariance()
    one, other = oriented(W, C), oriented(W, 1e6 * C)
    torch.testing.assert_close(one.S, other.S, atol=1e-3, rtol=1e-4)
    same_up_to_sign(one.U, one.Vh, other.U, other.Vh, atol=1e-3)


def test_corda_instruction_removes_more_energy_than_any_other_components() -> None:
    """Eckart-Young: of all choices of r components the first r take most of ||W C||_F, and no rank-r matrix takes more."""
    torch.manual_seed(1)
    W, C = torch.randn(6, 12), covariance()
    C = C / C.diagonal().mean()
    damped = C + 0.01 * torch.eye(12)
    found = oriented(W, C)

    def left(some: tuple[int, ...]) -> float:
        at = list(some)
        return float(((W - (found.U[:, at] * found.S[at]) @ found.Vh[at]) @ damped).norm())

    subsets = {some: left(some) for some in itertools.combinations(range(6), 2)}
    assert min(subsets, key=subsets.__getitem__) == (0, 1) and max(subsets, key=subsets.__getitem__) == (4, 5)
    for _ in range(50):
        guess = torch.randn(6, 2) @ torch.randn(2, 12)
        assert float(((W - guess) @ damped).norm()) >= subsets[0, 1]
    plain = torch.linalg.svd(W, full_matrices=False)
    pissa = (plain.U[:, :2] * plain.S[:2]) @ plain.Vh[:2]
    assert float(((W - pissa) @ damped).norm()) > subsets[0, 1]


def test_corda_damps_until_the_inverse_is_accurate() -> None:
    """Two tokens give a C of rank 2 among 12 features."""
    X = 100 * torch.randn(2, 12)
    W = torch.randn(9, 12)
    found = oriented(W, X.T @ X)
    assert found.Vh.isfinite().all()
    torch.testing.assert_close(found.matrix(), W, atol=1e-3, rtol=1e-3)
    with pytest.raises(Exception, match="not finite"):
        oriented(W, torch.full((12, 12), float("nan")))


def test_corda_knowledge_changes_least_what_the_context_shows() -> None:
    """Taking the knowledge components out of W moves the outputs on the context less than taking out any others."""
    base = mlp()
    X = torch.cat(inputs())
    gaps = {}
    for mode in ("knowledge", "instruction"):
        B0, A0 = start_of(made(base, CorDA(rank=3, alpha=3.0, mode=mode, targets="a")), "a")
        gaps[mode] = float((X @ (B0 @ A0).T).norm())
    B0, A0 = start_of(made(base, PiSSA(rank=3, alpha=3.0, targets="a", start="smallest")), "a")
    gaps["minor"] = float((X @ (B0 @ A0).T).norm())
    assert gaps["knowledge"] < 0.5 * gaps["minor"] < gaps["instruction"]


def test_corda_reads_its_context_from_elsewhere() -> None:
    base = mlp()
    asked: list[str] = []

    def read(b: Base, source: str) -> Sample:
        asked.append(source)
        return sample_of(inputs())

    task = sample_of([torch.randn(20, 12)])
    with_file = Sample(task.batches, task.run, task.loss, read=read)
    got = made(base, CorDA(rank=2, targets="a", context="facts.jsonl"), with_file)
    assert asked == ["facts.jsonl"]
    assert torch.equal(start_of(got, "a")[0], start_of(made(base, CorDA(rank=2, targets="a")), "a")[0])
    assert not torch.equal(start_of(got, "a")[0], start_of(made(base, CorDA(rank=2, targets="a"), task), "a")[0])


def test_corda_refuses_a_grouped_convolution() -> None:
    x = torch.randn(2, 4, 6, 6)
    base = Base(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), example=(x,))
    with pytest.raises(UsageError, match="grouped"):
        made(base, CorDA(rank=2, targets="convs"), sample_of([x]))
    delta = made(base, PiSSA(rank=2, alpha=2.0, targets="convs"))
    with torch.no_grad(), base.using(moved(delta)):
        out = base.model(x)
    torch.testing.assert_close(base.merged(delta).model(x), out, atol=1e-5, rtol=1e-5)


def test_begun_copies() -> None:
    t = begun(torch.ones(3, 2), torch.ones(2, 4))
    t["A"].add_(1)
    assert torch.equal(t["A0"], torch.ones(2, 4))
