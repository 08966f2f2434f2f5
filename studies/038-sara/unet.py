# SPDX-License-Identifier: Apache-2.0
"""A small class-conditional U-Net for 28x28 pictures, and the diffusion it is trained for (DDPM, noise prediction)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 1000


class Block(nn.Module):
    """Two convolutions round the time and class embedding [B, emb], with a residual path."""

    def __init__(self, into: int, out: int, emb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, into), nn.Conv2d(into, out, 3, padding=1)
        self.emb, self.norm2 = nn.Linear(emb, out), nn.GroupNorm(8, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Identity() if into == out else nn.Conv2d(into, out, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(e)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention over the positions of a map [B, C, H, W], 4 heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)  # [B, H W, C]
        q, k, v = (f(h).view(B, H * W, 4, C // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        return x + self.o(y).transpose(1, 2).reshape(B, C, H, W)


class UNet(nn.Module):
    """Noise prediction for x [B, 1, 28, 28] at times t [B] with class ids y [B]; maps of 28, 14 and 7."""

    def __init__(self, widths: tuple[int, int, int] = (16, 40, 128), emb: int = 128, classes: int = 9) -> None:
        super().__init__()
        a, b, c = widths
        self.emb = emb
        self.time1, self.time2, self.classes = nn.Linear(emb, emb), nn.Linear(emb, emb), nn.Embedding(classes, emb)
        self.into = nn.Conv2d(1, a, 3, padding=1)
        self.down1, self.to14 = Block(a, a, emb), nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.down2, self.to7 = Block(b, b, emb), nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.mid1, self.attention, self.mid2 = Block(c, c, emb), Attention(c), Block(c, c, emb)
        self.from7, self.up2 = nn.Conv2d(c, b, 1), Block(2 * b, b, emb)
        self.from14, self.up1 = nn.Conv2d(b, a, 1), Block(2 * a, a, emb)
        self.norm, self.out = nn.GroupNorm(8, a), nn.Conv2d(a, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        e = self.time2(F.silu(self.time1(waves(t, self.emb)))) + self.classes(y)
        e = F.silu(e)
        h1 = self.down1(self.into(x), e)
        h2 = self.down2(self.to14(h1), e)
        h = self.mid2(self.attention(self.mid1(self.to7(h2), e)), e)
        h = self.up2(torch.cat([F.interpolate(self.from7(h), scale_factor=2), h2], 1), e)
        h = self.up1(torch.cat([F.interpolate(self.from14(h), scale_factor=2), h1], 1), e)
        return self.out(F.silu(self.norm(h)))


def waves(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of the time [B] at falling frequencies, [B, width]."""
    f = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t.float()[:, None] * f
    return torch.cat([angles.sin(), angles.cos()], 1)


def kept_signal() -> Tensor:
    """alpha-bar [STEPS] of the cosine schedule (Nichol and Dhariwal 2021)."""
    s = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    return (f[1:] / f[0]).clamp(1e-4, 0.9999).float()


def noised(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """sqrt(alpha-bar_t) x + sqrt(1 - alpha-bar_t) noise."""
    keep = kept_signal()[t].view(-1, 1, 1, 1)
    return keep.sqrt() * x + (1 - keep).sqrt() * noise


@torch.no_grad()
def sample(model: nn.Module, y: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Pictures [n, 1, 28, 28] of the classes y by deterministic DDIM steps (Song et al. 2020)."""
    keep = kept_signal()
    x = torch.randn(len(y), 1, 28, 28, generator=generator)
    times = torch.linspace(STEPS - 1, 0, steps + 1).round().long().tolist()
    for now, then in pairwise(times):
        noise = model(x, torch.full((len(y),), now), y).float()
        clean = ((x - (1 - keep[now]).sqrt() * noise) / keep[now].sqrt()).clamp(-1, 1)
        x = keep[then].sqrt() * clean + (1 - keep[then]).sqrt() * noise
    return x.clamp(-1, 1)
