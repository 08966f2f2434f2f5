# SPDX-License-Identifier: Apache-2.0
"""Find what each layer is for by watching one forward pass: roles come from data flow, not from names.

Every tensor carries the set of layers it came from since the last layer. A layer whose output becomes the query of an
attention product is a `q`, one that reads attention's result is an `o`, one whose output passes an activation into
another linear is an `up` (or a `gate` where it multiplies a second one), and the layer that makes the model's output
is the `head`. Works for any module built from torch functions, with fused or written-out attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tunesmith.core.held import is_linear

_ACTIVATIONS = {
    "relu", "relu_", "relu6", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "hardtanh", "hardswish", "mish", "elu",
    "selu", "softplus", "celu", "prelu", "hardsigmoid",
}  # fmt: skip
_PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply", "mul_", "__imul__"}
_MATMULS = {"matmul", "bmm", "__matmul__", "baddbmm", "einsum"}


@dataclass(frozen=True)
class _Tag:
    """Where a tensor came from: layer paths, whether an activation came since, and attention marks."""

    paths: frozenset[str] = frozenset()
    activated: bool = False
    scores: tuple[frozenset[str], frozenset[str]] | None = None
    attended: str | None = None
    gated: bool = False
    behind: frozenset[str] = frozenset()  # every layer the tensor depends on


_EMPTY = _Tag()


@dataclass
class Trace:
    """What one pass showed.

    `attention` maps an attention module to (heads, kv_heads, head_dim, value_dim); `direct` says that the head's product
    is the model's output as it is, with no cap or scale after it; `aside` are layers that ran but do
    not reach the primary output, such as a pooler nobody reads.
    """

    roles: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    attention: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    output_shape: tuple[int, ...] = ()
    head: str | None = None
    direct: bool = False
    aside: frozenset[str] = frozenset()


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _tensors(v)


class _Watcher(TorchFunctionMode):
    def __init__(self, linears: Mapping[str, nn.Module], norms: set[str], stack: list[str]) -> None:
        super().__init__()
        self.linears, self.norms, self.stack = linears, norms, stack
        self.tags: dict[int, tuple[Tensor, _Tag]] = {}
        self.trace = Trace()
        self.last: Any = None  # output of the layer that ran last

    def tag(self, t: Any) -> _Tag:
        return self.tags[id(t)][1] if isinstance(t, Tensor) and id(t) in self.tags else _EMPTY

    def put(self, out: Any, tag: _Tag) -> None:
        for t in _tensors(out):
            self.tags[id(t)] = (t, tag)  # the tensor is kept alive so that its id stays its own

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        # An unusual call shape gives no information; it must never break the pass.
        with suppress(AttributeError, TypeError, IndexError, ValueError):
            self.put(out, self.rule(func, name, args, kwargs))
        return out

    def rule(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> _Tag:
        if func is F.scaled_dot_product_attention:
            q, k, v = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(("query", "key", "value")))
            return self.attend(self.tag(q), self.tag(k), self.tag(v), q, k, v)
        tags = [self.tag(t) for t in _tensors((args, kwargs))]
        if name in _MATMULS and len(tags) >= 2 and not any(isinstance(t, nn.Parameter) for t in _tensors(args)):
            a, b = [t for t in _tensors(args)][-2:]
            left, right = self.tag(a), self.tag(b)
            if left.scores is not None:
                q, k = (_Tag(paths=p, behind=left.behind) for p in left.scores)
                return self.attend(q, k, right, a, None, b)
            if left.paths and right.paths:
                return _Tag(scores=(left.paths, right.paths), behind=left.behind | right.behind)
        behind: frozenset[str] = frozenset().union(*(t.behind for t in tags)) if tags else frozenset()
        paths: frozenset[str] = frozenset().union(*(t.paths for t in tags)) if tags else frozenset()
        activated = any(t.activated for t in tags) or name in _ACTIVATIONS
        scores = next((t.scores for t in tags if t.scores), None)
        attended = next((t.attended for t in tags if t.attended is not None), None)  # "" is the model itself
        gated = any(t.gated for t in tags)
        if name in _PRODUCTS and len(tags) == 2 and tags[0].activated != tags[1].activated:
            on, off = (tags[0], tags[1]) if tags[0].activated else (tags[1], tags[0])
            if len(on.paths) == 1 and len(off.paths) == 1 and on.paths != off.paths:
                self.trace.roles.setdefault(next(iter(on.paths)), "gate")
                self.trace.roles.setdefault(next(iter(off.paths)), "up")
                gated = True
        return _Tag(paths, activated, scores, attended, gated, behind)

    def attend(self, qtag: _Tag, ktag: _Tag, vtag: _Tag, qt: Tensor, kt: Any, vt: Tensor) -> _Tag:
        q, k, v = qtag.paths, ktag.paths, vtag.paths
        fused = q & k & v
        for paths, role in ((fused, "qkv"), (q - fused, "q"), (k - fused, "k"), (v - fused, "v")):
            for p in paths:
                if p in self.linears:
                    self.trace.roles.setdefault(p, role)
        where = self.stack[-1] if self.stack else ""
        if kt is not None and qt.dim() == 4:
            # key-value heads as the projection makes them, before any repetition for grouped queries
            dim, kv = int(qt.shape[-1]), int(kt.shape[1])
            made = {int(m.out_features) for p in k - fused if is_linear(m := self.linears.get(p))}  # type: ignore
            if len(made) == 1 and next(iter(made)) % dim == 0:
                kv = min(kv, next(iter(made)) // dim)
            self.trace.attention[where] = (int(qt.shape[1]), kv, dim, int(vt.shape[-1]))
        return _Tag(attended=where, behind=qtag.behind | ktag.behind | vtag.behind)

    def leaf(self, path: str, x: Any, out: Any) -> None:
        """After a layer ran: read its input's tag, set its output's."""
        before = self.tag(x)
        behind = before.behind.union({path}, *(self.tag(t).behind for t in _tensors(out)))
        if path in self.norms:
            one = len(before.paths) == 1 and not before.activated
            self.put(out, _Tag(before.paths if one else frozenset({path}), attended=before.attended, behind=behind))
            return
        if before.attended is not None:
            self.trace.roles.setdefault(path, "o")
        elif before.gated:
            self.trace.roles.setdefault(path, "down")
        elif before.activated and len(before.paths) == 1:
            up = next(iter(before.paths))
            if up in self.linears and up != path and self.trace.roles.get(up) in (None, "up"):
                self.trace.roles.setdefault(up, "up")
                self.trace.roles.setdefault(path, "down")
        self.last = out
        self.put(out, _Tag(frozenset({path}), behind=behind))


def primary(output: Any) -> Tensor | None:
    """The tensor a model is used for: logits, else the last hidden state, else the first tensor."""
    for key in ("logits", "last_hidden_state"):
        found = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(found, Tensor):
            return found
    return next(iter(_tensors(output if not hasattr(output, "to_tuple") else output.to_tuple())), None)


@torch.no_grad()
def trace(
    model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...], linears: Iterable[str], norms: Iterable[str]
) -> Trace:
    """Run `model` once on `inputs` and say what each layer is for.

    `linears` are the paths of linear, convolution and embedding modules, `norms` those of normalisation modules. The
    model is put in eval mode for the pass and back afterwards; hooks are removed. Raises what the forward pass raises.
    """
    modules = dict(model.named_modules())
    linear = {p: modules[p] for p in linears}
    norm = set(norms)
    stack: list[str] = []
    watcher = _Watcher(linear, norm, stack)
    handles, training = [], {p: m.training for p, m in modules.items()}

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: stack.append(path)

    def leave(path: str) -> Callable[..., None]:
        def hook(_m: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            stack.pop()
            watcher.trace.order.append(path)
            if path in linear or path in norm:
                watcher.leaf(path, next(iter(_tensors((args, kwargs))), None), out)

        return hook

    for path, module in modules.items():
        handles.append(module.register_forward_pre_hook(enter(path)))
        handles.append(module.register_forward_hook(leave(path), with_kwargs=True))
    model.eval()
    try:
        with watcher:
            out = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    finally:
        for h in handles:
            h.remove()
        for p, m in modules.items():
            m.training = training[p]
    found, main = watcher.trace, primary(out)
    if main is not None:
        found.output_shape = tuple(main.shape)
        paths, reached = watcher.tag(main).paths, watcher.tag(main).behind
        found.aside = (
            frozenset(p for p in found.order if p in linear or p in norm) - reached if reached else frozenset()
        )
        only = next(iter(paths)) if len(paths) == 1 else None
        if only in linear and is_linear(modules[only]) and not watcher.tag(main).activated:
            found.head = only
            found.roles[only] = "head"
            found.direct = main is watcher.last
    return found
