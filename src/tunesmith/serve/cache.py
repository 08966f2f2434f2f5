# SPDX-License-Identifier: Apache-2.0
"""Keys and values of cached tokens in cells, and how a batch of requests reads and writes them.

Cells need not be neighbours: a request's cache is a list of cell numbers in the order of its tokens. A `View` lays out
one forward pass: flat tokens span by span, where their keys go, and what each attends to. Single tokens (decoding) are
attended to together, padded to the longest cache; longer spans (reading a prompt, or a chunk of it) one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import UsageError


@dataclass(frozen=True)
class Span:
    """New tokens of one request: `cells` of all its tokens, old and new; the first `old` are cached already."""

    cells: Tensor
    old: int
    new: int

    def __post_init__(self) -> None:
        if self.new < 1 or self.old < 0 or len(self.cells) != self.old + self.new:
            raise UsageError(f"{len(self.cells)} cells for {self.old} cached and {self.new} new tokens")


class Cache:
    """The two buffers of every layer: `keys` and `values` [layers, cells, width]."""

    def __init__(self, layers: int, cells: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(layers, cells, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def view(self, spans: Sequence[Span]) -> View:
        """The layout of one pass over the spans' new tokens, in this order."""
        return View(self, spans)


class View:
    """One pass over a cache. `positions` [N] are those of the flat new tokens."""

    def __init__(self, cache: Cache, spans: Sequence[Span]) -> None:
        self.cache, self.spans = cache, spans
        device = cache.keys.device
        self.positions = torch.cat([torch.arange(s.old, s.old + s.new) for s in spans]).to(device)
        self.written = torch.cat([s.cells[s.old :] for s in spans]).to(device)  # [N]
        starts = [0]
        for s in spans:
            starts.append(starts[-1] + s.new)
        self.long = [(s, starts[i]) for i, s in enumerate(spans) if s.new > 1]
        single = [(s, starts[i]) for i, s in enumerate(spans) if s.new == 1]
        self.single = torch.tensor([at for _, at in single], device=device)
        if single:
            most = max(len(s.cells) for s, _ in single)
            self.read = torch.stack([F.pad(s.cells, (0, most - len(s.cells))) for s, _ in single]).to(device)  # [B, S]
            lengths = torch.tensor([len(s.cells) for s, _ in single], device=device)
            seen = torch.arange(most, device=device) < lengths[:, None]
            self.mask = None if bool(seen.all()) else seen[:, None, None]  # [B, 1, 1, S]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put keys and values [N, width] of the new tokens into their cells."""
        self.cache.keys[layer].index_copy_(0, self.written, k.to(self.cache.keys.dtype))
        self.cache.values[layer].index_copy_(0, self.written, v.to(self.cache.values.dtype))

    def attend(self, layer: int, q: Tensor, kv_heads: int) -> Tensor:
        """Attention output [N, heads, head_dim] of queries of that shape, each over its request's tokens up to itself."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        out = torch.empty_like(q)
        grouped = q.shape[1] != kv_heads
        if len(self.single):
            k, v = (t[self.read].unflatten(-1, (kv_heads, -1)).transpose(1, 2) for t in (keys, values))  # [B, h, S, d]
            y = F.scaled_dot_product_attention(
                q[self.single][:, :, None], k.to(q.dtype), v.to(q.dtype), attn_mask=self.mask, enable_gqa=grouped
            )
            out[self.single] = y[:, :, 0]
        for s, at in self.long:
            k, v = (t[s.cells].unflatten(-1, (kv_heads, -1)).transpose(0, 1)[None].to(q.dtype) for t in (keys, values))
            mask = None
            if s.old:  # new token i sees the old ones and the new up to itself
                mask = torch.ones(s.new, s.old + s.new, dtype=torch.bool, device=q.device).tril(s.old)
            part = q[at : at + s.new].transpose(0, 1)[None]
            y = F.scaled_dot_product_attention(part, k, v, attn_mask=mask, is_causal=not s.old, enable_gqa=grouped)
            out[at : at + s.new] = y[0].transpose(0, 1)
        return out
