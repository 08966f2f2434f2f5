# SPDX-License-Identifier: Apache-2.0
"""A small causal transformer for studies on made-up sequences, of tokens or of vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.study.worlds.vit import Block


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
        self.blocks = nn.ModuleList([Block(dim, heads, causal=True) for _ in range(depth)])
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
