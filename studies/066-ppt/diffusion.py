# SPDX-License-Identifier: Apache-2.0
"""A tiny conditional U-Net that denoises piano rolls, its pre-training, its loss as a task, and a DDIM sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base

from .music import NULL, PITCHES, STEPS, TOKENS, Patches

LEVELS = 200
"""Noise levels."""


def signal(t: Tensor) -> Tensor:
    """alpha_bar of the cosine schedule at t in 0..LEVELS - 1, shaped to multiply rolls."""
    return torch.cos((t.float() + 1) / (LEVELS + 1) * math.pi / 2).square().clamp_min(1e-4)[:, None, None, None]


def noised(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """z_t = sqrt(a) x + sqrt(1 - a) eps."""
    a = signal(t)
    return a.sqrt() * x + (1 - a).sqrt() * eps


class Attention(nn.Module):
    """Self-attention over the positions of a feature map [B, C, H, W] and the words of the prompt [B, L, E]."""

    def __init__(self, channels: int, words: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.words = nn.Linear(words, channels)
        self.q, self.k, self.v, self.o = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        seen = torch.cat([h, self.words(words)], 1)
        q, k, v = (f(y).view(B, -1, self.heads, C // self.heads).transpose(1, 2)
                   for f, y in ((self.q, h), (self.k, seen), (self.v, seen)))  # fmt: skip
        y = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C))
        return x + y.transpose(1, 2).reshape(B, C, H, W)


class Residual(nn.Module):
    """Two convolutions with the condition [B, E] added between them."""

    def __init__(self, into: int, out: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, into), nn.Conv2d(into, out, 3, padding=1)
        self.condition = nn.Linear(condition, out)
        self.norm2, self.conv2 = nn.GroupNorm(8, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.condition(F.silu(c))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class TinyUNet(nn.Module):
    """Noisy rolls [B, 1, 16, 36], levels [B] and prompts [B, L] to the noise; three self-attention blocks."""

    def __init__(self, narrow: int = 24, wide: int = 64) -> None:
        super().__init__()
        e = wide
        self.tokens = nn.Embedding(TOKENS, e)
        self.time1, self.time2 = nn.Linear(e, e), nn.Linear(e, e)
        self.enter = nn.Conv2d(1, narrow, 3, padding=1)
        self.down1, self.to2 = Residual(narrow, narrow, e), nn.Conv2d(narrow, wide, 3, stride=2, padding=1)
        self.down2, self.attend1 = Residual(wide, wide, e), Attention(wide, e)
        self.to3, self.middle, self.attend2 = (
            nn.Conv2d(wide, wide, 3, stride=2, padding=1),
            Residual(wide, wide, e),
            Attention(wide, e),
        )
        self.up2, self.attend3 = Residual(2 * wide, wide, e), Attention(wide, e)
        self.up1, self.norm, self.leave = (
            Residual(wide + narrow, narrow, e),
            nn.GroupNorm(8, narrow),
            nn.Conv2d(narrow, 1, 3, padding=1),
        )
        nn.init.normal_(self.tokens.weight, std=0.3)
        nn.init.zeros_(self.leave.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        words = self.tokens(prompt)  # [B, L, E]
        e = words.shape[-1]
        angle = t.float()[:, None] * torch.exp(torch.arange(e // 2, device=x.device) * (-math.log(1000.0) / (e // 2)))
        c = self.time2(F.silu(self.time1(torch.cat([angle.sin(), angle.cos()], 1)))) + words.mean(1)
        h1 = self.down1(self.enter(x), c)
        h2 = self.attend1(self.down2(self.to2(h1), c), words)
        h3 = self.attend2(self.middle(self.to3(h2), c), words)
        h = torch.cat([F.interpolate(h3, scale_factor=2.0), h2], 1)
        h = self.attend3(self.up2(h, c), words)
        h = self.up1(torch.cat([F.interpolate(h, scale_factor=2.0), h1], 1), c)
        return self.leave(F.silu(self.norm(h)))


class Denoising:
    """Squared error of the noise, summed over patches (mean over cells)."""

    unit = "patches"

    def count(self, batch: Mapping[str, Any]) -> int:
        return len(batch["x"])

    def loss(self, base: Base, batch: Mapping[str, Any]) -> Tensor:
        z = noised(batch["x"], batch["t"], batch["eps"])
        found = base.model(z, batch["t"], batch["prompt"])
        return F.mse_loss(found, batch["eps"], reduction="none").mean((1, 2, 3)).sum()


@dataclass
class DenoisingTask:
    """Patches with their prompts; every step draws rows, levels and noise anew."""

    patches: Patches
    seed: int
    objective: Denoising

    def __len__(self) -> int:
        return len(self.patches)

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return [torch.randperm(len(self), generator=g)[:batch_size].tolist()]

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        rows = torch.tensor(list(indices))
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + 7 * epoch + 1)
        return drawn(self.patches[rows], g)

    def tokens(self, indices: Sequence[int]) -> int:
        return len(indices)


def drawn(patches: Patches, g: torch.Generator) -> dict[str, Any]:
    """A batch for the loss: a level and noise for every patch."""
    n = len(patches)
    t = torch.randint(LEVELS, (n,), generator=g)
    return {"x": patches.rolls, "t": t, "eps": torch.randn(patches.rolls.shape, generator=g), "prompt": patches.prompts}


def pretrained(songs: Patches, steps: int, batch: int, seed: int, narrow: int = 24, wide: int = 64) -> Base:
    """A U-Net trained on chorales with their prompts (one prompt in ten blank), frozen, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyUNet(narrow, wide)
    base, objective = Base(model, name="tiny-unet"), Denoising()
    g = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        some = songs[torch.randint(len(songs), (batch,), generator=g)]
        blank = torch.rand(batch, 1, generator=g) < 0.1
        one = drawn(Patches(some.rolls, torch.where(blank, NULL, some.prompts)), g)
        loss = objective.loss(base, one) / batch
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    for p in model.parameters():
        p.requires_grad_(False)
    first = drawn(songs[:2], torch.Generator().manual_seed(0))
    example = (noised(first["x"], first["t"], first["eps"]), first["t"], first["prompt"])
    return Base(model.eval(), example=example, name=base.name, family="denoiser")


@torch.no_grad()
def denoising_loss(base: Base, patches: Patches, draws: int, seed: int) -> float:
    """The mean loss over `draws` levels and noises of every patch, the same ones at every call."""
    g = torch.Generator().manual_seed(seed)
    total = 0.0
    with base.evaluating():
        for _ in range(draws):
            for rows in torch.arange(len(patches)).split(100):
                total += float(Denoising().loss(base, drawn(patches[rows], g)))
    return total / (draws * len(patches))


@torch.no_grad()
def sampled(base: Base, prompts: Tensor, steps: int, seed: int) -> Tensor:
    """Rolls for prompts [n, L] by deterministic DDIM over `steps` levels, rounded to -1 and 1."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(len(prompts), 1, STEPS, PITCHES, generator=g)
    levels = torch.linspace(LEVELS - 1, 0, steps).round().long()
    with base.evaluating():
        for i, level in enumerate(levels):
            t = level.expand(len(z))
            a = signal(t)
            eps = base.model(z, t, prompts)
            x = ((z - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
            eps = (z - a.sqrt() * x) / (1 - a).sqrt()
            z = x if i + 1 == steps else noised(x, levels[i + 1].expand(len(z)), eps)
    return torch.where(z > 0, 1.0, -1.0)
