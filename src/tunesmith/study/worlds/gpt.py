# SPDX-License-Identifier: Apache-2.0
"""A small causal transformer for studies on made-up sequences, of tokens or of vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """Causal self-attention over [B, T, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = (f(x).view(B, T, self.heads, d // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(B, T, d))


class CausalBlock(nn.Module):
    """Pre-norm attention and a GELU MLP of 4 times the width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), CausalAttention(dim, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyGPT(nn.Module):
    """Tokens [B, T] int64, or vectors [B, T, read] with `read`, to [B, T, out]; learned positions, pre-norm blocks."""

    def __init__(
        self,
        out: int,
        *,
        vocab: int = 0,
        read: int = 0,
        dim: int = 64,
        depth: int = 3,
        heads: int = 4,
        length: int = 40,
    ) -> None:
        super().__init__()
        self.enter: nn.Module = nn.Embedding(vocab, dim) if vocab else nn.Linear(read, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, length, dim))
        self.blocks = nn.ModuleList([CausalBlock(dim, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, out)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02 if vocab else (3 * m.in_features) ** -0.5)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x) + self.position[:, : x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))
