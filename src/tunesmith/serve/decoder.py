# SPDX-License-Identifier: Apache-2.0
"""A Llama-type decoder found by structure, run over flat tokens of many requests at once.

The model's own modules hold the weights; this is another order of the same products, with a paged cache and with the
deltas of each span of tokens beside the frozen layers:

    h <- h + o(attend(rope(q(n1(h))), rope(k(n1(h))), v(n1(h))))
    h <- h + down(act(gate(n2(h))) * up(n2(h)))
    logits = head(n(h))

Nothing is taken on trust: `Decoder.find` compares with the model's own forward pass and refuses a model that computes
anything else.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.sites import Site
from tunesmith.serve.cache import Cache, Span, View
from tunesmith.serve.mixed import Mixture

# The largest gap to the model's own logits, over their largest magnitude: rounding in another order of summing.
GAP = {torch.float32: 1e-4, torch.float64: 1e-9}
HALF_GAP = 4e-2


@dataclass(frozen=True)
class Layer:
    """The paths of one block's layers."""

    norm1: str
    q: str
    k: str
    v: str
    o: str
    norm2: str
    gate: str
    up: str
    down: str


class Decoder:
    """The forward pass of a base whose structure is that of Llama. Made by `find`."""

    def __init__(self, base: Base, layers: list[Layer], embed: str, norm: str, head: str, rope: nn.Module) -> None:
        self.base, self.layers = base, layers
        self.embed, self.norm, self.head, self.rope = embed, norm, head, rope
        heads = base.sites.of(layers[0].q.rpartition(".")[0], "attention").heads
        if heads is None:
            raise UsageError("the size of its attention heads is not known", where=base.name)
        self.heads, self.kv_heads, self.head_dim, _ = heads
        self.act = _activation(base, layers[0])
        self.paths = {embed, norm, head, *(p for one in layers for p in vars(one).values())}
        # A module's own forward, also while a dispatcher sits on the instance.
        self.own = {p: types.MethodType(type(base.modules[p]).forward, base.modules[p]) for p in self.paths}

    @classmethod
    def find(cls, base: Base) -> Decoder:
        """The decoder of a base. Raises UsageError that says what about the base is different."""
        made = cls._by_structure(base)
        made._prove()
        return made

    @classmethod
    def _by_structure(cls, base: Base) -> Decoder:
        if base.family != "causal-lm":
            raise UsageError(f"a {base.family} is no decoder of text", where=base.name)
        blocks = [s.path for s in base.sites.all() if s.kind == "block"]
        if not blocks:
            raise UsageError("it has no repeated blocks", where=base.name)
        layers = [_layer(base, path) for path in blocks]
        inside = tuple(f"{b}." for b in blocks)
        norms = [s.path for s in base.sites.all() if s.kind == "norm" and not s.path.startswith(inside)]
        heads, embeds = base.sites.role("head"), [s for s in base.sites.all() if s.kind == "embedding"]
        ropes = [m for m in base.modules.values() if "inv_freq" in m._buffers]
        for what, found in (
            ("final norm", norms),
            ("output head", heads),
            ("embedding", embeds),
            ("rotary table", ropes),
        ):
            if len(found) != 1:
                raise UsageError(f"it has {len(found)} of what a Llama has one: {what}", where=base.name)
        return cls(base, layers, embeds[0].path, norms[0], heads[0].path, ropes[0])

    @torch.no_grad()
    def _prove(self) -> None:
        """Raise UsageError where the model's own forward pass gives other logits."""
        ids = self.base.probe()["input_ids"][:1].to(self.base.device)  # type: ignore[index,call-overload]
        want = self.base.probe_outputs()[:1].float()
        n = ids.shape[1]
        cache = Cache(len(self.layers), n, self.kv_heads * self.head_dim, self.base.dtype, self.base.device)
        with self.base.evaluating():
            h = self(ids[0], cache.view([Span(torch.arange(n), 0, n)]), Mixture.none(n))
            got = self.logits(h, Mixture.none(n)).float()
        gap = float((got - want[0]).abs().max()) / max(1e-6, float(want.abs().max()))
        if not gap <= GAP.get(self.base.dtype, HALF_GAP):
            raise UsageError(f"run as a Llama its logits differ by {gap:.1e} of their size", where=self.base.name)

    def __call__(self, tokens: Tensor, view: View, mix: Mixture) -> Tensor:
        """Hidden states [N, d] of flat tokens [N], whose keys and values are written to the cache on the way."""
        h = self._run(self.embed, tokens, mix)
        cos, sin = self.rope(h[None], view.positions[None])
        cos, sin = cos[0][:, None], sin[0][:, None]  # [N, 1, head_dim]
        for i, at in enumerate(self.layers):
            x = self._run(at.norm1, h, mix)
            q = self._run(at.q, x, mix).view(-1, self.heads, self.head_dim)
            k = self._run(at.k, x, mix).view(-1, self.kv_heads, self.head_dim)
            v = self._run(at.v, x, mix)
            view.write(i, _rotated(k, cos, sin).flatten(1), v)
            y = view.attend(i, _rotated(q, cos, sin), self.kv_heads)
            h = h + self._run(at.o, y.flatten(1), mix)
            x = self._run(at.norm2, h, mix)
            h = h + self._run(at.down, self.act(self._run(at.gate, x, mix)) * self._run(at.up, x, mix), mix)
        return h

    def logits(self, h: Tensor, mix: Mixture) -> Tensor:
        """Logits [n, V] of hidden states [n, d]; `mix` says whose they are."""
        return self._run(self.head, self._run(self.norm, h, mix), mix)

    def _run(self, path: str, x: Tensor, mix: Mixture) -> Tensor:
        return mix.add(path, x, self.own[path](x), self.own[path])


def _layer(base: Base, block: str) -> Layer:
    """The layers of a block by role. Raises UsageError for a block that is built in another way."""
    inside = [s for s in base.sites.all() if s.path.startswith(f"{block}.")]
    roles: dict[str, list[Site]] = {}
    for s in inside:
        roles.setdefault("norm" if s.kind == "norm" else s.role, []).append(s)
    wanted = ("q", "k", "v", "o", "gate", "up", "down")
    for role in wanted:
        found = roles.get(role, [])
        if len(found) != 1 or found[0].kind != "linear" or found[0].transposed:
            raise UsageError(f"it has {len(found)} linear layers with the role {role!r}", where=block)
    norms = roles.get("norm", [])
    others = [
        s.path for s in inside if s.kind in ("embedding", "conv1d", "conv2d") or (s.kind == "linear" and not s.role)
    ]
    if len(norms) != 2 or others:
        raise UsageError(f"it has {len(norms)} norms and {len(others)} layers without a role", where=block)
    return Layer(
        norms[0].path, *(roles[r][0].path for r in wanted[:4]), norms[1].path, *(roles[r][0].path for r in wanted[4:])
    )


def _activation(base: Base, layer: Layer) -> Callable[[Tensor], Tensor]:
    """The function between gate and down: a module beside them, or the one the configuration names."""
    mlp: Any = base.modules[layer.gate.rpartition(".")[0]]
    found = [f for name, f in vars(mlp).items() if name.startswith("act") and callable(f)]
    found += [m for name, m in mlp._modules.items() if name.startswith("act") and not any(True for _ in m.parameters())]
    if len(found) != 1:
        raise UsageError(f"its activation cannot be told ({len(found)} candidates)", where=layer.gate)
    act: Callable[[Tensor], Tensor] = found[0]
    return act


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [N, heads, head_dim], halves rotated against each other."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin
