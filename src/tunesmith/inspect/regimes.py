# SPDX-License-Identifier: Apache-2.0
"""Would training hotter or colder make a network (or a delta) survive pruning better? Two measurements tell.

Of two models a and b, pruned with one mask and retrained with different seeds:

    LMC = (L(a) + L(b)) / 2 - L(t*)        on the straight line between them, t* where that differs most from 0
    CKA = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)        of their centred outputs X and Y [n, d]

    regime I      a barrier (LMC below 0)                      train hotter: fewer epochs, smaller batches, larger rates
    regime II-A   no barrier, outputs that differ              train colder
    regime II-B   no barrier, outputs that agree               stop

L is the training loss, with batch-norm statistics measured anew at every point (`recalibrated`), or every path shows a false
barrier. Where a barrier begins and when outputs agree are thresholds of the user's; the paper reads them from pictures.

Zhou, Yang, Chang and Mahoney 2023, arXiv 2305.18383; the definition of LMC after its released code, the card's from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.delta import Delta, clone_part
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding

Tensors = Mapping[str, Tensor]
ADVICE = {"I": "train hotter", "II-A": "train colder", "II-B": "stop"}


@dataclass(frozen=True)
class Path:
    """Losses [n] at points [n] from 0 to 1, and LMC, negative for a barrier."""

    points: list[float]
    losses: list[float]
    lmc: float


def between(a: Tensors, b: Tensors, t: float) -> dict[str, Tensor]:
    """The point (1 - t) a + t b; zeros of both stay zero, and a model with itself is itself bit for bit.

    Raises UsageError for other names or shapes.
    """
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        odd = sorted(a.keys() ^ b.keys()) or [k for k in a if a[k].shape != b[k].shape]
        raise UsageError(f"two models of different tensors: {odd[:3]}", where="between")
    return {k: torch.lerp(a[k].detach(), b[k].detach(), t) if a[k].is_floating_point() else a[k] for k in a}


def deltas_between(a: Delta, b: Delta, t: float) -> Delta:
    """A delta whose tensors lie between those of two deltas of the same parts. Raises UsageError for others."""
    one, two = dict(a.items()), dict(b.items())
    values = between(one, two, t)
    out = Delta(f"{a.name}-{b.name}", [clone_part(p) for p in a.parts], provenance=a.provenance)
    with torch.no_grad():
        for key, tensor in out.items():
            tensor.copy_(values[key])
    return out


def connectivity(loss_at: Callable[[float], float], n: int = 11) -> Path:
    """Losses along a path, `loss_at(t)` at `n` even points, and its LMC. Raises UsageError for fewer than 3 points."""
    if n < 3:
        raise UsageError(f"a path needs 3 points or more, got {n}", where="connectivity")
    points = [i / (n - 1) for i in range(n)]
    losses = [float(loss_at(t)) for t in points]
    ends = (losses[0] + losses[-1]) / 2
    lmc = max((ends - loss for loss in losses[1:-1]), key=abs)
    return Path(points, losses, lmc)


def cka(X: Tensor, Y: Tensor) -> float:
    """Linear CKA of outputs X [n, d] and Y [n, e] on the same rows, in fp64. Raises UsageError for unequal rows."""
    if X.dim() != 2 or Y.dim() != 2 or len(X) != len(Y) or len(X) < 2:
        raise UsageError(f"outputs of shapes {list(X.shape)} and {list(Y.shape)} cannot be compared", where="cka")
    A, B = ((Z.double() - Z.double().mean(0)) for Z in (X, Y))
    scale = (A.T @ A).norm() * (B.T @ B).norm()
    return float((B.T @ A).square().sum() / scale) if scale > 0 else float(torch.equal(A, B))


def jensen_shannon(P: Tensor, Q: Tensor) -> float:
    """Mean Jensen-Shannon divergence, in nats, of predictions P and Q [n, classes] that sum to 1."""
    p, q = P.double(), Q.double()
    m = (p + q) / 2

    def kl(a: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a.clamp_min(1e-300) / m.clamp_min(1e-300)).log(), 0.0).sum(1)

    return float((kl(p) + kl(q)).mean() / 2)


@contextmanager
def recalibrated(model: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """Within the block batch norms have the statistics of what `run()` shows them, averaged over its passes, in eval mode.

    Their own statistics, modes and momenta are put back afterwards.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    kept = [({k: v.clone() for k, v in m.named_buffers()}, m.momentum) for m in norms]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for m in norms:
            m.reset_running_stats()
            m.momentum, m.training = None, True  # a plain average over passes
        if norms:
            with torch.no_grad():
                run()
        model.eval()
        yield
    finally:
        for m, (buffers, momentum) in zip(norms, kept, strict=True):
            m.momentum = momentum
            for name, value in buffers.items():
                getattr(m, name).copy_(value)
        for module, mode in modes:
            module.training = mode


def magnitude_masks(weights: Tensors, density: float, scope: str = "layer") -> dict[str, Tensor]:
    """Boolean masks that keep the entries of largest magnitude: round(density n) of each tensor, or of all together.

    Ties go to the first. Raises UsageError for a density outside 0..1 or another scope than "layer" or "global".
    """
    if not 0 <= density <= 1 or scope not in ("layer", "global"):
        raise UsageError(f"density {density} and scope {scope!r} must be 0..1 and layer or global", where="density")

    def mask(values: Tensor) -> Tensor:
        keep = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
        order = values.flatten().abs().sort(descending=True, stable=True).indices
        keep[order[: round(density * values.numel())]] = True
        return keep

    if scope == "layer":
        return {k: mask(w.detach()).view(w.shape) for k, w in weights.items()}
    every = mask(torch.cat([w.detach().flatten().float() for w in weights.values()]))
    return {
        k: part.view(w.shape)
        for (k, w), part in zip(weights.items(), every.split([w.numel() for w in weights.values()]), strict=True)
    }


def regime(lmc: float, similarity: float, *, barrier: float = 0.0, similar: float = 0.9) -> str:
    """ "I" where LMC is below -`barrier`, "II-A" where the similarity is below `similar`, else "II-B"."""
    return "I" if lmc < -barrier else "II-A" if similarity < similar else "II-B"


def regimes(cells: Iterable[Mapping[str, Any]], *, barrier: float = 0.0, similar: float = 0.9) -> Finding:
    """Regime and advice for every cell, a mapping with `lmc`, `cka` and whatever names it (density, epochs).

    Raises UsageError for a cell without the two numbers, or no cells.
    """
    rows = []
    for cell in cells:
        if "lmc" not in cell or "cka" not in cell:
            raise UsageError(f"a cell needs lmc and cka, got {sorted(cell)}", where="regimes")
        found = regime(cell["lmc"], cell["cka"], barrier=barrier, similar=similar)
        rows.append({**cell, "regime": found, "advice": ADVICE[found]})
    if not rows:
        raise UsageError("there are no cells", where="regimes")
    counts = {name: sum(r["regime"] == name for r in rows) for name in ADVICE}
    told = ", ".join(f"{n} in regime {name} ({ADVICE[name]})" for name, n in counts.items() if n)
    return Finding("regimes", told, dict(counts), rows, {"barrier": barrier, "similar": similar})
