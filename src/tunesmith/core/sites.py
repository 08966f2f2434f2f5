# SPDX-License-Identifier: Apache-2.0
"""Sites: the places of a base where a delta can attach, found by structure.

A site is a module of the base seen in one orientation (weights `[out, in, *kernel]`). Roles come from `trace`, depth
from the repeated blocks of the model, ties from shared storage. Nothing here knows an architecture by name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import UsageError, nearest
from tunesmith.core.held import is_held
from tunesmith.core.trace import Trace, trace

WEIGHTED = ("linear", "conv1d", "conv2d", "embedding")
KINDS = (*WEIGHTED, "norm", "attention", "block", "model")
ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "down", "head", "embed")
GROUPS: dict[str, str] = {
    "all-linear": "every linear layer but the output head",
    "all-weights": "every linear, convolution and embedding but the output head",
    "all-affine": "every linear, convolution and norm but the output head",
    "attention": "query, key, value and output projections",
    "mlp": "gate, up and down projections",
    "everything": "every linear, convolution, embedding and norm, the output head included",
    "norms": "every normalisation layer",
    "convs": "every convolution",
    "embeddings": "every embedding",
    "blocks": "every repeated block",
    "attentions": "every attention module",
    "biases": "every layer with a bias",
    "model": "the model as a whole",
}


@dataclass(frozen=True)
class Site:
    """One place to attach. `shape` is the weight in canonical orientation, empty for sites without one.

    `depth` counts from the input over `of` repeated blocks (or over executed layers where nothing repeats).
    `tied` lists the other paths whose weight shares this one's storage. `inside` is the path of the linear layer that is
    made of this one (see `held`), "" for most.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    module: nn.Module = field(repr=False, compare=False)
    role: str = ""
    depth: int = 0
    of: int = 1
    transposed: bool = False
    has_bias: bool = False
    tied: tuple[str, ...] = ()
    heads: tuple[int, int, int, int] | None = None
    inside: str = ""
    map: SiteMap | None = field(default=None, repr=False, compare=False)

    @property
    def out_features(self) -> int:
        """Channels of the output: rows of the weight; the width of an embedding."""
        return self.shape[1] if self.kind == "embedding" else self.shape[0]

    @property
    def channel_dim(self) -> int:
        """The dimension of the output that holds its channels."""
        return 1 if self.kind.startswith("conv") or _channels_first(self.module) else -1

    @property
    def held(self) -> bool:
        """Whether the weight is held in another form than a dense tensor."""
        return self.kind == "linear" and is_held(self.module)

    def params(self) -> dict[str, Tensor]:
        """The module's own parameters and buffers by name, the weight in canonical orientation.

        A linear layer in another form gives its dense weight, made anew at each call, and its bias. One in shards over
        several processes is gathered: all of them must ask.
        """
        if self.held:
            m: Any = self.module
            return {"weight": m.dense_weight(), **({} if m.bias is None else {"bias": m.bias})}
        own: dict[str, Tensor] = {n: p for n, p in self.module._parameters.items() if p is not None}
        own.update({n: b for n, b in self.module._buffers.items() if b is not None})
        own = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in own.items()}
        if self.transposed:
            own["weight"] = own["weight"].T
        return own


def _channels_first(module: nn.Module) -> bool:
    if getattr(module, "data_format", None) == "channels_first":  # layer norms of feature maps
        return True
    return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.modules.instancenorm._InstanceNorm)


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear) or is_held(module):
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' transposed linear
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d):
        return "conv1d"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    if _is_norm(module):
        return "norm"
    return None


def _is_norm(module: nn.Module) -> bool:
    if next(module.children(), None) is not None or "norm" not in type(module).__name__.lower():
        return False
    return all(p is None or p.dim() == 1 for p in module._parameters.values())


def _shape(kind: str, module: nn.Module) -> tuple[int, ...]:
    if kind == "linear" and is_held(module):
        return (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    weight = module._parameters.get("weight")
    if weight is None:
        size = getattr(module, "num_features", None) or getattr(module, "num_channels", None)
        return tuple(getattr(module, "normalized_shape", ())) if size is None else (int(size),)
    shape = tuple(weight.shape)
    return shape[::-1] if hasattr(module, "nf") and kind == "linear" else shape


class SiteMap(Mapping[str, Site]):
    """All sites of a model by path, in definition order, with target selection.

    Groups leave out layers that do not reach the model's output and the parts of a layer in another form; naming one by
    path still selects it.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        traced: Trace | None,
        problem: str | None = None,
        depths: Mapping[str, int] | None = None,
    ) -> None:
        self.depths = dict(depths or {})
        self._sites = {(s.path, s.kind): replace(s, map=self) for s in sites}
        self._first: dict[str, Site] = {}
        for s in self._sites.values():
            self._first.setdefault(s.path, s)
        self.trace, self.problem = traced, problem

    def __getitem__(self, path: str) -> Site:
        if path not in self._first:
            raise UsageError(f"the base has no site {path!r}", hint=nearest(path, self._first))
        return self._first[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __len__(self) -> int:
        return len(self._first)

    def of(self, path: str, kind: str) -> Site:
        """The site at `path` of one kind (a path can be a block and an attention module at once)."""
        return self._sites.get((path, kind)) or self[path]

    def all(self) -> list[Site]:
        return list(self._sites.values())

    def depth_of(self, name: str) -> int:
        """The depth of a module, or of the parameter or buffer of that name, as `Site.depth` counts it.

        A module that has no depth of its own has that of the nearest module around it, else 0. Raises UsageError for a
        name that no site or block leads to.
        """
        path = name
        while path and path not in self.depths:
            path = path.rpartition(".")[0]
        if path:
            return self.depths[path]
        head = name.partition(".")[0]
        if "." in name and not any(p == head or p.startswith(head + ".") for p in self._first):
            raise UsageError(f"the base has no module around {name!r}", hint=nearest(head, self._first))
        return 0

    def block_of(self, name: str) -> str | None:
        """The path of the repeated block that holds a module or parameter, None outside of them."""
        blocks = [p for p, kind in self._sites if kind == "block" and (name == p or name.startswith(p + "."))]
        return max(blocks, key=len, default=None)

    def role(self, role: str) -> list[Site]:
        return [s for s in self._sites.values() if s.role == role]

    def select(self, targets: str, kinds: Iterable[str]) -> list[Site]:
        """Sites named by `targets` among `kinds`.

        `targets` is a comma list of groups (`all-linear`, `attention`, ...), roles (`q`, `down`, ...), path globs or
        last path parts (`q_proj`), and `re:` patterns; `!item` takes sites away. Every item must match: UsageError
        names the nearest choices otherwise.
        """
        allowed = tuple(kinds)
        pool = [s for s in self._sites.values() if s.kind in allowed]
        chosen: dict[tuple[str, str], Site] = {}
        items = [i.strip() for i in targets.split(",") if i.strip()]
        if not items:
            raise UsageError("no targets given", hint="for example targets='all-linear'")
        for item in items:
            drop, name = item.startswith("!"), item.lstrip("!")
            found = self._match(name, list(chosen.values()) if drop else pool)
            if not found:
                raise self._unmatched(name, pool, allowed)
            for s in found:
                chosen.pop((s.path, s.kind), None) if drop else chosen.setdefault((s.path, s.kind), s)
        if not chosen:
            raise UsageError(f"targets {targets!r} leave no site", hint="every match was taken away again")
        return [s for s in pool if (s.path, s.kind) in chosen]

    def _match(self, name: str, pool: list[Site]) -> list[Site]:
        found = self._matching(name, pool)
        whole = {s.path for s in found if s.held}
        # a layer stands for its parts, unless these are named alone
        return [s for s in found if not s.inside or s.inside not in whole]

    def _matching(self, name: str, pool: list[Site]) -> list[Site]:
        if name in GROUPS:
            aside = self.trace.aside if self.trace else ()
            return [s for s in pool if _in_group(s, name) and not s.inside and s.path not in aside]
        if name in ROLES:
            return [s for s in pool if s.role == name or (name in ("q", "k", "v") and s.role == "qkv")]
        if name.startswith("re:"):
            try:
                pattern = re.compile(name[3:])
            except re.error as e:
                raise UsageError(f"bad pattern {name!r}: {e}") from None
            return [s for s in pool if pattern.search(s.path)]
        return [s for s in pool if _path_matches(s.path, name)]

    def _unmatched(self, name: str, pool: list[Site], kinds: tuple[str, ...]) -> UsageError:
        last = {s.path.rsplit(".", 1)[-1] for s in pool} | {s.path for s in pool}
        roles = {s.role for s in pool if s.role}
        if self.trace is None and (name in ROLES or name in ("attention", "mlp")):
            why = f"roles are unknown because the model could not be traced ({self.problem})"
            return UsageError(
                f"target {name!r} matches nothing: {why}", hint="name modules by path, or give an example"
            )
        if self.trace is not None and name == "attentions":
            hint = "no torch scaled_dot_product_attention call was seen; load the model with attn_implementation='sdpa'"
            return UsageError("the model has no attention module that can be tapped", hint=hint)
        what = f"target {name!r} matches no {' or '.join(kinds)} of the model"
        meant = re.split(r"[_\W]", name.lower())[0]  # `q_proj` of another model is the role `q` of this one
        if meant in roles or ("qkv" in roles and meant in ("q", "k", "v")):
            return UsageError(what, hint=f"did you mean {meant!r}?")
        groups = [g for g in GROUPS if self._match(g, pool)]
        return UsageError(what, hint=nearest(name, sorted({*last, *roles, *groups}), n=5))


def _path_matches(path: str, name: str) -> bool:
    if any(c in name for c in "*?["):
        return fnmatch.fnmatchcase(path, name)
    return path == name or path.endswith("." + name) or f".{name}." in f".{path}."


def _in_group(s: Site, group: str) -> bool:
    head = s.role == "head"
    match group:
        case "all-linear":
            return s.kind == "linear" and not head
        case "all-weights":
            return s.kind in WEIGHTED and not head
        case "all-affine":
            return s.kind in ("linear", "conv1d", "conv2d", "norm") and not head
        case "everything":
            return s.kind in WEIGHTED or s.kind == "norm"
        case "attention":
            return s.role in ("q", "k", "v", "qkv", "o")
        case "mlp":
            return s.role in ("gate", "up", "down")
        case "norms":
            return s.kind == "norm"
        case "convs":
            return s.kind in ("conv1d", "conv2d")
        case "embeddings":
            return s.kind == "embedding"
        case "blocks":
            return s.kind == "block"
        case "attentions":
            return s.kind == "attention"
        case "biases":
            return s.has_bias and not head
        case _:
            return s.kind == "model"


def _blocks(model: nn.Module) -> list[str]:
    """Paths of the repeated blocks: children of the outermost lists that hold most of the parameters."""
    found: list[str] = []

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            here = f"{path}.{name}" if path else name
            kids = {} if is_held(child) else dict(child.named_children())
            listed = isinstance(child, nn.ModuleList | nn.Sequential) and len(kids) >= 2
            if listed and sum(1 for k in kids.values() if next(k.children(), None) is not None and not is_held(k)) >= 2:
                found.extend(f"{here}.{n}" for n, k in kids.items() if _has_weights(k))
            else:
                visit(child, here)

    visit(model, "")
    return found


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or any(is_held(m) for m in module.modules())


def _ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every module path with a weight, the other paths whose weight shares its storage."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.numel() and weight.device.type != "meta":
            key = (weight.untyped_storage().data_ptr(), weight.storage_offset(), tuple(weight.shape))
            groups.setdefault(key, []).append(path)
    return {p: tuple(q for q in paths if q != p) for paths in groups.values() if len(paths) > 1 for p in paths}


def find_sites(model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...] | None = None) -> SiteMap:
    """All sites of `model`. With `example` inputs one pass is traced and roles and attention heads are known."""
    modules = dict(model.named_modules())
    kinds = {p: k for p, m in modules.items() if (k := _kind(m)) is not None}
    held = [p for p, k in kinds.items() if k == "linear" and is_held(modules[p])]
    inside = {p: h for h in held for p in kinds if p.startswith(h + ".")}
    traced, problem = None, "no example input was given"
    if example is not None:
        linears = [p for p, k in kinds.items() if k in WEIGHTED and p not in inside]
        try:
            traced = trace(model, example, linears, [p for p, k in kinds.items() if k == "norm"])
        except Exception as e:  # a model that cannot run its example still has sites by path
            problem = f"{type(e).__name__}: {e}"
    roles = dict(traced.roles) if traced else {}
    _roles_by_interface(model, modules, roles)
    blocks, ties = _blocks(model), _ties(model)
    depth = _depths(modules, blocks, traced)
    total = max(depth.values(), default=0) + 1
    sites = [Site("", "model", (), model, of=total)]
    for path, kind in kinds.items():
        module = modules[path]
        role = roles.get(path, "embed" if kind == "embedding" else "")
        sites.append(
            Site(
                path, kind, _shape(kind, module), module, role, depth.get(path, 0), total,
                transposed=kind == "linear" and not (isinstance(module, nn.Linear) or is_held(module)),
                has_bias=module._parameters.get("bias") is not None, tied=ties.get(path, ()),
                inside=inside.get(path, ""),
            )
        )  # fmt: skip
    for path, heads in (traced.attention if traced else {}).items():
        sites.append(Site(path, "attention", (), modules[path], "", depth.get(path, 0), total, heads=heads))
    sites += [Site(p, "block", (), modules[p], "", depth.get(p, 0), total) for p in blocks]
    return SiteMap(sites, traced, problem, depth)


def _roles_by_interface(model: nn.Module, modules: Mapping[str, nn.Module], roles: dict[str, str]) -> None:
    """The output head and input embedding, where the model says them itself."""
    for getter, role in (("get_output_embeddings", "head"), ("get_input_embeddings", "embed")):
        if not callable(getattr(model, getter, None)):
            continue
        try:
            found = getattr(model, getter)()
        except (NotImplementedError, AttributeError):
            continue
        for path, module in modules.items():
            if found is not None and module is found:
                roles[path] = role


def _depths(modules: Mapping[str, nn.Module], blocks: list[str], traced: Trace | None) -> dict[str, int]:
    if blocks:
        index = {b: i for i, b in enumerate(blocks)}
        out: dict[str, int] = {}
        for path in modules:
            inside = [b for b in blocks if path == b or path.startswith(b + ".")]
            if inside:
                out[path] = index[max(inside, key=len)]
        first = next((i for i, p in enumerate(modules) if p in out), 0)
        for i, path in enumerate(modules):
            out.setdefault(path, 0 if i < first else len(blocks) - 1)
        return out
    order = list(dict.fromkeys(traced.order)) if traced else list(modules)
    leaves = [p for p in order if next(modules[p].parameters(recurse=False), None) is not None or is_held(modules[p])]
    return {p: i for i, p in enumerate(leaves)}


def example_tokens(model: nn.Module, vocab: int, rows: int = 2, length: int = 16) -> Tensor:
    """A fixed batch of token ids [rows, length] spread over a vocabulary, the same on every machine."""
    i = torch.arange(rows * length, dtype=torch.int64)
    ids = (i * 7919 + 104729) % max(vocab, 1)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return ids.reshape(rows, length).to(device)
