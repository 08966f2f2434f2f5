# SPDX-License-Identifier: Apache-2.0
"""A base: any module, frozen, with its sites, its fingerprint and the verbs that apply deltas to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core import apply, route
from tunesmith.core.carriers import Action, folded, order
from tunesmith.core.delta import Delta, View, as_view
from tunesmith.core.errors import UsageError
from tunesmith.core.fingerprint import Fingerprint, fingerprint, weights_digest
from tunesmith.core.held import dense_layer, is_held, put_module
from tunesmith.core.sites import SiteMap, example_tokens, find_sites
from tunesmith.core.trace import primary

Inputs = Mapping[str, Any] | tuple[Any, ...]


class Base:
    """A pre-trained model that deltas attach to. The module tree, its weights and its flags are never changed.

    Args:
        model: any `nn.Module`.
        tokenizer: what turns text into inputs, if the model has one (opaque here).
        example: inputs for one forward pass (dict of keyword arguments or tuple), used to find roles and as the probe
            on which effects are measured. Text models with a vocabulary need none.
        name, family: how the model is called and what it is ("causal-lm", "encoder", "vision", "module").
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        example: Inputs | None = None,
        name: str | None = None,
        family: str = "module",
        source: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"a base must be a torch.nn.Module, got {type(model).__name__}")
        self.model, self.tokenizer, self.family = model, tokenizer, family
        self.name = name or type(model).__name__
        self.source = dict(source or {})
        self._example = example
        self.installed = apply.installed(model)
        self.router: route.Router = route.reference

    def __repr__(self) -> str:
        return f"Base({self.name!r}, {sum(p.numel() for p in self.model.parameters()):,} parameters, {self.family})"

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    @cached_property
    def sites(self) -> SiteMap:
        """Where deltas can attach; the first use runs one traced forward pass."""
        return find_sites(self.model, self.probe())

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.model, self.name)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def probe(self) -> Inputs | None:
        """The fixed inputs on which effects are measured: the example, or tokens spread over the vocabulary."""
        if self._example is not None:
            return self._example
        vocab = getattr(getattr(self.model, "config", None), "vocab_size", None)
        return {"input_ids": example_tokens(self.model, int(vocab))} if vocab else None

    def with_example(self, example: Inputs) -> Base:
        """Give the base an example input if it has none; roles found without one are found anew."""
        if self._example is None and self.probe() is None:
            self._example = example
            self.__dict__.pop("sites", None)
        return self

    @torch.no_grad()
    def probe_outputs(self) -> Tensor:
        """The primary output on the probe in eval mode, under whatever is in use. Raises UsageError without a probe."""
        inputs = self.probe()
        if inputs is None:
            raise UsageError("no probe input is known", where=self.name, hint="Base(model, example=inputs)")
        with self.evaluating():
            out = primary(self.model(**inputs) if isinstance(inputs, Mapping) else self.model(*inputs))
        if out is None:
            raise UsageError("the model's output holds no tensor", where=self.name)
        return out

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode for the block; every module's own flag is put back."""
        flags = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for m, flag in flags:
                m.training = flag

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No parameter of the base takes gradients within the block; the flags are put back."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        for p, _ in flags:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)

    def using(self, *deltas: Delta | View | None, check: bool = True) -> AbstractContextManager[Base]:
        """Within the block the model runs with these deltas, in order, on top of those already in use.

        Nested uses add up; other threads and tasks are not affected; `None` is skipped. Raises BaseMismatch for a delta
        of another base or one whose parents are not in use, unless `check=False`.
        """
        return apply.using(self, tuple(as_view(d) for d in deltas if d is not None), check=check)

    def without(self, *names: str) -> AbstractContextManager[Base]:
        """Within the block the model runs without the named deltas, or without any if none is named."""
        app = apply.current(self)
        known = [v.delta.name for v in app.stack] if app else []
        for n in names:
            if n not in known:
                raise UsageError(f"no delta {n!r} is in use", hint=f"in use: {known or 'none'}")
        return apply.filtered(self, lambda v: bool(names) and v.delta.name not in names)

    @property
    def active(self) -> list[str]:
        """Names of the deltas in use in this thread or task."""
        app = apply.current(self)
        return [v.delta.name for v in app.stack] if app else []

    def __call__(self, *args: Any, deltas: Sequence[Delta | View | None] | None = None, **kwargs: Any) -> Any:
        """The model's forward. `deltas` gives each row of the batch its own delta (or None), of mixed kinds."""
        if deltas is None:
            return self.model(*args, **kwargs)
        return self.router(self, list(deltas), args, kwargs)

    def digest(self) -> str:
        """sha256 of every byte of the weights and buffers."""
        return weights_digest(self.model)

    def merged(self, *deltas: Delta | View) -> Base:
        """A new base with the deltas folded into its weights. Untouched tensors are shared with this one.

        Ties are kept where a delta acts on both sides and undone where it acts on one. A packed or factored linear layer
        whose weight changes becomes a dense one. Raises UsageError for a part that cannot merge, or a module that cannot
        hold the result.
        """
        views = tuple(as_view(d) for d in deltas)
        for i, v in enumerate(views):
            apply.check_fits(self, v.delta, views[:i])
        app = apply.Application(self, views)
        model = apply.sharing_copy(self.model)
        modules = dict(model.named_modules())
        written: dict[str, nn.Parameter] = {}
        for path, actions in app.plan.items():
            dense = _fold_into(modules[path], path, order(actions), app.plan, written)
            if dense is not None and path:
                put_module(model, path, dense)
            elif dense is not None:
                model = dense
        _record_untied(model)
        return Base(
            model, tokenizer=self.tokenizer, example=self._example, name=f"{self.name}+{'+'.join(v.delta.name for v in views)}",
            family=self.family, source={**self.source, "merged": [v.delta.name for v in views]},
        )  # fmt: skip


def _fold_into(
    module: nn.Module,
    path: str,
    actions: list[Action],
    plan: Mapping[str, list[Action]],
    written: dict[str, nn.Parameter],
) -> nn.Module | None:
    """Write the folded parameters of one site into the copied module, or give the dense layer to put in its place."""
    site = actions[0].site
    for a in actions:
        if a.carrier not in ("weight", "hidden") or site.kind in ("model", "block", "attention"):
            raise UsageError(f"{a.part.info.name} cannot be merged: {a.part.info.merge}", where=path or "model")
    canonical = actions[0].part.alias.get(path, path)
    old = site.params()
    trained = {t.untyped_storage().data_ptr() for a in actions for t in a.tensors.values()}
    changed: Tensor | None = None
    for name, value in folded(actions, old).items():
        if name in old and value is old[name]:
            continue
        value = value.to(old[name].dtype if name in old else old.get("weight", value).dtype)
        if value.untyped_storage().data_ptr() in trained:
            value = value.clone()  # an absolute value: training the delta on must not move the merged model
        if name == "weight" and site.transposed:
            value = value.T.contiguous()
        if name in module._buffers:
            module._buffers[name] = value.detach()
            continue
        if name == "weight" and is_held(module):
            changed = value
            continue
        if name not in module._parameters:
            raise UsageError(f"{type(module).__name__} cannot hold a {name}", where=path)
        key = f"{canonical}:{name}"
        same = [id(a.part) for a in actions] == [id(a.part) for a in plan.get(canonical, [])]
        shared = same and key in written and all(a.part.alias.get(path) == canonical for a in actions)
        module._parameters[name] = written[key] if shared else nn.Parameter(value.detach(), requires_grad=False)
        written[key] = module._parameters[name]  # type: ignore[assignment]
    return None if changed is None else dense_layer(changed, module._parameters.get("bias"))


def _record_untied(model: nn.Module) -> None:
    """Say in a transformers config when embedding and head no longer share a tensor."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and embed is not None and head.weight is not embed.weight:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
