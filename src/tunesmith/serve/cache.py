# SPDX-License-Identifier: Apache-2.0
"""Keys and values of cached tokens in cells, and how a batch of requests reads and writes them.

Cells need not be neighbours: a request's cache is a list of cell numbers in the order of its tokens. A `View` lays out
one forward pass: flat tokens span by span, where their keys go, and what each attends to. Single tokens (decoding) are
attended to together, padded to the longest cache; longer spans (reading a prompt, or a chunk of it) one by one.

A head's vectors lie beside each other, so one gather brings keys and values of a batch in the order in which batched
products read them, without another copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    """The key and value buffers of every layer, as `buffer` [layers, 2 * kv_heads, cells, head_dim], keys first."""

    def __init__(
        self, layers: int, cells: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.buffer = torch.zeros(layers, 2 * kv_heads, cells, head_dim, dtype=dtype, device=device)
        self.kv_heads, self.cells = kv_heads, cells
        self.flat = [b.view(-1, head_dim) for b in self.buffer]  # [2 * kv_heads * cells, head_dim] a layer
        self.starts = (torch.arange(2 * kv_heads) * cells)[:, None]  # of the heads in it

    @property
    def nbytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()

    def at(self, cells: Tensor) -> Tensor:
        """Where cells [n] of every head lie in `flat`: [2 * kv_heads * n], head by head."""
        return (self.starts + cells).flatten().to(self.buffer.device)

    def view(self, spans: Sequence[Span]) -> View:
        """The layout of one pass over the spans' new tokens, in this order."""
        return View(self, spans)


class View:
    """One pass over a cache. `positions` [N] are those of the flat new tokens."""

    def __init__(self, cache: Cache, spans: Sequence[Span]) -> None:
        self.cache = cache
        buffer = cache.buffer
        self.positions = torch.cat([torch.arange(s.old, s.old + s.new) for s in spans]).to(buffer.device)
        self._written = cache.at(torch.cat([s.cells[s.old :] for s in spans]))
        starts = [0]
        for s in spans:
            starts.append(starts[-1] + s.new)
        self._long = [(s, starts[i], cache.at(s.cells)) for i, s in enumerate(spans) if s.new > 1]
        single = [(s, starts[i]) for i, s in enumerate(spans) if s.new == 1]
        self._rows = len(single)
        self._single: Tensor | None = None  # None: the single tokens are all there is, in order
        if not single:
            return
        if self._long:
            self._single = torch.tensor([at for _, at in single], device=buffer.device)
        cells = pad_sequence([s.cells for s, _ in single], batch_first=True)  # [B, S]
        lengths = torch.tensor([len(s.cells) for s, _ in single])
        hidden = torch.arange(cells.shape[1]) >= lengths[:, None]
        self._read = cache.at(cells.flatten())
        # A weight for every pair of head and request, as batched products want it: [kv_heads * B, 1, S].
        self._bias: Tensor | None = None
        if bool(hidden.any()):
            bias = torch.zeros(hidden.shape, dtype=buffer.dtype).masked_fill_(hidden, float("-inf"))
            self._bias = bias.repeat(cache.kv_heads, 1)[:, None].to(buffer.device)
        self._got = buffer.new_empty(len(self._read), buffer.shape[-1])

    def write(self, layer: int, kv: Tensor) -> None:
        """Put keys and values [N, 2 * kv_heads, head_dim] of the new tokens, keys first, into their cells."""
        flat = self.cache.flat[layer]
        flat.index_copy_(0, self._written, kv.transpose(0, 1).reshape(-1, kv.shape[-1]).to(flat.dtype))

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention output [N, heads * head_dim] of queries [N, heads, head_dim], each over its request up to itself."""
        if not self._long:
            return self._together(layer, q)
        out = torch.empty_like(q).flatten(1)
        if self._single is not None and self._rows:
            out[self._single] = self._together(layer, q[self._single])
        for s, at, where in self._long:
            kv = self.cache.flat[layer].index_select(0, where).view(2, 1, self.cache.kv_heads, -1, q.shape[-1])
            k, v = kv.to(q.dtype)
            mask = None
            if s.old:  # new token i sees the old ones and the new up to itself
                mask = torch.ones(s.new, s.old + s.new, dtype=torch.bool, device=q.device).tril(s.old)
            part = q[at : at + s.new].transpose(0, 1)[None]
            grouped = q.shape[1] != self.cache.kv_heads
            y = F.scaled_dot_product_attention(part, k, v, attn_mask=mask, is_causal=not s.old, enable_gqa=grouped)
            out[at : at + s.new] = y[0].transpose(0, 1).flatten(1)
        return out

    def _together(self, layer: int, q: Tensor) -> Tensor:
        """The same for one token of each of B requests: two batched products over what one gather brought."""
        n, heads, d = q.shape
        h = self.cache.kv_heads
        kv = torch.index_select(self.cache.flat[layer], 0, self._read, out=self._got).to(q.dtype)
        k, v = kv.view(2, h * n, -1, d)  # [h * B, S, d]
        rows = (q * d**-0.5).view(n, h, heads // h, d).transpose(0, 1).reshape(h * n, heads // h, d)
        scores = torch.bmm(rows, k.transpose(1, 2))
        if self._bias is not None:
            scores = scores.add_(self._bias)
        y = torch.bmm(scores.softmax(-1), v)  # [h * B, heads / h, d]
        return y.view(h, n, heads // h, d).transpose(0, 1).reshape(n, heads * d)
