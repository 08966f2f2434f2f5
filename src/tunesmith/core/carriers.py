# SPDX-License-Identifier: Apache-2.0
"""How a delta acts: the five carriers wrap the forward of one module of the base.

Each carrier takes the continuation `call` (the module as the parts before it left it) and returns a new one. Weight
parts act first, on the module's parameters; the others then act on its inputs and outputs in the order of the list.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tunesmith.core import fused
from tunesmith.core.algebra import Dense, Update, apply_dense, wide
from tunesmith.core.delta import Part
from tunesmith.core.errors import UsageError
from tunesmith.core.method import CARRIERS
from tunesmith.core.sites import Site

Strength = float | Tensor
Call = Callable[..., Any]
MEMO: ContextVar[dict[int, dict[str, Any]] | None] = ContextVar("tunesmith_memo", default=None)


@dataclass(frozen=True)
class Action:
    """One part acting at one site at a strength (a number, or a tensor [batch] or [batch, tokens])."""

    part: Part
    site: Site
    strength: Strength = 1.0

    @property
    def carrier(self) -> str:
        return self.part.info.carrier

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.part.tensors(self.site.path)

    @property
    def full(self) -> bool:
        return not isinstance(self.strength, Tensor) and self.strength == 1.0

    def number(self) -> float:
        if isinstance(self.strength, Tensor):
            raise UsageError(f"{self.part.info.name} cannot take a strength per row", where=self.site.path)
        return self.strength


@dataclass
class Attention:
    """The arguments of one scaled dot product: query [B, H, T, d], key and value [B, H or H_kv, S, d], mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def explicit_mask(self) -> Tensor | None:
        """The mask with `is_causal` written out, boolean or additive; None when everything is seen."""
        if not self.is_causal:
            return self.mask
        T, S = self.query.shape[-2], self.key.shape[-2]
        causal = torch.ones(T, S, dtype=torch.bool, device=self.query.device).tril()
        if self.mask is None:
            return causal
        return self.mask & causal if self.mask.dtype == torch.bool else self.mask.masked_fill(~causal, float("-inf"))


def run(actions: list[Action], original: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's forward with all actions on it."""
    weights = [a for a in actions if a.carrier == "weight"]
    call: Call = original
    if weights:
        call = _Weight(weights, original)
    for a in actions:
        if a.carrier != "weight":
            call = _WRAP[a.carrier](a, call)
    return call(*args, **kwargs)


def order(actions: list[Action]) -> list[Action]:
    """Stable order of effect at one site: by carrier, then as stacked."""
    return sorted(actions, key=lambda a: CARRIERS.index(a.carrier))


def folded(actions: list[Action], params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The module's parameters (canonical orientation) after the weight parts and mergeable others, in order.

    Values are computed in fp32 or wider; the caller casts them back. Raises UsageError for a part that cannot merge.
    """
    for a in actions:
        method, t = a.part.method, a.tensors
        if a.carrier == "weight" and hasattr(method, "update"):
            update = method.update(a.site, t)
            change = update.dense().to(params["weight"].device) * a.number()
            params = {**params, "weight": wide(params["weight"]) + change}
            continue
        rewrite = getattr(method, "rewrite", None) or getattr(method, "merge", None)
        if rewrite is None or not a.part.info.mergeable:
            raise UsageError(f"{a.part.info.name} cannot be merged: {a.part.info.merge}", where=a.site.path)
        before = {k: wide(v) if v.is_floating_point() else v for k, v in params.items()}
        after = rewrite(a.site, t, before)
        if not a.full:
            s = a.number()
            after = {k: v if v is before.get(k) else _blend(before.get(k), v, s) for k, v in after.items()}
        params = after
    return params


def _blend(old: Tensor | None, new: Tensor, s: float) -> Tensor:
    if not new.is_floating_point():
        raise UsageError("an integer entry cannot be scaled; use strength 0 or 1")
    return new * s if old is None else old + s * (new - old)


_NARROW = (torch.bfloat16, torch.float16)
_LIVE = (nn.Linear.forward, nn.Embedding.forward, nn.Conv1d.forward, nn.Conv2d.forward)


class _Weight:
    """Additive parts beside the frozen product where possible, else the product with rewritten parameters."""

    def __init__(self, actions: list[Action], original: Call) -> None:
        self.actions, self.original = actions, original
        site = actions[0].site
        plain = type(site.module).forward in _LIVE or site.transposed or site.held
        self.live = plain and all(_live_on(a.part.method, site) for a in actions)
        self.apart = plain and any("weight" in touched(a) for a in actions)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.live:
            return self.rewritten(*args, **kwargs)
        x, put = first_tensor(args, kwargs)
        a = self.actions[0]
        only = a.part.method.update(a.site, a.tensors) if len(self.actions) == 1 and _adds(a) else None
        if only is not None and a.full and self.bare() and fused.fits(a.site.module, only):
            return fused.beside(x, a.site.module, only)

        def original(new: Tensor) -> Tensor:
            again_args, again_kwargs = put(new)
            return self.original(*again_args, **again_kwargs)

        if only is not None:
            return _plus(original(x), a, only, x)
        # Runs of additive parts share one pass; a part with a live form wraps all that came before it.
        call: Callable[[Tensor], Tensor] = original
        waiting: list[Action] = []
        for a in self.actions:
            if _adds(a):
                waiting.append(a)
                continue
            if waiting:
                call, waiting = _beside(call, waiting), []
            call = _through(call, a)
        return (_beside(call, waiting) if waiting else call)(x)

    def bare(self) -> bool:
        """Whether what would run is the forward of a plain linear layer itself."""
        site = self.actions[0].site
        plain = site.kind == "linear" and type(site.module).forward is nn.Linear.forward
        return plain and getattr(self.original, "__self__", None) is site.module

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        site = self.actions[0].site
        if getattr(self.original, "__func__", None) is not type(site.module).forward:
            hint = "load the model without device hooks, or use a method that adds to the weight, such as lora"
            raise UsageError(
                f"{self.actions[0].part.info.name} rewrites weights and cannot go through a forward that was replaced",
                where=site.path, hint=hint,
            )  # fmt: skip
        if site.held and not any("weight" in touched(a) for a in self.actions):
            return self.shifted(*args, **kwargs)
        old = site.params()
        moved = plain_differences(self.actions, old)
        if moved is not None:
            return moved_call(site, old, moved, args, kwargs)
        new = folded(self.actions, old)
        change: Tensor | None = None
        if self.apart and "weight" in old and old["weight"].dtype in _NARROW:
            # W' rounded to the digits of W would lose every change below half of its last one: they are kept apart.
            change = new["weight"] - wide(old["weight"])
            new = {**new, "weight": old["weight"]}
        cast = {
            k: v.to(old[k].dtype) if k in old and v.is_floating_point() and k not in site.module._buffers else v
            for k, v in new.items()
        }
        y = call_with(site, cast, args, kwargs)
        if change is None:
            return y
        x, _ = first_tensor(args, kwargs)
        return y + apply_dense(change.to(y.dtype), x, site)

    def shifted(self, *args: Any, **kwargs: Any) -> Any:
        """The output of a layer in another form with a changed bias, without forming its weight."""
        bias: Any = self.actions[0].site.module.bias
        y = self.original(*args, **kwargs)
        new = folded(self.actions, {} if bias is None else {"bias": bias})["bias"]
        return y + (new if bias is None else new - wide(bias)).to(y.dtype)


def plain_differences(actions: list[Action], old: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What a single part of plain differences adds to each parameter, where the sum may take the parameter's place; or None.

    A weight in half precision is rounded to its digits this way, which loses the smallest changes from the output. A
    training step can bear that, as mixed precision everywhere does: the difference itself is in fp32. What is measured
    without gradients is exact.
    """
    a = actions[0]
    method = a.part.method
    if (
        len(actions) > 1
        or a.carrier != "weight"
        or not a.full
        or not hasattr(method, "differences")
        or fused.is_plain()
    ):
        return None
    if "weight" in touched(a) and "weight" in old and old["weight"].dtype in _NARROW and not torch.is_grad_enabled():
        return None
    found = {n: u for n, u in method.differences(a.site, a.tensors).items() if n in old}
    if any(n in a.site.module._buffers or not isinstance(u, Dense) or old[n].requires_grad for n, u in found.items()):
        return None
    return {n: u.value for n, u in found.items()}


def moved_call(
    site: Site, old: Mapping[str, Tensor], moved: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The site's module with plain differences `moved` added to its parameters `old`."""
    m: Any = site.module
    if type(m).forward is nn.Embedding.forward and m.max_norm is None and not (m.sparse or m.scale_grad_by_freq):
        return fused.rows(first_tensor(args, kwargs)[0], old["weight"], moved["weight"], m.padding_idx)
    return call_with(site, {**old, **{n: fused.shifted(old[n], d) for n, d in moved.items()}}, args, kwargs)


def touched(a: Action) -> tuple[str, ...]:
    """The parameters the action's method changes."""
    method = a.part.method
    return tuple(method.touches()) if hasattr(method, "touches") else ("weight",)


def _live_on(method: Any, site: Site) -> bool:
    """Whether a weight method can act without forming the new weight at this site."""
    if hasattr(method, "update"):
        return True
    return hasattr(method, "forward") and (not hasattr(method, "live_kinds") or site.kind in method.live_kinds())


def _beside(call: Callable[[Tensor], Tensor], actions: list[Action]) -> Callable[[Tensor], Tensor]:
    """The output of `call` plus the additive changes."""

    def run_beside(x: Tensor) -> Tensor:
        y = call(x)
        for a in actions:
            y = _plus(y, a, a.part.method.update(a.site, a.tensors), x)
        return y

    return run_beside


def _plus(y: Tensor, a: Action, update: Update, x: Tensor) -> Tensor:
    """The output y plus what the action's update makes of the input x, at the action's strength."""
    change = update.apply(x, a.site)
    return y + (change if a.full else change * shaped(a.strength, change)).to(y.dtype)


def _adds(a: Action) -> bool:
    return hasattr(a.part.method, "update")


def _through(call: Callable[[Tensor], Tensor], a: Action) -> Callable[[Tensor], Tensor]:
    """The live form of a part that is no addition, around what came before it; its strength blends outputs."""

    def run_through(x: Tensor) -> Tensor:
        y = a.part.method.forward(a.site, a.tensors, x, call)
        if a.full:
            return y
        h = call(x)
        return h + shaped(a.strength, h) * (y - h)

    return run_through


def shaped(strength: Strength, like: Tensor) -> Strength:
    """A strength per row [B] or per token [B, T] broadcast against `like` [B, ..., C]."""
    if not isinstance(strength, Tensor):
        return strength
    return strength.to(like.dtype).reshape(*strength.shape, *([1] * (like.dim() - strength.dim())))


def call_with(site: Site, params: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The site's module with other parameters and buffers, the module itself unchanged (thread-safe)."""
    m: Any = site.module
    f: Callable[..., Any] = type(m).forward
    x, _ = first_tensor(args, kwargs)
    w, b = params.get("weight"), params.get("bias")
    if (f is nn.Linear.forward or site.transposed or site.held) and w is not None:
        return F.linear(x, w, None if b is None else b.to(x.dtype))
    if f is nn.Embedding.forward and w is not None:
        return F.embedding(x, w, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)
    if f in (nn.Conv1d.forward, nn.Conv2d.forward) and w is not None:
        return m._conv_forward(x, w, b)
    if f is nn.LayerNorm.forward:
        return F.layer_norm(x, m.normalized_shape, w, b, m.eps)
    unknown = set(params) - set(m._parameters) - set(m._buffers)
    if unknown:
        raise UsageError(f"{type(m).__name__} cannot hold {sorted(unknown)}", where=site.path)
    shadow = copy.copy(m)  # its own tables of parameters and buffers, so that no other thread sees the change
    for table in ("_parameters", "_buffers"):
        own = m.__dict__[table]
        shadow.__dict__[table] = {**own, **{k: v for k, v in params.items() if k in own}}
    return f(shadow, *args, **kwargs)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The module's input tensor and a function that puts another in its place, giving (args, kwargs)."""
    at = next((i for i, a in enumerate(args) if isinstance(a, Tensor)), None)
    if at is not None:
        return args[at], lambda new: ((*args[:at], new, *args[at + 1 :]), kwargs)
    key = next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
    if key is not None:
        return kwargs[key], lambda new: (args, {**kwargs, key: new})
    raise UsageError("a site was called without any tensor input")


def hidden_of(out: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The hidden state in a module's output (a tensor, or the first of a tuple) and a function that replaces it."""
    if isinstance(out, Tensor):
        return out, lambda new: new
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        return out[0], lambda new: (new, *out[1:])
    raise UsageError(f"a hidden delta cannot read an output of type {type(out).__name__}")


def _hidden(a: Action, call: Call, *, memo: bool = False) -> Call:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        x, put = first_tensor(args, kwargs)
        box: list[Callable[[Tensor], Any]] = [lambda new: new]
        first: list[Tensor] = []

        def inner(new: Tensor) -> Tensor:
            again_args, again_kwargs = put(new)
            h, box[0] = hidden_of(call(*again_args, **again_kwargs))
            if new is x:  # the output without this part; a changed input gives another
                first.append(h)
            return h

        extra = (_memo(a.part),) if memo else ()
        y = a.part.method.forward(a.site, a.tensors, x, inner, *extra)
        if not a.full:
            _needs(a, "blend", "linear")
            h = first[0] if first else inner(x)
            y = h + shaped(a.strength, h) * (y - h)
        return box[0](y)

    return wrapped


def _memo(part: Part) -> dict[str, Any]:
    memo = MEMO.get()
    if memo is None:
        raise UsageError(f"part {part.name!r} was run outside a forward pass of its base")
    return memo.setdefault(id(part), {})


def _side(a: Action, call: Call) -> Call:
    return _hidden(a, call, memo=True)


def _needs(a: Action, *kinds: str) -> None:
    if a.part.info.strength not in kinds:
        raise UsageError(f"{a.part.info.name} has no strength between: it is on or off", where=a.site.path)


class _Tap(TorchFunctionMode):
    """Hands every scaled dot product made inside the block to `attend`."""

    def __init__(self, a: Action) -> None:
        super().__init__()
        self.a, self.calls = a, 0

    def __torch_function__(self, func: Call, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        seen = Attention(mask=given.pop("attn_mask", None), **given)
        return self.a.part.method.attend(self.a.site, self.a.tensors, attend, seen)


def attend(at: Attention) -> Tensor:
    """softmax(q k^T scale + mask) v by torch, [B, H, T, d_v]."""
    return F.scaled_dot_product_attention(
        at.query, at.key, at.value, attn_mask=at.mask, dropout_p=at.dropout_p, is_causal=at.is_causal, scale=at.scale,
        enable_gqa=at.enable_gqa,
    )  # fmt: skip


def _prompt(a: Action, call: Call) -> Call:
    if a.site.kind == "model":
        return _model(a, call)
    if not a.full:
        raise UsageError(f"{a.part.info.name} has no strength between: it is on or off", where=a.site.path)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        tap = _Tap(a)
        with tap:
            out = call(*args, **kwargs)
        if not tap.calls:
            hint = "load the model with attn_implementation='sdpa'"
            raise UsageError(
                "no attention product was seen, so the prompt would do nothing", where=a.site.path, hint=hint
            )
        return out

    return wrapped


def _model(a: Action, call: Call) -> Call:
    if not a.full and a.part.info.strength == "on-off":
        raise UsageError(f"{a.part.info.name} has no strength between: it is on or off")
    signature = inspect.signature(a.site.module.__class__.forward)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(a.site.module, *args, **kwargs)
        inputs: dict[str, Any] = {}
        for key, value in list(bound.arguments.items())[1:]:
            kind = signature.parameters[key].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise UsageError(f"{a.part.info.name} needs named inputs", where=type(a.site.module).__name__)
            inputs.update(value if kind is inspect.Parameter.VAR_KEYWORD else {key: value})
        method = a.part.method
        if a.full:
            return method.model(a.site, a.tensors, call, inputs)
        out, base = method.model(a.site, a.tensors, call, inputs), call(**inputs)
        return blend_outputs(base, out, a.strength)

    return wrapped


def blend_outputs(base: Any, out: Any, strength: Strength) -> Any:
    """base + strength * (out - base) on the floating tensors of two outputs of one structure."""
    if isinstance(out, Tensor):
        return base + shaped(strength, out) * (out - base) if out.is_floating_point() else out
    if isinstance(out, Mapping):
        same = {k: blend_outputs(base[k], v, strength) for k, v in out.items() if k in base}
        return type(out)(**{**out, **same})
    if isinstance(out, tuple):
        return tuple(blend_outputs(b, o, strength) for b, o in zip(base, out, strict=True))
    return out


_WRAP: dict[str, Callable[[Action, Call], Call]] = {
    "hidden": _hidden,
    "prompt": _prompt,
    "side": _side,
    "output": _model,
}


def with_strength(a: Action, strength: Strength) -> Action:
    """The same action at another strength."""
    return replace(a, strength=strength)
