# SPDX-License-Identifier: Apache-2.0
"""OFT and BOFT against PEFT, and rotations against what makes them rotations."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.deltas import BOFT, OFT
from tunesmith.deltas.weight.multiplicative import butterfly, cayley, near_divisor, skew

peft = pytest.importorskip("peft")
boft_layer = pytest.importorskip("peft.tuners.boft.layer")


def oft_twin(model: nn.Module, delta: Delta, targets: list[str], **config: object) -> tuple[nn.Module, int]:
    """A PEFT OFT model with the delta's tensors (an embedding's negated), and how many layers got them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of adjusted block sizes
        twin = peft.get_peft_model(copy.deepcopy(model), peft.OFTConfig(target_modules=targets, **config)).eval()
    n = 0
    with torch.no_grad():
        for path, module in twin.named_modules():
            site = path.removeprefix("base_model.model.")
            if not hasattr(module, "oft_R") or site not in delta.parts[0].kind_of:
                continue
            q = delta.parts[0].tensors(site)["q"]
            if len(module.oft_embedding_R):
                module.oft_embedding_R["default"].weight.copy_(-q)
            else:
                module.oft_R["default"].weight.copy_(q)
            n += 1
    return twin, n


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"block": 4}, {"oft_block_size": 4, "use_cayley_neumann": False}),
        ({"block": 7}, {"oft_block_size": 7, "use_cayley_neumann": False}),
        ({"block": 8, "block_share": True}, {"oft_block_size": 8, "block_share": True, "use_cayley_neumann": False}),
        ({"block": 4, "neumann_terms": 5}, {"oft_block_size": 4}),
        ({"block": 4, "neumann_terms": 8}, {"oft_block_size": 4, "num_cayley_neumann_terms": 8}),
        (
            {"block": 4, "coft": True, "eps": 0.3},
            {"oft_block_size": 4, "coft": True, "eps": 0.3, "use_cayley_neumann": False},
        ),
    ],
    ids=["exact", "nearest-divisor", "shared", "neumann-5", "neumann-8", "coft"],
)
@pytest.mark.parametrize(
    ("name", "targets"), [("llama", "q_proj,down_proj"), ("bert", "query"), ("llama", "embed_tokens")]
)
def test_oft_equals_peft(options, config, name, targets, request, ids, moved, same_as_peft) -> None:
    base = Base(request.getfixturevalue(name))
    delta = moved(base, OFT(targets=targets, **options), size=0.2)
    want, layers = oft_twin(base.model, delta, targets.split(","), **config)
    same_as_peft(base, delta, want, layers, ids, 2e-5)


def test_oft_on_convolutions_equals_peft_merged(moved) -> None:
    """PEFT folds rotated patches back into an image, which for kernels above 1 x 1 is not its own merged layer."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    x = torch.randn(2, 2, 5, 5)
    base = Base(model, example=(x,))
    delta = moved(base, OFT(block=3, targets="convs"), size=0.3)
    twin, layers = oft_twin(model, delta, ["0", "2"], oft_block_size=3, use_cayley_neumann=False)
    assert layers == 2
    with torch.no_grad():
        theirs = twin.merge_and_unload()
        mine = base.merged(delta).model
        for i in (0, 2):
            torch.testing.assert_close(mine[i].weight, theirs[i].weight, atol=1e-5, rtol=0)
        with base.using(delta):
            torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=0)


def test_rotations_keep_lengths_and_angles(moved) -> None:
    layer, x = nn.Linear(12, 7), torch.randn(3, 12)
    base = Base(nn.Sequential(layer), example=(x,))
    for method in (OFT(block=4, targets="0"), OFT(block=12, targets="0"), BOFT(block=2, factors=2, targets="0")):
        delta = moved(base, method, size=1.0)
        if "s" in delta.parts[0].tensors("0"):
            with torch.no_grad():
                delta.parts[0].tensors("0")["s"].fill_(1.0)
        W = base.merged(delta).model[0].weight.detach()
        torch.testing.assert_close(W @ W.T, (layer.weight @ layer.weight.T).detach(), atol=1e-5, rtol=0)
        assert (W - layer.weight).abs().max() > 0.1


def test_the_series_approaches_the_inverse_map() -> None:
    Q = skew(0.05 * torch.randn(3, 6, dtype=torch.float64), 4)
    assert torch.equal(Q, -Q.mT)
    exact = cayley(-Q)  # the series turns the other way
    gaps = [float((cayley(Q, terms) - exact).abs().max()) for terms in (4, 6, 14)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-9
    torch.testing.assert_close(exact @ exact.mT, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))


@pytest.mark.parametrize(
    ("n", "k", "want"), [(16, 32, 16), (24, 7, 6), (27, 4, 3), (12, 5, 4), (13, 3, 1), (576, 32, 32)]
)
def test_nearest_divisor(n, k, want) -> None:
    assert near_divisor(n, k) == want


def test_coft_stays_near(llama) -> None:
    base = Base(llama)
    method = OFT(block=4, coft=True, eps=0.1, targets="q")
    delta = Delta.create(base, method)
    with torch.no_grad():
        for _, q in delta.items():
            q.normal_()
        method.after_step(delta.parts[0], None)
    for _, q in delta.items():
        norms = skew(q.detach(), 4).flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, 0.1 / 4**0.5))
    before = [q.detach().clone() for _, q in delta.items()]
    with torch.no_grad():
        OFT(block=4, targets="q").after_step(delta.parts[0], None)
    assert all(torch.equal(q, old) for (_, q), old in zip(delta.items(), before, strict=True))


def test_identity_at_the_start_and_counts(llama, ids, undone) -> None:
    base = Base(llama)
    for method, count in (
        (OFT(block=4, targets="q,down"), 2 * (4 * 6 + 6 * 6)),
        (OFT(block=4, block_share=True, targets="q,down"), 2 * (6 + 6)),
        (BOFT(block=4, factors=2, targets="q,down"), 2 * ((2 * 16 * 4 + 16) + (2 * 24 * 4 + 16))),
    ):
        delta = Delta.create(base, method)
        assert delta.trainable_parameters == count
        torch.testing.assert_close(undone(base, delta, input_ids=ids), llama(input_ids=ids)[0], atol=1e-6, rtol=0)


@pytest.fixture
def fast_block_diag(monkeypatch) -> None:
    """PEFT's CUDA extension written out, so that it does not fall back to one factor."""

    def diagonal(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*one) for one in blocks])]

    monkeypatch.setattr(boft_layer, "_FBD_CUDA", SimpleNamespace(forward=diagonal))


def boft_twin(model: nn.Module, delta: Delta, targets: list[str], block: int, factors: int) -> tuple[nn.Module, int]:
    config = peft.BOFTConfig(boft_block_size=block, boft_n_butterfly_factor=factors, target_modules=targets)
    twin = peft.get_peft_model(copy.deepcopy(model), config).eval()
    n = 0
    with torch.no_grad():
        for path, module in twin.named_modules():
            site = path.removeprefix("base_model.model.")
            if hasattr(module, "boft_R") and site in delta.parts[0].kind_of:
                t = delta.parts[0].tensors(site)
                module.boft_R["default"].copy_(t["D"])
                module.boft_s["default"].copy_(t["s"].reshape(module.boft_s["default"].shape))
                n += 1
    return twin, n


@pytest.mark.parametrize(("block", "factors"), [(4, 1), (2, 2), (4, 2), (2, 3)])
def test_boft_equals_peft(block, factors, fast_block_diag, llama, ids, moved, undone) -> None:
    base = Base(llama)
    delta = moved(base, BOFT(block=block, factors=factors, targets="q_proj,down_proj"), size=0.3)
    want, layers = boft_twin(llama, delta, ["q_proj", "down_proj"], block, factors)
    assert layers == len(delta.parts[0].kind_of) == 4
    assert delta.trainable_parameters == sum(p.numel() for p in want.parameters() if p.requires_grad)
    out = undone(base, delta, input_ids=ids)
    with torch.no_grad():
        torch.testing.assert_close(out, want(input_ids=ids)[0], atol=1e-5, rtol=0)
        assert (out - llama(input_ids=ids)[0]).abs().max() > 1e-3
        merged = base.merged(delta).model
        torch.testing.assert_close(merged(input_ids=ids)[0], out, atol=2e-5, rtol=0)
        theirs = dict(want.merge_and_unload().named_parameters())
    for key, p in merged.named_parameters():
        torch.testing.assert_close(p, theirs[key], atol=1e-5, rtol=0)


def test_boft_on_convolutions_equals_peft(fast_block_diag, moved) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    x = torch.randn(2, 2, 5, 5)
    base = Base(model, example=(x,))
    delta = moved(base, BOFT(block=2, targets="convs"), size=0.3)
    twin, layers = boft_twin(model, delta, ["0", "2"], 2, 1)
    assert layers == 2
    with torch.no_grad(), base.using(delta):
        torch.testing.assert_close(model(x), twin(x), atol=1e-5, rtol=0)


def test_factors_reach_across_blocks() -> None:
    """b factors of k x k blocks connect every channel with k 2^(b-1) others, b = 3 and k = 2 all of 8."""
    R = cayley(skew(torch.randn(3 * 4, 1), 2)).reshape(3, 4, 2, 2)
    x = torch.eye(8)
    for level in reversed(range(3)):
        x = butterfly(x, R[level], level)
    assert (x.abs() > 1e-6).all()
    torch.testing.assert_close(x @ x.T, torch.eye(8))


def test_what_does_not_fit_is_refused(llama) -> None:
    base = Base(llama)
    with pytest.raises(UsageError, match="4 terms"):
        Delta.create(base, OFT(neumann_terms=2))
    with pytest.raises(UsageError, match="does not divide"):
        Delta.create(base, BOFT(block=5))
    with pytest.raises(UsageError, match="even block"):
        Delta.create(base, BOFT(block=3, factors=4, targets="down"))
    prime = Base(nn.Sequential(nn.Linear(13, 4)), example=(torch.randn(2, 13),))
    with pytest.raises(UsageError, match="no block near"):
        Delta.create(prime, OFT(block=3, targets="0"))
    assert Delta.create(prime, OFT(block=8, targets="0")).trainable_parameters == 13 * 12 // 2
