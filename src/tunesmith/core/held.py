# SPDX-License-Identifier: Apache-2.0
"""Linear layers that hold their weight in another form than a dense tensor: packed, factored, or made on the fly.

A module is one when it has `in_features`, `out_features` and `dense_weight() -> Tensor` [out, in], and a `bias` (a
parameter of its own, or None). Its forward is x W^T + bias with that W. Sites see it as a linear layer, so every delta
attaches: additive ones beside its own product, the others on the dense weight formed for the call. Folding a change of
the weight into it gives an ordinary dense layer; layers inside it are sites too, but belong to no group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_held(module: nn.Module | None) -> bool:
    """Whether the module is a linear layer in another form."""
    if module is None or isinstance(module, nn.Linear):
        return False
    sizes = all(isinstance(getattr(module, n, None), int) for n in ("in_features", "out_features"))
    return sizes and callable(getattr(module, "dense_weight", None))


def is_linear(module: nn.Module | None) -> bool:
    """Whether the module computes x W^T + bias, in whatever form it holds W (transformers' `Conv1D` aside)."""
    return isinstance(module, nn.Linear) or is_held(module)


def dense_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An `nn.Linear` that holds `weight` [out, in] and `bias` [out] as they are, without a copy and frozen."""
    out, inside = weight.shape
    with torch.device("meta"):
        layer = nn.Linear(inside, out, bias=bias is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path` in the tree, in place of the one there. Raises KeyError for a path that is not there."""
    where, _, name = path.rpartition(".")
    parent: Any = model.get_submodule(where)
    if name not in parent._modules:
        raise KeyError(path)
    parent._modules[name] = module
