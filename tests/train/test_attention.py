"""Attention in blocks: as near to the exact product as torch's own kernel, forward and backward, or left to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from serve_cases import tiny_llama
from torch import Tensor

from tunesmith.core.delta import Delta
from tunesmith.deltas import LoRA
from tunesmith.train import attention
from tunesmith.train.attention import BlockAttention, block_attention
from tunesmith.train.dropout import dropped, scale


def made(B: int, H: int, T: int, S: int, d: int = 16) -> list[Tensor]:
    g = torch.Generator().manual_seed(T)
    return [torch.randn(B, H, n, d, generator=g).to(torch.bfloat16) for n in (T, S, S, T)]


def masks(kind: str, B: int, H: int, T: int, S: int) -> Tensor | None:
    g = torch.Generator().manual_seed(1)
    lengths = torch.arange(S)[None] < torch.randint(max(1, S // 2), S + 1, (B, 1), generator=g)  # [B, S]
    if kind == "padding":
        return lengths[:, None, None]
    if kind == "padded causal":
        return lengths[:, None, None] & torch.ones(T, S, dtype=torch.bool).tril()
    if kind == "per head":
        return torch.randn(1, H, T, S, generator=g)
    if kind == "per head and row":
        return torch.randn(B, H, T, S, generator=g)
    return None


CASES = [
    (2, 3, 1, 1, ""), (2, 3, 7, 7, "causal"), (2, 3, 128, 128, "causal"), (1, 4, 300, 300, "causal"), (3, 2, 20, 20, "padding"),
    (3, 2, 150, 150, "padded causal"), (2, 3, 9, 30, "per head"), (2, 3, 140, 140, "per head and row"), (2, 2, 5, 200, ""),
]  # fmt: skip


@pytest.mark.parametrize("B, H, T, S, kind", CASES)
@pytest.mark.parametrize("elements", [400_000, 2_000])
def test_as_near_to_the_exact_product_as_torch(
    B: int, H: int, T: int, S: int, kind: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "ELEMENTS", elements)
    *qkv, up = made(B, H, T, S)
    mask, causal = masks(kind, B, H, T, S), kind == "causal"
    leaves = [[t.clone().requires_grad_() for t in qkv] for _ in range(2)]
    exact = [t.double().requires_grad_() for t in qkv]
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    half = mask if mask is None or mask.dtype == torch.bool else mask.to(torch.bfloat16)
    outs = [
        block_attention(*leaves[0], mask, causal, 16**-0.5),
        F.scaled_dot_product_attention(*leaves[1], half, is_causal=causal),
        F.scaled_dot_product_attention(*exact, wide, is_causal=causal),
    ]
    grads = [torch.autograd.grad(o, ls, up.to(o.dtype)) for o, ls in zip(outs, [*leaves, exact], strict=True)]
    for mine, theirs, want in [(outs[0], outs[1], outs[2]), *zip(*grads, strict=True)]:
        size = float(want.detach().norm())
        gap = float((mine.double() - want).detach().norm())
        other = float((theirs.double() - want).detach().norm())
        assert gap <= 3 * other + 1e-2 * size
        if size > 1e-3:  # one key: the weights are constant, and what is left of their gradient is rounding
            assert gap < 0.02 * size


@pytest.mark.parametrize("B, H, T, S, kind", [c for c in CASES if c[3] > 1])
def test_dropout_equals_the_plain_form_under_the_same_mask(B: int, H: int, T: int, S: int, kind: str) -> None:
    *qkv, up = made(B, H, T, S)
    mask, causal = masks(kind, B, H, T, S), kind == "causal"
    drop, kept = dropped((B * H, T, S), 0.3), scale(0.3)
    leaves = [t.clone().requires_grad_() for t in qkv]
    q, k, v = exact = [t.double().requires_grad_() for t in qkv]
    got = block_attention(*leaves, mask, causal, 16**-0.5, drop, kept)
    scores = q @ k.transpose(-1, -2) * 16**-0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(), -torch.inf)
    elif mask is not None:
        scores = scores.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else scores + mask.double()
    want = scores.softmax(-1).masked_fill(drop.view(B, H, T, S), 0.0) * kept @ v
    grads = [torch.autograd.grad(o, ls, up.to(o.dtype)) for o, ls in ((got, leaves), (want, exact))]
    for a, b in [(got, want), *zip(*grads, strict=True)]:
        assert float((a.double() - b).detach().norm()) < 0.02 * float(b.detach().norm())


def test_dropout_draws_from_the_generator_and_drops_the_share_asked_for() -> None:
    q, k, v, _ = made(4, 4, 60, 60)
    v.fill_(1.0)  # each output is then the sum of the weights that stay
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with BlockAttention() as mode:
            found.append(F.scaled_dot_product_attention(q, k, v, dropout_p=0.25))
        assert mode.taken == 1
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert float(found[0].float().mean()) == pytest.approx(1.0, abs=0.03)
    assert float(found[0].float().std()) > 0.02


def test_a_row_that_sees_nothing_gives_numbers() -> None:
    q, k, v, up = made(1, 1, 4, 4)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 0] = False
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
        y = block_attention(*leaves, given, False, 0.25)
        assert bool(torch.isfinite(y).all())
        assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(y, leaves, up))


def test_nothing_of_the_size_of_the_scores_is_kept() -> None:
    q, k, v, _ = (t.requires_grad_() for t in made(1, 2, 260, 260))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        block_attention(q, k, v, None, True, 0.25)
    assert max(kept) <= 2 * 260 * 16


@pytest.mark.parametrize(
    "change",
    [
        {"dropout_p": 1.0},
        {"dtype": torch.float32},
        {"attn_mask": torch.zeros(1, 1, 6, 6, requires_grad=True)},
        {"flat": True},
    ],
)
def test_what_it_cannot_do_goes_to_torch(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "block_attention", lambda *a: pytest.fail("the fast form was used"))
    q, k, v, _ = made(1, 2, 6, 6)
    if change.pop("flat", False):
        q, k, v = q[0], k[0], v[0]
    dtype = change.pop("dtype", torch.bfloat16)
    with BlockAttention():
        F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), **change)


def test_grouped_heads_and_autocast() -> None:
    q, k, v, _ = (t.float() for t in made(2, 4, 12, 12))
    few = [t[:, :2].clone().requires_grad_() for t in (k, v)]
    with torch.autocast("cpu", torch.bfloat16), BlockAttention() as mode:
        got = F.scaled_dot_product_attention(q, *few, is_causal=True, enable_gqa=True)
    assert mode.taken == 1 and got.dtype == torch.bfloat16
    want = F.scaled_dot_product_attention(q, *few, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0.03)
    for a, b in zip(*(torch.autograd.grad(y.float().square().sum(), few) for y in (got, want)), strict=True):
        assert a.shape == b.shape and float((a - b).norm()) < 0.03 * float(b.norm())


def test_a_language_model_trains_the_same_way() -> None:
    """Losses of ten steps in bf16 stay as near to those in fp32 as with torch's kernel."""
    found: dict[str, list[float]] = {}
    for name in ("fp32", "torch", "blocks"):
        base = tiny_llama()
        if name != "fp32":
            base.model.to(torch.bfloat16)
        delta = Delta.create(base, LoRA(rank=2), seed=0)
        params = [t for _, t in delta.items() if t.requires_grad]
        optimiser = torch.optim.AdamW(params, lr=0.02)
        ids = torch.arange(40).reshape(2, 20) * 7 % 67
        mask = torch.ones_like(ids)
        mask[1, 15:] = 0
        losses = found.setdefault(name, [])
        with base.frozen(), base.using(delta):
            for _ in range(10):
                if name == "blocks":
                    with BlockAttention() as mode:
                        z = base.model(input_ids=ids, attention_mask=mask).logits
                    assert mode.taken == 2
                else:
                    z = base.model(input_ids=ids, attention_mask=mask).logits
                loss = F.cross_entropy(z[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(float(loss.detach()))
    drop = found["fp32"][0] - found["fp32"][-1]
    assert drop > 0.5
    gap = {n: max(abs(a - b) for a, b in zip(found[n], found["fp32"], strict=True)) for n in ("torch", "blocks")}
    assert gap["blocks"] < max(2 * gap["torch"], 0.05 * drop)
