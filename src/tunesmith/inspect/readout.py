# SPDX-License-Identifier: Apache-2.0
"""Does a layer still know the answer? A linear read-out of the residual stream after every block.

A model *has* a capability where a linear layer trained on some block's output solves the task, whatever the model says.
`block_states` collects those outputs at one position of each row, `readout` trains the layer, `capability` does both for
every block. A linear layer on many features learns something from any of them: compare with a model of random weights, and
keep train and test rows apart.

Jain et al. 2024, arXiv 2311.12786: AdamW, rate 1e-3 divided by 10 after 1/2, 3/4 and 7/8 of 4,000 steps. States are
standardised on the training rows here, which the paper does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding


@torch.no_grad()
def block_states(
    base: Base,
    batches: Iterable[Any],
    run: Callable[[Base, Any], Any],
    position: Callable[[Any], Tensor] | None = None,
    *,
    each: str = "blocks",
) -> dict[str, Tensor]:
    """By path, what every block gives at one position of each row, [n, d] fp32, in the order of the rows.

    Args:
        run: `run(base, batch)`: one forward pass.
        position: `position(batch)`: the position of each row [B] int64; the last one if not given.
        each: which sites are watched, such as "attentions" instead of blocks.
    Raises UsageError for a base without such sites.
    """
    sites = base.sites.select(each, ("block", "attention", "linear"))
    out: dict[str, list[Tensor]] = {s.path: [] for s in sites}
    at: dict[str, Tensor | None] = {}

    def hook_for(path: str) -> Any:
        def hook(_m: nn.Module, _args: Any, y: Any) -> None:
            h = y if isinstance(y, Tensor) else y[0]  # [B, T, d]
            where = at["now"]
            rows = h[:, -1] if where is None else h[torch.arange(len(h), device=h.device), where.to(h.device)]
            out[path].append(rows.float())

        return hook

    handles = [base.modules[s.path].register_forward_hook(hook_for(s.path)) for s in sites]
    try:
        with base.evaluating():
            for batch in batches:
                at["now"] = None if position is None else position(batch)
                run(base, batch)
    finally:
        for h in handles:
            h.remove()
    return {path: torch.cat(rows) for path, rows in out.items() if rows}


def readout(
    X: Tensor, y: Tensor, X_test: Tensor, y_test: Tensor, *, classes: int = 0, steps: int = 4000, lr: float = 1e-3,
    seed: int = 0,
) -> float:  # fmt: skip
    """Accuracy on (X_test [m, d], y_test [m]) of a linear layer trained on (X [n, d], y [n] int64), whole batch.

    Raises UsageError for shapes that do not agree.
    """
    if X.dim() != 2 or len(X) != len(y) or X_test.shape[1:] != X.shape[1:] or len(X_test) != len(y_test):
        shapes = [list(t.shape) for t in (X, y, X_test, y_test)]
        raise UsageError(f"states and labels of shapes {shapes} do not agree", where="readout")
    classes = classes or int(torch.cat([y, y_test]).max()) + 1
    mean, std = X.mean(0), X.std(0, correction=0).clamp_min(1e-6)
    A, B = (X - mean) / std, (X_test - mean) / std
    g = torch.Generator().manual_seed(seed)
    W = (torch.randn(classes, X.shape[1], generator=g) * X.shape[1] ** -0.5).to(X).requires_grad_(True)
    b = torch.zeros(classes, device=X.device, requires_grad=True)
    optimiser = torch.optim.AdamW([W, b], lr=lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [steps // 2, 3 * steps // 4, 7 * steps // 8])
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(F.linear(A, W, b), y).backward()
            optimiser.step()
            schedule.step()
    return float((F.linear(B, W, b).argmax(1) == y_test).double().mean())


def capability(
    train: dict[str, Tensor], y: Tensor, test: dict[str, Tensor], y_test: Tensor, **settings: Any
) -> Finding:
    """One read-out for every block: rows with `block` and `accuracy`; `settings` are those of `readout`.

    `train` and `test` come from `block_states`. Raises UsageError where they are of different blocks.
    """
    if train.keys() != test.keys() or not train:
        raise UsageError("training and test states are of different blocks", where="capability")
    rows = [{"block": p, "accuracy": readout(train[p], y, test[p], y_test, **settings)} for p in train]
    best = max(rows, key=lambda r: r["accuracy"])
    told = f"A linear read-out is right on {100 * best['accuracy']:.1f} % after {best['block']}"
    return Finding("capability", told, {"best": best["accuracy"], "best_block": best["block"]}, rows)
