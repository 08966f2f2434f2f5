# SPDX-License-Identifier: Apache-2.0
"""A Llama-type decoder found by structure, run over flat tokens of many requests at once.

The model's own modules say what is computed; this is another order of the same products, with a paged cache and with the
deltas of each span of tokens beside the frozen layers. What reads one input is one product (`products`):

    h <- h + o(attend(rope(q(n1(h))), rope(k(n1(h))), v(n1(h))))
    h <- h + down(act(gate(n2(h))) * up(n2(h)))
    logits = head(n(h))

Nothing is taken on trust: `Decoder.find` compares with the model's own forward pass and refuses a model that computes
anything else.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.sites import Site
from tunesmith.serve.cache import Cache, Span, View
from tunesmith.serve.mixed import Mixture
from tunesmith.serve.products import Product, choose

# The largest gap to the model's own logits, over their largest magnitude: rounding in another order of summing.
GAP = {torch.float32: 1e-4, torch.float64: 1e-9}
# In half precision the order of rounding matters more than that: the structure is proved with the model's own roundings,
# and the quick form, which rounds less often, is held against the model with room for all it rounds.
HALF_GAP, QUICK_HALF_GAP = 4e-2, 0.25
# The gap between a norm's module and the single operation, over the largest output: one rounding of the dtype.
NORM_GAP = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


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

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The paths of its products, in the order in which they run."""
        return (self.q, self.k, self.v), (self.o,), (self.gate, self.up), (self.down,)


class Decoder:
    """The forward pass of a base whose structure is that of Llama. Made by `find`."""

    def __init__(
        self, base: Base, layers: list[Layer], embed: str, norm: str, head: str, rope: nn.Module, exact: bool = False
    ) -> None:  # fmt: skip
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
        self.groups = [g for one in layers for g in one.groups]
        # Exact: every product by its own module and every rounding where the model has it.
        self.form = "own" if exact else choose([base.modules[p] for g in (*self.groups, (head,)) for p in g])
        self._exact = exact
        self._blocks = [
            (self._norm(one.norm1), self._norm(one.norm2), *(self.product(g) for g in one.groups)) for one in layers
        ]
        self._last, self._embed, self._head = self._norm(norm), self._alone(embed), self.product((head,))

    def product(self, paths: tuple[str, ...], changes: Mapping[str, Tensor] | None = None) -> Product:
        """The product of the layers at `paths`, with `changes` added to copies of their weights."""
        widths = [self.base.sites.of(p, "linear").shape[0] for p in paths]
        changed = {p: c for p, c in (changes or {}).items() if p in paths}
        return Product({p: self.base.modules[p] for p in paths}, self.own, widths, self.form, changed)

    def _alone(self, path: str) -> Product:
        return Product({path: self.base.modules[path]}, self.own)

    def _norm(self, path: str) -> Product:
        """A norm; as one operation where its module is found to compute just that."""
        made, module = self._alone(path), self.base.modules[path]
        if self._exact:
            return made
        weight: Any = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, Tensor) or not isinstance(eps, float) or getattr(module, "bias", None) is not None:
            return made
        x = 3 * torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
        quick = partial(F.rms_norm, normalized_shape=(len(weight),), weight=weight.detach(), eps=eps)
        with torch.no_grad():
            want = self.own[path](x).float()
            gap = float((quick(x).float() - want).abs().max())
        if gap <= NORM_GAP.get(weight.dtype, 0.0) * float(want.abs().max()):
            made.call = quick
        return made

    @classmethod
    def find(cls, base: Base) -> Decoder:
        """The decoder of a base. Raises UsageError that says what about the base is different."""
        gap = GAP.get(base.dtype)
        if gap is None:
            cls._by_structure(base, exact=True)._prove(HALF_GAP)
        made = cls._by_structure(base)
        made._prove(QUICK_HALF_GAP if gap is None else gap)
        return made

    @classmethod
    def _by_structure(cls, base: Base, *, exact: bool = False) -> Decoder:
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
        return cls(base, layers, embeds[0].path, norms[0], heads[0].path, ropes[0], exact)

    @torch.no_grad()
    def _prove(self, allowed: float) -> None:
        """Raise UsageError where the model's own forward pass gives other logits."""
        ids = self.base.probe()["input_ids"][:1].to(self.base.device)  # type: ignore[index,call-overload]
        want = self.base.probe_outputs()[:1].float()
        n = ids.shape[1]
        cache = self.cache(n)
        with self.base.evaluating():
            h = self(ids[0], cache.view([Span(torch.arange(n), 0, n)]), Mixture.none(n))
            got = self.logits(h, Mixture.none(n)).float()
        gap = float((got - want[0]).abs().max()) / max(1e-6, float(want.abs().max()))
        if not gap <= allowed:
            raise UsageError(f"run as a Llama its logits differ by {gap:.1e} of their size", where=self.base.name)

    def cache(self, cells: int) -> Cache:
        """Room for the keys and values of `cells` tokens."""
        return Cache(len(self.layers), cells, self.kv_heads, self.head_dim, self.base.dtype, self.base.device)

    def __call__(self, tokens: Tensor, view: View, mix: Mixture) -> Tensor:
        """Hidden states [N, d] of flat tokens [N], whose keys and values are written to the cache on the way."""
        h = _run(self._embed, tokens, mix)
        cos, sin = self.rope(h[None], view.positions[None])
        cos, sin = cos[0][:, None], sin[0][:, None]  # [N, 1, head_dim]
        turned, rotate = self.heads + self.kv_heads, _rotate_exactly if self._exact else _rotate
        for i, (norm1, norm2, qkv, o, gate_up, down) in enumerate(self._blocks):
            y = _run(qkv, _run(norm1, h, mix), mix).view(len(h), -1, self.head_dim)  # [N, heads + 2 kv_heads, head_dim]
            rotate(y[:, :turned], cos, sin)
            view.write(i, y[:, self.heads :])
            h = h + _run(o, view.attend(i, y[:, : self.heads]), mix)
            gate, up = _run(gate_up, _run(norm2, h, mix), mix).chunk(2, -1)
            h = h + _run(down, self.act(gate) * up, mix)
        return h

    def logits(self, h: Tensor, mix: Mixture) -> Tensor:
        """Logits [n, V] of hidden states [n, d]; `mix` says whose they are."""
        return _run(self._head, _run(self._last, h, mix), mix)


def _run(product: Product, x: Tensor, mix: Mixture) -> Tensor:
    return mix.add(product.paths, x, mix.product(product, x), product)


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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary positions on x [N, heads, head_dim], in place, halves rotated against each other."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    x.copy_(turned)


def _rotate_exactly(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The same with the roundings of the models in transformers."""
    a, b = x.chunk(2, -1)
    x.copy_(x * cos + torch.cat([-b, a], -1) * sin)
