# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer for studies on little pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention over [B, T, dim] with query, key, value and output layers of their own; `causal` looks back only."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = (f(x).view(B, T, self.heads, d // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(y.transpose(1, 2).reshape(B, T, d))


class Block(nn.Module):
    """Pre-norm attention and a GELU MLP of 4 times the width."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, causal)
        self.norm2, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyViT(nn.Module):
    """Pictures [B, channels, image, image] to [B, out]: patches, a class token, learned positions, pre-norm blocks.

    With `out=0` there is no last layer and the normed class token [B, dim] is given. Linear layers start from a normal
    of standard deviation 0.02 and zero biases, as ViT's do. With `mean` there is no class token but the mean over patches,
    and standard deviations are 1 / sqrt(inputs): it learns several times as fast from few pictures.
    """

    def __init__(
        self,
        image: int = 32,
        patch: int = 4,
        dim: int = 192,
        depth: int = 6,
        heads: int = 3,
        channels: int = 3,
        out: int = 0,
        mean: bool = False,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, dim, patch, stride=patch)
        self.token = None if mean else nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + (not mean), dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out) if out else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features**-0.5 if mean else 0.02)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)  # [B, T, dim]
        if self.token is not None:
            h = torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        h = h + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1) if self.token is None else self.norm(h[:, 0]))
