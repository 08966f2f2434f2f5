# SPDX-License-Identifier: Apache-2.0
"""Readers of LoRA and its kin, IA3, SHiRA, norm tuning and trained rows, and of whatever rides along with any of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.errors import DeltaError, UsageError
from tunesmith.core.patterns import common, targets_of
from tunesmith.export.peft.layout import PREFIX, Adapter, Piece, need

LORA = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
        "lora_magnitude_vector.weight", "lora_B.bias")  # fmt: skip
CHANGED = ("pissa", "olora", "corda", "loftq")
ROWS = "trainable_tokens_delta"


def read_lora(a: Adapter) -> list[Piece]:
    """LoRA with rank and alpha patterns, rsLoRA, DoRA, and starts that PEFT subtracts from the base.

    `init_lora_weights` pissa and olora without conversion stand for a change of the base too: W - s B0 A0 with the first
    factors, which are computed anew. CorDA's start needs its data and cannot be: save with
    `path_initial_model_for_weight_conversion`.
    """
    found = a.by_path(*LORA)
    start = a.option("init_lora_weights", True)
    rs, dora = bool(a.option("use_rslora", False)), bool(a.option("use_dora", False))
    a.option("lora_bias")
    if any("lora_B.bias" in t for t in found.values()):
        raise UsageError("lora_bias=True adds a bias to a layer, which no delta here does", where=a.where)
    r0, alpha0 = a.number("r", 8), a.number("lora_alpha", 8)
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for path, t in found.items():
        embedding = "lora_embedding_A" in t
        if embedding:  # rows x dim: the factors stand the other way round
            B, A = need(t, "lora_embedding_A", path).T, need(t, "lora_embedding_B", path).T
        else:
            B, A = need(t, "lora_B.weight", path).flatten(1), need(t, "lora_A.weight", path).flatten(1)
        tensors[path] = {"A": A.contiguous(), "B": B.contiguous()}
        ranks[path] = len(A)
        alphas[path] = float(a.pattern("alpha_pattern", path, alpha0))
        a.pattern("rank_pattern", path, r0)
        if dora:
            m = t.get("lora_magnitude_vector", t.get("lora_magnitude_vector.weight"))
            if m is None:
                raise DeltaError("the tensor 'lora_magnitude_vector' is missing", where=path)
            tensors[path]["m"] = m.flatten()
    name = "dora" if dora else "lora"
    if isinstance(start, str) and (start in CHANGED or start.startswith("pissa")):
        name = _changed_start(a, start, dora)
    kinds = methods.get(name).kinds
    r, rank_pattern = common(ranks, r0)
    alpha, alpha_pattern = common(alphas, alpha0)
    options = {
        "rank": int(r), "alpha": float(alpha), "rslora": rs, "targets": targets_of(a.base, tensors, kinds),
        "rank_pattern": {p: int(v) for p, v in rank_pattern.items()}, "alpha_pattern": alpha_pattern,
    }  # fmt: skip
    method = methods.build(name, options)
    if name in ("pissa", "olora"):
        for path, t in tensors.items():
            site = a.site(path, kinds)
            first = method.calibrate(site, method.init(site, torch.Generator().manual_seed(0)), site.params())
            tensors[path] = {**t, "A0": first["A0"], "B0": first["B0"]}
    return [Piece(method, tensors)]


def _changed_start(a: Adapter, start: str, dora: bool) -> str:
    """The method for an adapter whose base was changed by its start. Raises UsageError where that cannot be redone."""
    if dora or start in ("corda", "loftq"):
        why = "DoRA on a changed base" if dora else f"the start {start!r} depends on data or a quantised base"
        hint = "save it with path_initial_model_for_weight_conversion, which gives a plain LoRA"
        raise UsageError(f"{why} cannot be represented", where=a.where, hint=hint)
    if start.startswith("pissa_niter_"):
        hint = "save it with path_initial_model_for_weight_conversion, which gives a plain LoRA"
        raise UsageError("a randomised start cannot be computed again", where=a.where, hint=hint)
    return start


def read_adalora(a: Adapter) -> list[Piece]:
    """AdaLoRA as the LoRA it is once trained: E goes into A, and the scale is alpha / (r + 1e-5)."""
    found = a.by_path("lora_A", "lora_B", "lora_E")
    alpha = a.number("lora_alpha", 8)
    a.option("r"), a.option("rank_pattern"), a.option("use_dora"), a.option("use_rslora")
    tensors, ranks, alphas = {}, {}, {}
    for path, t in found.items():
        E = need(t, "lora_E", path).reshape(-1, 1)
        A = (E * need(t, "lora_A", path)).contiguous()
        tensors[path] = {"A": A, "B": need(t, "lora_B", path).contiguous()}
        r = len(A)
        ranks[path] = r
        alphas[path] = (alpha if alpha > 0 else float(r)) * r / (r + 1e-5)
    r, rank_pattern = common(ranks, 8)
    most, alpha_pattern = common(alphas, alpha)
    options = {
        "rank": int(r), "alpha": float(most), "targets": targets_of(a.base, tensors, methods.get("lora").kinds),
        "rank_pattern": {p: int(v) for p, v in rank_pattern.items()}, "alpha_pattern": alpha_pattern,
    }  # fmt: skip
    return [Piece(methods.build("lora", options), tensors)]


def read_ia3(a: Adapter) -> list[Piece]:
    """IA3; a vector [1, in] scales the input of its layer, one [out, 1] the output."""
    found = a.by_path("ia3_l")
    tensors, on_input = {}, []
    for path, t in found.items():
        site, l = a.site(path, ("linear",)), t["ia3_l"]
        feed = tuple(l.shape) == (1, site.shape[1])
        if feed and tuple(l.shape) == (site.shape[0], 1):  # a 1 x 1 layer: the settings decide
            feed = any(path.endswith(m) for m in a.option("feedforward_modules", []))
        if feed:
            on_input.append(path)
        tensors[path] = {"l": l.flatten()}
    options = {"targets": targets_of(a.base, tensors, ("linear",)), "inputs": ",".join(on_input)}
    return [Piece(methods.build("ia3", options), tensors)]


def read_shira(a: Adapter) -> list[Piece]:
    """SHiRA; the places are stored as rows and columns, the values as they come."""
    found = a.by_path("shira_weight", "shira_indices")
    r, tensors = int(a.number("r", 32)), {}
    for path, t in found.items():
        site = a.site(path, ("linear",))
        rows, columns = need(t, "shira_indices", path).long()
        inside = bool(((rows >= 0) & (rows < site.shape[0]) & (columns >= 0) & (columns < site.shape[1])).all())
        if not inside:
            raise DeltaError("a place lies outside the weight", where=path)
        at = rows * site.shape[1] + columns
        order = at.argsort()
        if len(at) != len(at.unique()):
            raise DeltaError("a place stands there twice", where=path)
        tensors[path] = {"indices": at[order], "values": need(t, "shira_weight", path).flatten()[order]}
    options = {"rank": r, "targets": targets_of(a.base, tensors, ("linear",))}
    return [Piece(methods.build("shira", options), tensors)]


def read_ln_tuning(a: Adapter) -> list[Piece]:
    """Norm tuning: PEFT stores the new scales and shifts, a delta their differences."""
    found = a.by_path("ln_tuning_layers.weight", "ln_tuning_layers.bias")
    tensors = {}
    for path, t in found.items():
        params = a.site(path, ("norm",)).params()
        tensors[path] = {n: _difference(t[f"ln_tuning_layers.{n}"], params, n, path) for n in ("weight", "bias")
                         if f"ln_tuning_layers.{n}" in t}  # fmt: skip
    shift = any("bias" in t for t in tensors.values())
    options = {"targets": targets_of(a.base, tensors, ("norm",)), "shift": shift}
    return [Piece(methods.build("norm-tuning", options), tensors)]


def read_trainable_tokens(a: Adapter) -> list[Piece]:
    """Trained rows of an embedding, with those tied to it: PEFT stores the new rows, a delta their differences."""
    ids = a.option("token_indices", [])
    return _rows(a, a.by_path(ROWS), lambda path: ids)


def read_rows(a: Adapter) -> list[Piece]:
    """The same beside another method (`trainable_token_indices`)."""
    given = a.option("trainable_token_indices", [])

    def ids(path: str) -> Any:
        if not isinstance(given, dict):
            return given
        return next((v for k, v in given.items() if path == k or path.endswith("." + k)), [])

    return _rows(a, a.by_path(f"token_adapter.{ROWS}"), ids, suffix=f"token_adapter.{ROWS}")


def _rows(a: Adapter, found: dict[str, dict[str, Tensor]], ids_at: Any, suffix: str = ROWS) -> list[Piece]:
    pieces = []
    for n, (path, t) in enumerate(found.items()):
        site, rows, ids = a.site(path, ("embedding", "linear")), t[suffix], list(ids_at(path))
        if site.kind == "linear" and any(p in found for p in site.tied):
            continue  # the tied head: the same rows again
        whole = all(type(i) is int and 0 <= i < site.shape[0] for i in ids) and len(set(ids)) == len(ids)
        if not whole or tuple(rows.shape) != (len(ids), site.shape[1]):
            raise DeltaError(f"{len(ids)} ids do not fit rows of shape {tuple(rows.shape)}", where=path)
        at, order = torch.tensor(ids).sort()
        d = rows[order] - site.params()["weight"].detach().float()[at]
        options = {"tokens": at.tolist(), "targets": targets_of(a.base, [path], ("embedding",))}
        method = methods.build("trainable-tokens", options)
        name = "trainable-tokens" if not n else f"trainable-tokens-{n + 1}"
        pieces.append(Piece(method, {path: {"rows": at, "d": d}}, name, tied="both"))
    return pieces


def read_biases(a: Adapter) -> list[Piece]:
    """Biases trained beside the method (`bias` all, or that of the targets alone)."""
    if a.option("bias", "none") == "none":
        return []
    found = {**a.by_path("base_layer.bias")}
    for path, t in a.by_path("bias").items():
        found.setdefault(path, {})["base_layer.bias"] = t["bias"]
    tensors = {}
    for path, t in found.items():
        params = a.site(path).params()
        tensors[path] = {"bias": _difference(t["base_layer.bias"], params, "bias", path)}
    if not tensors:
        return []
    kinds = methods.get("bitfit").kinds
    return [Piece(methods.build("bitfit", {"targets": targets_of(a.base, tensors, kinds)}), tensors)]


def read_modules(a: Adapter) -> list[Piece]:
    """Whole layers saved beside the method (`modules_to_save`), as differences from those of the base."""
    if not a.option("modules_to_save", []):
        return []
    tensors: dict[str, dict[str, Tensor]] = {}
    kinds = methods.get("full").kinds
    for path, t in a.by_path("weight", "bias").items():
        if not any(s.path == path and s.kind in kinds for s in a.base.sites.all()):
            hint = "give the base a head of that shape first, or drop it from modules_to_save"
            raise UsageError("a whole module was saved that the base does not have", where=path, hint=hint)
        site = a.site(path, kinds)
        tensors[path] = {n: _difference(v, site.params(), n, path) for n, v in t.items()}
    if not tensors:
        return []
    bias = any("bias" in t for t in tensors.values())
    return [Piece(methods.build("full", {"targets": targets_of(a.base, tensors, kinds), "bias": bias}), tensors)]


def _difference(new: Tensor, params: dict[str, Tensor], name: str, path: str) -> Tensor:
    if name not in params:
        raise UsageError(f"the layer has no {name}", where=f"{PREFIX}{path}")
    old = params[name].detach().float()
    if math.prod(new.shape) != math.prod(old.shape):
        raise DeltaError(f"{name} has shape {tuple(new.shape)}, the base's {tuple(old.shape)}", where=path)
    return new.reshape(old.shape) - old
